"""The five parts of a text-to-image latent diffusion model, side by side: no machinery to chase."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextEncoder
from tinyldm.sampler import SAMPLERS, first_noise, guided
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet


@dataclass(frozen=True)
class Defaults:
    """What suits a checkpoint best, stored with it; the values here suit Stable Diffusion 1.x."""

    size: int = 512  # of the pictures, in pixels
    sampler: str = "ddim"
    sampler_steps: int = 50
    guidance: float = 7.5
    steps: int = 3000  # of learning a word,
    batch: int = 4
    lr: float = 5e-3
    preview_every: int = 500
    init_object: str = "object"  # the word that a new object starts from,
    init_style: str = "painting"  # and a new style
    taken_literally: tuple[str, ...] = ()  # words its captions use only where true: templates with them go


@dataclass
class LatentDiffusion:
    tokenizer: Tokenizer
    text_encoder: CLIPTextEncoder
    unet: UNet
    autoencoder: AutoencoderKL
    schedule: NoiseSchedule
    scale: float = 0.18215  # brings the autoencoder's latents to about unit variance, where the noise schedule works
    defaults: Defaults = field(default_factory=Defaults)

    def modules(self) -> tuple[CLIPTextEncoder, UNet, AutoencoderKL]:
        return self.text_encoder, self.unet, self.autoencoder

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "LatentDiffusion":
        """Move the three networks, freeze them, and put them in eval mode; nothing here ever trains them."""
        for module in self.modules():
            module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        return self.text_encoder.table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_encoder.table.dtype

    @property
    def multiple(self) -> int:
        """A picture's height and width must be multiples of this many pixels."""
        return self.autoencoder.config.factor * self.unet.config.factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(latent_channels, h, w) of a picture of height x width pixels."""
        factor = self.autoencoder.config.factor
        return self.autoencoder.config.latent_channels, height // factor, width // factor

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, H, W) in [-1, 1] -> mean and log-variance of the scaled latents, each (b, c, h, w) in float32."""
        mean, log_variance = self.autoencoder.encode(pictures.to(self.device, self.dtype))
        return self.scale * mean.float(), log_variance.float() + 2 * math.log(self.scale)

    def decode(self, z_0: torch.Tensor) -> torch.Tensor:
        """Scaled latents (b, c, h, w) -> pictures (b, 3, H, W) in float32, about in [-1, 1]."""
        return self.autoencoder.decode((z_0 / self.scale).to(self.dtype)).float()

    def context(self, prompts: list[str], vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Prompts -> what the UNet's cross-attention reads, (b, tokens, width). vectors: the learned rows, if any."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device), vectors)

    def check_size(self, height: int, width: int) -> None:
        """Raises InputError if the UNet cannot halve and double pictures of this size."""
        if height % self.multiple or width % self.multiple:
            near = [max(round(side / self.multiple), 1) * self.multiple for side in (height, width)]
            raise InputError(
                f"a picture of {height}x{width} pixels does not fit this checkpoint: expected multiples of "
                f"{self.multiple}; try {near[0]}x{near[1]}"
            )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],  # one a prompt: each picture's noise is its own, whatever its neighbours
        *,
        vectors: torch.Tensor | None = None,  # the rows of the learned words
        negative: str = "",  # what to move away from
        sampler: str | None = None,  # None here and below: the checkpoint's default
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields the latents (b, c, h, w) after each step of the sampler; decode the last for the pictures."""
        d = self.defaults
        height, width = height or d.size, width or d.size
        self.check_size(height, width)
        context = self.context([*prompts, negative], vectors)
        denoiser = guided(self.unet, context[:-1], context[-1:], d.guidance if guidance is None else guidance)
        z_T, generators = first_noise(self.latent_shape(height, width), seeds)
        run = SAMPLERS[sampler or d.sampler]
        yield from run(denoiser, z_T.to(self.device), self.schedule, steps or d.sampler_steps, generators)
