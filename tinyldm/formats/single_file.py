"""Single files of Stable Diffusion 1.x and 2.x, and of an autoencoder alone, in the original names.

They have no configuration. Sizes are read off shapes; the rest is known of the family, stated in the metadata, or for
the user to say.
"""

import math
import re
from pathlib import Path

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextEncoder
from tinyldm.formats.names import (
    OPEN_CLIP,
    PREFIXES,
    Shapes,
    autoencoder_sizes,
    hugging_face_text,
    keys_by_part,
    numbers,
    open_clip_text,
    prefixed,
    text_sizes,
    unet_sizes,
)
from tinyldm.formats.parts import SCALE, Checkpoint, Part
from tinyldm.formats.prediction import STATED, Prediction, known_prediction
from tinyldm.formats.recognise import LOADABLE, check_is_checkpoint
from tinyldm.formats.untrusted import WeightsFile
from tinyldm.latent_diffusion import Defaults
from tinyldm.schedule import NoiseSchedule
from tinyldm.unet import UNet

OF_1X = Prediction("eps", "its family, 1.x")


def read_single_file(
    path: Path,
    weights: WeightsFile,
    flag: str | None,  # --prediction
    other: tuple[Part, float] | None = None,  # an autoencoder and its scale, for a file that has none
) -> Checkpoint:
    """Raises InputError if it is something else, or if flag contradicts what it states."""
    shapes = weights.shapes
    check_is_checkpoint(path, shapes, has_other=other is not None)
    is_2x = any(name.startswith(OPEN_CLIP) for name in shapes)
    layout = open_clip_text(OPEN_CLIP) if is_2x else hugging_face_text(PREFIXES["text_encoder"], shapes)
    keys = keys_by_part(shapes)
    try:
        text = text_sizes(shapes, layout)
        unet = unet_sizes(shapes, PREFIXES["unet"])
        if keys["autoencoder"] or other is None:
            sizes, scale = autoencoder_sizes(shapes, PREFIXES["autoencoder"]), SCALE
            autoencoder = Part(AutoencoderKL, sizes, weights, prefixed(PREFIXES["autoencoder"]), keys["autoencoder"])
        else:
            autoencoder, scale = other
        stated = stated_prediction(path, weights)
        otherwise = prediction_of_2x(weights) if is_2x and not (stated or flag) else OF_1X
    except InputError:
        raise
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:  # a tensor that tells is not there
        found = error.args[0] if isinstance(error, KeyError) else error
        raise InputError(f"{path} lacks weights that tell its sizes ({found}); {LOADABLE}, or copy it again") from error
    prediction = known_prediction(path, stated, "its metadata", flag, otherwise)
    return Checkpoint(
        path,
        "single file",
        weights.paths,
        text_encoder=Part(CLIPTextEncoder, text, weights, layout, keys["text_encoder"]),
        unet=Part(UNet, unet, weights, prefixed(PREFIXES["unet"]), keys["unet"]),
        autoencoder=autoencoder,
        prediction=prediction,
        schedule=NoiseSchedule(prediction=prediction.target),
        scale=scale,
        length=text.length,
        pad="zero" if is_2x else "end",
        defaults=Defaults(size=768 if is_2x and prediction.target == "v" else 512),
    )


def stated_prediction(path: Path, weights: WeightsFile) -> str | None:
    """What the file says of itself, as kohya's and ComfyUI's tools write it; ComfyUI also in the name of a tensor."""
    if "ztsnr" in weights.shapes:
        found = f"{path} is of a zero terminal SNR (it holds ztsnr), whose noise schedule is another"
        raise InputError(f"{found}; {LOADABLE}")
    said = (weights.metadata.get(f"modelspec.{name}", "").lower() for name in ("prediction_type", "predict_key"))
    return "v" if "v_pred" in weights.shapes else next(filter(None, map(STATED.get, said)), None)


def prediction_of_2x(weights: WeightsFile) -> Prediction:
    """eps (2.0-base, 2.1-base) or v (2.0, 2.1), of the same shapes: told by one tensor that v made spread further.

    The tensor and its limit are ComfyUI's, SD20.model_type in comfy/supported_models.py.
    """
    blocks = re.escape(PREFIXES["unet"]) + r"output_blocks\.(\d{1,3})\."
    name = f"output_blocks.{max(numbers(weights.shapes, blocks))}.1.transformer_blocks.0.norm1.bias"
    if math.prod(weights.shapes[PREFIXES["unet"] + name]) > 10_000:
        raise ValueError(f"{name} is no bias")
    deviation = weights.read(PREFIXES["unet"] + name).float().std(correction=0).item()
    target = "v" if deviation > 0.09 else "eps"
    return Prediction(target, f"the deviation of {name}, {deviation:.3f}: above 0.09 it is v, as ComfyUI tells them")


def read_autoencoder_file(path: Path, weights: WeightsFile) -> tuple[Part, float]:
    """An autoencoder, alone or in a whole checkpoint, and the scale of its latents. InputError if there is none."""
    shapes = weights.shapes
    if is_of_diffusers(shapes):
        raise InputError(f"{path} is one part of a diffusers folder; give the folder with its config.json as --vae")
    prefix = PREFIXES["autoencoder"] if any(key.startswith(PREFIXES["autoencoder"]) for key in shapes) else ""
    if prefix + "encoder.conv_in.weight" not in shapes:
        raise InputError(f"{path} holds no autoencoder; expected a VAE file, for example vae-ft-mse-840000-ema-pruned")
    try:
        sizes = autoencoder_sizes(shapes, prefix)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path} lacks weights that tell its sizes ({error}); copy it again") from error
    keys = [key for key in shapes if key.startswith(prefix)]
    return Part(AutoencoderKL, sizes, weights, prefixed(prefix), keys), SCALE


def is_of_diffusers(shapes: Shapes) -> bool:
    """Whether an autoencoder has diffusers' names, which need the configuration beside them."""
    return "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
