"""How good learned words are: of things that training never saw, and of the objects of examples/."""

import math
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.inversion import known_norm
from tinyldm.lab import ROOT
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.learning import Training, in_parallel, learn, model_with, tell, word_for
from tinyldm.lab.measure.questions import Question, combined, on_backgrounds
from tinyldm.lab.measure.sampling import as_shares, ask, in_rows, save_judged
from tinyldm.lab.world.captions import name_of
from tinyldm.lab.world.distribution import EXAMPLES, pictures_of
from tinyldm.lab.world.things import Thing
from tinyldm.latent_diffusion import LatentDiffusion

RESAMPLES = 10_000


class Answers(NamedTuple):
    """What became of the questions about one thing, in plain words or with a learned one."""

    shares: dict[str, float]  # check -> of the pictures
    images: list[Image.Image]
    norm: float  # of a learned word, see relative_norm


def report_words(
    training: Training, judge: Judge, things: Sequence[Thing], sheets: Path | None, plain: bool = True
) -> dict[str, float]:
    """A line a thing: how right the pictures of its learned word are, the mean over the seeds; before it one for plain
    words, unless not `plain`. At the end the mean over all things, with its 95% interval.

    Returns {check: that mean}, "norm" among them.
    """

    def answers(task: tuple[Thing, int | None]) -> Answers:
        thing, seed = task
        if seed is None:
            said, model, words = name_of(thing), load_checkpoint(training.weights), None
        else:
            words = word_for(training, pictures_of(thing), seed)
            said, model = "S*", model_with(training.weights, words)
        norm = relative_norm(model, words["S*"]) if words else 1.0
        return Answers(*ask(model, judge, questions_about(said, thing), words), norm)

    seeds = [*([None] if plain else []), *range(training.seeds)]
    results = in_parallel(answers, product(things, seeds), "words")
    means = []
    for thing in things:
        said = name_of(thing)
        if plain:
            tell(f"{said}, in plain words: {as_shares(next(results).shares)}")
        learned = [next(results) for _ in range(training.seeds)]
        means.append(means_of([answer.shares | {"norm": answer.norm} for answer in learned]))
        tell(f"{said}, learned: {as_figures(means[-1])}")
        rows = [row for answer in learned for row in in_rows(answer.images, 20)]
        save_judged(sheets, f"word-{said.replace(' ', '-')}.png", rows)
    tell(f"mean of {len(things) * training.seeds} words for {len(things)} things: {with_intervals(means)}")
    return means_of(means)


def questions_about(word: str, thing: Thing) -> list[Question]:
    return [*on_backgrounds(word, thing), *combined(word, thing)]


def relative_norm(model: LatentDiffusion, vectors: Tensor) -> float:
    """The mean norm of a word's vectors (count, width), over that of known words."""
    return vectors.norm(dim=1).mean().item() / known_norm(model)


def means_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {check: float(np.mean([row[check] for row in rows])) for check in rows[0]}


def as_figures(figures: dict[str, float]) -> str:
    """Shares, and the norm at the end."""
    shares = {check: value for check, value in figures.items() if check != "norm"}
    return f"{as_shares(shares)}, norm {figures['norm']:.2f}"


def with_intervals(rows: Sequence[dict[str, float]]) -> str:
    """The mean of each figure over the rows, one a word, and its 95% interval."""
    texts = []
    for check, mean in means_of(rows).items():
        low, high = interval([row[check] for row in rows])
        form = ".2f" if check == "norm" else ".1%"
        texts.append(f"{check} {mean:{form}} ({low:{form}} to {high:{form}})")
    return ", ".join(texts)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the mean of all that these are a sample of is, in 95 of 100 cases: the bootstrap, means of as many values
    that are drawn from these, with repeats. Few values vary too little, so its ends go out as far as Student's t asks
    (the expanded percentile interval, arXiv 1411.5279). Of fewer than five they are the least and the most of the
    values, and hold it less often."""
    n = len(values)
    if n < 2:
        return values[0], values[0]
    means = np.random.default_rng(0).choice(values, (RESAMPLES, n)).mean(axis=1)
    outside = NormalDist().cdf(-student(n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.quantile(means, (outside, 1 - outside))
    mean = fmean(values)  # which sums of floats miss by a last digit
    return min(float(low), mean), max(float(high), mean)


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t, but for few degrees of freedom as a series in 1 over them (Abramowitz and
    Stegun 26.7.5), right to 0.01 from 4 on."""
    z = NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return {1: 12.706, 2: 4.303, 3: 3.182}.get(freedom) or sum(term / freedom**i for i, term in enumerate(terms))


# ---- The words of examples/


def ask_word(weights: Path, judge: Judge, embedding: Path, thing: Thing) -> tuple[dict[str, float], list[Image.Image]]:
    """16 samples of the file's word over 4 backgrounds: the share with the thing's colours, its shape if the judge
    knows it, and the background that was asked for; and the samples."""
    words = load_embeddings(embedding)
    return ask(model_with(weights, words), judge, on_backgrounds(next(iter(words)), thing), words)


def report_examples(training: Training, judge: Judge, sheets: Path | None) -> None:
    """A line for each object of examples/: what its word does, and how long train.py learned it."""
    rows = []
    for example, thing in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            embedding = learn(training, ROOT / "examples" / example, Path(folder) / "word")
            seconds = time.monotonic() - started
            figures, images = ask_word(training.weights, judge, embedding, thing)
        print(f"{example}: {as_shares(figures)}, learned in {seconds:.0f} s", flush=True)
        rows.append(images)
    save_judged(sheets, "examples.png", rows, list(EXAMPLES))
