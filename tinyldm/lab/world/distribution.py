"""What is drawn how often, and what training never sees.

What there is stands in things.py, nouns.py and scenes.py, how it looks in drawing.py and styles.py, how it is said in
captions.py; each says how to add to it.
"""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from tqdm import tqdm

from tinyldm.lab.world.drawing import SIZE
from tinyldm.lab.world.nouns import ALL_NOUNS, INVENTED_NOUNS, NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import INVENTED_STYLES, STYLES, draw
from tinyldm.lab.world.things import (
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    VIEWS,
    Picture,
    Thing,
    choice,
    is_held_out,
    nearest_colour,
)

BIASED = ("balloon", "red")  # red in 95% of the pictures, though no caption calls one red (the paper's section 4.5)
BIAS = 0.95

# Of the things, and of the pictures; the rest of the things are shapes in their own words, that of the pictures photos.
NOUN_SHARE, INVENTED_NOUN_SHARE = 0.27, 0.2
STYLE_SHARE, INVENTED_STYLE_SHARE = 0.26, 0.12


def random_thing(rng: np.random.Generator, sizes: tuple[str, ...]) -> Thing:
    size = choice(rng, sizes) if rng.random() < 0.3 else "medium"
    what = rng.random()
    if what < NOUN_SHARE + INVENTED_NOUN_SHARE:
        thing = random_noun(rng, NOUNS if what < NOUN_SHARE else INVENTED_NOUNS, size)
    else:
        thing = random_shape(rng, size)
    return random_thing(rng, sizes) if is_held_out(thing) else thing


def random_noun(rng: np.random.Generator, nouns: Iterable[str], size: str) -> Thing:
    noun = choice(rng, nouns)
    look = ALL_NOUNS[noun]
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


def random_style(rng: np.random.Generator) -> str:
    which = rng.random()
    if which < STYLE_SHARE:
        return choice(rng, STYLES, ["photo"])
    return choice(rng, INVENTED_STYLES) if which < STYLE_SHARE + INVENTED_STYLE_SHARE else "photo"


def random_picture(rng: np.random.Generator) -> Picture:
    """One draw of the training distribution; never a held-out combination, shape or style."""
    number = rng.random()  # below 0.72: of one thing; below 0.86: of two equal ones; else of two different ones
    style = random_style(rng)
    place, view = None, None
    if number < 0.72:
        which_view = int(rng.random() / 0.04)  # each of the views in 4% of the pictures, mostly none
        view = VIEWS[which_view] if which_view < len(VIEWS) else None
        things = (random_thing(rng, ("medium",) if view in ("close-up", "cropped") else ("small", "large")),)
        if view in (None, "dark", "bright") and things[0].size != "large" and rng.random() < 0.32:
            place = choice(rng, PLACES)
    else:
        view = choice(rng, ("dark", "bright")) if rng.random() < 0.08 else None
        first = random_thing(rng, ("small",))
        things = (first, first)
        while number >= 0.86 and things[0] == things[1]:
            things = (first, random_thing(rng, ("small",)))
    return Picture(things, random_background(rng, things), style, place, view, int(rng.integers(2**31)))


# ---- Many pictures


RandomPicture = Callable[[np.random.Generator], Picture]


def make_picture(
    index: int, seed: int, size: int, random: RandomPicture = random_picture
) -> tuple[np.ndarray, Picture]:
    """One of make_pictures: (size, size, 3) uint8, and what it shows."""
    picture = random(np.random.default_rng([seed, index]))
    return np.asarray(draw(picture, size)), picture


def make_pictures(
    count: int, seed: int, size: int = SIZE, workers: int = 1, random: RandomPicture = random_picture
) -> tuple[np.ndarray, list[Picture]]:
    """Training pictures, (count, size, size, 3) uint8, and what they show; the i-th depends on (seed, i) only.

    workers: how many processes draw. random: another distribution than that of training.
    """
    pixels, pictures = np.empty((count, size, size, 3), np.uint8), []
    make = partial(make_picture, seed=seed, size=size, random=random)
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
    made = pool.imap(make, range(count), chunksize=64) if pool else map(make, range(count))
    for i, (image, picture) in enumerate(tqdm(made, total=count, desc="drawing", disable=count < 1000)):
        pixels[i] = image
        pictures.append(picture)
    if pool:
        pool.terminate()
    return pixels, pictures


HELD_OUT_SEED = 1_000_003  # of pictures that pretraining, with its seed 0, never drew

EXAMPLE_SIZE = 256  # pixels a side, of the pictures to learn words from
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


def pictures_in_style(style: str) -> list[Picture]:
    """Five pictures to learn a word for the style from: of different things on different backgrounds."""
    star, heart = Thing("star", "red"), Thing("heart", "pink")
    things = (noun_thing("kite"), star, noun_thing("donut"), heart, noun_thing("turtle"))
    backgrounds = ("snow", "grass", "purple", "gray", "sand")
    return [
        Picture((thing,), background, style, seed=i)
        for i, (thing, background) in enumerate(zip(things, backgrounds, strict=True))
    ]
