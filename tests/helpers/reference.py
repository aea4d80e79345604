"""What the parity tests share: random models, our weights under the names of diffusers and transformers, differences.

diffusers renamed the original checkpoints' weights, flat lists into nested ones; the rules are a dozen lines a model.
They are written here on their own, without the tables of formats/names.py, so that each checks the other.
"""

import hashlib
import re

import torch
from diffusers import AutoencoderKL as ReferenceAutoencoder
from diffusers import UNet2DConditionModel as ReferenceUNet
from torch import Tensor, nn
from transformers import CLIPConfig as ReferenceCLIPConfig
from transformers import CLIPModel as ReferenceCLIP
from transformers import CLIPTextConfig as ReferenceTextConfig
from transformers import CLIPTextModel as ReferenceTextEncoder

from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.clip_image import CLIP, CLIPConfig, CLIPVisionConfig
from tinyldm.unet import UNet, UNetConfig

# ---- Measuring


def difference(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the reference's largest value."""
    assert ours.shape == reference.shape
    ours, reference = ours.detach(), reference.detach()
    return float((ours - reference).abs().max() / reference.abs().max())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def digest(model: nn.Module) -> str:
    """SHA-256 of the sorted list of names and shapes: the same if and only if a checkpoint fits, name by name."""
    lines = sorted(f"{name} {list(value.shape)}" for name, value in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---- Random models


# The layers that write what a norm will read.
BEFORE_A_NORM = re.compile(
    r"input_blocks\.0\.0|in_layers\.2|emb_layers\.1|out_layers\.3|proj_in|to_out\.0|net\.2"  # UNet
    r"|conv_in|conv[12]|attn_1\.proj_out"  # autoencoder
    r"|embedding|out_proj|fc2"  # text encoder
)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every parameter at random, those that start at zero or one too, so that none can be missed or swapped unseen.

    What the norms read is kept small, with a variance of 1e-4 and more: there a wrong eps of 1e-6 or 1e-5 shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        is_norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        size = 0.01 if BEFORE_A_NORM.search(name) else 1.0
        for p in module.parameters(recurse=False):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.data = size * noise / p[0].numel() ** 0.5  # divided: a layer's output is `size` times its input
            elif is_norm:
                p.data = p.data + 0.3 * noise  # around the scale of 1 and the shift of 0
            else:
                p.data = 0.01 * noise


def copy_weights(ours: nn.Module, reference: nn.Module, rename) -> None:
    shapes = {name: value.shape for name, value in reference.state_dict().items()}
    weights = {rename(name): value for name, value in ours.state_dict().items()}
    # diffusers turned the autoencoder's 1x1 convolutions of attention into linear layers.
    weights = {name: value.flatten(1) if len(shapes[name]) == 2 else value for name, value in weights.items()}
    reference.load_state_dict(weights, strict=True)


def substitute(name: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


# ---- The UNet

UNETS = {  # our configuration in small, and what diffusers calls attention_head_dim, which is the number of heads
    "1.x": (UNetConfig(channels=(32, 64, 64, 64), context_width=32, norm_groups=8), 8),
    "2.x": (
        UNetConfig(
            channels=(32, 64, 64, 64),
            context_width=48,
            heads=None,
            head_width=16,
            linear_projections=True,
            norm_groups=8,
        ),
        (2, 4, 4, 4),
    ),
    "tiny": (  # the shape of a laptop's model: two levels, both with attention, one block each
        UNetConfig(
            latent_channels=8,
            channels=(32, 48),
            attention=(True, True),
            blocks=1,
            context_width=32,
            heads=4,
            norm_groups=8,
        ),
        4,
    ),
}


def unets(kind: str) -> tuple[UNet, ReferenceUNet]:
    """Ours and diffusers', of the same shape and with the same random weights."""
    config, heads = UNETS[kind]
    blocks = ["CrossAttn" * attention for attention in config.attention]
    reference = ReferenceUNet(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        down_block_types=[f"{block}DownBlock2D" for block in blocks],
        up_block_types=[f"{block}UpBlock2D" for block in reversed(blocks)],
        cross_attention_dim=config.context_width,
        attention_head_dim=heads,
        use_linear_projection=config.linear_projections,
        norm_num_groups=config.norm_groups,
    )
    ours = UNet(config)
    randomise(ours)
    copy_weights(ours, reference, lambda name: unet_name(name, config))
    return ours.eval(), reference.eval()


def unet_name(name: str, config: UNetConfig) -> str:
    """input_blocks.4.1.norm.weight -> down_blocks.1.attentions.0.norm.weight, and so on."""

    def down(match: re.Match) -> str:
        level, n = divmod(int(match[1]) - 1, config.blocks + 1)
        if n == config.blocks:
            return f"down_blocks.{level}.downsamplers.0.conv"
        return f"down_blocks.{level}.{('resnets', 'attentions')[int(match[2])]}.{n}"

    def up(match: re.Match) -> str:
        level, n = divmod(int(match[1]), config.blocks + 1)
        if match[3]:
            return f"up_blocks.{level}.upsamplers.0.conv"
        return f"up_blocks.{level}.{('resnets', 'attentions')[int(match[2])]}.{n}"

    name = re.sub(r"^input_blocks\.0\.0", "conv_in", name)
    name = re.sub(r"^input_blocks\.(\d+)\.(\d)(\.op)?", down, name)
    name = re.sub(r"^output_blocks\.(\d+)\.(\d)(\.conv)?", up, name)
    return substitute(
        name,
        {
            r"^middle_block\.0": "mid_block.resnets.0",
            r"^middle_block\.1": "mid_block.attentions.0",
            r"^middle_block\.2": "mid_block.resnets.1",
            r"^time_embed\.0": "time_embedding.linear_1",
            r"^time_embed\.2": "time_embedding.linear_2",
            r"^out\.0": "conv_norm_out",
            r"^out\.2": "conv_out",
            r"in_layers\.0": "norm1",
            r"in_layers\.2": "conv1",
            r"emb_layers\.1": "time_emb_proj",
            r"out_layers\.0": "norm2",
            r"out_layers\.3": "conv2",
            r"skip_connection": "conv_shortcut",
        },
    )


# ---- The autoencoder


def autoencoder_reference(ours: AutoencoderKL) -> ReferenceAutoencoder:
    """diffusers' autoencoder with the weights of ours."""
    config = ours.config
    levels = len(config.channels)
    reference = ReferenceAutoencoder(
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    copy_weights(ours, reference, lambda name: autoencoder_name(name, levels))
    return reference.eval()


def autoencoder_name(name: str, levels: int) -> str:
    """decoder.up.3.block.0.norm1.weight -> decoder.up_blocks.0.resnets.0.norm1.weight, and so on."""
    name = re.sub(r"\.up\.(\d)", lambda match: f".up_blocks.{levels - 1 - int(match[1])}", name)
    return substitute(
        name,
        {
            r"\.down\.": ".down_blocks.",
            r"\.block\.": ".resnets.",
            r"(down|up)sample\.conv": r"\1samplers.0.conv",
            r"mid\.block_1": "mid_block.resnets.0",
            r"mid\.block_2": "mid_block.resnets.1",
            r"attn_1\.norm": "attn_1.group_norm",
            r"attn_1\.([qkv])\.": r"attn_1.to_\1.",
            r"attn_1\.proj_out": "attn_1.to_out.0",
            r"mid\.attn_1": "mid_block.attentions.0",
            r"norm_out": "conv_norm_out",
            r"nin_shortcut": "conv_shortcut",
        },
    )


# ---- The text encoder

TEXTS = {
    "1.x": CLIPTextConfig(vocabulary_size=60, length=16, width=32, layers=3, heads=4),
    "2.x": CLIPTextConfig(vocabulary_size=60, length=16, width=48, layers=4, heads=3, activation="gelu", skip_last=1),
}


def random_ids(length: int = 16, batch: int = 3) -> Tensor:
    """(batch, length) ids: prompts of different lengths, each padded with the vocabulary's last word, the end token."""
    words = TEXTS["1.x"].vocabulary_size
    ids = torch.randint(words - 2, (batch, length), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate([length, 1, length // 2]):
        ids[row, end:] = words - 1
    return ids


class ReferenceText(nn.Module):
    """transformers' text encoder, with `skip_last` as Stable Diffusion 2.x means it."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.skip_last = config.skip_last
        self.model = ReferenceTextEncoder(
            ReferenceTextConfig(
                vocab_size=config.vocabulary_size,
                max_position_embeddings=config.length,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                hidden_act=config.activation,
                bos_token_id=config.vocabulary_size - 2,
                eos_token_id=config.vocabulary_size - 1,
                pad_token_id=config.vocabulary_size - 1,
            )
        )
        self.body = getattr(self.model, "text_model", self.model)  # transformers 5 did away with the inner module

    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(ids, output_hidden_states=True)
        if self.skip_last == 0:
            return out.last_hidden_state
        return self.body.final_layer_norm(out.hidden_states[-1 - self.skip_last])

    def add_rows(self, vectors: Tensor) -> nn.Parameter:
        """The vocabulary's table with the vectors as new rows at its end, as one parameter."""
        old = self.model.get_input_embeddings().num_embeddings
        self.model.resize_token_embeddings(old + len(vectors))
        table = self.model.get_input_embeddings().weight
        table.data[old:] = vectors.detach()
        return table


def text_encoders(kind: str) -> tuple[CLIPTextEncoder, ReferenceText]:
    """Ours and transformers', of the same shape and with the same random weights."""
    ours, reference = CLIPTextEncoder(TEXTS[kind]), ReferenceText(TEXTS[kind])
    randomise(ours)
    weights = {name.removeprefix("text_model."): value for name, value in ours.state_dict().items()}
    missing, unexpected = reference.body.load_state_dict(weights, strict=False)
    assert not unexpected and all(".3." in name for name in missing)  # layer 3 of 2.x is the one that is left out
    return ours.eval(), reference.eval()


# ---- Both towers of CLIP

CLIPS = {
    "openai": CLIPConfig(  # in small; its heads are 64 wide, as in OpenAI's
        CLIPTextConfig(vocabulary_size=60, length=16, width=64, layers=2, heads=1),
        CLIPVisionConfig(size=32, patch=8, width=128, layers=3, heads=2),
        projection=48,
    ),
    "openclip": CLIPConfig(
        CLIPTextConfig(vocabulary_size=60, length=16, width=48, layers=3, heads=3, activation="gelu"),
        CLIPVisionConfig(size=42, patch=14, width=80, layers=2, heads=2, activation="gelu"),
        projection=32,
    ),
}


def clip_reference(config: CLIPConfig) -> ReferenceCLIP:
    """transformers' CLIP in the same sizes, its weights at random."""
    text, vision = config.text, config.vision
    end = text.vocabulary_size - 1
    text_config = {
        "vocab_size": text.vocabulary_size,
        "max_position_embeddings": text.length,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": text.activation,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision_config = {
        "image_size": vision.size,
        "patch_size": vision.patch,
        "hidden_size": vision.width,
        "intermediate_size": 4 * vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "hidden_act": vision.activation,
    }
    return ReferenceCLIP(
        ReferenceCLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=config.projection)
    ).eval()


def clips(kind: str) -> tuple[CLIP, ReferenceCLIP]:
    """Ours and transformers', of the same shape and with the same random weights."""
    ours, reference = CLIP(CLIPS[kind]), clip_reference(CLIPS[kind])
    randomise(ours)
    torch.nn.init.constant_(ours.logit_scale, 3.0)  # the small values of `randomise` would be a temperature of 1
    reference.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), reference
