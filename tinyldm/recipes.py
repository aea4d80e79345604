"""Ways to learn a word: what the paper tried, and what others have tried since.

`Recipe()` is the paper's own way (arXiv 2208.01618, section 4): one vector, a copy of a coarse word's; pictures,
timesteps and noise drawn independently; AdamW at a constant rate, without its weight decay, of which the paper does not
tell (its code leaves it at PyTorch's 0.01); nothing added to the loss. Each name in RECIPES changes one thing of it, by
one small function or class below. Names are composed: "low-variance,falling" lets the rate fall besides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.inversion import (
    Batch,
    Pictures,
    add_words,
    caption_beside,
    captions_of,
    draw_independently,
    draw_pairs,
    draw_spread_out,
    whole_words,
)
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.optimizers import Adam, DecayingNorm, KeptNorm, OnSphere
from tinyldm.schedule import NoiseSchedule

LossOf = Callable[[Batch, dict[str, Tensor]], Tensor]  # train.py's inversion_loss with the frozen model


# ---- Which vectors there are, and when


class Word:
    """The new word, known to the model's tokenizer. All its vectors are there from the first step."""

    def __init__(self, model: LatentDiffusion, token: str, vectors: Tensor, pictures: int):
        """vectors: (count, width), as the word starts; pictures: how many it is learned from."""
        self.token, self.count, self.placeholders = token, len(vectors), model.tokenizer.placeholders
        add_words(model, {token: vectors})
        self.vectors = vectors  # all that learns

    def now(self, done: float) -> dict[str, Tensor]:
        """What captions may hold when this share of the steps is done: word -> (vectors, width)."""
        return {self.token: self.vectors}

    def captions(self, captions: list[list[str]]) -> list[list[str]]:
        """What becomes of the captions of each picture."""
        return captions


class ProgressiveWord(Word):
    """The second vector joins after two fifths of the steps, the third after four fifths, as after 2,000 and 4,000 of
    the paper's 5,000 (section 5.2). One that waits is not in the prompt either."""

    JOINS = (0.4, 0.8)

    def now(self, done: float) -> dict[str, Tensor]:
        count = min(self.count, 1 + sum(done >= share for share in self.JOINS))
        first = self.placeholders[self.token][0]
        self.placeholders[self.token] = list(range(first, first + count))
        return {self.token: self.vectors[:count]}


class WordPerPicture(Word):
    """Beside the word one for each picture, to take what only that one shows (section 5.2, "per-image tokens": "a photo
    of S* with S_i"). Only the new word is kept.

    The paper's code says "with S_i" in a quarter of the captions, and starts these tokens with random vectors; here it
    is in all, and they start as the word does.
    """

    def __init__(self, model: LatentDiffusion, token: str, vectors: Tensor, pictures: int):
        self.others = [f"<{token} in picture {i}>" for i in range(1, pictures + 1)]
        of_pictures = vectors[-1:].repeat(pictures, 1)
        add_words(model, dict(zip(self.others, of_pictures.split(1), strict=True)))
        super().__init__(model, token, vectors, pictures)
        self.vectors = torch.cat([vectors, of_pictures])

    def now(self, done: float) -> dict[str, Tensor]:
        own, *others = self.vectors.split([self.count, *[1] * len(self.others)])
        return {self.token: own, **dict(zip(self.others, others, strict=True))}

    def captions(self, captions: list[list[str]]) -> list[list[str]]:
        return [[f"{text} with {other}" for text in of] for of, other in zip(captions, self.others, strict=True)]


# ---- What is said of the pictures. Their paths and the templates -> the captions of each picture.


def from_templates(model: LatentDiffusion, token: str, paths: list[Path], templates: Sequence[str]) -> list[list[str]]:
    """The same for all: every template with the word in it."""
    return [captions_of(model, templates, token)] * len(paths)


def from_files(model: LatentDiffusion, token: str, paths: list[Path], templates: Sequence[str]) -> list[list[str]]:
    """One for each, from the .txt beside it or its name."""
    return [[caption_beside(model, path, token)] for path in paths]


