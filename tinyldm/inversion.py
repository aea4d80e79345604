"""Textual Inversion: a new word for a frozen model (arXiv 2208.01618).

A new word is a placeholder, such as "S*", and a few vectors that the text encoder reads in its place, as if they were
rows of its table. Learning it means finding the vectors v* with which the frozen model best denoises a few pictures
(section 3, equation 2):

    v* = argmin_v  E [ || eps - eps_theta(z_t, t, c_theta(y(v))) ||^2 ]

Here is what that needs: where the vectors start, which captions y the word stands in, and what is random in a step.
train.py has the loss and the loop.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderKL
from tinyldm.files import read_lines
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from tinyldm.tokenizer import ALPHABET

TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


# ---- The new word


def vectors_of(model: LatentDiffusion, phrase: str, count: int | None = None) -> Tensor:
    """A new word's first vectors: copies of those of the phrase's tokens, (count, width) float32.

    count: how many; None for one per token. If there are more, the phrase's vectors repeat. Raises InputError for a
    phrase that is empty or unknown to the vocabulary, or longer than count.
    """
    ids = known_ids(model, phrase)
    count = count or len(ids)
    if len(ids) > count:
        raise InputError(
            f'the init "{phrase}" is {len(ids)} tokens, which does not fit {count} vectors: '
            f"expected at most {count}; try --vectors {len(ids)}"
        )
    if count > (room := model.tokenizer.length - 2):
        raise InputError(f"{count} vectors do not fit into a prompt, which has room for {room}; try fewer --vectors")
    rows = torch.tensor([ids[i % len(ids)] for i in range(count)], device=model.device)
    return model.text_encoder.table[rows].detach().float().clone()


def known_ids(model: LatentDiffusion, phrase: str) -> list[int]:
    """The ids of a phrase whose every word is one that the model learned."""
    ids = model.tokenizer.encode(phrase)
    if not ids:
        raise InputError("the init is empty; expected a word or a phrase that says roughly what the pictures show")
    for word in re.findall(r"[^\W\d_]{2,}", phrase):
        # What the tokenizer must spell, be it in part, it never learned as a word: no start to learn from.
        if any(i < len(ALPHABET) for i in model.tokenizer.encode(word)):
            raise InputError(f'the init "{word}" is no word this checkpoint knows; expected known words; try "circle"')
    return ids


def add_words(model: LatentDiffusion, words: Mapping[str, Tensor]) -> None:
    """Let the model's tokenizer know the words, so that prompts may hold them.

    words: word -> (vectors, width). Raises InputError if one can't be a word, or is one already.
    """
    for word, vectors in words.items():
        model.tokenizer.add_placeholder(word, len(vectors))


# ---- Its captions


def templates_for(model: LatentDiffusion, subject: str) -> tuple[str, ...]:
    """The paper's templates for an "object" or a "style" that do not mislead the model.

    "A cropped photo of a {}" is untrue of most pictures. Stable Diffusion hardly minds; a model that always got what
    such a word said would have to unlearn it in the new word.
    """
    misleading = set(model.defaults.taken_literally)
    return tuple(template for template in TEMPLATES[subject] if not misleading & set(template.split()))


def read_templates(path: str | Path) -> tuple[str, ...]:
    """One template a line, each with exactly one {} where the word goes; empty lines are skipped."""
    templates = tuple(read_lines(path, "templates"))
    if not templates:
        raise InputError(f'no template in {path}; expected lines like "a photo of a {{}}"')
    for template in templates:
        # A caption without the word would train nothing, and nobody would notice.
        if template.count("{}") != 1:
            raise InputError(
                f'{path}: the template "{template}" has {template.count("{}")} places for the word, expected one {{}}'
            )
    return templates


def captions_of(model: LatentDiffusion, templates: Iterable[str], word: str) -> list[str]:
    """The templates filled with the word, each checked to bring every vector of it to the text encoder."""
    captions = [template.replace("{}", word) for template in templates]
    placeholder = set(model.tokenizer.placeholders[word])
    for caption, ids in zip(captions, model.tokenizer(captions), strict=True):  # raises if one is cut off
        if not placeholder <= set(ids.tolist()):
            raise InputError(f'the template behind "{caption}" hides {word}; leave a space around its {{}}')
    return captions


# ---- What is random in a step


class Batch(NamedTuple):
    """One training step's draw, made on the CPU so that a seed means the same on every device."""

    z_0: Tensor  # (b, c, h, w), clean latents
    eps: Tensor  # (b, c, h, w), the noise that is added
    t: Tensor  # (b,), the timesteps
    captions: list[str]


def draw_batch(
    mean: Tensor,  # (n, c, h, w), of the latents of the training pictures, on the CPU
    log_variance: Tensor,  # (n, c, h, w)
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
    eps_0, eps = torch.randn(2, size, *mean.shape[1:], generator=generator)
    z_0 = AutoencoderKL.sample(mean[rows], log_variance[rows], eps_0)
    return Batch(z_0, eps, t, [captions[i] for i in chosen])
