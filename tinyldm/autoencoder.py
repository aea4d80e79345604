"""The KL autoencoder of latent diffusion: pictures to small latents and back (arXiv 2112.10752, section 3.1).

A 512x512 picture becomes a (4, 64, 64) latent, 48 times fewer numbers, and diffusion happens there. The encoder gives
a Gaussian per latent number (mean and log-variance); the decoder turns a sample of it back into a picture.

The names are those of the original checkpoints (`first_stage_model.` + these), so `load_state_dict` is the loader:
- `down` and `up` are lists of levels, each a bare Module holding `block` and, but for the coarsest / finest one, the
  `downsample` / `upsample` step. `up` counts from the FINE end, as `down` does, so the decoder walks it backwards.
- `nin_shortcut` ("network in network") is a 1x1 convolution where a block changes its number of channels.
- `quant_conv` and `post_quant_conv` are 1x1 convolutions around the latent, from its vector-quantised sibling.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyldm.attention import attention


@dataclass(frozen=True)
class AutoencoderConfig:
    """The defaults are those of Stable Diffusion 1.x and 2.x (83,653,863 parameters)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level, fine to coarse
    blocks: int = 2  # residual blocks per level in the encoder; the decoder has one more
    latent_channels: int = 4
    norm_groups: int = 32  # a group needs about four channels: with one, GroupNorm is instance norm and loses colours

    @property
    def factor(self) -> int:
        """How many pixels of the picture, along each side, make one of the latent."""
        return 2 ** (len(self.channels) - 1)


def norm(config: AutoencoderConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (b, c_in, h, w) -> (b, c_out, h, w)."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One-headed self-attention over all pixels, its projections written as 1x1 convolutions."""

    def __init__(self, config: AutoencoderConfig, channels: int):
        super().__init__()
        self.norm = norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b (h w) c") for conv in (self.q, self.k, self.v))
        h = rearrange(attention(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Padded at the right and the bottom only, as the checkpoints were trained; symmetric padding would shift
        # every level by a pixel and the picture by eight.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: every pixel becomes four, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, then perhaps a step to the next resolution."""

    def __init__(
        self,
        config: AutoencoderConfig,
        c_in: int,
        c_out: int,
        blocks: int,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.block = nn.ModuleList(ResnetBlock(config, a, b) for a, b in pairwise(widths))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Residual block, attention, residual block, at the coarsest level."""

    def __init__(self, config: AutoencoderConfig, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttnBlock(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(b, 3, H, W) in [-1, 1] -> (b, 2 * latent_channels, H / factor, W / factor)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, c_out in enumerate(channels):
            c_in, last = channels[max(i - 1, 0)], i == len(channels) - 1
            self.down.append(Level(config, c_in, c_out, config.blocks, downsample=not last))
        self.mid = Middle(config, channels[-1])
        self.norm_out = norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(b, latent_channels, h, w) -> (b, 3, h * factor, w * factor), about in [-1, 1]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(config, channels[-1])
        self.up = nn.ModuleList()
        for i, c_out in enumerate(channels):
            c_in = channels[min(i + 1, len(channels) - 1)]
            self.up.append(Level(config, c_in, c_out, config.blocks + 1, upsample=i > 0))
        self.norm_out = norm(config, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """encode: picture -> (mean, log-variance); sample: those -> latent; decode: latent -> picture.

    Latents here are the autoencoder's own. The diffusion model works on `scale` times these (0.18215 in Stable
    Diffusion), which `LatentDiffusion` takes care of.
    """

    def __init__(self, config: AutoencoderConfig | None = None):
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, H, W) in [-1, 1] -> mean and log-variance of q(z | x), each (b, latent_channels, h, w)."""
        mean, log_variance = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)  # so that exp() stays finite in float32

    @staticmethod
    def sample(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
        """z = mean + exp(log_variance / 2) eps with eps ~ N(0, I), all (b, c, h, w) (arXiv 1312.6114, section 2.4)."""
        return mean + (0.5 * log_variance).exp() * eps

    def decode(self, z: Tensor) -> Tensor:
        """(b, latent_channels, h, w) -> (b, 3, H, W), about in [-1, 1]; clamp before making pictures of it."""
        return self.decoder(self.post_quant_conv(z))
