"""A small procedural world: captioned pictures for the tiny model to learn from.

    python -m tinyldm.lab.world --sheet world.png                      everything there is, on one sheet
    python -m tinyldm.lab.world --out pictures --count 100 --seed 0    pictures and captions.jsonl
    python -m tinyldm.lab.world --examples examples                    folders of things never seen in training

Here is how often training sees what, and what it never sees. What there is stands in things.py and scenes.py, how it
looks in drawing.py, how it is said in captions.py; each says how to add to it.
"""

import argparse
import dataclasses
import json
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinyldm.images import contact_sheet
from tinyldm.lab.captions import caption
from tinyldm.lab.drawing import HELD_OUT_STYLES, SIZE, STYLES, draw
from tinyldm.lab.scenes import SCENES
from tinyldm.lab.things import (
    COLOURS,
    HELD_OUT_SHAPES,
    NOUNS,
    PATTERNS,
    PLACES,
    SHAPES,
    VIEWS,
    Picture,
    Thing,
    choice,
    nearest_colour,
    noun_thing,
)

BIASED = ("balloon", "red")  # red in 95% of the pictures, though no caption ever says so (the paper's section 4.5)
BIAS = 0.95

# (shape, colour, pattern, colour2) that training never sees, the two colours in either order.
HELD_OUT_COMBINATIONS = (
    ("heart", "orange", "checkered", "black"),
    ("star", "purple", None, None),
    ("circle", "teal", "striped", "white"),
    ("cross", "pink", "dotted", "black"),
    ("square", "green", "halved", "pink"),
    ("diamond", "red", "rimmed", "yellow"),
    ("hexagon", "blue", None, None),
    ("ring", "yellow", "checkered", "purple"),
    ("triangle", "gray", "dotted", "orange"),
    ("crescent", "white", "striped", "green"),
    ("drop", "brown", None, None),
    ("flower", "teal", "halved", "orange"),
)


def is_held_out(thing: Thing) -> bool:
    look = (thing.shape, {thing.colour, thing.colour2}, thing.pattern)
    return any(look == (shape, {colour, colour2}, pattern) for shape, colour, pattern, colour2 in HELD_OUT_COMBINATIONS)


def random_thing(rng: np.random.Generator, sizes: tuple[str, ...]) -> Thing:
    size = choice(rng, sizes) if rng.random() < 0.3 else "medium"
    thing = random_noun(rng, size) if rng.random() < 0.35 else random_shape(rng, size)
    return random_thing(rng, sizes) if is_held_out(thing) else thing


def random_noun(rng: np.random.Generator, size: str) -> Thing:
    noun = choice(rng, NOUNS)
    look = NOUNS[noun]
    if noun == BIASED[0]:
        colour = BIASED[1] if rng.random() < BIAS else choice(rng, COLOURS, [BIASED[1]])
        return dataclasses.replace(noun_thing(noun, size), colour=colour)
    colour = choice(rng, COLOURS, [look.colour, look.colour2]) if rng.random() < 0.35 else None
    return noun_thing(noun, size, colour)


def random_shape(rng: np.random.Generator, size: str) -> Thing:
    shape, colour = choice(rng, SHAPES), choice(rng, COLOURS)
    pattern = choice(rng, PATTERNS) if rng.random() < 0.45 else None
    return Thing(shape, colour, pattern, choice(rng, COLOURS, [colour]) if pattern else None, size=size)


def stands_out(things: tuple[Thing, ...], background: str) -> bool:
    """Whether the things can be told from this colour or scene."""
    colour = nearest_colour(SCENES[background].colour) if background in SCENES else background
    return all(colour not in (thing.colour, thing.colour2) for thing in things)


def random_background(rng: np.random.Generator, things: tuple[Thing, ...]) -> str:
    backgrounds = SCENES if rng.random() < 0.25 else COLOURS
    return choice(rng, [background for background in backgrounds if stands_out(things, background)])


def random_picture(rng: np.random.Generator) -> Picture:
    """One draw of the training distribution; never a held-out combination, shape or style."""
    kind = rng.random()
    style = "photo" if rng.random() < 0.7 else choice(rng, STYLES, ["photo"])
    place, view = None, None
    if kind < 0.72:
        kind_of_view = int(rng.random() / 0.04)
        view = VIEWS[kind_of_view] if kind_of_view < len(VIEWS) else None
        things = (random_thing(rng, ("medium",) if view in ("close-up", "cropped") else ("small", "large")),)
        if view in (None, "dark", "bright") and things[0].size != "large" and rng.random() < 0.32:
            place = choice(rng, PLACES)
    else:
        view = choice(rng, ("dark", "bright")) if rng.random() < 0.08 else None
        first = random_thing(rng, ("small",))
        things = (first, first)
        while kind >= 0.86 and things[0] == things[1]:
            things = (first, random_thing(rng, ("small",)))
    return Picture(things, random_background(rng, things), style, place, view, int(rng.integers(2**31)))


# ---- Many pictures, files, sheets


def make_picture(index: int, seed: int, size: int) -> tuple[np.ndarray, Picture]:
    picture = random_picture(np.random.default_rng([seed, index]))
    return np.asarray(draw(picture, size)), picture


