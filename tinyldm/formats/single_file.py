"""Single files of Stable Diffusion 1.x and 2.x, and of an autoencoder alone, in the original names.

They have no configuration. Sizes are read off shapes; the rest is known of the family, stated in the metadata, or for
the user to say.
"""

from pathlib import Path

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextEncoder
from tinyldm.formats.names import (
    OPEN_CLIP,
    PREFIXES,
    autoencoder_sizes,
    hugging_face_text,
    keys_by_part,
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
OF_2X = Prediction(
    "v", "a guess, as for most of 2.x: 2.0-base and 2.1-base, for 512 pixels, need --prediction eps", is_guess=True
)
OF_20_BASE = Prediction(  # 2.1-base and 2.1 have the same shapes
    "eps",
    "a guess, since 2.0-base was trained for 875,000 steps too: if pictures are noise, --prediction v",
    is_guess=True,
)


def read_single_file(path: Path, weights: WeightsFile, flag: str | None) -> Checkpoint:
    """Raises InputError if it is something else, or if flag, --prediction, contradicts what it states."""
    shapes = weights.shapes
    check_is_checkpoint(path, shapes)
    is_2x = any(name.startswith(OPEN_CLIP) for name in shapes)
    layout = open_clip_text(OPEN_CLIP) if is_2x else hugging_face_text(PREFIXES["text_encoder"], shapes)
    try:
        text = text_sizes(shapes, layout)
        unet = unet_sizes(shapes, PREFIXES["unet"])
        autoencoder = autoencoder_sizes(shapes, PREFIXES["autoencoder"])
    except (KeyError, ValueError, IndexError, TypeError) as error:  # a tensor that tells a size is not there
        found = error.args[0] if isinstance(error, KeyError) else error
        raise InputError(f"{path} lacks weights that tell its sizes ({found}); {LOADABLE}, or copy it again") from error
    keys = keys_by_part(shapes)
    prediction = predicted(path, weights.metadata, is_2x, flag)
    return Checkpoint(
        path,
        "single file",
        weights.paths,
        text_encoder=Part(CLIPTextEncoder, text, weights, layout, keys["text_encoder"]),
        unet=Part(UNet, unet, weights, prefixed(PREFIXES["unet"]), keys["unet"]),
        autoencoder=Part(AutoencoderKL, autoencoder, weights, prefixed(PREFIXES["autoencoder"]), keys["autoencoder"]),
        prediction=prediction,
        schedule=NoiseSchedule(prediction=prediction.target),
        scale=SCALE,
        length=text.length,
        pad="zero" if is_2x else "end",
        defaults=Defaults(size=768 if is_2x and prediction.target == "v" else 512),
    )


def predicted(path: Path, metadata: dict[str, str], is_2x: bool, flag: str | None) -> Prediction:
    stated = STATED.get(metadata.get("modelspec.prediction_type", "").lower())
    of_2x = OF_20_BASE if metadata.get("global_step") == "875000" else OF_2X
    return known_prediction(path, stated, "its metadata", flag, of_2x if is_2x else OF_1X)


def read_autoencoder_file(path: Path, weights: WeightsFile) -> tuple[Part, float]:
    """An autoencoder, alone or in a whole checkpoint, and the scale of its latents. InputError if there is none."""
    shapes = weights.shapes
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
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
