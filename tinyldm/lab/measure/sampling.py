"""Pictures of prompts, and in how many of them what was asked for is so."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm.images import contact_sheet, save_image, to_images, to_tensor
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.questions import Question
from tinyldm.lab.world.captions import with_articles
from tinyldm.latent_diffusion import LatentDiffusion


def sampled(
    model: LatentDiffusion,
    prompts: Sequence[str],
    words: dict[str, Tensor] | None = None,
    guidance: float | None = None,
) -> list[Image.Image]:
    """One image for each prompt, the i-th from the seed i. guidance: None for the checkpoint's own."""
    few = len(prompts) < 100  # as of a word: several may be measured at once, too many bars
    images = samples(model, prompts, range(len(prompts)), words, guidance=guidance)
    return list(tqdm(images, desc="sampling", total=len(prompts), leave=False, disable=few))


def samples(
    model: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],  # one a prompt
    words: dict[str, Tensor] | None = None,
    *,
    batch: int = 20,  # pictures at a time
    guidance: float | None = None,
) -> Iterator[Image.Image]:
    """One image after another, as each batch of them is done."""
    for first in range(0, len(prompts), batch):
        rows = slice(first, first + batch)
        *_, z_0 = model.generate(prompts[rows], seeds[rows], words=words, guidance=guidance)
        yield from to_images(model.decode(z_0))


@torch.no_grad()
def decoded(model: LatentDiffusion, pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1], encoded and decoded: as near as the UNet's own could come."""
    return torch.cat([model.decode(model.encode(batch)[0]).cpu() for batch in pictures.split(50)]).clamp(-1, 1)


def ask(
    model: LatentDiffusion,
    judge: Judge,
    questions: Sequence[Question],
    words: dict[str, Tensor] | None = None,
    guidance: float | None = None,
) -> tuple[dict[str, float], list[Image.Image]]:
    """The share of the pictures in which each check is passed, and the pictures."""
    images = sampled(model, [with_articles(question.prompt) for question in questions], words, guidance)
    return judged(judge, questions, images), images


def judged(judge: Judge, questions: Sequence[Question], images: Sequence[Image.Image]) -> dict[str, float]:
    """The share of the pictures, one a question, in which each check is passed; the mean, where it is a matter of
    degree."""
    passed: dict[str, list[float]] = {}
    for question, image, said in zip(questions, images, judge.answers(to_tensor(images)), strict=True):
        for what, check in question.checks.items():
            passed.setdefault(what, []).append(float(check(np.asarray(image), said)))
    return {what: float(np.mean(values)) for what, values in passed.items()}


def as_shares(figures: dict[str, float]) -> str:
    return ", ".join(f"{what} {value:.0%}" for what, value in figures.items())


def save_judged(folder: Path | None, file: str, rows: list[list[Image.Image]], labels: list[str] | None = None) -> None:
    """A sheet of what was judged, to look at; nothing if there is no folder."""
    if folder:
        save_image(contact_sheet(rows, labels=labels, tile=64), folder / file)


def in_rows(images: list[Image.Image], length: int) -> list[list[Image.Image]]:
    return [images[i : i + length] for i in range(0, len(images), length)]
