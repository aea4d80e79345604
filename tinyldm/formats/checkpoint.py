"""The door to checkpoints, whatever their layout.

    python -m tinyldm.formats.checkpoint FILE      what a checkpoint is, in a few lines

Three layouts load: our own (native.py), whose sizes and settings stand in its metadata; the single files of Stable
Diffusion 1.x and 2.x (single_file.py), whose sizes are read off their shapes; and diffusers' folders
(diffusers_folder.py), whose sizes stand in their config.json files. Opening one reads headers only, and of a single
file of 2.x one small weight; loading is in parts.py.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tinyldm import InputError, cli
from tinyldm.clip_image import CLIP, CLIPConfig
from tinyldm.formats.configuration import build
from tinyldm.formats.diffusers_folder import read_autoencoder_folder, read_folder
from tinyldm.formats.hashes import file_sha256
from tinyldm.formats.merges import GET_MERGES
from tinyldm.formats.names import clip_sizes, prefixed
from tinyldm.formats.native import METADATA, read_metadata, read_native
from tinyldm.formats.parts import Checkpoint, Part
from tinyldm.formats.single_file import is_of_diffusers, read_autoencoder_file, read_single_file
from tinyldm.formats.untrusted import open_weights
from tinyldm.latent_diffusion import LatentDiffusion

KNOWN = {  # SHA-256 of public files
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "v1-5-pruned-emaonly.safetensors",
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "v1-5-pruned-emaonly.ckpt",
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": "sd-v1-4.ckpt",
    "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a": "tokenizer/merges.txt of Stable Diffusion",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a": "bpe_simple_vocab_16e6.txt.gz of CLIP",
}
GET_WEIGHTS = (
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 v1-5-pruned-emaonly.safetensors tokenizer/merges.txt "
    "--local-dir weights/sd15"
)


def load_checkpoint(
    path: str | Path,  # a file, or a folder: ours, or diffusers'
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,  # of the weights in memory, whatever they are on disk
    *,
    vae: str | Path | None = None,  # another autoencoder to use in its place
    prediction: str | None = None,  # "eps" or "v", where the checkpoint does not say
) -> LatentDiffusion:
    """The model, frozen, on its device. Raises InputError if there is no checkpoint, or a broken one."""
    return open_checkpoint(path, vae=vae, prediction=prediction).load(device, dtype)


def open_checkpoint(path: str | Path, *, vae: str | Path | None = None, prediction: str | None = None) -> Checkpoint:
    """Find out what a checkpoint is, without reading its weights. Arguments and errors as load_checkpoint's."""
    path = Path(path)
    other = open_autoencoder(Path(vae)) if vae is not None else None
    with configured(path):
        if (path / "model_index.json").is_file() or (path / "unet").is_dir():
            checkpoint = read_folder(path, prediction, other)
        else:
            path = weights_file(path)
            weights = open_weights(path)
            if METADATA in weights.metadata:
                checkpoint = read_native(path, weights, prediction)
            else:
                checkpoint = read_single_file(path, weights, prediction, other)
    if other is not None:
        autoencoder, scale = other
        checkpoint = replace(checkpoint, autoencoder=autoencoder, scale=scale)
    expected, found = (part.config.latent_channels for part in (checkpoint.unet, checkpoint.autoencoder))
    if found != expected:
        found = f"the autoencoder of {vae or path} makes latents of {found} channels"
        raise InputError(f"{found}, expected {expected} for {path}; choose another --vae")
    found, expected = checkpoint.text_encoder.config.width, checkpoint.unet.config.context_width
    if found != expected:
        advice = "expected the parts of one model, copy it again"
        raise InputError(f"{path}: its text encoder is {found} wide, and its UNet reads {expected}; {advice}")
    return checkpoint


