"""The five parts of a text-to-image latent diffusion model, side by side, and the way through them.

A learned word is one entry of a dictionary `words` on its whole way: the word -> its vectors, (vectors, width) float32.
"""

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextEncoder
from tinyldm.editing import Source, ended, inside
from tinyldm.sampler import SAMPLERS, Seed, denoiser, first_noise, guided, noise_like, noised
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet

DECODED = 512 * 512  # pixels at a time, of a picture or of several


class Sampling(NamedTuple):
    """How pictures are made from noise."""

    sampler: str
    steps: int
    guidance: float
    height: int  # pixels
    width: int


@dataclass(frozen=True)
class Learning:
    """How a word is learned; the values here suit Stable Diffusion 1.x."""

    init: str  # the word it starts from
    recipe: str = "low-variance,falling"  # names in recipes.py
    steps: int = 3000
    lr: float = 5e-3


@dataclass(frozen=True)
class Defaults:
    """What suits a checkpoint best, stored with it; the values here suit Stable Diffusion 1.x."""

    size: int = 512  # of the pictures, in pixels
    sampler: str = "ddim"
    sampler_steps: int = 50
    guidance: float = 7.5
    object: Learning = Learning("object")  # of a word for one,
    style: Learning = Learning("painting")  # and for the other
    batch: int = 4  # pictures, captions and noises a step
    save_every: int = 500  # steps
    taken_literally: tuple[str, ...] = ()  # words its captions use only where true: templates with them go

    def sampling(
        self,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Sampling:
        """What is given, and the defaults in place of what is None."""
        return Sampling(
            sampler or self.sampler,
            steps or self.sampler_steps,
            self.guidance if guidance is None else guidance,
            height or self.size,
            width or self.size,
        )


@dataclass
class LatentDiffusion:
    """All that turns a prompt into a picture, frozen once `to` was called."""

    tokenizer: Tokenizer
    text_encoder: CLIPTextEncoder
    unet: UNet
    autoencoder: AutoencoderKL
    schedule: NoiseSchedule
    scale: float = 0.18215  # brings the autoencoder's latents to about unit variance, where the noise schedule works
    defaults: Defaults = field(default_factory=Defaults)

    def networks(self) -> tuple[CLIPTextEncoder, UNet, AutoencoderKL]:
        return self.text_encoder, self.unet, self.autoencoder

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "LatentDiffusion":
        """Move the three networks, freeze them, and put them in eval mode; nothing here ever trains them."""
        for network in self.networks():
            network.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return self

    def with_own_words(self) -> "LatentDiffusion":
        """The same networks; words that are added there are not known here, nor the other way round."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.placeholders = dict(tokenizer.placeholders)
        return replace(self, tokenizer=tokenizer)

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

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, H, W) in [-1, 1] -> mean and log-variance of the scaled latents, each (b, c, h, w) in float32."""
        # The UNet, unlike the autoencoder, is slower if what it gets has its channels last and its kernels have not.
        mean, log_variance = (x.contiguous() for x in self.autoencoder.encode(self.for_autoencoder(pictures)))
        return self.scale * mean.float(), log_variance.float() + 2 * math.log(self.scale)

    def decode(self, z_0: Tensor) -> Tensor:
        """Scaled latents (b, c, h, w) -> pictures (b, 3, H, W) in float32, about in [-1, 1]."""
        maps = self.for_autoencoder(z_0 / self.scale)
        # Large pictures one at a time: together they would take several times the memory, and no less time.
        at_a_time = max(1, DECODED // (maps[0, 0].numel() * self.autoencoder.config.factor**2))
        return torch.cat([self.autoencoder.decode(part).float() for part in maps.split(at_a_time)])

    def for_autoencoder(self, maps: Tensor) -> Tensor:
        """On its device, in its dtype. Channels last, as all its maps are then: that is faster on a CPU."""
        return maps.to(self.device, self.dtype, memory_format=torch.channels_last)

    def context(self, prompts: Sequence[str], words: Mapping[str, Tensor] | None = None) -> Tensor:
        """Prompts -> what the UNet's cross-attention reads, (b, tokens, width).

        words: the vectors of every word that was added with inversion.add_words.
        """
        # A step's captions are drawn from a few templates: each is read once.
        distinct = list(dict.fromkeys(prompts))
        # The text encoder reads all vectors as rows of one table, in the order of the placeholders' ids. Words that the
        # checkpoint came with are rows of its own table.
        added = [word for word, ids in self.tokenizer.placeholders.items() if ids[0] >= len(self.text_encoder.table)]
        rows = [words[word] for word in added] if words else []
        vectors = torch.cat(rows).to(self.device) if rows else None
        contexts = self.text_encoder(self.tokenizer(distinct).to(self.device), vectors)
        which = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        # Not contexts[which]: several threads would add up its gradient in an order that is never the same.
        return contexts.index_select(0, which)

    def predict(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The UNet's answer, eps or v, in float32, whatever the precision of the weights.

        z_t: (b, c, h, w); t: (b,); context: (b, tokens, width), as `context` gives it. Returns (b, c, h, w).
        """
        return self.unet(z_t.to(self.dtype), t, context).float()

    def check_size(self, height: int, width: int, batch: int | None = None) -> None:
        """Raises InputError if the UNet cannot halve and double pictures of this size, or if they surely don't fit.

        batch: of a training step; None: a picture is decoded. On a GPU its own allocator says so; a computer without
        one grants more than it has, and then ends programs.
        """
        if height % self.multiple or width % self.multiple:
            near = [max(round(side / self.multiple), 1) * self.multiple for side in (height, width)]
            raise InputError(
                f"a picture of {height}x{width} pixels does not fit this checkpoint: expected multiples of "
                f"{self.multiple}; try {near[0]}x{near[1]}"
            )
        # The least there can be at a time, in numbers. Decoding: what goes into a normalisation, into a convolution,
        # and comes out. A step: what the way back needs, 40 maps a stage with attention, else 10; 53 were measured.
        least = 3 * height * width * self.autoencoder.config.channels[0]
        if batch:
            config, (_, h, w) = self.unet.config, self.latent_shape(height, width)
            maps = [40 if attends else 10 for attends in config.attention]
            levels = enumerate(zip(config.channels, maps, strict=True))
            least = batch * (2 * config.blocks + 1) * sum(n * channels * h * w // 4**i for i, (channels, n) in levels)
        least *= self.dtype.itemsize
        if self.device.type != "cuda" and hasattr(os, "sysconf"):
            there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if least > there:
                what, less = (f" in a batch of {batch}", ", or the batch") if batch else ("", "")
                raise InputError(
                    f"{height}x{width} pixels{what} take more than {least / 2**30:.0f} GiB of memory, this computer "
                    f"has {there / 2**30:.0f}; make the pictures smaller{less}"
                )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[Seed],  # one a prompt: each picture's noise is its own, whatever its neighbours
        *,
        words: Mapping[str, Tensor] | None = None,  # learned ones
        negative: str = "",  # what to move away from
        sampler: str | None = None,  # None here and below: the checkpoint's default
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        source: Source | None = None,  # a picture to begin with; None: noise
    ) -> Iterator[Tensor]:
        """Yields the latents (b, c, h, w) after each step of the sampler; decode the last for the pictures."""
        sampling = self.defaults.sampling(sampler, steps, guidance, height, width)
        self.check_size(sampling.height, sampling.width)
        context = self.context([*prompts, negative], words)
        denoise = denoiser(guided(self.predict, context[:-1], context[-1:], sampling.guidance), self.schedule)
        z, generators = first_noise(self.latent_shape(sampling.height, sampling.width), seeds)
        z, skip = z.to(self.device), None
        mask = source.mask.cells.to(self.device) if source and source.mask else None
        if source:
            skip = source.skipped(sampling.steps)
            z_0, noise = self.autoencoder.sample(*self.encode(source.picture), z), noise_like(z, generators)
            z = noised(z_0, noise, sampling.sampler, self.schedule, sampling.steps, skip)
        if mask is not None:
            # Even the noisiest timestep holds a little signal. If all steps are taken, covered cells begin without it;
            # what the cells beside them hold of it, since an encoder looks around, stays.
            z = torch.where(mask > 0, noise, z) if skip == 0 else z
            denoise = inside(denoise, mask, z_0)
        latents = SAMPLERS[sampling.sampler](denoise, z, self.schedule, sampling.steps, generators, skip)
        yield from latents if mask is None else ended(latents, sampling.steps - skip, mask, z_0)
