"""Single files of Stable Diffusion 1.x and 2.x, what is only mistaken for one, and our own format.

Theirs has no configuration: sizes are read off shapes, and the rest is known of the family, stated in the metadata, or
for the user to say. Ours has all of it in its metadata. Either way the result is a configuration as ours stores it,
the parts, and how the prediction is known.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderConfig
from tinyldm.formats.names import (
    Part,
    Shapes,
    autoencoder_sizes,
    hugging_face_text,
    open_clip_text,
    prefixed,
    text_sizes,
    unet_sizes,
)
from tinyldm.formats.untrusted import WeightsFile, open_weights
from tinyldm.latent_diffusion import Defaults
from tinyldm.schedule import NoiseSchedule

PREFIXES = {  # of each part's names in a single file
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
}
OPEN_CLIP = "cond_stage_model.model."  # in place of the text encoder's, in 2.x
SCALE = 0.18215
MAX_VECTORS = 75  # more fit into no prompt
LOADABLE = "expected Stable Diffusion 1.x or 2.x, for example v1-5-pruned-emaonly.safetensors"

OTHERS = {  # how a name that gives the file away begins, what the file then is, and what to do with it
    r"noise_augmentor\.": ("a Stable unCLIP checkpoint", LOADABLE),
    r"conditioner\.embedders\.|model\.diffusion_model\.label_emb\.": ("an SDXL checkpoint", LOADABLE),
    r"(model\.diffusion_model\.)?joint_blocks\.": ("a Stable Diffusion 3 checkpoint", LOADABLE),
    r"(model\.diffusion_model\.)?(double|single)_blocks\.|single_transformer_blocks\.": ("a Flux checkpoint", LOADABLE),
    r"(.*[._])?lora[._]|lycoris_": (
        "a LoRA, which changes a checkpoint and is none",
        "merge it into one with the tool it came from",
    ),
    r"control_model\.|controlnet_": ("a ControlNet", LOADABLE),
    r"(conv_in|down_blocks)\.": (
        "one part of a diffusers folder",
        "give the folder that holds unet, vae, text_encoder and tokenizer",
    ),
    r"text_model\.|(transformer\.)?resblocks\.": ("a text encoder alone", LOADABLE),
}
READS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-to-image model"}  # channels of its input
STATED = {  # ModelSpec's and diffusers' words for what the UNet's output means
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v-prediction": "v",
    "v_prediction": "v",
}
GUESSES = {  # by the training steps of a 2.x checkpoint, if it tells them: 2.1-base and 2.1 have the same shapes
    "875000": (
        "eps",
        "a guess, since 2.0-base was trained for 875,000 steps too: if pictures are noise, --prediction v",
    ),
    None: ("v", "a guess, as for most of 2.x: 2.0-base and 2.1-base, for 512 pixels, need --prediction eps"),
}


# Larger numbers than anybody's model has, in a file that was made to keep the computer busy.
LIMITS = {
    "layers": 100,
    "blocks": 100,
    "layers_per_block": 100,
    "num_hidden_layers": 100,
    "steps": 100_000,
    "num_train_timesteps": 100_000,
}


class Found(NamedTuple):
    """A checkpoint before its weights are read."""

    config: dict  # sizes and settings, as our own format stores them
    parts: dict[str, Part]
    prediction_from: str  # how we know whether it predicts eps or v


def recognise(path: Path, shapes: Shapes) -> None:
    """Raises InputError, saying what the file is, if it is not a single file of Stable Diffusion 1.x or 2.x."""
    for pattern, (what, advice) in OTHERS.items():
        if any(re.match(pattern, name) for name in shapes):
            raise InputError(f"{path} is {what}; {advice}")
    first, last = (f"{PREFIXES['unet']}{name}.weight" for name in ("input_blocks.0.0", "out.2"))
    if first in shapes and last in shapes:
        check_inputs(path, shapes[first][1], shapes[last][0])
    if is_autoencoder(shapes):
        raise InputError(f"{path} is an autoencoder alone; give it as --vae, and a whole checkpoint as --weights")
    if is_embedding(shapes):
        raise InputError(f"{path} is a learned embedding; give it as --embedding, and its checkpoint as --weights")
    names = {
        "UNet": PREFIXES["unet"],
        "autoencoder": PREFIXES["autoencoder"],
        "text encoder": (PREFIXES["text_encoder"], OPEN_CLIP),
    }
    if missing := [part for part, prefix in names.items() if not any(name.startswith(prefix) for name in shapes)]:
        raise InputError(f"{path} has no {' and no '.join(missing)}; {LOADABLE}")


def check_inputs(path: Path, inputs: int, outputs: int) -> None:
    if inputs != outputs:
        what = READS.get(inputs, "another kind of model")
        raise InputError(f"{path} is {what}: its UNet reads {inputs} channels, expected {outputs}; {LOADABLE}")


def is_autoencoder(shapes: Shapes) -> bool:
    names = [name.removeprefix(PREFIXES["autoencoder"]) for name in shapes]
    kept = [name for name in names if not name.startswith(("loss.", "model_ema."))]
    return bool(kept) and all(
        name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in kept
    )


def is_embedding(shapes: Shapes) -> bool:
    """Whether every tensor is a vector or a few: there are too many names for what they are called."""
    return bool(shapes) and all(
        len(shape) == 1 or (len(shape) == 2 and shape[0] <= MAX_VECTORS) for shape in shapes.values()
    )


def single_file(path: Path, weights: WeightsFile, prediction: str | None) -> Found:
    recognise(path, weights.shapes)
    is_2x = any(name.startswith(OPEN_CLIP) for name in weights.shapes)
    text_layout = open_clip_text(OPEN_CLIP) if is_2x else hugging_face_text(PREFIXES["text_encoder"], weights.shapes)
    try:
        sizes = {
            "text_encoder": text_sizes(weights.shapes, text_layout),
            "unet": unet_sizes(weights.shapes, PREFIXES["unet"]),
            "autoencoder": autoencoder_sizes(weights.shapes, PREFIXES["autoencoder"]),
        }
    except (KeyError, ValueError, IndexError, TypeError) as error:  # a tensor that tells a size is not there
        found = error.args[0] if isinstance(error, KeyError) else error
        raise InputError(f"{path} lacks weights that tell its sizes ({found}); {LOADABLE}, or copy it again") from error
    stated = STATED.get(weights.metadata.get("modelspec.prediction_type", "").lower())
    default = GUESSES.get(weights.metadata.get("global_step"), GUESSES[None]) if is_2x else ("eps", "its family, 1.x")
    prediction, how = known_prediction(path, stated, "its metadata", prediction, default)
    size = 768 if is_2x and prediction == "v" else 512
    parts = parts_of(weights) | {"text_encoder": Part(weights, text_layout, keys_of(weights)["text_encoder"])}
    return Found(configuration(sizes, prediction, is_2x, size), parts, how)


def own(path: Path, weights: WeightsFile, prediction: str | None) -> Found:
    """Our own format says everything itself."""
    config = json.loads(weights.metadata["tinyldm"])
    for part in config.values():
        if isinstance(part, dict):
            check_limits(path, part)
    _, how = known_prediction(path, config["schedule"]["prediction"], "its metadata", prediction)
    return Found(config, parts_of(weights), how)


def known_prediction(
    path: Path,
    stated: str | None,  # by the checkpoint: "eps", "v" or nothing,
    where: str,  # there
    flag: str | None,  # --prediction
    default: tuple[str, str] = ("eps", "the default"),
) -> tuple[str, str]:
    """("eps" or "v", how we know): what the checkpoint states, else what the user says, else the default."""
    if stated and flag not in (None, stated):
        raise InputError(f"--prediction {flag} contradicts {path}, of which {where} states {stated}; leave it out")
    if stated:
        return stated, where
    return (flag, "--prediction") if flag else default


def keys_of(weights: WeightsFile) -> dict[str, list[str]]:
    """A single file's keys by part, so that none is overlooked: what is neither of the two others is the UNet's."""
    keys: dict[str, list[str]] = {part: [] for part in PREFIXES}
    for key in weights.shapes:
        beginning = {"cond_stage_model": "text_encoder", "first_stage_model": "autoencoder"}
        keys[beginning.get(key.partition(".")[0], "unet")].append(key)
    return keys


def parts_of(weights: WeightsFile) -> dict[str, Part]:
    """The parts of a single file that is in our own names."""
    return {part: Part(weights, prefixed(PREFIXES[part]), keys) for part, keys in keys_of(weights).items()}


def check_limits(path: Path, config: dict) -> None:
    for name, value in config.items():
        most = LIMITS.get(name)
        if most and not (isinstance(value, int) and 0 < value <= most):
            raise InputError(f"{path}: {name} is {str(value)[:40]}, expected 1 to {most}; copy it again")
        if isinstance(value, list) and len(value) > 100:
            raise InputError(f"{path}: {name} has {len(value)} entries, expected at most 100; copy it again")


def configuration(
    sizes: dict[str, object],  # each part's own configuration
    prediction: str,
    pads_with_zero: bool,
    size: int,  # of the pictures, in pixels
    scale: float = SCALE,
    **schedule: object,  # as NoiseSchedule takes it; Stable Diffusion's by default
) -> dict:
    """What our own format stores as JSON."""
    return {part: asdict(config) for part, config in sizes.items()} | {
        "schedule": NoiseSchedule(prediction=prediction, **schedule).config(),
        "tokenizer": {"length": sizes["text_encoder"].length, "pad": "zero" if pads_with_zero else "end"},
        "scale": scale,
        "defaults": asdict(Defaults(size=size)),
    }


def autoencoder_file(path: Path) -> tuple[AutoencoderConfig, Part, float]:
    """An autoencoder in the original names, alone or in a whole checkpoint, with the scale of its latents."""
    weights = open_weights(path)
    if "tinyldm" in weights.metadata:
        found = own(path, weights, None)
        return AutoencoderConfig(**found.config["autoencoder"]), found.parts["autoencoder"], found.config["scale"]
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in weights.shapes:
        raise InputError(f"{path} is one part of a diffusers folder; give the folder with its config.json as --vae")
    prefix = PREFIXES["autoencoder"] if any(key.startswith(PREFIXES["autoencoder"]) for key in weights.shapes) else ""
    if prefix + "encoder.conv_in.weight" not in weights.shapes:
        raise InputError(f"{path} holds no autoencoder; expected a VAE file, for example vae-ft-mse-840000-ema-pruned")
    try:
        config = autoencoder_sizes(weights.shapes, prefix)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path} lacks weights that tell its sizes ({error}); copy it again") from error
    return config, Part(weights, prefixed(prefix), [key for key in weights.shapes if key.startswith(prefix)]), SCALE
