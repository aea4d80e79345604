"""Muon, which trains matrices in far fewer steps than Adam (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of Jordan's quintic: steep at 0, so that five rounds bring any singular value into about 0.7 to 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix instead of the gradient: every direction moves equally far.

    A convolution's kernel is the matrix of its outputs (c_out, everything else). The step's root mean square is 0.2,
    about that of Adam's steps, so Adam's learning rates and weight decay fit (arXiv 2502.16982, section 2.2).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float | Tensor, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}  # of one shape: one multiplication does for all of them
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append(p)
            for (m, n), parameters in alike.items():
                directions = orthogonalized(torch.stack([self.with_momentum(p, group["momentum"]) for p in parameters]))
                for p, direction in zip(parameters, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * (0.2 * max(m, n) ** 0.5) * direction.reshape(p.shape))

    def with_momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The gradient's moving average, brought up to date, and Nesterov's step ahead of it: (m, n)."""
        if "exp_avg" not in self.state[p]:
            self.state[p]["exp_avg"] = torch.zeros_like(p)
        average = self.state[p]["exp_avg"]
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum).flatten(1)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(k, m, n) -> about U V^T of each one's singular value decomposition U S V^T.

    By the Newton-Schulz iteration, in bfloat16.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = (matrices.mT if is_tall else matrices).bfloat16()
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1, from where it converges
    for _ in range(ROUNDS):
        gram = wide @ wide.mT
        wide = LINEAR * wide + (CUBIC * gram + QUINTIC * gram @ gram) @ wide
    return (wide.mT if is_tall else wide).to(matrices.dtype)
