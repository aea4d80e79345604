"""The UNet of latent diffusion: noisy latent, timestep and prompt in, noise (or v) out (arXiv 2112.10752).

The path goes down to coarse levels and up again; what each step of the way down saw is handed across to the way up.
ResBlocks take in the timestep, SpatialTransformers the prompt.

The names are those of the original checkpoints (`model.diffusion_model.` + these), so `load_state_dict` is the loader:
- `input_blocks`, `middle_block` and `output_blocks` are flat lists; each entry is a `Stage`, a Sequential that hands
  the timestep to the layers that want it, the prompt to those that want that, and neither to the rest.
- `in_layers`, `emb_layers`, `out_layers` are Sequentials whose numbers are in the keys; an Identity stands where the
  original had a dropout (`out_layers.2`, `to_out.1`, `ff.net.1`), so that the numbers agree.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyldm.attention import attention


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are those of Stable Diffusion 1.x (859,520,964 parameters).

    Stable Diffusion 2.x (865,910,724 parameters): heads=None, head_width=64, context_width=1024,
    linear_projections=True.
    """

    latent_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level, fine to coarse
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have SpatialTransformers
    blocks: int = 2  # ResBlocks per level on the way down; one more on the way up
    context_width: int = 768  # of the text encoder
    heads: int | None = 8  # attention heads at every level,
    head_width: int | None = None  # or, if heads is None, channels / head_width of them
    linear_projections: bool = False  # SpatialTransformer's proj_in, proj_out: linear (2.x) or 1x1 convolutions (1.x)
    norm_groups: int = 32

    def __post_init__(self):
        if (self.heads is None) == (self.head_width is None):  # the wrong number of heads loads, and computes nonsense
            raise ValueError(f"heads={self.heads} and head_width={self.head_width}: expected exactly one of the two")

        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention={self.attention} for channels={self.channels}: expected one of each a level")

    def heads_for(self, channels: int) -> int:
        return self.heads or channels // self.head_width

    @property
    def factor(self) -> int:
        """The latent's height and width must be multiples of this, so that way down and way up meet."""
        return 2 ** (len(self.channels) - 1)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """[cos(w_i t), sin(w_i t)] with w_i falling from 1 to 1 / max_period: (b,) -> (b, width), in float32.

    The sinusoids of Attention Is All You Need (section 3.5), cosines first, as the checkpoints were trained.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = rearrange(t.float(), "b -> b 1") * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions around a residual, the timestep added between them: (b, c_in, h, w) -> (b, c_out, h, w)."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, c_in, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(c_in, c_out, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.channels[0], c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, c_out, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """emb: the embedded timestep, (b, 4 * channels[0])."""
        h = self.in_layers(x) + rearrange(self.emb_layers(emb), "b c -> b c 1 1")
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention from x (b, n, width) to a context (b, m, context_width); with context=None, from x to itself."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} can't be shared out among {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in x (arXiv 2002.05202). The exact GELU, not its tanh approximation."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        # Two products, not one that is cut in two: the halves lie apart, and their gradients need not be put together.
        weights, biases = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        value, gate = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pixels look at each other (attn1), then at the prompt (attn2), then think (ff)."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, as a residual: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        project = nn.Linear if config.linear_projections else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(channels, channels)
        block = BasicTransformerBlock(channels, config.context_width, config.heads_for(channels))
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        # A 1x1 convolution is a linear layer on every pixel: 1.x and 2.x differ in the shape of their weights alone.
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half the height and width. Unlike the autoencoder's, this one pads symmetrically."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width: every pixel becomes four, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Layers in a row, each given what it takes: ResBlocks the timestep, SpatialTransformers the prompt."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """eps_theta(z_t, t, c), or v_theta where the checkpoint was trained so (see NoiseSchedule.target)."""

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = config = config or UNetConfig()
        self.low_memory = False  # where gradients are wanted: keep what goes into a stage, compute the rest of it again
        channels, time_width = config.channels, 4 * config.channels[0]

        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )

        def res_stage(level: int, c_in: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(config, c_in, channels[level])]
            if config.attention[level]:
                layers.append(SpatialTransformer(config, channels[level]))
            return layers

        # Down. `widths` remembers how many channels each entry hands across.
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.latent_channels, channels[0], 3, padding=1))])
        width, widths = channels[0], [channels[0]]
        for level in range(len(channels)):
            for _ in range(config.blocks):
                self.input_blocks.append(Stage(*res_stage(level, width)))
                width = channels[level]
                widths.append(width)
            if level < len(channels) - 1:
                self.input_blocks.append(Stage(Downsample(width)))
                widths.append(width)

        # Across, at the coarsest level.
        self.middle_block = Stage(
            ResBlock(config, width, width), SpatialTransformer(config, width), ResBlock(config, width, width)
        )

        # Up, taking the handed-across maps in reverse.
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for i in range(config.blocks + 1):
                layers = res_stage(level, width + widths.pop())
                width = channels[level]
                if level > 0 and i == config.blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(width, config.latent_channels, 3, padding=1),
        )

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """z_t: (b, latent_channels, h, w); t: (b,), whole or fractional; context: (b, tokens, context_width).

        Returns (b, latent_channels, h, w). h and w must be multiples of config.factor.
        """
        emb = timestep_embedding(t, self.config.channels[0])
        emb = self.time_embed(emb.to(self.time_embed[0].weight.dtype))
        h, handed = z_t, []
        for stage in self.input_blocks:
            h = self.through(stage, h, emb, context)
            handed.append(h)
        h = self.through(self.middle_block, h, emb, context)
        for stage in self.output_blocks:
            h = self.through(stage, torch.cat([h, handed.pop()], dim=1), emb, context)
        return self.out(h)

    def through(self, stage: Stage, *inputs: Tensor) -> Tensor:
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        return stage(*inputs)
