"""What a file is that is not what was asked for, told by the names in it: one table for checkpoints and embeddings."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tinyldm import InputError
from tinyldm.formats.names import OPEN_CLIP, PREFIXES, Shapes

MAX_VECTORS = 75  # of a learned word: CLIP reads 77 tokens, two of them start and end, so more fit into no prompt
LOADABLE = "expected Stable Diffusion 1.x or 2.x, for example v1-5-pruned-emaonly.safetensors"
NO_AUTOENCODER = "give one as --vae, for example vae-ft-mse-840000-ema-pruned.safetensors"
LEARNED = "expected an embedding file, as train.py or diffusers write it"


class Other(NamedTuple):
    """A kind of file, and what to do with it."""

    pattern: str  # of the beginning of a name that gives it away
    what: str  # the file, in words
    for_weights: str | None = LOADABLE  # to someone who gave it as a checkpoint; None: that may be right
    for_word: str = LEARNED  # to someone who gave it as an embedding


OTHERS = (  # the first that fits
    Other(
        r"(clip_[lgh]|t5\w*|text_encoders_\d)\Z",
        "a learned embedding for several text encoders (SDXL, SD 3, Flux)",
        for_word="take one made for SD 1 or 2",
    ),
    Other(
        r"emp_params_out\Z",
        "an output embedding of OneTrainer, which no prompt can hold",
        for_word="train it again without",
    ),
    Other(
        r"(IN01|OUT11)\Z",
        "an XTI embedding of kohya's, with one word for each of 16 layers of the UNet",
        for_word="train it again without XTI, with one word for all layers",
    ),
    Other(
        r"(layer_structure|is_layer_norm)\Z",
        "a hypernetwork of A1111's, which changes a checkpoint and is none",
        for_word="use it in the tool it came from, or take an embedding",
    ),
    Other(
        r"optimizer_state_dict\Z",
        "the state of an optimiser, which A1111 keeps beside what it trains",
        for_weights="give the file beside it, of the same name without .optim",
        for_word="give the file beside it, of the same name without .optim",
    ),
    Other(r"noise_augmentor\.", "a Stable unCLIP checkpoint"),
    Other(
        r".*\.(time_stack|time_mixer|temporal_transformer_blocks|temporal_res_block)\.",
        "a Stable Video Diffusion checkpoint",
    ),
    Other(
        r"(model\.diffusion_model\.)?(clf\.1|clip_txt_mapper|effnet_mapper|down_blocks\.\d+\.\d+\.channelwise)\.",
        "a Stable Cascade checkpoint",
    ),
    Other(r"conditioner\.embedders\.|model\.diffusion_model\.label_emb\.", "an SDXL checkpoint"),
    Other(r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 checkpoint"),
    Other(
        r"(model\.diffusion_model\.)?(double|single)_blocks\.|single_transformer_blocks\.",
        "a Flux checkpoint",
    ),
    Other(
        r"((.*[._])?lora[._]|lycoris_).*\.",
        "a LoRA, which changes a checkpoint and is none",
        for_weights="merge it into one with the tool it came from",
    ),
    Other(r"control_model\.|controlnet_.*\.", "a ControlNet"),
    Other(r"(adapter\.)*body\.\d+\.(in_conv|block1|body|resnets)\.", "a T2I-Adapter"),
    Other(
        r"(.*\.)?motion_modules\.",
        "a motion module of AnimateDiff, which goes into a checkpoint and is none",
    ),
    Other(
        r"(conv_in|down_blocks)\.",
        "one part of a diffusers folder",
        for_weights="give the folder that holds unet, vae, text_encoder and tokenizer",
    ),
    Other(
        r"(text_model|(embeddings\.)?token_embedding|(transformer\.)?resblocks|encoder\.layers)\.",
        "a text encoder alone",
    ),
    Other(
        r"state_dict\Z|(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "a checkpoint, not a word",
        for_weights=None,
        for_word="give it as --weights",
    ),
    Other(r".+\.(weight|bias)\Z", "a model or a part of one, not a word", for_weights=None),
)
OTHER_UNETS = {  # by the channels that they read
    9: "an inpainting model",
    8: "an instruct-pix2pix model",
    5: "a depth-to-image model",
}


def what_else(names: Iterable[object]) -> tuple[Other, str] | None:
    """The kind of file that one of the names gives away, and that name; None if it is none of OTHERS."""
    known = [name for name in names if isinstance(name, str)]
    for other in OTHERS:
        for name in known:
            if re.match(other.pattern, name[:200]):  # cut, so that no name can keep the pattern busy
                return other, name
    return None


def check_is_word(path: Path, words: Mapping[object, object]) -> None:
    """Raises InputError, saying what the file is, if its names are those of something else than learned words."""
    if found := what_else(words):
        other, name = found
        raise InputError(f"{path} is {other.what} (found {name[:60]!r}); {other.for_word}")


def check_is_checkpoint(path: Path, shapes: Shapes, has_other: bool = False) -> None:
    """Raises InputError, saying what the file is, if it is not a single file of Stable Diffusion 1.x or 2.x.

    has_other: an autoencoder is given besides, so the file may have none.
    """
    if (found := what_else(shapes)) and found[0].for_weights:
        raise InputError(f"{path} is {found[0].what}; {found[0].for_weights}")
    first, last = (f"{PREFIXES['unet']}{name}.weight" for name in ("input_blocks.0.0", "out.2"))
    if first in shapes and last in shapes:
        check_inputs(path, shapes[first][1], shapes[last][0])
    if is_autoencoder(shapes):
        raise InputError(f"{path} is an autoencoder alone; give it as --vae, and a whole checkpoint as --weights")
    if is_embedding(shapes):
        raise InputError(f"{path} is a learned embedding; give it as --embedding, and its checkpoint as --weights")
    prefixes = {
        "UNet": PREFIXES["unet"],
        "autoencoder": PREFIXES["autoencoder"],
        "text encoder": (PREFIXES["text_encoder"], OPEN_CLIP),
    }
    missing = [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in shapes)]
    if missing == ["autoencoder"] and has_other:
        return
    if missing:
        advice = NO_AUTOENCODER if missing == ["autoencoder"] else LOADABLE
        raise InputError(f"{path} has no {' and no '.join(missing)}; {advice}")


def check_inputs(path: Path, inputs: int, outputs: int) -> None:
    """Raises InputError if a UNet reads more channels than the noisy latent has: something besides it."""
    if inputs != outputs:
        what = OTHER_UNETS.get(inputs, "another kind of model")
        raise InputError(f"{path} is {what}: its UNet reads {inputs} channels, expected {outputs}; {LOADABLE}")


def is_autoencoder(names: Iterable[str]) -> bool:
    names = [name.removeprefix(PREFIXES["autoencoder"]) for name in names]
    kept = [name for name in names if not name.startswith(("loss.", "model_ema."))]
    return bool(kept) and all(
        name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in kept
    )


def is_embedding(shapes: Shapes) -> bool:
    """Whether every tensor is a vector or a few: there are too many names for what they are called."""
    return bool(shapes) and all(
        len(shape) == 1 or (len(shape) == 2 and shape[0] <= MAX_VECTORS) for shape in shapes.values()
    )
