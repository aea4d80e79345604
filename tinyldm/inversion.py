"""Textual Inversion: a new word for a frozen model (arXiv 2208.01618).

A concept is a placeholder, such as "S*", and the rows of the embedding table that it stands for. Learning it means
finding the rows v* with which the frozen model best denoises the concept's few pictures (section 3.2, equation 2):

    v* = argmin_v  E [ || eps - eps_theta(z_t, t, c_theta(y(v))) ||^2 ]
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from tinyldm import InputError
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from tinyldm.tokenizer import ALPHABET

# A mean over 65,536 latents has gradients of 1e-5 each, and float16 keeps few digits below 6e-5, none below 6e-8. So
# between the loss and the vectors, which are both float32, gradients of float16 weights are this many times too large.
LOSS_SCALE = 4096.0
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


@dataclass
class Concept:
    """A new word: what is typed, and what the text encoder reads for it."""

    token: str
    vectors: torch.Tensor  # (vectors, width), float32 whatever the frozen weights' dtype

    def learns(self) -> torch.Tensor:
        """The one tensor that training may change."""
        return self.vectors.requires_grad_(True)


def new_concept(model: LatentDiffusion, token: str, init: str, count: int | None = None) -> Concept:
    """Add `token` to the model's tokenizer, its vectors copied from those of the words of `init`.

    count: how many vectors; None for one per token of `init`. If there are more, init's vectors repeat. Raises
    InputError for an init that is empty or unknown to the vocabulary, or longer than count.
    """
    ids = init_ids(model, init)
    count = count or len(ids)
    if len(ids) > count:
        raise InputError(
            f'the init "{init}" is {len(ids)} tokens, which does not fit {count} vectors: '
            f"expected at most {count}; try --vectors {len(ids)}"
        )
    model.tokenizer.add_placeholder(token, count)
    rows = torch.tensor([ids[i % len(ids)] for i in range(count)], device=model.device)
    return Concept(token, model.text_encoder.table[rows].detach().float().clone())


def init_ids(model: LatentDiffusion, init: str) -> list[int]:
    ids = model.tokenizer.encode(init)
    if not ids:
        raise InputError("the init is empty; expected a word or a phrase that says roughly what the pictures show")
    for word in re.findall(r"[^\W\d_]{2,}", init):
        # What the tokenizer must spell, be it in part, it never learned as a word: no start to learn from.
        if any(i < len(ALPHABET) for i in model.tokenizer.encode(word)):
            raise InputError(f'the init "{word}" is no word this checkpoint knows; expected known words; try "circle"')
    return ids


def add_concepts(model: LatentDiffusion, embeddings: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor | None:
    """Add learned words (one dictionary per file) to the tokenizer; returns all their rows, (vectors, width), or None.

    The rows stand in the order of the placeholders' ids, as the text encoder's masked lookup expects them.
    """
    rows = []
    for words in embeddings:
        for token, vectors in words.items():
            model.tokenizer.add_placeholder(token, len(vectors))
            rows.append(vectors.to(model.device, torch.float32))
    return torch.cat(rows) if rows else None


def templates_for(model: LatentDiffusion, property: str) -> tuple[str, ...]:
    """The paper's templates for an object or a style that do not mislead the model.

    "A cropped photo of a {}" is untrue of most pictures. Stable Diffusion hardly minds; a model that always got what
    such a word said would have to unlearn it in the new word.
    """
    literal = set(model.defaults.taken_literally)
    return tuple(template for template in TEMPLATES[property] if not literal & set(template.split()))


def read_templates(path: str | Path) -> tuple[str, ...]:
    """One template a line, each with exactly one {} where the word goes; empty lines are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the templates {path} ({error}); expected a text file") from error
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise InputError(f'no template in {path}; expected lines like "a photo of a {{}}"')
    for template in templates:
        # A caption without the word would train nothing, and nobody would notice.
        if template.count("{}") != 1:
            raise InputError(
                f'{path}: the template "{template}" has {template.count("{}")} places for the word, expected one {{}}'
            )
    return templates


def captions_of(model: LatentDiffusion, templates: Iterable[str], token: str) -> list[str]:
    """The templates filled with the token, each checked to bring every row of it to the text encoder."""
    captions = [template.replace("{}", token) for template in templates]
    placeholder = set(model.tokenizer.placeholders[token])
    for caption, ids in zip(captions, model.tokenizer(captions), strict=True):  # raises if one is cut off
        if not placeholder <= set(ids.tolist()):
            raise InputError(f'the template behind "{caption}" hides {token}; leave a space around its {{}}')
    return captions


@dataclass(frozen=True)
class Batch:
    """Everything random in one training step, drawn on the CPU so that a seed means the same on every device."""

    z_0: torch.Tensor  # (b, c, h, w), clean latents
    eps: torch.Tensor  # (b, c, h, w), the noise that is added
    t: torch.Tensor  # (b,), the timesteps
    captions: list[str]


def draw_batch(
    mean: torch.Tensor,  # (n, c, h, w), of the latents of the training pictures, on the CPU
    log_variance: torch.Tensor,  # (n, c, h, w)
    captions: list[str],
    schedule: NoiseSchedule,
    size: int,
    generator: torch.Generator,
) -> Batch:
    """All pictures and timesteps are equally likely, but spread out: no picture comes twice while another has not come
    once, and `schedule.draw_timesteps` does as much for the timesteps. The mean gradient is that of independent draws;
    single ones stray less from it.
    """
    rounds = [torch.randperm(len(mean), generator=generator) for _ in range(math.ceil(size / len(mean)))]
    rows = torch.cat(rounds)[:size]
    chosen = torch.randint(len(captions), (size,), generator=generator)
    t = schedule.draw_timesteps(size, generator)
    noise, eps = torch.randn(2, size, *mean.shape[1:], generator=generator)
    z_0 = mean[rows] + (0.5 * log_variance[rows]).exp() * noise
    return Batch(z_0, eps, t, [captions[i] for i in chosen])


def inversion_loss(model: LatentDiffusion, batch: Batch, vectors: torch.Tensor) -> torch.Tensor:
    """Equation 2's expectation on one batch: the frozen model's squared error when it reads `vectors` for the word."""
    z_0, eps, t = (x.to(model.device) for x in (batch.z_0, batch.eps, batch.t))
    z_t = model.schedule.add_noise(z_0, eps, t)
    if model.dtype == torch.float16:
        vectors = with_gradient_times(1 / LOSS_SCALE, vectors)
    context = model.context(batch.captions, vectors)
    output = model.unet(z_t.to(model.dtype), t, context).float()
    if model.dtype == torch.float16:
        output = with_gradient_times(LOSS_SCALE, output)
    return F.mse_loss(output, model.schedule.target(z_0, eps, t))


def with_gradient_times(factor: float, x: torch.Tensor) -> torch.Tensor:
    """The same numbers; on its way back through here, the gradient is multiplied by the factor."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: factor * gradient)
    return x
