"""How a training step's seconds grow: with a word's vectors and pictures, the batch, the pixels, the vocabulary, and
the words that are learned at a time."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from statistics import median

from tqdm import tqdm

from helpers.public import merges
from helpers.works import Work, our_model, seconds_of, step_of_words, training_step
from tinyldm import InputError
from tinyldm.clip import CLIPTextEncoder
from tinyldm.lab.paper.plots import new_figure, save_figure
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.tokenizer import Tokenizer

VALUES = {
    "vectors": (1, 2, 4, 8),
    "pictures": (3, 10, 30, 100),
    "vocabulary": (1000, 4000, 16000, 49408),
    "batch": (1, 2, 4, 8, 16),
    "words": (1, 4, 16),  # at a time, each with a batch of its own
}
LARGE, SMALL = (256, 384, 512, 640, 768), (32, 64, 96, 128)  # pixels

Growth = dict[str, dict[int, list[float]]]  # quantity -> its value -> seconds of each round


def growth(options: Namespace) -> Growth:
    """One quantity changes at a time. A round takes a step with each value, so that a slow while slows all of them."""
    model = our_model(options)
    usual = usual_values(model, options)
    values = VALUES | {"pixels": LARGE if options.model in ("1.5", "2.1") else SMALL}
    steps, found = {}, {name: {} for name in values}
    for name, value in [(quantity, value) for quantity in values for value in values[quantity]]:
        try:
            steps[name, value] = step_of(model, **usual | {name: value})
            found[name][value] = []
        except InputError as error:
            print(f"left out: {name} {value}: {error}", file=sys.stderr)
    with tqdm(total=(1 + options.rounds) * len(steps), desc="growth") as bar:
        for number in range(1 + options.rounds):
            for (name, value), step in steps.items():
                seconds = seconds_of(step, options.device)
                if number:  # the first one does not count
                    found[name][value].append(seconds)
                bar.update()
    return found


def usual_values(model: LatentDiffusion, options: Namespace) -> dict[str, int]:
    """Of the quantities that do not change."""
    vocabulary, batch = model.tokenizer.vocabulary_size, options.batch or model.defaults.batch
    return {"vectors": 1, "pictures": 5, "vocabulary": vocabulary, "batch": batch, "pixels": options.size, "words": 1}


def step_of(
    model: LatentDiffusion, vectors: int, pictures: int, vocabulary: int, batch: int, pixels: int, words: int
) -> Work:
    """Raises InputError if it surely needs more memory than there is."""
    model.check_size(pixels, pixels, batch * words)
    if words > 1:
        return step_of_words(model, pixels, batch, words)
    step, _ = training_step(with_vocabulary(model, vocabulary), pixels, batch, vectors, pictures)
    return step


def with_vocabulary(model: LatentDiffusion, size: int) -> LatentDiffusion:
    """The same networks, a tokenizer without new words, and a random table if the vocabulary is of another size."""
    if size == model.tokenizer.vocabulary_size:
        return replace(model, tokenizer=deepcopy(model.tokenizer))
    tokenizer = Tokenizer(merges(size), length=model.tokenizer.length, pad=model.tokenizer.pad)
    text = CLIPTextEncoder(replace(model.text_encoder.config, vocabulary_size=size))
    text.text_model.encoder = model.text_encoder.text_model.encoder  # the most of it, which need not be there twice
    return replace(model, tokenizer=tokenizer, text_encoder=text).to(model.device, model.dtype)


def growth_table(found: Growth) -> Iterator[str]:
    """The medians, a line for each quantity."""
    for name, of_value in found.items():
        yield f"{name}: " + ", ".join(f"{value} {median(seconds):.3g} s" for value, seconds in of_value.items())


def draw_growth(found: Growth, options: Namespace) -> None:
    """A small panel for each quantity, medians with extremes, all with the same seconds."""
    figure = new_figure(14, 2.8)
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (name, of_value) in zip(panels, found.items(), strict=True):
        middle = [median(seconds) for seconds in of_value.values()]
        below = [m - min(seconds) for m, seconds in zip(middle, of_value.values(), strict=True)]
        above = [max(seconds) - m for m, seconds in zip(middle, of_value.values(), strict=True)]
        axes.errorbar([*of_value], middle, yerr=[below, above], fmt="o-", markersize=4, elinewidth=1)
        axes.set(xlabel=name, xlim=0)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="seconds of a step", ylim=0)  # now that all of them are there
    save_figure(figure, options.growth)
