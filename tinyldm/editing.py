"""Beginning with a picture instead of noise: image to image, and editing inside a mask.

Noise hides the fine before the coarse. A picture that is noised half-way and denoised with a prompt keeps its layout
and takes its looks from the prompt (SDEdit, arXiv 2108.01073). With a mask, what lies outside stays as it was (Blended
Latent Diffusion, arXiv 2206.02779).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyldm import InputError
from tinyldm.sampler import Denoise, Scale


class Mask(NamedTuple):
    """What may change of a picture."""

    pixels: np.ndarray  # (height, width) bool, of the picture,
    cells: Tensor  # (1, 1, h, w), and of its latent: 1 where it may change, else 0


class Source(NamedTuple):
    """What a picture begins with."""

    picture: Tensor  # (1, 3, height, width) in [-1, 1]
    strength: float  # the share of the sampler's steps that are taken, in (0, 1]; the more, the less is left of it
    mask: Mask | None = None  # None: all may change

    def skipped(self, steps: int) -> int:
        """How many of a sampler's steps are left out, those at its beginning. Raises InputError if none is left."""
        taken = int(self.strength * steps)
        if taken < 1:
            found = f"a strength of {self.strength:g} leaves none of {steps} steps"
            enough = math.ceil(1000 / steps) / 1000  # rounded up: a little less would take none again
            raise InputError(f"{found}, expected at least one; give at least {enough:g}, or more steps")
        return steps - taken


def inside(denoise: Denoise, cells: Tensor, original: Tensor) -> Denoise:
    """The same, but outside the cells it sees the original's clean latent (b, c, h, w), whatever is there.

    The paper (algorithm 1) puts the noised original there after every step. With its z_0 there the sampler's own step
    does that, along one path from noise to the original, and for samplers that stop between timesteps, too.
    """

    def blended(z: Tensor, t: float, signal: Scale, noise: Scale) -> Tensor:
        return torch.where(cells > 0, denoise(z, t, signal, noise), original)

    return blended


def ended(latents: Iterator[Tensor], steps: int, cells: Tensor, original: Tensor) -> Iterator[Tensor]:
    """The same latents, but the last one is the original itself outside the cells: ddim leaves a trace of noise."""
    for step, z in enumerate(latents, start=1):
        yield torch.where(cells > 0, z, original) if step == steps else z
