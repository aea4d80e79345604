"""How well a learned word keeps an outline: that of a shape training never saw, beside shapes that it knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.images import to_images, to_tensor
from tinyldm.lab.measure.colours import EDGE, contrast_of
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.learning import Training, in_parallel, model_with, tell, word_for
from tinyldm.lab.measure.questions import on_backgrounds, true_pictures
from tinyldm.lab.measure.sampling import ask, decoded, save_judged
from tinyldm.lab.world.captions import name_of
from tinyldm.lab.world.distribution import pictures_of
from tinyldm.lab.world.drawing import shape_mask
from tinyldm.lab.world.things import SHAPES, Spot, Thing

UNSEEN_SHAPES = [Thing("bolt", "yellow"), Thing("hourglass", "red"), Thing("arrow", "blue")]
KNOWN_SHAPES = [Thing("heart", "green"), Thing("star", "purple"), Thing("cross", "orange")]
SIDE = 48  # of the silhouettes that are compared
DRAWN = 256  # pixels: the side of the picture that an outline is taken from
ANGLES = range(-12, 13, 2)  # degrees: the world's things lean by as much


def silhouette(mask: np.ndarray) -> np.ndarray:
    """A mask (h, w) in its smallest square, as large as all others: (SIDE, SIDE) bool."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows) == 0:
        return np.zeros((SIDE, SIDE), bool)
    middle_y, middle_x = rows[[0, -1]].sum() / 2 + 0.5, columns[[0, -1]].sum() / 2 + 0.5
    half = max(np.ptp(rows), np.ptp(columns)) / 2 + 0.5
    box = (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    square = image.transform((SIDE, SIDE), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.asarray(square) > 127


def silhouette_of(image: Image.Image) -> np.ndarray:
    """Of what stands out from the picture's background by half as much as its colour does: where its edge is."""
    contrast = contrast_of(np.asarray(image.resize((DRAWN, DRAWN), Image.Resampling.BICUBIC)))
    half = np.median(contrast[contrast > EDGE]) / 2 if (contrast > EDGE).any() else EDGE
    return silhouette(contrast > max(half, EDGE))


@cache
def true_silhouettes(shape: str) -> np.ndarray:
    """Of the shape's outline in all its leanings, (len(ANGLES), SIDE, SIDE) bool."""
    return leaning_silhouettes(lambda spot: shape_mask(Thing(shape, "red"), spot, DRAWN))


def leaning_silhouettes(mask_at: Callable[[Spot], Image.Image]) -> np.ndarray:
    """Of anything whose mask can be drawn at a spot, white on black, DRAWN pixels wide: as `true_silhouettes`."""
    spots = [Spot(0.5, 0.5, 0.3, np.radians(angle)) for angle in ANGLES]
    return np.stack([silhouette(np.asarray(mask_at(spot)) > 127) for spot in spots])


def overlap(seen: np.ndarray, shape: str) -> float:
    """Intersection over union of a silhouette and the shape's own, in the leaning that suits best."""
    return best_overlap(seen, true_silhouettes(shape))


def best_overlap(seen: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of a silhouette and that of the true ones, (n, SIDE, SIDE), which suits best."""
    return float(((seen & true).sum(axis=(1, 2)) / (seen | true).sum(axis=(1, 2))).max())


@dataclass(frozen=True)
class HasOutline:
    """How far the object's outline is the true one, in any of its leanings: the `best_overlap`. A check."""

    true: Callable[[], np.ndarray]  # its silhouettes

    def __call__(self, pixels: np.ndarray, said: dict[str, str]) -> float:
        return best_overlap(silhouette_of(Image.fromarray(pixels)), self.true())


def mean_overlap(silhouettes: Sequence[np.ndarray], shape: str) -> float:
    return float(np.mean([overlap(seen, shape) for seen in silhouettes]))


def report_outlines(training: Training, judge: Judge, sheets: Path | None) -> dict[str, float]:
    """A line for each of three unseen and three known shapes in one colour: how right the samples of its word are.

    "IoU" is the mean `overlap` with its own outline; after it what can be reached, that of the world's own pictures
    once they are encoded and decoded, and what the samples have with other known outlines, the mean and the most.
    Returns {shape: IoU of its samples}.
    """

    def samples(task: tuple[Thing, int]) -> tuple[dict[str, float], list[Image.Image]]:
        thing, seed = task
        words = word_for(training, pictures_of(thing), seed)
        return ask(model_with(training.weights, words), judge, on_backgrounds("S*", thing), words)

    things = [*UNSEEN_SHAPES, *KNOWN_SHAPES]
    model = load_checkpoint(training.weights)
    results = in_parallel(samples, product(things, range(training.seeds)), "outlines")
    figures, rows = {}, []
    for thing in things:
        learned = [next(results) for _ in range(training.seeds)]
        colours = np.mean([passed["colours"] for passed, _ in learned])
        seen = [silhouette_of(image) for _, images in learned for image in images]
        true = [silhouette_of(image) for image in to_images(decoded(model, to_tensor(true_pictures(thing))))]
        others = {shape: mean_overlap(seen, shape) for shape in SHAPES if shape != thing.shape}
        nearest = max(others, key=others.get)
        figures[thing.shape] = mean_overlap(seen, thing.shape)
        line = f"{name_of(thing)}: colours {colours:.0%}, IoU {figures[thing.shape]:.2f}"
        line += f"; decoded true pictures {mean_overlap(true, thing.shape):.2f}"
        line += f"; other outlines {np.mean(list(others.values())):.2f}, {nearest} {others[nearest]:.2f}"
        tell(line)
        rows += [images for _, images in learned]
    save_judged(sheets, "outlines.png", rows, [name_of(thing) for thing in things for _ in range(training.seeds)])
    for what, some in (("unseen", UNSEEN_SHAPES), ("known", KNOWN_SHAPES)):
        tell(f"mean IoU of {len(some)} {what} shapes: {np.mean([figures[thing.shape] for thing in some]):.2f}")
    return figures
