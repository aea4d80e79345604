"""Reading and writing checkpoints, whatever their layout.

    python -m tinyldm.formats.checkpoint FILE      what a checkpoint is, in a few lines

Three layouts load: our own, which is one safetensors file in the key names of Stable Diffusion 1.x with every size and
setting as JSON in its metadata; the single files of Stable Diffusion 1.x and 2.x, whose sizes are read off their
shapes (stable_diffusion.py); and diffusers' folders, whose sizes stand in their config.json files
(diffusers_folder.py). The names that others use are tables in layouts.py. Opening a checkpoint reads headers only;
weights are read, cast and put in place one by one, so that there is never a second copy of them in memory.
"""

import hashlib
import json
import re
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tinyldm import InputError, cli
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.clip_image import CLIP, CLIPConfig, CLIPVisionConfig
from tinyldm.files import write_atomically
from tinyldm.formats.diffusers_folder import autoencoder_folder, folder
from tinyldm.formats.names import Part
from tinyldm.formats.single_file import GUESSES, PREFIXES, autoencoder_file, own, single_file
from tinyldm.formats.untrusted import DTYPES, open_weights
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet, UNetConfig

NETWORKS = {
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "unet": (UNet, UNetConfig),
    "autoencoder": (AutoencoderKL, AutoencoderConfig),
}

# What a file may hold besides what we use.
DROPPED = {
    r"model_ema\.": "the moving average of training, beside the weights themselves",
    r"(.*\.)?position_ids$": "0, 1, 2, …",
    r"betas$|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights$|logvar$": "the noise schedule, computed here",
    r"(.*\.)?(text_projection(\.weight)?|logit_scale)$": "CLIP's comparison with pictures",
    r"(first_stage_model\.)?loss\.": "what the autoencoder was trained against",
}

KNOWN = {  # SHA-256 of public files
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "v1-5-pruned-emaonly.safetensors",
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "v1-5-pruned-emaonly.ckpt",
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": "sd-v1-4.ckpt",
    "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a": "tokenizer/merges.txt of Stable Diffusion",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a": "bpe_simple_vocab_16e6.txt.gz of CLIP",
}
GET = "hf download stable-diffusion-v1-5/stable-diffusion-v1-5"
GET_MERGES = f"{GET} tokenizer/merges.txt --local-dir weights"
GET_WEIGHTS = f"{GET} v1-5-pruned-emaonly.safetensors tokenizer/merges.txt --local-dir weights/sd15"


