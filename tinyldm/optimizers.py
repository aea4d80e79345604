"""How a word's vectors move against their gradient. A recipe chooses one of these (recipes.py).

All are made from the vectors, (count, width); norm, the length of known words (inversion.known_norm); and lr, the rate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Adam:
    """Adam (arXiv 1412.6980, algorithm 1), of the vectors alone; no weight decay pulls them to 0.

    To the last bit what torch.optim.AdamW(…, weight_decay=0) does on a CPU, but that loads PyTorch's compiler: a second
    of every start.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, vectors: Tensor, norm: float, lr: float):
        self.vectors, self.norm, self.lr, self.steps = vectors, norm, lr, 0
        # Running means of the gradients and of their squares; they stand in resume.safetensors under PyTorch's names.
        self.state = {"exp_avg": torch.zeros_like(vectors), "exp_avg_sq": torch.zeros_like(vectors)}

    @torch.no_grad()
    def step(self) -> None:
        """Move the vectors against their gradient, and forget it."""
        gradient, self.vectors.grad = self.vectors.grad, None
        mean, square = self.state["exp_avg"], self.state["exp_avg_sq"]
        self.steps += 1
        mean.lerp_(gradient, 1 - self.BETAS[0])
        square.mul_(self.BETAS[1]).addcmul_(gradient, gradient, value=1 - self.BETAS[1])
        mean_share, square_share = (1 - beta**self.steps for beta in self.BETAS)  # that is in the running means by now
        size = (square.sqrt() / square_share**0.5).add_(self.EPS)
        self.vectors.addcdiv_(mean, size, value=-self.lr / mean_share)


class KeptNorm(Adam):
    """After every step the vectors are as long as known words again (OneTrainer, "preserve embedding norm")."""

    def share(self) -> float:
        """How far their lengths go there."""
        return 1.0

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        norms = self.vectors.norm(dim=1, keepdim=True)
        self.vectors.mul_(1 + self.share() * (self.norm / norms - 1))


class DecayingNorm(KeptNorm):
    """After every step their length goes a twentieth of the way to that of known words, less when the rate has fallen.

    lora_pti's clip_ti_decay, min(1, 100 times the rate), at its own rate, 5e-4.
    """

    def __init__(self, vectors: Tensor, norm: float, lr: float):
        super().__init__(vectors, norm, lr)
        self.first_lr = lr

    def share(self) -> float:
        return 0.05 * self.lr / self.first_lr


class OnSphere:
    """Riemannian SGD: the vectors are as long as known words, and only their directions learn.

    A prior pulls the directions towards those they start with (Directional Textual Inversion, arXiv 2512.13672). As in
    its code, the gradient along the sphere is brought to length 1, so 4 times `lr` is a step in radians; its code's is
    0.04. A vector that no caption of the batch holds has no gradient, and stays.
    """

    KAPPA = 1e-4  # of the von Mises-Fisher prior
    LR = 4  # times the rate: 0.01 times a batch of 4

    def __init__(self, vectors: Tensor, norm: float, lr: float):
        self.vectors, self.norm, self.lr, self.state = vectors, norm, lr, {}
        self.prior = F.normalize(vectors.detach(), dim=1)
        vectors.data.copy_(self.norm * self.prior)

    @torch.no_grad()
    def step(self) -> None:
        """Turn the vectors against their gradient, and forget it."""
        gradient, self.vectors.grad = self.vectors.grad, None
        is_read = gradient.abs().amax(dim=1, keepdim=True) != 0  # NaN is a gradient, too
        direction = F.normalize(self.vectors, dim=1)
        gradient = self.norm * gradient - self.KAPPA * self.prior
        along = F.normalize(gradient - (gradient * direction).sum(dim=1, keepdim=True) * direction, dim=1)
        turned = self.norm * F.normalize(direction - self.LR * self.lr * along, dim=1)
        self.vectors.copy_(torch.where(is_read, turned, self.vectors))
