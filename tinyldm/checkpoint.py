"""Reading and writing checkpoints: one safetensors file in the key names of Stable Diffusion 1.x, merges.txt beside it.

The file's metadata holds, as JSON under "tinyldm", every size and setting, so nothing has to be guessed.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPTextEncoder, CLIPVisionConfig
from tinyldm.files import write_atomically
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet, UNetConfig

PREFIXES = {
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
}


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
    path: str | Path,  # the safetensors file, or the folder with model.safetensors in it
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentDiffusion:
    """The model, frozen, on its device. Raises InputError if there is no checkpoint, or a broken one."""
    path = checkpoint_file(path)
    with opened(path) as file:
        model = build(path, read_config(path, file.metadata() or {}))
        for part, prefix in PREFIXES.items():
            load_part(path, file, getattr(model, part), prefix, dtype)
    return model.to(device)


def checkpoint_config(path: str | Path) -> dict:
    """The sizes and settings of a checkpoint: enough to refuse what does not fit before any weight is read."""
    path = checkpoint_file(path)
    with opened(path) as file:
        return read_config(path, file.metadata() or {})


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is no readable safetensors checkpoint ({error}); expected one like weights/tiny, copy it again"
        ) from error


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint's weights file, given it or its folder."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no checkpoint at {path}: expected a folder with model.safetensors in it; try weights/tiny")
    return file


def checkpoint_hash(path: str | Path) -> str:
    """SHA-256 of the weights file, in hexadecimal: which weights a word was learned on."""
    with open(checkpoint_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(path: Path, metadata: dict[str, str]) -> dict:
    try:
        return json.loads(metadata["tinyldm"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f'{path} has no tinyldm configuration in its metadata; expected a checkpoint like "weights/tiny"'
        ) from error


def build(path: Path, config: dict) -> LatentDiffusion:
    """The model in these sizes, its networks on the meta device: shapes without memory, to be filled by load_part."""
    try:
        sizes = {part: {name: as_tuple(value) for name, value in config[part].items()} for part in PREFIXES}
        with torch.device("meta"):
            text_encoder = CLIPTextEncoder(CLIPTextConfig(**sizes["text_encoder"]))
            unet = UNet(UNetConfig(**sizes["unet"]))
            autoencoder = AutoencoderKL(AutoencoderConfig(**sizes["autoencoder"]))
        schedule, defaults = NoiseSchedule(**config["schedule"]), Defaults(**config["defaults"])
        length, pad, scale = config["tokenizer"]["length"], config["tokenizer"]["pad"], float(config["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its configuration is not one of ours ({error}); copy the checkpoint again"
        ) from error
    tokenizer = Tokenizer.read(path.parent / "merges.txt", length=length, pad=pad)
    if tokenizer.vocabulary_size != text_encoder.config.vocabulary_size:
        raise InputError(
            f"{path.parent / 'merges.txt'} makes a vocabulary of {tokenizer.vocabulary_size}, expected "
            f"{text_encoder.config.vocabulary_size} for {path.name}; copy both files again"
        )
    return LatentDiffusion(tokenizer, text_encoder, unet, autoencoder, schedule, scale, defaults)


def as_tuple(value: object) -> object:
    """JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


def load_part(path: Path, file: safe_open, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
    """Fill one network, tensor by tensor, so that no second copy of it ever exists."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {key.removeprefix(prefix): key for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{path} lacks {prefix}{name}; expected a whole checkpoint, copy it again")
        stored = tuple(file.get_slice(found[name]).get_shape())
        if stored != tuple(shape):
            raise InputError(f"{path}: {prefix}{name} is {stored}, expected {tuple(shape)} by its configuration")
    if extra := found.keys() - expected.keys():
        raise InputError(f"{path} holds {prefix}{min(extra)}, which its configuration does not know")
    state = {name: file.get_tensor(key).to(dtype) for name, key in found.items()}
    module.load_state_dict(state, strict=True, assign=True)


def load_clip(
    path: str | Path,  # the safetensors file: the tiny clip.safetensors, or model.safetensors of an openai/clip-vit-*
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CLIP:
    """Both towers, frozen, on their device: sizes from the metadata if it has them, else from the tensors' shapes.

    Raises InputError if there is no such file, or a broken one, or if a tensor is missing, extra or misshaped.
    """
    expectation = "expected the file of both towers, as weights/tiny/clip.safetensors or openai's model.safetensors"
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} can't be read as safetensors ({error}); {expectation}") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    # Older releases of transformers stored the positions' numbers 0, 1, 2, … too, which nothing here looks up.
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".position_ids")}
    try:
        if stored := (file.metadata() or {}).get("tinyldm"):
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
    state = {name: file.get_tensor(name).to(dtype) for name in shapes}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False).to(device)