def save_checkpoint(folder: str | Path, model: LatentDiffusion, dtype: torch.dtype = torch.float16) -> None:
    """Write `model.safetensors` and `merges.txt` into the folder, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        prefix + name: tensor.detach().to("cpu", dtype).contiguous()
        for part, prefix in PREFIXES.items()
        for name, tensor in getattr(model, part).state_dict().items()
    }
    config = {part: asdict(getattr(model, part).config) for part in PREFIXES} | {
        "schedule": model.schedule.config(),
        "tokenizer": {"length": model.tokenizer.length, "pad": model.tokenizer.pad},
        "scale": model.scale,
        "defaults": asdict(model.defaults),
    }
    with write_atomically(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"tinyldm": json.dumps(config)})
    model.tokenizer.write_merges(folder / "merges.txt")


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


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint is, by its headers and configuration."""

    path: Path
    kind: str
    config: dict  # sizes and settings, as our own format stores them
    parts: dict[str, Part]
    prediction_from: str  # how we know whether it predicts eps or v
    merges: Path | None

    @property
    def defaults(self):
        return Defaults(**as_tuples(self.config["defaults"]))

    @property
    def text_encoder(self):
        from types import SimpleNamespace as N

        return N(config=N(width=self.config["text_encoder"]["width"]))

    def sha256(self):
        return checkpoint_hash(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for part in self.parts.values() for path in part.file.paths))

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LatentDiffusion:
        """The whole model, frozen, on its device."""
        c = self.config
        if self.merges is None:
            raise InputError(f"no merges.txt with {self.path}, and its tokenizer needs one; get it with: {GET_MERGES}")
        networks = self.networks()
        try:
            schedule, scale = NoiseSchedule(**c["schedule"]), float(c["scale"])
            defaults = Defaults(**as_tuples(c["defaults"]))
            length, pad = c["tokenizer"]["length"], c["tokenizer"]["pad"]
        except (KeyError, TypeError, ValueError) as error:
            raise self.broken(error) from error
        tokenizer = Tokenizer.read(self.merges, length=length, pad=pad)
        if tokenizer.vocabulary_size != (expected := c["text_encoder"]["vocabulary_size"]):
            found = f"{self.merges} makes a vocabulary of {tokenizer.vocabulary_size}"
            raise InputError(f"{found}, expected {expected} for {self.path}; put its own merges.txt beside it")
        for name, network in networks.items():
            self.fill(name, network, device, dtype)
        if self.prediction_from in [how for _, how in GUESSES.values()]:
            warnings.warn(f"{self.path} predicts {schedule.prediction}: {self.prediction_from}", stacklevel=3)
        return LatentDiffusion(tokenizer, **networks, schedule=schedule, scale=scale, defaults=defaults).to(device)

    def networks(self) -> dict[str, nn.Module]:
        """The three networks on the meta device, names and shapes without memory, checked to fit the files."""
        try:
            with torch.device("meta"):
                networks = {
                    name: network(config(**as_tuples(self.config[name])))
                    for name, (network, config) in NETWORKS.items()
                }
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise self.broken(error) from error
        for name, network in networks.items():
            self.check(name, network)
        return networks

    def broken(self, error: Exception) -> InputError:
        return InputError(f"{self.path}: its configuration is not one of ours ({error}); copy the checkpoint again")

    def check(self, name: str, network: nn.Module) -> None:
        """Raises InputError unless the network's tensors are in the file, of its shapes, and nothing unexplained is."""
        file, layout = self.parts[name].file, self.parts[name].layout
        where = ", ".join(str(path) for path in file.paths)
        for key, tensor in network.state_dict().items():
            source, expected = layout(key), tuple(tensor.shape)
            if source.name not in file.shapes:
                raise InputError(f"{where} lacks {source.name}; expected a whole checkpoint, copy it again")
            if source.third is not None:
                expected = (3 * expected[0], *expected[1:])
            found = file.shapes[source.name]
            if found != expected and (*found, 1, 1) != expected:  # a linear layer is our 1x1 convolution
                advice = "expected {} by its configuration; copy it again"
                raise InputError(f"{where}: {source.name} is {found}, {advice.format(expected)}")
            if (dtype := file.dtypes[source.name]) not in DTYPES.values():
                advice = f"expected one of {', '.join(DTYPES.values())}; get the checkpoint that is not quantised"
                raise InputError(f"{where}: {source.name} holds {dtype}, {advice}")
        if extra := [key for key, reason in self.unused(name, network).items() if reason is None]:
            advice = "expected the weights of its configuration alone; choose the checkpoint of a plain model"
            raise InputError(f"{where} holds {min(extra)}, which is not known; {advice}")

    def unused(self, name: str, network: nn.Module) -> dict[str, str | None]:
        """The keys of a part that its network does not read, and why they are there; None: nobody knows."""
        part, config = self.parts[name], network.config
        used = {part.layout(key).name for key in network.state_dict()}
        reasons = dict(DROPPED)
        if getattr(config, "skip_last", 0):
            reasons[rf".*\.resblocks\.{config.used_layers}\."] = "the last layer, which 2.x leaves out"
        return {
            key: next((reason for pattern, reason in reasons.items() if re.match(pattern, key)), None)
            for key in part.keys
            if key not in used
        }

    def fill(self, name: str, network: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
        """Read one network's weights, each cast and put in its place before the next is read."""
        file, layout = self.parts[name].file, self.parts[name].layout
        state = {}
        for key, expected in network.state_dict().items():
            source = layout(key)
            tensor = file.read(source.name)
            tensor = tensor if source.third is None else tensor.chunk(3)[source.third]
            state[key] = tensor.reshape(expected.shape).to(device, dtype)
            if not all(bound.isfinite() for bound in state[key].aminmax()):
                advice = "copy it again, or try --dtype bfloat16" if dtype == torch.float16 else "copy it again"
                found = f"holds NaN or infinite values as {str(dtype).removeprefix('torch.')}"
                where = ", ".join(str(path) for path in file.paths)
                raise InputError(f"{where}: {source.name} {found}, expected finite ones; {advice}")
        network.load_state_dict(state, strict=True, assign=True)


def open_checkpoint(path: str | Path, *, vae: str | Path | None = None, prediction: str | None = None) -> Checkpoint:
    """Find out what a checkpoint is, without reading a weight. Arguments and errors as load_checkpoint's."""
    path = Path(path)
    try:
        if (path / "model_index.json").is_file() or (path / "unet").is_dir():
            kind, found = "diffusers folder", folder(path, prediction)
        else:
            path = weights_file(path)
            weights = open_weights(path)
            if "tinyldm" in weights.metadata:
                kind, found = "tinyldm checkpoint", own(path, weights, prediction)
            else:
                kind, found = "single file", single_file(path, weights, prediction)
        config, parts = dict(found.config), dict(found.parts)
        if vae is not None:
            read = autoencoder_folder if Path(vae).is_dir() else autoencoder_file
            sizes, parts["autoencoder"], config["scale"] = read(Path(vae))
            config["autoencoder"] = asdict(sizes)
        channels = [config[name]["latent_channels"] for name in ("unet", "autoencoder")]
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # of JSON that is not as it should be
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its configuration is incomplete or broken ({error!r}); copy it again") from error
    if channels[0] != channels[1]:
        found = f"the autoencoder of {vae or path} makes latents of {channels[1]} channels"
        raise InputError(f"{found}, expected {channels[0]} for {path}; choose another --vae")
    return Checkpoint(path, kind, config, parts, found.prediction_from, find_merges(path))


def weights_file(path: Path) -> Path:
    """The file itself; in a folder model.safetensors, or else the only checkpoint there."""
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"no checkpoint at {path}; try --weights weights/tiny, or get another with: {GET_WEIGHTS}")
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt", ".pt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        expected = "expected model.safetensors, the folders of diffusers, or one checkpoint file"
        raise InputError(
            f"no checkpoint at {path}: {expected}, found {found}; name the file, or get one: {GET_WEIGHTS}"
        )
    return files[0]


