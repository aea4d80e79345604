"""The tables of others' names: complete, the same as helpers/reference.py's rules, and true to public checkpoints."""

import hashlib

import pytest
import torch
from helpers.reference import autoencoder_name, unet_name
from torch import Tensor, nn

from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.formats.names import (
    PREFIXES,
    Source,
    autoencoder_sizes,
    diffusers_autoencoder,
    diffusers_unet,
    hugging_face_text,
    open_clip_text,
    prefixed,
    text_sizes,
    unet_sizes,
)
from tinyldm.unet import UNet, UNetConfig

TEXT_2X = CLIPTextConfig(width=1024, layers=24, heads=16, activation="gelu", skip_last=1)
UNET_2X = UNetConfig(heads=None, head_width=64, context_width=1024, linear_projections=True)
SMALL = UNetConfig(channels=(32, 64, 96), attention=(False, True, True), blocks=1, context_width=48)
OPEN_CLIP = open_clip_text("cond_stage_model.model.")

# Configurations, and of the public single files the number of keys that are read and the digest of their sorted list.
PUBLIC = {
    "1.x": (
        CLIPTextConfig(),
        UNetConfig(),
        prefixed(PREFIXES["text_encoder"]),
        (1130, "dd0d17c940fbd3a9caaa5c0908f12bcc529c3920a6edcf30fe8eedab2d41b931"),
    ),
    "2.x": (
        TEXT_2X,
        UNET_2X,
        OPEN_CLIP,
        (1214, "cb60416bf599c46807eaba5a88a4fff016e0e47ea16ea0fd071edfec0f3c0bbe"),
    ),
}


def shapes_of(network, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network at its full size, which on the meta device takes no memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in network(config).state_dict().items()}


def file_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that our full-size networks read from a single file."""
    text, unet, text_layout, _ = PUBLIC[kind]
    parts = (
        (CLIPTextEncoder, text, text_layout),
        (UNet, unet, prefixed(PREFIXES["unet"])),
        (AutoencoderKL, AutoencoderConfig(), prefixed(PREFIXES["autoencoder"])),
    )
    shapes = {}
    for network, config, layout in parts:
        for name, shape in shapes_of(network, config).items():
            source = layout(name)
            shapes[source.name] = shape if source.qkv is None else (3 * shape[0], *shape[1:])
    return shapes


@pytest.mark.parametrize("kind", PUBLIC)
def test_full_size_networks_read_exactly_the_keys_and_shapes_of_the_public_checkpoints(kind):
    lines = sorted(f"{name} {list(shape)}" for name, shape in file_shapes(kind).items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == PUBLIC[kind][3]


@pytest.mark.parametrize("kind", PUBLIC)
def test_sizes_are_read_off_shapes(kind):
    text, unet, layout, _ = PUBLIC[kind]
    shapes = file_shapes(kind)
    if kind == "2.x":  # the last layer is in the file, though nothing reads it
        shapes |= {name.replace(".22.", ".23."): shape for name, shape in shapes.items() if ".resblocks.22." in name}
    assert unet_sizes(shapes, PREFIXES["unet"]) == unet
    assert autoencoder_sizes(shapes, PREFIXES["autoencoder"]) == AutoencoderConfig()
    assert text_sizes(shapes, layout) == text


def test_sizes_of_small_networks_are_read_too():
    assert unet_sizes(shapes_of(UNet, SMALL), "") == SMALL
    autoencoder = AutoencoderConfig(channels=(32, 64), blocks=3, latent_channels=8)
    assert autoencoder_sizes(shapes_of(AutoencoderKL, autoencoder), "") == autoencoder


def test_a_2x_file_without_the_unused_layer_has_nothing_left_to_leave_out():
    """As tools write it that went through diffusers."""
    config = text_sizes(file_shapes("2.x"), OPEN_CLIP)
    assert config.layers == 23 and config.skip_last == 0


@pytest.mark.parametrize("config", [UNetConfig(), UNET_2X, SMALL], ids=["1.x", "2.x", "small"])
def test_the_unet_in_diffusers_names(config):
    layout, names = diffusers_unet(config), shapes_of(UNet, config)
    assert {name: layout(name) for name in names} == {name: Source(unet_name(name, config)) for name in names}


@pytest.mark.parametrize("config", [AutoencoderConfig(), AutoencoderConfig(channels=(32, 64), blocks=1)])
def test_the_autoencoder_in_diffusers_names(config):
    layout, names = diffusers_autoencoder(config, {}), shapes_of(AutoencoderKL, config)
    expected = {name: Source(autoencoder_name(name, len(config.channels))) for name in names}
    assert {name: layout(name) for name in names} == expected


def test_the_autoencoders_attention_in_its_old_spelling():
    old = diffusers_autoencoder(AutoencoderConfig(), {"encoder.mid_block.attentions.0.query.weight": (512, 512)})
    found = [old(f"decoder.mid.attn_1.{name}.weight").name for name in ("norm", "q", "k", "v", "proj_out")]
    expected = ("group_norm", "query", "key", "value", "proj_attn")
    assert found == [f"decoder.mid_block.attentions.0.{name}.weight" for name in expected]


@pytest.mark.parametrize("inner", ["text_model.", ""])
def test_the_text_encoder_with_and_without_its_inner_name(inner):
    shapes = {f"p.{inner}final_layer_norm.bias": (768,)}
    assert hugging_face_text("p.", shapes)("text_model.final_layer_norm.bias") == Source(*shapes)


def test_open_clips_names_give_every_weight_the_place_of_nn_multihead_attentions():
    """q, k and v are thirds of one matrix: cut up, they compute what PyTorch's own module does."""
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(8, 1, batch_first=True)
    x, weights = torch.randn(1, 5, 8), dict(fused.named_parameters())
    q, k, v = (
        nn.functional.linear(x, *(third(weights, f"encoder.layers.0.self_attn.{name}.{kind}") for kind in KINDS))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    out = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(fused.out_proj(out), fused(x, x, x)[0])


KINDS = ("weight", "bias")


def third(weights: dict[str, Tensor], name: str) -> Tensor:
    source = open_clip_text("")(f"text_model.{name}")
    return weights[source.name.removeprefix("transformer.resblocks.0.attn.")].chunk(3)[source.qkv]
