"""The noise schedule: how much noise a latent carries at each of the 1000 timesteps.

Forward process (DDPM, arXiv 2006.11239, eq. 4), t = 0 nearly clean, t = steps - 1 nearly pure noise:

    z_t = sqrt(ᾱ_t) z_0 + sqrt(1 - ᾱ_t) eps,     ᾱ_t = Π_{s <= t} (1 - β_s),     eps ~ N(0, I)

ᾱ is `alphas_cumprod`; the two factors are called `signal` and `noise`, here and in sampler.py. Training uses
`draw_timesteps`, `add_noise` and `target`; sampling uses `timesteps`, `predict_z_0` and `posterior`.
Everywhere z is (batch, channels, height, width), and t one int or a LongTensor (batch,).
"""

import numpy as np
import torch
from torch import Tensor

from tinyldm import InputError

KINDS = ("scaled_linear", "linear")
PREDICTIONS = ("eps", "v")


class NoiseSchedule:
    """The tables β_t, ᾱ_t and σ_t and what follows from them; the defaults are Stable Diffusion's.

    All three tables are float32 (steps,) on the CPU; `alpha_bar` brings what it reads to the latents' device. σ, in
    `sigmas`, is EDM's (arXiv 2206.00364): the noise in units of the signal, sqrt((1 - ᾱ) / ᾱ).
    """

    def __init__(
        self,
        steps: int = 1000,  # number of timesteps the model is trained on
        beta_start: float = 0.00085,  # variance of the noise that the first step adds
        beta_end: float = 0.0120,  # … and the last
        kind: str = "scaled_linear",  # what grows in a straight line: sqrt(β), or for "linear" β itself
        prediction: str = "eps",  # what the UNet's output means: "eps" (SD 1.x) or "v" (SD 2.1-768)
    ):
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InputError(f"the schedule's steps must be a whole number of at least 1, not {steps!r}")
        if not 0 < beta_start <= beta_end < 1:
            raise InputError(f"betas must satisfy 0 < beta_start <= beta_end < 1, not {beta_start!r} and {beta_end!r}")
        if kind not in KINDS:
            raise InputError(f"unknown kind of schedule {kind!r}: choose one of {', '.join(KINDS)}")
        if prediction not in PREDICTIONS:
            raise InputError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}")
        self.steps, self.beta_start, self.beta_end = steps, beta_start, beta_end
        self.kind, self.prediction = kind, prediction

        # In float64 up to here: a product of 1000 factors near 1 loses digits in float32.
        betas = betas_of(steps, beta_start, beta_end, kind)
        alphas_cumprod = np.cumprod(1 - betas)
        self.betas = torch.tensor(betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        self.sigmas = torch.tensor(np.sqrt((1 - alphas_cumprod) / alphas_cumprod), dtype=torch.float32)

    def config(self) -> dict[str, int | float | str]:
        """What a checkpoint stores: NoiseSchedule(**schedule.config()) is the same schedule."""
        return {name: getattr(self, name) for name in ("steps", "beta_start", "beta_end", "kind", "prediction")}

    # ---- Training

    def add_noise(self, z_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """z_t = sqrt(ᾱ_t) z_0 + sqrt(1 - ᾱ_t) eps (DDPM eq. 4)."""
        signal, noise = self.scales(t, z_0)
        return signal * z_0 + noise * eps

    def target(self, z_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """What the UNet learns: eps (DDPM eq. 14), or v = sqrt(ᾱ_t) eps - sqrt(1 - ᾱ_t) z_0 (arXiv 2202.00512)."""
        if self.prediction == "eps":
            return eps
        signal, noise = self.scales(t, z_0)
        return signal * eps - noise * z_0

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """A timestep for each picture of a batch, (count,): all equally likely, but one from each of `count` equal
        parts of the schedule, earliest first. The mean loss is that of independent draws, and strays less from it.
        """
        return (torch.arange(count) * self.steps + torch.randint(self.steps, (count,), generator=generator)) // count

    # ---- Sampling

    def predict_z_0(self, z_t: Tensor, output: Tensor, signal: Tensor | float, noise: Tensor | float) -> Tensor:
        """The clean latent that the UNet's output implies (DDPM eq. 15 for eps, arXiv 2202.00512 appendix D for v).

        At any noise level, between timesteps too: z_t = signal z_0 + noise eps, signal² + noise² = 1.

        For eps, solve that equation for z_0. For v: (z_t, v) is (z_0, eps) turned by the angle atan(noise / signal),
        and this turns it back.
        """
        if self.prediction == "eps":
            return (z_t - noise * output) / signal
        return signal * z_t - noise * output

    def posterior(
        self, z_t: Tensor, z_0: Tensor, t: int | Tensor, previous: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z_previous | z_t, z_0), DDPM eq. 6 and 7; previous is t - 1 if it is not given.

        A larger stride joins several small steps into one, whose α is ᾱ_t / ᾱ_previous (arXiv 2102.09672, section 4).
        previous < 0 means the clean latent. Returns the mean like z_t and the variance (batch or 1, 1, 1, 1).
        """
        alpha_bar = self.alpha_bar(t, z_t)
        alpha_bar_previous = self.alpha_bar(t - 1 if previous is None else previous, z_t)
        alpha_t = alpha_bar / alpha_bar_previous
        beta_t = 1 - alpha_t
        towards_z_0 = alpha_bar_previous.sqrt() * beta_t / (1 - alpha_bar)
        towards_z_t = alpha_t.sqrt() * (1 - alpha_bar_previous) / (1 - alpha_bar)
        return towards_z_0 * z_0 + towards_z_t * z_t, beta_t * (1 - alpha_bar_previous) / (1 - alpha_bar)

    def timesteps(self, n: int, spacing: str = "leading") -> Tensor:
        """The n timesteps a sampler visits, noisiest first (n,). For n = 50 of 1000:

        "leading"        981, 961, …, 41, 21, 1       every 20th, plus one: what the original samplers do (ddpm, ddim)
        "linspace"       999, 978.6, …, 20.4, 0       both ends, fractions kept: float (euler, euler_a)
        "linspace_open"  999, 979, …, 40, 20          n + 1 points, rounded, without their last (dpmpp_2m)

        With n = 1 the first two visit only their last value, nearly no noise: a picture needs at least a few steps.
        """
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= self.steps:
            raise InputError(f"a sampler takes a whole number of 1 to {self.steps} steps, not {n!r}")
        if spacing == "leading":
            t = np.arange(n) * (self.steps // n)
            t += t[-1] < self.steps - 1  # the offset by one, unless n = steps, where the last + 1 would not exist
        elif spacing == "linspace":
            t = np.linspace(0, self.steps - 1, n, dtype=np.float32)
        elif spacing == "linspace_open":
            t = np.linspace(0, self.steps - 1, n + 1).round()[1:].astype(np.int64)
        else:
            raise InputError(f"unknown spacing {spacing!r}: choose leading, linspace or linspace_open")
        return torch.from_numpy(t[::-1].copy())

    def scales(self, t: int | Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """signal and noise, sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), each (batch or 1, 1, 1, 1) on the device of z."""
        alpha_bar = self.alpha_bar(t, z)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def alpha_bar(self, t: int | Tensor, z: Tensor) -> Tensor:
        """ᾱ_t, shaped to multiply z: (batch or 1, 1, 1, 1) on its device. t < 0 is the clean latent, ᾱ = 1."""
        t = torch.as_tensor(t).reshape(-1, *[1] * (z.ndim - 1))
        # looked up where t is, so that an int is not sent to the GPU and waited for
        return torch.where(t < 0, 1.0, self.alphas_cumprod.to(t.device)[t.clamp(min=0)]).to(z.device)


def betas_of(steps: int, start: float, end: float, kind: str) -> np.ndarray:
    """β_t, (steps,) float64."""
    if kind == "linear":
        return np.linspace(start, end, steps)
    return np.linspace(start**0.5, end**0.5, steps) ** 2