def find_merges(path: Path) -> Path | None:
    """The tokenizer's merges: the checkpoint's own, else those beside it, else CLIP's in weights."""
    beside = path if path.is_dir() else path.parent
    for place in (beside, Path("weights")):
        for name in ("tokenizer/merges.txt", "merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer/tokenizer.json"):
            if (place / name).is_file():
                return place / name
    return None


def checkpoint_config(path: str | Path, *, vae: str | Path | None = None, prediction: str | None = None) -> dict:
    """The sizes and settings of a checkpoint: enough to refuse what does not fit before any weight is read."""
    return open_checkpoint(path, vae=vae, prediction=prediction).config


def checkpoint_hash(path: str | Path) -> str:
    """Which weights a word is for: SHA-256, in hexadecimal, of their file; if there are several, of their hashes."""
    hashes = [file_hash(file) for file in open_checkpoint(path).files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_tuples(sizes: dict) -> dict:
    """JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}


def load_clip(
    path: str | Path,  # the safetensors file: the tiny clip.safetensors, or model.safetensors of an openai/clip-vit-*
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CLIP:
    """Both towers, frozen, on their device: sizes from the metadata if it has them, else from the tensors' shapes.

    Raises InputError if there is no such file, or a broken one, or if a tensor is missing, extra or misshaped.
    """
    expectation = "expected the file of both towers, as weights/tiny/clip.safetensors or openai's model.safetensors"
    file = open_weights(Path(path))
    # Older releases of transformers stored the positions' numbers 0, 1, 2, … too, which nothing here looks up.
    shapes = {name: shape for name, shape in file.shapes.items() if not name.endswith(".position_ids")}
    try:
        if stored := file.metadata.get("tinyldm"):
            sizes = json.loads(stored)
            text, vision = CLIPTextConfig(**sizes["text"]), CLIPVisionConfig(**sizes["vision"])
            config = CLIPConfig(text, vision, sizes["projection"])
        else:
            config = CLIPConfig.from_shapes(shapes)
        with torch.device("meta"):
            model = CLIP(config)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say its sizes ({error}); {expectation}") from error
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            raise InputError(f"{path} lacks {name}; {expectation}")
        if shapes[name] != tuple(tensor.shape):
            raise InputError(f"{path}: {name} is {shapes[name]}, expected {tuple(tensor.shape)} by its other sizes")
    if extra := shapes.keys() - model.state_dict().keys():
        raise InputError(f"{path} holds {min(extra)}, which is no part of its towers; {expectation}")
    state = {name: file.read(name).to(dtype) for name in shapes}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False).to(device)


def describe(checkpoint: Checkpoint) -> list[str]:
    """What a person wants to know of a checkpoint, a few lines; raises InputError if it can't be loaded."""
    c = checkpoint.config
    read, dropped, counts = Counter(), Counter(), {}
    for name, network in checkpoint.networks().items():
        part = checkpoint.parts[name]
        counts[name] = sum(tensor.numel() for tensor in network.state_dict().values())
        read.update(part.file.dtypes[part.layout(key).name] for key in network.state_dict())
        dropped.update(checkpoint.unused(name, network).values())
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    width, size = c["unet"]["context_width"], c["defaults"]["size"]
    lines = [
        f"{checkpoint.path}: {checkpoint.kind}, {families.get(width, f'context {width} wide')}, pictures {size}x{size}",
        f"predicts {c['schedule']['prediction']}, known from {checkpoint.prediction_from}",
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "stored as: " + ", ".join(f"{dtype} ({count} tensors)" for dtype, count in read.most_common()),
        *(f"dropped: {count} tensors, {reason}" for reason, count in dropped.items()),
    ]
    for file in [*checkpoint.files, *filter(None, [checkpoint.merges])]:
        digest = file_hash(file)
        known = f", the public {KNOWN[digest]}" if digest in KNOWN else ""
        lines.append(f"{file}: {file.stat().st_size:,} bytes, sha256 {digest}{known}")
    if checkpoint.merges is None:
        lines.append(f"no merges.txt found; get it with: {GET_MERGES}")
    return lines


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a checkpoint: file or folder")
    print("\n".join(describe(open_checkpoint(parser.parse_args(arguments).file))))


if __name__ == "__main__":
    cli.run(main)
