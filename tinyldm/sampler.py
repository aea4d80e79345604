"""Guidance and the samplers: from noise to a latent, one call of the UNet per step.

A sampler is a generator. It takes z ~ N(0, I) of shape (batch, channels, h, w) and yields the latent after every step:

    denoise = denoiser(guided(model.predict, context, uncond_context, 7.5), schedule)
    z, generators = first_noise((4, 64, 64), seeds=[0, 1])
    for z in SAMPLERS["ddim"](denoise, z, schedule, 50, generators):
        ...  # progress, previews
    pictures = model.decode(z)

With `skip` a sampler leaves out so many of its steps, and z is a latent that is noised as after those: see `noised`.

Every z that is yielded is a z_t as the UNet is trained on, of variance near one; the last one is the sample. The caller
moves the first noise to the model's device. Everything here is float32; `LatentDiffusion.predict` casts to the model's
own precision and back. The conventions (which timesteps, which last step) are diffusers', with SD 1.5's settings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyldm.schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]  # z_t (batch, c, h, w), t (batch,) -> eps or v (batch, c, h, w)
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same with the context (batch, tokens, width)
Generators = Sequence["torch.Generator | Way"]  # one a picture
Scale = Tensor | float
# z_t = signal z_0 + noise eps (batch, c, h, w), t, signal, noise -> the z_0 that is seen in it
Denoise = Callable[[Tensor, float, Scale, Scale], Tensor]


# ---- Guidance


def guided(predict: Predict, context: Tensor, uncond_context: Tensor | None, guidance: float) -> Model:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6): eps_uncond + guidance (eps_cond - eps_uncond). So for v, too.

    In the paper's letters guidance is 1 + w: 0 ignores the prompt, 1 is the plain model, more exaggerates what the
    prompt changes. context is (batch, tokens, width); uncond_context, (batch or 1, tokens, width), is the empty
    prompt's, or in its place that of a negative prompt, to move away from. Both halves are one UNet call on a doubled
    batch; guidance 1 needs the conditional half alone.
    """
    if guidance == 1:
        return lambda z, t: predict(z, t, context)
    contexts = torch.cat([context, uncond_context.expand_as(context)])

    def model(z: Tensor, t: Tensor) -> Tensor:
        cond, uncond = predict(torch.cat([z, z]), torch.cat([t, t]), contexts).chunk(2)
        return uncond + guidance * (cond - uncond)

    return model


def denoiser(model: Model, schedule: NoiseSchedule) -> Denoise:
    """What a sampler asks at every step: which clean latent is seen in this noisy one."""

    def denoise(z: Tensor, t: float, signal: Scale, noise: Scale) -> Tensor:
        output = model(z, torch.full((len(z),), t, device=z.device))
        return schedule.predict_z_0(z, output, signal, noise)

    return denoise


# ---- Noise


class Between(NamedTuple):
    """A seed on the way from one to another, which other programs call a variation seed and its strength. They do so
    with the first noise alone; here it is all noise of a picture, or the way would not end at the other's."""

    seed: int
    other: int
    share: float  # of the other: 0 is the one, 1 the other


Seed = int | Between


class Way(NamedTuple):
    """What draws the noise of a seed between two."""

    generator: torch.Generator
    other: torch.Generator
    share: float


def generator_of(seed: Seed) -> torch.Generator | Way:
    if not isinstance(seed, Between):
        return torch.Generator().manual_seed(seed)
    if seed.share in (0, 1):
        return generator_of(seed.other if seed.share else seed.seed)
    return Way(generator_of(seed.seed), generator_of(seed.other), seed.share)


def drawn(shape: tuple[int, ...], generator: torch.Generator | Way) -> Tensor:
    """N(0, I), on the CPU in float32."""
    if isinstance(generator, Way):
        one, other = (drawn(shape, each).flatten() for each in generator[:2])
        return slerp(one, other, generator.share).reshape(shape)
    return torch.randn(shape, generator=generator)


