"""Muon, which trains matrices in far fewer steps than Adam (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Iterable

import torch
from torch import nn

# Coefficients of Jordan's quintic: steep at 0, so that five rounds bring any singular value into about 0.7 to 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix instead of the gradient: every direction moves equally far.

    A convolution's kernel is the matrix of its outputs (c_out, everything else). The step's root mean square is 0.2,
    about that of Adam's steps, so Adam's learning rates and weight decay fit (arXiv 2502.16982, section 2.2).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalized(p.grad.lerp(average, group["momentum"]).flatten(1))  # Nesterov's momentum
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction.reshape(p.shape), alpha=group["lr"] * 0.2 * max(direction.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """(m, n) -> about U V^T of its singular value decomposition U S V^T, by the Newton-Schulz iteration in bfloat16."""
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    wide = wide / (wide.norm() + 1e-7)  # no singular value above 1, from where the iteration converges
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = LINEAR * wide + (CUBIC * gram + QUINTIC * gram @ gram) @ wide
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)
