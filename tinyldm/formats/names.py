"""How others name the same weights: OpenCLIP's text tower, diffusers' UNet and autoencoder, as tables.

Our modules carry the names of the original Stable Diffusion checkpoints (and Hugging Face's CLIP), so those need a
prefix and no table. For each other layout there is one function, `our name -> Source`: where in the file this tensor
lies. Which sizes a file without a configuration has is read off its shapes, at the end.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tinyldm.autoencoder import AutoencoderConfig
from tinyldm.clip import CLIPTextConfig
from tinyldm.clip_image import CLIPConfig, CLIPVisionConfig
from tinyldm.unet import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]


class Source(NamedTuple):
    """Where a tensor lies in a file."""

    name: str  # there
    qkv: int | None = None  # which of the three, where the file stacks q, k and v in one tensor


Layout = Callable[[str], Source]


# ---- Single files

PREFIXES = {  # of each part's names, in Stable Diffusion 1.x and in our own format
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
}
OPEN_CLIP = "cond_stage_model.model."  # in place of the text encoder's, in 2.x


def prefixed(prefix: str) -> Layout:
    """Our own names, after a prefix."""
    return lambda name: Source(prefix + name)


def keys_by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """A single file's names by part, so that none is overlooked: what is neither of the two others is the UNet's."""
    keys: dict[str, list[str]] = {part: [] for part in PREFIXES}
    for name in names:
        beginning = {"cond_stage_model": "text_encoder", "first_stage_model": "autoencoder"}
        keys[beginning.get(name.partition(".")[0], "unet")].append(name)
    return keys


# ---- Text encoders

PART_OF_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
QKV = ("q_proj", "k_proj", "v_proj")  # OpenCLIP stacks the three in this order, as nn.MultiheadAttention does


def open_clip_text(prefix: str) -> Layout:
    """OpenCLIP's names, as in Stable Diffusion 2.x's single files."""

    def source(name: str) -> Source:
        name = name.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            number, part, kind = match.groups()
            block = f"{prefix}transformer.resblocks.{number}."
            attention = part.removeprefix("self_attn.")
            if attention in QKV:
                return Source(f"{block}attn.in_proj_{kind}", QKV.index(attention))
            if attention == "out_proj":
                return Source(f"{block}attn.out_proj.{kind}")
            return Source(f"{block}{PART_OF_LAYER[part]}.{kind}")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        name = name.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        return Source(prefix + name)

    return source


def hugging_face_text(prefix: str, shapes: Shapes) -> Layout:
    """Ours, or ours without `text_model.`, which some tools leave out."""
    inner = "text_model." if any(name.startswith(prefix + "text_model.") for name in shapes) else ""
    return lambda name: Source(prefix + inner + name.removeprefix("text_model."))


# ---- diffusers

UNET_INSIDE = {  # a ResBlock's parts; a SpatialTransformer's are named as ours
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def diffusers_unet(config: UNetConfig) -> Layout:
    """Our flat lists of blocks, which diffusers nests by level."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    last = len(config.channels) - 1
    n = 1
    for level in range(last + 1):
        for i in range(config.blocks):
            table[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{i}"
            table[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
            n += 1
        if level < last:
            table[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    n = 0
    for up, level in enumerate(reversed(range(last + 1))):
        for i in range(config.blocks + 1):
            table[f"output_blocks.{n}.0"] = f"up_blocks.{up}.resnets.{i}"
            table[f"output_blocks.{n}.1"] = f"up_blocks.{up}.attentions.{i}"
            if level > 0 and i == config.blocks:
                # The upsampling step comes after the attention, or in its place where a level has none.
                table[f"output_blocks.{n}.{1 + config.attention[level]}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            n += 1
    return lambda name: Source(translated(name, table, UNET_INSIDE))


AUTOENCODER_INSIDE = {"nin_shortcut": "conv_shortcut"}
ATTENTION_INSIDE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION_INSIDE = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def diffusers_autoencoder(config: AutoencoderConfig, shapes: Shapes) -> Layout:
    """Our levels and blocks; `up`, which counts from the fine end, is turned round. Attention has two spellings."""
    is_old = any(name.endswith(".query.weight") for name in shapes)
    table = {}
    for half in ("encoder", "decoder"):
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        table[f"{half}.mid.block_1"] = f"{half}.mid_block.resnets.0"
        table[f"{half}.mid.block_2"] = f"{half}.mid_block.resnets.1"
        for ours, theirs in (OLD_ATTENTION_INSIDE if is_old else ATTENTION_INSIDE).items():
            table[f"{half}.mid.attn_1.{ours}"] = f"{half}.mid_block.attentions.0.{theirs}"
    last = len(config.channels) - 1
    for level in range(last + 1):
        for i in range(config.blocks):
            table[f"encoder.down.{level}.block.{i}"] = f"encoder.down_blocks.{level}.resnets.{i}"
        for i in range(config.blocks + 1):
            table[f"decoder.up.{level}.block.{i}"] = f"decoder.up_blocks.{last - level}.resnets.{i}"
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{last - level}.upsamplers.0.conv"
    return lambda name: Source(translated(name, table, AUTOENCODER_INSIDE))


def translated(name: str, table: dict[str, str], inside: dict[str, str]) -> str:
    """`table` has the beginning of the name, the longest that fits; `inside` what follows, up to weight or bias."""
    path, kind = name.rsplit(".", 1)
    beginning = path
    while beginning and beginning not in table:
        beginning = beginning.rpartition(".")[0]
    rest = path[len(beginning) :].removeprefix(".")
    parts = [table.get(beginning, ""), inside.get(rest, rest), kind]
    return ".".join(part for part in parts if part)


# ---- Sizes, read off the shapes of a file in the original names


def numbers(shapes: Shapes, pattern: str) -> set[int]:
    """The numbers that stand in the names where the pattern has its group."""
    return {int(match[1]) for name in shapes if (match := re.match(pattern, name))}


def unet_sizes(shapes: Shapes, prefix: str) -> UNetConfig:
    """What the shapes tell, and what they can't: 8 heads in 1.x, heads 64 wide in 2.x, 32 groups in both."""
    blocks = re.escape(prefix) + r"input_blocks\.(\d{1,3})\."
    ends = [*sorted(numbers(shapes, blocks + r"0\.op\.weight")), max(numbers(shapes, blocks)) + 1]
    firsts = [1, *(end + 1 for end in ends[:-1])]  # the first block of each level
    crosses = numbers(shapes, blocks + r"1\.transformer_blocks\.0\.attn2\.to_k\.weight")
    first_attention = f"{prefix}input_blocks.{min(crosses)}.1."
    is_2x = len(shapes[first_attention + "proj_in.weight"]) == 2
    return UNetConfig(
        latent_channels=shapes[prefix + "out.2.weight"][0],
        channels=tuple(shapes[f"{prefix}input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts),
        attention=tuple(first in crosses for first in firsts),
        blocks=ends[0] - 1,
        context_width=shapes[first_attention + "transformer_blocks.0.attn2.to_k.weight"][1],
        heads=None if is_2x else 8,
        head_width=64 if is_2x else None,
        linear_projections=is_2x,
    )


def autoencoder_sizes(shapes: Shapes, prefix: str) -> AutoencoderConfig:
    down = re.escape(prefix) + r"encoder\.down\."
    levels = sorted(numbers(shapes, down + r"(\d{1,3})\."))
    return AutoencoderConfig(
        channels=tuple(shapes[f"{prefix}encoder.down.{level}.block.0.conv2.weight"][0] for level in levels),
        blocks=max(numbers(shapes, down + r"0\.block\.(\d{1,3})\.")) + 1,
        latent_channels=shapes[prefix + "post_quant_conv.weight"][0],
    )


def text_sizes(shapes: Shapes, layout: Layout) -> CLIPTextConfig:
    """CLIP's heads are 64 wide. OpenCLIP's last layer is left out, as in Stable Diffusion 2.x, if the file has it."""
    is_open_clip = layout("text_model.encoder.layers.0.self_attn.q_proj.weight").qkv is not None
    vocabulary_size, width = shapes[layout("text_model.embeddings.token_embedding.weight").name]
    first_norm = layout("text_model.encoder.layers.0.layer_norm1.weight").name
    layers = max(numbers(shapes, re.escape(first_norm).replace(r"\.0\.", r"\.(\d{1,3})\.", 1))) + 1
    return CLIPTextConfig(
        vocabulary_size=vocabulary_size,
        length=shapes[layout("text_model.embeddings.position_embedding.weight").name][0],
        width=width,
        layers=layers,
        heads=width // 64,
        activation="gelu" if is_open_clip else "quick_gelu",
        # Tools that went through diffusers write only the 23 layers that are used.
        skip_last=1 if is_open_clip and layers != 23 else 0,
    )


def clip_sizes(shapes: Shapes) -> CLIPConfig:
    """Of one of OpenAI's files of both towers, such as clip-vit-base-patch32, in Hugging Face's names.

    Shapes don't tell the heads, which are 64 wide in all of OpenAI's, nor the activation, QuickGELU in all.
    Raises KeyError with the name of a tensor that is needed and not there, ValueError for LAION's larger ones.
    """
    vocabulary_size, text_width = shapes["text_model.embeddings.token_embedding.weight"]
    length, _ = shapes["text_model.embeddings.position_embedding.weight"]
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    if width in (1280, 1408, 1664):  # ViT-H-14, g-14 and bigG-14 have the same names
        raise ValueError(f"a vision tower {width} wide has heads of {width // 16}, not of 64")
    positions, _ = shapes["vision_model.embeddings.position_embedding.weight"]
    text_layers, layers = (
        1 + max(numbers(shapes, rf"{tower}_model\.encoder\.layers\.(\d{{1,3}})\."), default=-1)
        for tower in ("text", "vision")
    )
    return CLIPConfig(
        CLIPTextConfig(vocabulary_size, length, text_width, text_layers, heads=text_width // 64),
        CLIPVisionConfig(math.isqrt(positions - 1) * patch, patch, width, layers, width // 64),
        projection=shapes["visual_projection.weight"][0],
    )
