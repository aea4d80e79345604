"""Guidance and the samplers: from noise to a latent, one call of the UNet per step.

A sampler is a generator. It takes z ~ N(0, I) of shape (batch, channels, h, w) and yields the latent after every step:

    z, generators = first_noise((4, 64, 64), seeds=[0, 1])
    for z in SAMPLERS["ddim"](guided(model.predict, context, uncond_context, 7.5), z, schedule, 50, generators):
        ...  # progress, previews
    pictures = model.decode(z)

Every z that is yielded is a z_t as the UNet is trained on, of variance near one; the last one is the sample. The caller
moves the first noise to the model's device. Everything here is float32; `LatentDiffusion.predict` casts to the model's
own precision and back. The conventions (which timesteps, which last step) are diffusers', with SD 1.5's settings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tinyldm.schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]  # z_t (batch, c, h, w), t (batch,) -> eps or v (batch, c, h, w)
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same with the context (batch, tokens, width)


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


# ---- Noise


def first_noise(shape: tuple[int, int, int], seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """One picture's start per seed, (len(seeds), *shape), and the generators that these pictures go on drawing from."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators]), generators


def noise_like(z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """N(0, I) of z's shape, row i from generator i, drawn on the CPU in float32.

    So a picture has the same noise on every device, in every precision, and whatever its neighbours in the batch. The
    networks' sums round otherwise in a batch of another size: in float32 a pixel changes by 1 of 255 at most.
    """
    rows = [torch.randn((1, *row.shape), generator=generator) for row, generator in zip(z, generators, strict=True)]
    return torch.cat(rows).to(z.device)


# ---- Samplers that walk from timestep to timestep


@torch.no_grad()
def ddpm(
    model: Model, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2) with the posterior's own variance, eq. 7.

    The timesteps 981, 961, …, 21, 1 (for 50), then the clean latent, where no noise is added.
    """
    timesteps = schedule.timesteps(steps, "leading").tolist()
    for t, previous in pairwise([*timesteps, -1]):
        z_0 = schedule.predict_z_0(z, call_model(model, z, t), t)
        z, variance = schedule.posterior(z, z_0, t, previous)
        if previous >= 0:
            z = z + variance.sqrt() * noise_like(z, generators)
        yield z


@torch.no_grad()
def ddim(
    model: Model, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """DDIM (arXiv 2010.02502, eq. 12 with its σ = 0): predict z_0 and eps, and put them together again with less noise.

    The timesteps 981, 961, …, 21, 1 (for 50). The last step goes to timestep 0 and not to the clean latent, as in the
    original code of Stable Diffusion: a trace of noise, 3% of the signal, stays. Draws no noise.
    """
    for t in schedule.timesteps(steps, "leading").tolist():
        previous = max(t - schedule.steps // steps, 0)
        output = call_model(model, z, t)
        z_0, eps = schedule.predict_z_0(z, output, t), schedule.predict_eps(z, output, t)
        z = schedule.add_noise(z_0, eps, previous)
        yield z


# ---- Samplers that walk from noise level to noise level
#
# EDM (arXiv 2206.00364) divides z_t by sqrt(ᾱ_t): x = z_0 + σ eps, and all that changes on the way is σ. In these
# coordinates the probability flow is dx/dσ = eps = (x - z_0) / σ, a straight line if the predicted z_0 did not change.
# σ ends at 0; z_t = x / sqrt(1 + σ²) goes into the model and out to the caller.


@torch.no_grad()
def euler(
    model: Model, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Euler's method on the probability flow (arXiv 2206.00364, algorithm 1 without its correction). Draws no noise.

    The first x is σ z, as if the last timestep held no signal at all; σ² is 214 there, so little is wrong with that.
    """
    timesteps, sigmas = linspace_levels(schedule, steps)
    x = sigmas[0] * z
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        z_0 = denoise(model, x, t, sigma, schedule)
        x = x + (sigma_next - sigma) * (x - z_0) / sigma
        yield to_z(x, sigma_next)


@torch.no_grad()
def euler_a(
    model: Model, z: Tensor, schedule: NoiseSchedule, steps: int, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Euler's method, but each step goes further down than sigma_next, and fresh noise brings it back up.

    The split is DDPM's posterior (eq. 7) in these coordinates: its variance is sigma_up² = σ_next² (σ² - σ_next²) / σ²,
    and what remains, sigma_down² = σ_next² - sigma_up², is (σ_next² / σ)².
    """
    timesteps, sigmas = linspace_levels(schedule, steps)
    x = sigmas[0] * z
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        z_0 = denoise(model, x, t, sigma, schedule)
        sigma_down = sigma_next**2 / sigma
        sigma_up = (sigma_next**2 - sigma_down**2) ** 0.5
        x = x + (sigma_down - sigma) * (x - z_0) / sigma
        if sigma_up > 0:
            x = x + sigma_up * noise_like(x, generators)
        yield to_z(x, sigma_next)


@torch.no_grad()
def dpmpp_2m(
    model: Model,
    z: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: Sequence[torch.Generator],
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
    timesteps, sigmas = karras_levels(schedule, steps) if karras else open_levels(schedule, steps)
    x = z * (1 + sigmas[0] ** 2) ** 0.5
    z_0_last, h_last = None, 0.0
    for t, (sigma, sigma_next) in zip(timesteps, pairwise(sigmas), strict=True):
        z_0 = middle = denoise(model, x, t, sigma, schedule)
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


# ---- One call of the model


def call_model(model: Model, z: Tensor, t: int | float) -> Tensor:
    """The model's output at one timestep for the whole batch."""
    return model(z, torch.full((len(z),), t, device=z.device))


def denoise(model: Model, x: Tensor, t: int | float, sigma: float, schedule: NoiseSchedule) -> Tensor:
    """The z_0 that the model sees in x = z_0 + sigma eps."""
    z, signal = to_z(x, sigma), 1 / (1 + sigma**2) ** 0.5
    return schedule.z_0_at(z, call_model(model, z, t), signal, sigma * signal)


def to_z(x: Tensor, sigma: float) -> Tensor:
    """From x = z_0 + sigma eps to the z_t of the same noise level, of variance near one."""
    return x / (1 + sigma**2) ** 0.5


# ---- Which noise levels: each gives steps timesteps for the model, and steps + 1 sigmas of which the last is 0


def linspace_levels(schedule: NoiseSchedule, steps: int) -> tuple[list[float], list[float]]:
    """Timesteps 999, …, 0 with fractions (which the UNet's sinusoids take as they are), sigma interpolated."""
    timesteps = schedule.timesteps(steps, "linspace").numpy()
    return timesteps.tolist(), [*np.interp(timesteps, np.arange(schedule.steps), schedule.sigmas).tolist(), 0.0]


def open_levels(schedule: NoiseSchedule, steps: int) -> tuple[list[int], list[float]]:
    """Whole timesteps 999, 979, …, 20 (for 50)."""
    timesteps = schedule.timesteps(steps, "linspace_open")
    return timesteps.tolist(), [*schedule.sigmas[timesteps].tolist(), 0.0]


def karras_levels(schedule: NoiseSchedule, steps: int) -> tuple[list[int], list[float]]:
    """σ^(1/7) evenly spaced over the schedule's range (EDM eq. 5), and the nearest timestep by log σ."""
    schedule.timesteps(steps)  # refuses a bad number of steps
    table = schedule.sigmas.numpy().astype(np.float64)
    sigmas = np.linspace(table[-1] ** (1 / 7), table[0] ** (1 / 7), steps) ** 7
    timesteps = np.interp(np.log(sigmas), np.log(table), np.arange(schedule.steps)).round().astype(np.int64)
    return timesteps.tolist(), [*sigmas.tolist(), 0.0]
