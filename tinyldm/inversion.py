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
from tinyldm.tokenizer import ALPHABET, WORD_END

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


def whole_words(model: LatentDiffusion) -> Tensor:
    """The ids of the vocabulary's words of letters, two at least; among them endings that words were merged from."""
    words = re.compile(rf"[a-z]{{2,}}{re.escape(WORD_END)}")
    ids = [i for i, symbol in enumerate(model.tokenizer.symbols) if words.fullmatch(symbol)]
    return torch.tensor(ids, dtype=torch.long, device=model.device)


def known_norm(model: LatentDiffusion) -> float:
    """How long the vectors of known words are: the median norm of the vocabulary's whole words.

    Not of all its rows: bytes and pieces of words are rows, too. Most of those of the tiny checkpoint were never read
    in training and are a fifth as long.
    """
    table, words = model.text_encoder.table, whole_words(model)
    return (table[words] if len(words) else table).float().norm(dim=1).median().item()


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
    for caption in captions:
        check_caption(
            model, caption, word, f'the template behind "{caption}" hides {word}; leave a space around its {{}}'
        )
    return captions


def caption_beside(model: LatentDiffusion, picture: Path, word: str) -> str:
    """What the .txt beside a picture says; if there is none, the picture's file name, without numbers before it.

    As kohya's scripts and OneTrainer have it, the word itself has to be in it. Raises InputError where it is not.
    """
    file = picture.with_suffix(".txt")
    caption = " ".join(read_lines(file, "captions")) if file.exists() else re.sub(r"^[-\d]+\s*", "", picture.stem)
    found = f'{file if file.exists() else picture} is captioned "{caption}"'
    check_caption(model, caption, word, f"{found}, expected {word} in it; write a caption with it into {file}")
    return caption


def check_caption(model: LatentDiffusion, caption: str, word: str, error: str) -> None:
    """Raises InputError(error) if the text encoder would not read every vector of the word; another one, if some of it
    is cut off."""
    if not set(model.tokenizer.placeholders[word]) <= set(model.tokenizer(caption)[0].tolist()):
        raise InputError(error)


# ---- What is random in a step


class Batch(NamedTuple):
    """One training step's draw, made on the CPU so that a seed means the same on every device."""

    z_0: Tensor  # (b, c, h, w), clean latents
    eps: Tensor  # (b, c, h, w), the noise that is added
    t: Tensor  # (b,), the timesteps
    captions: list[str]


class Pictures(NamedTuple):
    """What a word is learned from, on the CPU."""

    mean: Tensor  # (n, c, h, w), of the latents of n pictures,
    log_variance: Tensor  # (n, c, h, w), and of what the autoencoder is unsure of
    captions: list[list[str]]  # of each picture, as many as of any other


def draw_independently(pictures: Pictures, schedule: NoiseSchedule, size: int, generator: torch.Generator) -> Batch:
    """As the expectation of equation 2 says: every picture, timestep, caption and noise by itself."""
    rows = torch.randint(len(pictures.mean), (size,), generator=generator)
    chosen = torch.randint(len(pictures.captions[0]), (size,), generator=generator)
    t = torch.randint(schedule.steps, (size,), generator=generator)
    return with_noise(pictures, rows, chosen, t, generator)


def draw_spread_out(pictures: Pictures, schedule: NoiseSchedule, size: int, generator: torch.Generator) -> Batch:
    """All pictures and timesteps are equally likely, but spread out: no picture comes twice while another has not come
    once, and `schedule.draw_timesteps` does as much for the timesteps. The mean gradient is that of independent draws;
    single ones stray less from it.
    """
    n = len(pictures.mean)
    rows = torch.cat([torch.randperm(n, generator=generator) for _ in range(math.ceil(size / n))])[:size]
    chosen = torch.randint(len(pictures.captions[0]), (size,), generator=generator)
    t = schedule.draw_timesteps(size, generator)
    return with_noise(pictures, rows, chosen, t, generator)


def draw_pairs(pictures: Pictures, schedule: NoiseSchedule, size: int, generator: torch.Generator) -> Batch:
    """Spread out, and each twice, with opposite noise (antithetic variates): what is odd in the noise cancels out."""
    half = draw_spread_out(pictures, schedule, math.ceil(size / 2), generator)
    twice = half.z_0.repeat(2, 1, 1, 1), torch.cat([half.eps, -half.eps]), half.t.repeat(2)
    rows = list(range(len(twice[2])))
    if size % 2:  # any one has to do without its partner: the last has the most noise, and not always that one may
        del rows[int(torch.randint(len(rows), (), generator=generator))]
    return Batch(*(x[rows] for x in twice), [half.captions[row % len(half.captions)] for row in rows])


def with_noise(pictures: Pictures, rows: Tensor, chosen: Tensor, t: Tensor, generator: torch.Generator) -> Batch:
    """rows: (b,), which of the pictures; chosen: (b,), which of their captions; t: (b,), their timesteps."""
    eps_0, eps = torch.randn(2, len(rows), *pictures.mean.shape[1:], generator=generator)
    z_0 = AutoencoderKL.sample(pictures.mean[rows], pictures.log_variance[rows], eps_0)
    return Batch(z_0, eps, t, [pictures.captions[row][i] for row, i in zip(rows, chosen, strict=True)])
