"""The nouns of the small world: thirty-nine everyday ones, and a thousand that are spoken nowhere else.

A noun says at once what shape, colours and pattern a thing has, in one token. A learned word has to do the same, and it
is easier to find among the vectors of a thousand such words than of thirty-nine (Stable Diffusion's text encoder has
seen tens of thousands). To add an everyday noun: add an entry to NOUNS.
"""

from dataclasses import dataclass

import numpy as np

from tinyldm.lab.world.names import invented_names
from tinyldm.lab.world.things import (
    COLOURS,
    HELD_OUT_SHAPES,
    MARKED,
    PATTERNS,
    SHAPES,
    Thing,
    arc,
    around,
    choice,
    corners,
    is_held_out,
    moved,
)

NOUN_SHAPES = {  # those that have no word of their own
    "balloon": [np.concatenate([moved(arc(0.84, 97, 443) * (0.9, 1), 0, -0.16), corners(".2,1 -.2,1")])],
}
ANY_THING = "thing"  # what captions may call anything


@dataclass(frozen=True)
class Noun:
    """What one word says at once."""

    shape: str
    colour: str
    pattern: str | None = None
    colour2: str | None = None
    mark: str | None = None


NOUNS = {
    "lemon": Noun("oval", "yellow"),
    "egg": Noun("oval", "white"),
    "plum": Noun("oval", "purple"),
    "bee": Noun("oval", "yellow", "striped", "black"),
    "pill": Noun("oval", "white", "halved", "red"),
    "tomato": Noun("circle", "red"),
    "cookie": Noun("circle", "brown", "dotted", "black"),
    "ladybug": Noun("circle", "red", "dotted", "black"),
    "pumpkin": Noun("circle", "orange", "striped", "brown"),
    "button": Noun("circle", "blue", "dotted", "white"),
    "sun": Noun("circle", "yellow", "rimmed", "orange"),
    "donut": Noun("ring", "pink", "dotted", "white"),
    "tire": Noun("ring", "black"),
    "lifebuoy": Noun("ring", "red", "striped", "white"),
    "moon": Noun("crescent", "yellow"),
    "watermelon": Noun("crescent", "red", "rimmed", "green"),
    "starfish": Noun("star", "orange", "dotted", "white"),
    "medal": Noun("star", "yellow", "rimmed", "brown"),
    "valentine": Noun("heart", "red", "rimmed", "pink"),
    "gem": Noun("diamond", "teal"),
    "kite": Noun("diamond", "blue", "halved", "yellow"),
    "pizza": Noun("triangle", "yellow", "dotted", "red"),
    "tent": Noun("triangle", "orange", "striped", "white"),
    "chessboard": Noun("square", "black", "checkered", "white"),
    "domino": Noun("square", "white", "dotted", "black"),
    "window": Noun("square", "blue", "rimmed", "white"),
    "crate": Noun("square", "brown", "striped", "yellow"),
    "raindrop": Noun("drop", "blue"),
    "pear": Noun("drop", "green"),
    "flame": Noun("drop", "orange", "rimmed", "yellow"),
    "honeycomb": Noun("hexagon", "yellow", "checkered", "brown"),
    "turtle": Noun("hexagon", "green", "checkered", "brown"),
    "nut": Noun("hexagon", "gray"),
    "medkit": Noun("cross", "red", "rimmed", "white"),
    "daisy": Noun("flower", "white", "rimmed", "yellow"),
    "rose": Noun("flower", "red"),
    "rainbow": Noun("arch", "red", "rimmed", "blue"),
    "magnet": Noun("arch", "red", "halved", "gray"),
    "balloon": Noun("balloon", "red"),
}


# ---- Invented nouns

INVENTED, NOUNS_SEED = 1000, 5_000_011
OWN_OUTLINES = 0.25  # of the invented nouns have a shape that nothing else has
KINDS = {"plain": 0.12, "patterned": 0.6, MARKED: 0.28}
HOLLOW = ("ring", "crescent", "arch")  # nothing to put a mark on


def own_outline(rng: np.random.Generator) -> np.ndarray:
    """A closed curve around the middle, (n, 2): a polygon of uneven corners, or a circle with a few bumps."""
    if rng.random() < 0.5:
        count = int(rng.integers(5, 10))
        return around(rng.uniform(0.45, 1.1, count))
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    waves = [rng.uniform(0, 0.5 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6)]
    return around(np.clip(0.8 + sum(waves), 0.35, 1.15))


def invented_look(name: str, rng: np.random.Generator) -> Noun:
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    shape = name if rng.random() < OWN_OUTLINES else choice(rng, SHAPES, HOLLOW if kind == MARKED else ())
    colour = choice(rng, COLOURS)
    if kind == "plain":
        return Noun(shape, colour)
    colour2 = choice(rng, COLOURS, [colour])
    if kind == MARKED:
        return Noun(shape, colour, MARKED, colour2, mark=choice(rng, SHAPES, [shape, *HOLLOW]))
    return Noun(shape, colour, choice(rng, PATTERNS), colour2)


def invented_nouns(
    count: int = INVENTED, seed: int = NOUNS_SEED
) -> tuple[dict[str, Noun], dict[str, list[np.ndarray]]]:
    """name -> look, no two alike, none of a held-out combination; and the outlines of those that have their own."""
    rng = np.random.default_rng(seed)
    looks, outlines, taken = {}, {}, set(NOUNS.values())
    for name in invented_names(count, seed):
        look = invented_look(name, rng)
        while look in taken or is_held_out(thing_of(look)):
            look = invented_look(name, rng)
        looks[name] = look
        taken.add(look)
        if look.shape == name:
            outlines[name] = [own_outline(rng)]
    return looks, outlines


def thing_of(look: Noun, noun: str | None = None, size: str = "medium", colour: str | None = None) -> Thing:
    shape, pattern, colour2 = look.shape, look.pattern, look.colour2
    return Thing(shape, colour or look.colour, pattern, colour2, noun, colour is not None, size, look.mark)


INVENTED_NOUNS, INVENTED_OUTLINES = invented_nouns()
ALL_NOUNS = NOUNS | INVENTED_NOUNS
OUTLINES = SHAPES | HELD_OUT_SHAPES | NOUN_SHAPES | INVENTED_OUTLINES


def noun_thing(noun: str, size: str = "medium", colour: str | None = None) -> Thing:
    """What the noun means, in its own colour; or in this one, which captions then say."""
    return thing_of(ALL_NOUNS[noun], noun, size, colour)