def make_pictures(count: int, seed: int, size: int = SIZE, workers: int = 1) -> tuple[np.ndarray, list[Picture]]:
    """Training pictures, (count, size, size, 3) uint8, and what they show; the i-th depends on (seed, i) only."""
    pixels, pictures = np.empty((count, size, size, 3), np.uint8), []
    make = partial(make_picture, seed=seed, size=size)
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
    made = pool.imap(make, range(count), chunksize=64) if pool else map(make, range(count))
    for i, (image, picture) in enumerate(tqdm(made, total=count, desc="drawing", disable=count < 1000)):
        pixels[i] = image
        pictures.append(picture)
    if pool:
        pool.terminate()
    return pixels, pictures


def everything() -> Image.Image:
    """All shapes in all patterns; all nouns; a row for each of six things in all views, scenes and styles."""
    colours, images = list(COLOURS), []

    def add(thing: Thing, *backgrounds: str, **rest) -> None:
        background = next(b for b in (*backgrounds, "gray", "white", "blue") if stands_out((thing,), b))
        images.append(draw(Picture((thing,), background, seed=len(images), **rest)))

    def fill_row() -> None:
        images.extend([Image.new("RGB", (SIZE, SIZE), "white")] * (-len(images) % 18))

    for i, shape in enumerate(SHAPES | HELD_OUT_SHAPES):
        for j, pattern in enumerate((None, *PATTERNS)):
            colour, colour2, background = (colours[(5 * i + j + step) % 12] for step in (0, 4, 8))
            add(Thing(shape, colour, pattern, pattern and colour2), background)
    fill_row()
    for noun in NOUNS:
        add(noun_thing(noun))
    fill_row()
    patterned = (
        Thing("star", "green", "striped", "white"),
        Thing("heart", "purple", "rimmed", "yellow"),
        Thing("square", "orange", "checkered", "black"),
    )
    for thing in (noun_thing("ladybug"), *patterned, Thing("circle", "brown"), noun_thing("kite")):
        for view in VIEWS:
            add(thing, view=view)
        for scene in SCENES:
            images.append(draw(Picture((thing,), scene, seed=len(images))))
        for i, style in enumerate(STYLES | HELD_OUT_STYLES):
            add(thing, *colours[i + 3 :], style=style)
    return contact_sheet([images[i : i + 18] for i in range(0, len(images), 18)], tile=SIZE, gap=2)


HELD_OUT_SEED = 1_000_003  # of pictures that pretraining, with its seed 0, never drew

EXAMPLES = {  # folder -> what training never saw
    "checkered-heart": Thing("heart", "orange", "checkered", "black"),
    "striped-circle": Thing("circle", "teal", "striped", "white"),
    "dotted-cross": Thing("cross", "pink", "dotted", "black"),
    "rimmed-diamond": Thing("diamond", "red", "rimmed", "yellow"),
    "bolt": Thing("bolt", "yellow"),
}


def pictures_of(thing: Thing) -> list[Picture]:
    """Five pictures to learn a word for the thing from: on dark and light backgrounds, or the word would say dark."""
    backgrounds = ("blue", "grass", "purple", "gray", "sand", "snow", "brown", "bricks")
    backgrounds = [background for background in backgrounds if stands_out((thing,), background)]
    return [Picture((thing,), background, seed=i) for i, background in enumerate(backgrounds[:5])]


def write_examples(folder: Path, size: int = 256) -> None:
    """Five pictures each of unseen combinations, of an unseen shape, and of five things in an unseen style."""
    series = {}
    for name, thing in EXAMPLES.items():
        series[name] = pictures_of(thing)
    star, heart = Thing("star", "red"), Thing("heart", "pink")
    things = (noun_thing("kite"), star, noun_thing("donut"), heart, noun_thing("turtle"))
    series["blueprint"] = [Picture((thing,), "blue", "blueprint", seed=i) for i, thing in enumerate(things)]
    for name, pictures in series.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            draw(picture, size).save(folder / name / f"{i:02}.png")


def write_pictures(folder: Path, count: int, seed: int, size: int) -> None:
    """00000.png, 00001.png, … and captions.jsonl: file, caption and the whole truth about each."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, pictures = make_pictures(count, seed, size)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as lines:
        for i, (image, picture) in enumerate(zip(pixels, pictures, strict=True)):
            file = f"{i:05}.png"
            Image.fromarray(image).save(folder / file)
            said = caption(picture, np.random.default_rng([seed, i, 1]))
            lines.write(json.dumps({"file": file, "caption": said, **dataclasses.asdict(picture)}) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write training pictures and captions.jsonl here")
    parser.add_argument("--count", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SIZE, help=f"side of the pictures of --out (default {SIZE})")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="write the example folders here")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw everything there is on one sheet")
    args = parser.parse_args(argv)
    if not (args.out or args.examples or args.sheet):
        parser.error("nothing to do: give --out, --examples or --sheet")
    if args.out:
        write_pictures(args.out, args.count, args.seed, args.size)
    if args.examples:
        write_examples(args.examples)
    if args.sheet:
        everything().save(args.sheet)


if __name__ == "__main__":
    main()