def first_noise(shape: tuple[int, int, int], seeds: Sequence[Seed]) -> tuple[Tensor, Generators]:
    """One picture's start per seed, (len(seeds), *shape), and the generators that these pictures go on drawing from."""
    generators = [generator_of(seed) for seed in seeds]
    return torch.stack([drawn(shape, generator) for generator in generators]), generators


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From the vectors a to b, (…, width), along the arc between their directions; the length goes in a straight line.

    On the straight line between two noises there is less noise than the model knows: half-way its variance is 1/2.
    """
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    to_a, to_b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)  # of a vector of length 0: itself
    angle = (to_a * to_b).sum(dim=-1, keepdim=True).clamp(-1, 1).acos()
    direction = (((1 - share) * angle).sin() * to_a + (share * angle).sin() * to_b) / angle.sin()
    # Along a very short arc the straight line is as good, and divides by nothing.
    return torch.where(angle < 1e-3, torch.lerp(a, b, share), direction * torch.lerp(norm_a, norm_b, share))


def noise_like(z: Tensor, generators: Generators) -> Tensor:
    """N(0, I) of z's shape, row i from generator i, drawn on the CPU in float32.

    So a picture has the same noise on every device, in every precision, and whatever its neighbours in the batch. The
    networks' sums round otherwise in a batch of another size: in float32 a pixel changes by 1 of 255 at most.
    """
    return torch.stack([drawn(row.shape, each) for row, each in zip(z, generators, strict=True)]).to(z.device)


# ---- Samplers that walk from timestep to timestep


@torch.no_grad()
def ddpm(
    denoise: Denoise, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Generators, skip: int | None = None
) -> Iterator[Tensor]:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2) with the posterior's own variance, eq. 7.

    The timesteps 981, 961, …, 21, 1 (for 50), then the clean latent, where no noise is added.
    """
    timesteps, _ = leading_levels(schedule, steps)
    for t, previous in pairwise([*timesteps[skip:], -1]):
        z_0 = denoise(z, t, *schedule.scales(t, z))
        z, variance = schedule.posterior(z, z_0, t, previous)
        if previous >= 0:
            z = z + variance.sqrt() * noise_like(z, generators)
        yield z