# ---- How they start. Those of the coarse word, (vectors, width) -> others of the same shape.


class Lesson(NamedTuple):
    """What a start may look at."""

    model: LatentDiffusion
    word: Word
    pictures: Pictures
    batch: int  # pictures a step
    loss_of: LossOf
    loss_scale: float  # by which gradients of it are to be larger on their way, see train.py

    def fixed_batch(self, size: int) -> Batch:
        """The same every time: pictures, captions, timesteps and noise by which vectors can be compared."""
        return draw_spread_out(self.pictures, self.model.schedule, size, torch.Generator().manual_seed(0))


def copies(lesson: Lesson) -> Tensor:
    """Of the coarse word, as in the paper."""
    return lesson.word.vectors


@torch.no_grad()
def outputs(lesson: Lesson) -> Tensor:
    """What the text encoder makes of the coarse word, which is nearer to what words become by learning than its own row
    of the table is (Cross Initialization, arXiv 2312.15905)."""
    context = lesson.model.context([lesson.word.token], lesson.word.now(1))
    own = context[0, 1 : 1 + lesson.word.count].float()  # after the start token
    return torch.cat([own, lesson.word.vectors[lesson.word.count :]])


CANDIDATES = 32


def best_words(lesson: Lesson) -> Tensor:
    """The known words that suit the pictures best, one vector after the other.

    All are ranked by how much the loss of one batch would fall, to first order, if the vector became theirs; of the
    best, CANDIDATES, that loss itself is computed. Prints the five best of these. Raises InputError if the vocabulary
    has no whole words.
    """
    model, word = lesson.model, lesson.word
    batch, table, ids = lesson.fixed_batch(lesson.batch), model.text_encoder.table.float(), whole_words(model)
    if not len(ids):
        raise InputError("auto-start found no whole words in the vocabulary to start from; say a start with --init")
    with tqdm(total=word.count * CANDIDATES, desc=f"looking for words like {word.token}", leave=False) as bar:
        for i in range(word.count):
            vectors = word.vectors.requires_grad_()
            (gradient,) = torch.autograd.grad(lesson.loss_scale * lesson.loss_of(batch, word.now(1)), vectors)
            word.vectors = vectors.detach()
            change, losses = (table[ids] - word.vectors[i]) @ gradient[i], {}
            for candidate in ids[change.argsort()[:CANDIDATES]].tolist():
                word.vectors[i] = table[candidate]
                with torch.no_grad():
                    losses[candidate] = lesson.loss_of(batch, word.now(1)).item()
                bar.update()
            ranking = sorted(losses, key=losses.get)
            word.vectors[i] = table[ranking[0]]
            names = ", ".join(f'"{model.tokenizer.decode([k])}" {losses[k]:.4f}' for k in ranking[:5])
            bar.write(f"vector {i + 1} of {word.token} starts from the word of the smallest loss: {names}")
    return word.vectors


# ---- How the rate goes on. The share of the steps that is done -> the factor of --lr.


def constant(done: float) -> float:
    return 1.0


def falling(done: float) -> float:
    """In a straight line to 0: the last steps are the smallest, so the word settles where it should be."""
    return 1 - done


# ---- What is added to the loss. The vectors now and as they started, (vectors, width) -> a number.


def nothing(vectors: Tensor, first: Tensor) -> Tensor:
    return vectors.new_zeros(())


def squared_distance(vectors: Tensor, first: Tensor, weight: float) -> Tensor:
    """|v - v_0|^2, the mean over the vectors (section 5.2, "regularization")."""
    return weight * (vectors - first).square().sum(dim=1).mean()


def distance(vectors: Tensor, first: Tensor, weight: float) -> Tensor:
    """|v - v_0|, the mean over the vectors (Cross Initialization)."""
    # F.pairwise_distance adds a tiny number, without which there is no gradient where both are the same.
    return weight * F.pairwise_distance(vectors, first).mean()


# ---- When it stops, besides at the last step


