"""Our own format: one safetensors file in the names of Stable Diffusion 1.x, with all else as JSON in its metadata.

    {"text_encoder": sizes, "unet": sizes, "autoencoder": sizes, "schedule": …, "tokenizer": {"length": …, "pad": …},
     "scale": …, "defaults": …}

The tokenizer's merges.txt lies beside it.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.files import write_atomically
from tinyldm.formats.merges import write_merges
from tinyldm.formats.names import PREFIXES, keys_by_part, prefixed
from tinyldm.formats.parts import Checkpoint, Part
from tinyldm.formats.prediction import known_prediction
from tinyldm.formats.untrusted import WeightsFile, check_sizes
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.unet import UNet, UNetConfig

METADATA = "tinyldm"  # what the JSON is called there; no other format has it
NETWORKS = {
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "unet": (UNet, UNetConfig),
    "autoencoder": (AutoencoderKL, AutoencoderConfig),
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
        save_file(tensors, temporary, metadata={METADATA: json.dumps(config)})
    write_merges(folder / "merges.txt", model.tokenizer.merges)


def read_native(path: Path, weights: WeightsFile, flag: str | None) -> Checkpoint:
    """flag: --prediction. InputError if it contradicts the file; KeyError, TypeError, ValueError if that is broken."""
    config = json.loads(weights.metadata[METADATA])
    for values in config.values():
        if isinstance(values, dict):
            check_sizes(path, values)
    keys = keys_by_part(weights.shapes)
    parts = {
        name: Part(network, sizes(**with_tuples(config[name])), weights, prefixed(PREFIXES[name]), keys[name])
        for name, (network, sizes) in NETWORKS.items()
    }
    try:
        schedule = NoiseSchedule(**config["schedule"])
    except InputError as error:
        raise InputError(f"{path}: its configuration is broken ({error}); copy it again") from error
    return Checkpoint(
        path,
        "tinyldm checkpoint",
        weights.paths,
        **parts,
        prediction=known_prediction(path, schedule.prediction, "its metadata", flag),
        schedule=schedule,
        scale=float(config["scale"]),
        length=config["tokenizer"]["length"],
        pad=config["tokenizer"]["pad"],
        defaults=Defaults(**with_tuples(config["defaults"])),
    )


def with_tuples(values: dict[str, object]) -> dict[str, object]:
    """JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