@contextmanager
def configured(path: Path) -> Iterator[None]:
    """What a configuration lacks, or has of another type, is an error that names the checkpoint."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:  # of JSON that is broken
        raise InputError(f"{path}: its configuration is incomplete or broken ({error!r}); copy it again") from error


def open_autoencoder(path: Path) -> tuple[Part, float]:
    """An autoencoder, alone or in a checkpoint of any layout, and the scale of its latents."""
    with configured(path):
        if path.is_dir():
            return read_autoencoder_folder(path)
        weights = open_weights(path)
        if METADATA in weights.metadata:
            checkpoint = read_native(path, weights, None)
            return checkpoint.autoencoder, checkpoint.scale
        if is_of_diffusers(weights.shapes) and (path.parent / "config.json").is_file():
            return read_autoencoder_folder(path.parent, weights)
        return read_autoencoder_file(path, weights)


def weights_file(path: Path) -> Path:
    """The file itself; in a folder model.safetensors, or else the only checkpoint there."""
    if not path.is_dir():
        if not path.exists():
            here = "weights/tiny is in tinyldm's own folder: go there"
            raise InputError(f"no checkpoint at {path}; {here}, or get another with: {GET_WEIGHTS}")
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt", ".pt", ".bin"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        expected = "expected model.safetensors, a diffusers folder, or one checkpoint file"
        raise InputError(
            f"no checkpoint at {path}: {expected}, found {found}; name the file, or get one: {GET_WEIGHTS}"
        )
    return files[0]


def load_clip(
    path: str | Path,  # the safetensors file: the tiny clip.safetensors, or model.safetensors of an openai/clip-vit-*
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CLIP:
    """Both towers, frozen, on their device: sizes from the metadata if it has them, else from the tensors' shapes.

    Raises InputError if there is no such file, or a broken one, or if a tensor is missing, extra or misshaped.
    """
    path = Path(path)
    file = open_weights(path)
    if METADATA in file.metadata:
        config = read_metadata(path, file, CLIPConfig)
    else:
        try:
            config = build(CLIPConfig, asdict(clip_sizes(file.shapes)))
        except (LookupError, TypeError, ValueError) as error:
            found = f"{path} does not say its sizes ({error}); expected the file of both towers"
            raise InputError(f"{found}, as weights/tiny/clip.safetensors or openai's model.safetensors") from error
    part = Part(CLIP, config, file, prefixed(""), list(file.shapes))
    model = part.build()
    part.fill(model, device, dtype)
    return model.eval().requires_grad_(False)


# ---- python -m tinyldm.formats.checkpoint FILE


def describe(checkpoint: Checkpoint) -> list[str]:
    """What a person wants to know of a checkpoint, a few lines; raises InputError if it can't be loaded."""
    read, dropped, counts = Counter(), Counter(), {}
    for name, part in checkpoint.parts.items():
        network = part.build()
        counts[name] = sum(tensor.numel() for tensor in network.state_dict().values())
        read.update(part.file.dtypes[part.layout(key).name] for key in network.state_dict())
        dropped.update(part.unused(network).values())
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    width, size = checkpoint.unet.config.context_width, checkpoint.defaults.size
    family = families.get(width, f"context {width} wide")
    lines = [
        f"{checkpoint.path}: {checkpoint.kind}, {family}, pictures {size}x{size}",
        f"predicts {checkpoint.prediction.target}, known from {checkpoint.prediction.known_from}",
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "stored as: " + ", ".join(f"{dtype} ({count} tensors)" for dtype, count in read.most_common()),
        *(f"dropped: {count} tensors, {reason}" for reason, count in dropped.items()),
    ]
    merges = checkpoint.merges_file
    for file in [*checkpoint.files, *([merges] if merges else [])]:
        digest = file_sha256(file)
        known = f", the public {KNOWN[digest]}" if digest in KNOWN else ""
        lines.append(f"{file}: {file.stat().st_size:,} bytes, sha256 {digest}{known}")
    if merges:
        if words := checkpoint.tokenizer().placeholders:
            counts = ", ".join(f"{word} ({len(ids)})" for word, ids in words.items())
            lines.append(f"words of its own (and their vectors): {counts}")
    else:
        lines.append(f"no merges.txt found; get it with: {GET_MERGES}")
    return lines


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("file", type=cli.path, metavar="FILE", help="a checkpoint: file or folder")
    print("\n".join(map(cli.printable, describe(open_checkpoint(parser.parse_args(arguments).file)))))


if __name__ == "__main__":
    cli.run(main)