class AtTheEnd:
    """Not before."""

    def __init__(self, lesson: Lesson, steps: int):
        self.history: list[float] = []

    def watch(self, words: dict[str, Tensor]) -> None:
        """Called after every step, with the words as they are now."""

    def reason(self) -> str:
        """Why to stop now, or ""."""
        return ""


class WhenFlat(AtTheEnd):
    """When the loss of one fixed batch hardly changes any more: its variance over the last steps is less than 0.15 of
    that over all steps so far (DVAR, arXiv 2302.04841).

    Its window is 310 steps of 6,000. A twentieth of so few steps as 150 is too short: of a loss that falls in a
    straight line, the last 8 steps vary less than 0.15 times as much as the first 21.
    """

    BATCH, LEAST, WINDOW = 4, 0.15, 0.2

    def __init__(self, lesson: Lesson, steps: int):
        super().__init__(lesson, steps)
        self.loss_of, self.batch = lesson.loss_of, lesson.fixed_batch(self.BATCH)
        self.window = max(8, round(self.WINDOW * steps))

    @torch.no_grad()
    def watch(self, words: dict[str, Tensor]) -> None:
        self.history.append(self.loss_of(self.batch, words).item())

    def reason(self) -> str:
        losses = torch.tensor(self.history, dtype=torch.float64)
        if len(losses) <= self.window:
            return ""
        share = (losses[-self.window :].var(correction=0) / losses.var(correction=0)).item()
        if share >= self.LEAST:
            return ""
        return f"in the last {self.window} steps the loss of a fixed batch varied {share:.2f} times as much as in all"


# ---- Recipes


Draw = Callable[[Pictures, NoiseSchedule, int, torch.Generator], Batch]


@dataclass(frozen=True)
class Recipe:
    """How a word is learned. The defaults are the paper's."""

    vectors: int | None = None  # None: as many as the coarse words have tokens
    word: type[Word] = Word
    captions: Callable[[LatentDiffusion, str, list[Path], Sequence[str]], list[list[str]]] = from_templates
    start: Callable[[Lesson], Tensor] = copies
    draw: Draw = draw_independently
    lr: float = 1.0  # times --lr
    rate: Callable[[float], float] = constant
    optimizer: type[Adam | OnSphere] = Adam
    penalty: Callable[[Tensor, Tensor], Tensor] = nothing
    stop: type[AtTheEnd] = AtTheEnd


RECIPES: dict[str, dict[str, object]] = {  # name -> what it changes
    "paper": {},
    "high-rate": {"lr": 4.0},  # 2e-2 where the paper's is 5e-3 (section 5.2)
    "low-rate": {"lr": 0.02},  # 1e-4
    "2-word": {"vectors": 2},
    "3-word": {"vectors": 3},
    "progressive": {"vectors": 3, "word": ProgressiveWord},
    "regularised": {"penalty": partial(squared_distance, weight=1e-2)},
    "per-image": {"word": WordPerPicture},
    "captions": {"captions": from_files},
    "fixed-norm": {"optimizer": OnSphere},
    "cross": {"start": outputs, "penalty": partial(distance, weight=1e-5)},
    "kept-norm": {"optimizer": KeptNorm},
    "norm-decay": {"optimizer": DecayingNorm},
    "early-stop": {"stop": WhenFlat},
    "low-variance": {"draw": draw_spread_out},
    "pairs": {"draw": draw_pairs},
    "falling": {"rate": falling},
    "auto-start": {"start": best_words},
}


def composed(names: str) -> Recipe:
    """The recipe of these names with commas between them. Raises InputError for a name that there is not, and for two
    that change the same."""
    changes: dict[str, object] = {}
    changed_by: dict[str, str] = {}
    for name in names.split(","):
        if name not in RECIPES:
            raise InputError(f'no recipe "{name}", expected some of {", ".join(RECIPES)}, with commas between them')
        for what, value in RECIPES[name].items():
            if what in changes:
                raise InputError(
                    f"the recipes {changed_by[what]} and {name} both change the {what}; choose one of them"
                )
            changes[what], changed_by[what] = value, name
    return Recipe(**changes)