@torch.no_grad()
def ddim(
    denoise: Denoise, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Generators, skip: int | None = None
) -> Iterator[Tensor]:
    """DDIM (arXiv 2010.02502, eq. 12 with its σ = 0): predict z_0 and eps, and put them together again with less noise.

    The timesteps 981, 961, …, 21, 1 (for 50). The last step goes to timestep 0 and not to the clean latent, as in the
    original code of Stable Diffusion: a trace of noise, 3% of the signal, stays. Draws no noise.
    """
    timesteps, _ = leading_levels(schedule, steps)
    for t in timesteps[skip:]:
        previous = max(t - schedule.steps // steps, 0)
        signal, noise = schedule.scales(t, z)
        z_0 = denoise(z, t, signal, noise)
        eps = (z - signal * z_0) / noise
        z = schedule.add_noise(z_0, eps, previous)
        yield z


# ---- Samplers that walk from noise level to noise level
#
# EDM (arXiv 2206.00364) divides z_t by sqrt(ᾱ_t): x = z_0 + σ eps, and all that changes on the way is σ. In these
# coordinates the probability flow is dx/dσ = eps = (x - z_0) / σ, a straight line if the predicted z_0 did not change.
# σ ends at 0; z_t = x / sqrt(1 + σ²) goes into the model and out to the caller.


@torch.no_grad()
def euler(
    denoise: Denoise, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Generators, skip: int | None = None
) -> Iterator[Tensor]:
    """Euler's method on the probability flow (arXiv 2206.00364, algorithm 1 without its correction). Draws no noise.

    The first x is σ z, as if the last timestep held no signal at all; σ² is 214 there, so little is wrong with that.
    """
    timesteps, sigmas = levels_from(linspace_levels(schedule, steps), skip)
    x = sigmas[0] * z if skip is None else to_x(z, sigmas[0])
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        z_0 = denoise(to_z(x, sigma), t, *scales_at(sigma))
        x = x + (sigma_next - sigma) * (x - z_0) / sigma
        yield to_z(x, sigma_next)


@torch.no_grad()
def euler_a(
    denoise: Denoise, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Generators, skip: int | None = None
) -> Iterator[Tensor]:
    """Euler's method, but each step goes further down than sigma_next, and fresh noise brings it back up.

    The split is DDPM's posterior (eq. 7) in these coordinates: its variance is sigma_up² = σ_next² (σ² - σ_next²) / σ²,
    and what remains, sigma_down² = σ_next² - sigma_up², is (σ_next² / σ)².
    """
    timesteps, sigmas = levels_from(linspace_levels(schedule, steps), skip)
    x = sigmas[0] * z if skip is None else to_x(z, sigmas[0])
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        z_0 = denoise(to_z(x, sigma), t, *scales_at(sigma))
        sigma_down = sigma_next**2 / sigma
        sigma_up = (sigma_next**2 - sigma_down**2) ** 0.5
        x = x + (sigma_down - sigma) * (x - z_0) / sigma
        if sigma_up > 0:
            x = x + sigma_up * noise_like(x, generators)
        yield to_z(x, sigma_next)


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: Generators,
    skip: int | None = None,
    *,
    karras: bool = False,  # EDM's noise levels instead of evenly spaced timesteps
) -> Iterator[Tensor]:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2). Draws no noise.

    The timesteps, 999, 979, …, 20 (for 50), are diffusers'. A1111's and k-diffusion's plain "DPM++ 2M" goes in as many
    steps from 999 to 0, as `euler` does here, so its pictures differ a little.

    For a z_0 that stays the same the flow is solved exactly; the z_0 put in here is extrapolated from the last two
    predictions to the middle of the step, which is h long on the scale of log σ. The first step has no prediction
    before it, and the last (to σ = 0, h infinite) takes its own as it is.
    """
    levels = karras_levels(schedule, steps) if karras else open_levels(schedule, steps)
    timesteps, sigmas = levels_from(levels, skip)
    x = to_x(z, sigmas[0])
    z_0_last, h_last = None, 0.0
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        z_0 = middle = denoise(to_z(x, sigma), t, *scales_at(sigma))
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        if h_last > 0 and sigma_next > 0:  # h_last is 0 where two timesteps were rounded to one, with 1000 steps
            middle = z_0 + h / (2 * h_last) * (z_0 - z_0_last)
        x = middle + sigma_next / sigma * (x - middle)  # sigma_next / sigma = exp(-h)
        z_0_last, h_last = z_0, h
        yield to_z(x, sigma_next)


SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_a": euler_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": partial(dpmpp_2m, karras=True),
}


# ---- The two coordinates


def to_z(x: Tensor, sigma: float) -> Tensor:
    """From x = z_0 + sigma eps to the z_t of the same noise level, of variance near one."""
    return x / (1 + sigma**2) ** 0.5


def to_x(z: Tensor, sigma: float) -> Tensor:
    """And back."""
    return z * (1 + sigma**2) ** 0.5


def scales_at(sigma: float) -> tuple[float, float]:
    """signal and noise of z_t at a noise level."""
    signal = 1 / (1 + sigma**2) ** 0.5
    return signal, sigma * signal


# ---- Which noise levels: each gives steps timesteps for the model, and steps + 1 sigmas of which the last is 0

Levels = tuple[list[float], list[float]]


def leading_levels(schedule: NoiseSchedule, steps: int) -> Levels:
    """Whole timesteps 981, 961, …, 21, 1 (for 50)."""
    timesteps = schedule.timesteps(steps, "leading")
    return timesteps.tolist(), [*schedule.sigmas[timesteps].tolist(), 0.0]


def linspace_levels(schedule: NoiseSchedule, steps: int) -> Levels:
    """Timesteps 999, …, 0 with fractions (which the UNet's sinusoids take as they are), sigma interpolated."""
    timesteps = schedule.timesteps(steps, "linspace").numpy()
    return timesteps.tolist(), [*np.interp(timesteps, np.arange(schedule.steps), schedule.sigmas).tolist(), 0.0]


def open_levels(schedule: NoiseSchedule, steps: int) -> Levels:
    """Whole timesteps 999, 979, …, 20 (for 50)."""
    timesteps = schedule.timesteps(steps, "linspace_open")
    return timesteps.tolist(), [*schedule.sigmas[timesteps].tolist(), 0.0]


def karras_levels(schedule: NoiseSchedule, steps: int) -> Levels:
    """σ^(1/7) evenly spaced over the schedule's range (EDM eq. 5), and the nearest timestep by log σ."""
    schedule.timesteps(steps)  # refuses a bad number of steps
    table = schedule.sigmas.numpy().astype(np.float64)
    sigmas = np.linspace(table[-1] ** (1 / 7), table[0] ** (1 / 7), steps) ** 7
    timesteps = np.interp(np.log(sigmas), np.log(table), np.arange(schedule.steps)).round().astype(np.int64)
    return timesteps.tolist(), [*sigmas.tolist(), 0.0]


LEVELS: dict[str, Callable[[NoiseSchedule, int], Levels]] = {
    "ddim": leading_levels,
    "ddpm": leading_levels,
    "euler": linspace_levels,
    "euler_a": linspace_levels,
    "dpmpp_2m": open_levels,
    "dpmpp_2m_karras": karras_levels,
}


def levels_from(levels: Levels, skip: int | None) -> Levels:
    """Those of the steps that are left."""
    timesteps, sigmas = levels
    return timesteps[skip:], sigmas[skip:]


def noised(z_0: Tensor, eps: Tensor, name: str, schedule: NoiseSchedule, steps: int, skip: int) -> Tensor:
    """z_0 with as much noise as this sampler has left after `skip` steps, to go on from there."""
    _, sigmas = LEVELS[name](schedule, steps)
    signal, noise = scales_at(sigmas[skip])
    return signal * z_0 + noise * eps
