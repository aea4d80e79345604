"""Our own format: one safetensors file in the names of Stable Diffusion 1.x, with all else as JSON in its metadata.

That JSON, a `Configuration`, ends with its own SHA-256: a byte that was changed on the way is noticed. (In the weights
one can't be.) The tokenizer's merges.txt lies beside the file.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.files import write_atomically
from tinyldm.formats.configuration import build
from tinyldm.formats.merges import write_merges
from tinyldm.formats.names import PREFIXES, keys_by_part, prefixed
from tinyldm.formats.parts import Checkpoint, Part
from tinyldm.formats.prediction import known_prediction
from tinyldm.formats.untrusted import WeightsFile
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.unet import UNet, UNetConfig

METADATA = "tinyldm"  # what the JSON is called there; no other format has it
DIGEST = "sha256"  # and its last entry
NETWORKS = {"text_encoder": CLIPTextEncoder, "unet": UNet, "autoencoder": AutoencoderKL}
T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerSettings:
    length: int  # ids a prompt, start and end included
    pad: str  # after the end, see Tokenizer


@dataclass(frozen=True)
class Configuration:
    """All of a checkpoint but its weights and merges, under the names that it has in the JSON."""

    text_encoder: CLIPTextConfig
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    schedule: NoiseSchedule
    tokenizer: TokenizerSettings
    scale: float  # of the autoencoder's latents
    defaults: Defaults


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
        save_file(tensors, temporary, metadata=as_metadata(config))
    write_merges(folder / "merges.txt", model.tokenizer.merges)


def read_native(path: Path, weights: WeightsFile, flag: str | None) -> Checkpoint:
    """flag: --prediction. InputError if it contradicts the file, or if that is broken."""
    config = read_metadata(path, weights, Configuration)
    length, most = config.tokenizer.length, config.text_encoder.length
    if length > most:
        raise InputError(f"{path}: tokenizer.length is {length}, expected at most text_encoder.length, {most}")
    keys = keys_by_part(weights.shapes)
    parts = {
        name: Part(network, getattr(config, name), weights, prefixed(PREFIXES[name]), keys[name])
        for name, network in NETWORKS.items()
    }
    return Checkpoint(
        path,
        "tinyldm checkpoint",
        weights.paths,
        **parts,
        prediction=known_prediction(path, config.schedule.prediction, "its metadata", flag),
        schedule=config.schedule,
        scale=config.scale,
        length=length,
        pad=config.tokenizer.pad,
        defaults=config.defaults,
    )


# ---- The metadata, of this format and of clip.safetensors


def as_metadata(config: dict[str, object]) -> dict[str, str]:
    """The configuration and its digest, as safetensors takes it: one entry, because it writes several in any order."""
    return {METADATA: json.dumps(config | {DIGEST: digest_of(config)})}


def read_metadata(path: Path, weights: WeightsFile, make: type[T]) -> T:
    """What the metadata says, for example a Configuration, every value of it checked.

    Raises InputError if it is not as it was written (files of before there was a digest have none), or can't be built.
    """
    try:
        config = json.loads(weights.metadata[METADATA])
        stored = config.pop(DIGEST, None) if isinstance(config, dict) else None
        if stored not in (None, digest_of(config)):
            raise InputError(f"its {DIGEST} is another, so it was changed after it was written")
        return build(make, config)
    except (ValueError, RecursionError) as error:  # of JSON that is none
        raise InputError(f"{path}: its configuration is broken ({error}); copy it again") from error


def digest_of(config: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()
