"""Things that no code of the world draws: two of them made of two parts, a letter, a face, a key.

To add one: enter its parts in FIGURES, and in THINGS its one or two colours.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageChops

from tinyldm.lab.measure.outlines import DRAWN, leaning_silhouettes
from tinyldm.lab.world.drawing import OVERSAMPLE, arrange, mask_of, shade
from tinyldm.lab.world.nouns import own_outline
from tinyldm.lab.world.styles import ground, lit
from tinyldm.lab.world.things import Picture, Spot, Thing, arc, corners, moved

Part = tuple[
    list[np.ndarray], str
]  # outlines as of the world's shapes, the first filled and the others holes; a colour


def smile() -> np.ndarray:
    """A closed mouth, laughing."""
    return moved(np.concatenate([arc(0.62, 15, 165), arc(0.34, 165, 15)]), 0, 0.04)


FIGURES: dict[str, list[Part]] = {  # from back to front
    "snowman": [
        ([moved(arc(0.58), 0, 0.45)], "white"),
        ([moved(arc(0.36), 0, -0.32)], "white"),
        ([corners("-.32,-1.08 .32,-1.08 .32,-.7 .5,-.7 .5,-.54 -.5,-.54 -.5,-.7 -.32,-.7")], "red"),
    ],
    "letter": [([corners("-.6,-1 .7,-1 .7,-.6 -.14,-.6 -.14,-.2 .5,-.2 .5,.2 -.14,.2 -.14,1 -.6,1")], "purple")],
    "face": [
        ([arc(0.98)], "yellow"),
        ([moved(arc(0.22), -0.36, -0.28)], "black"),
        ([moved(arc(0.22), 0.36, -0.28)], "black"),
        ([smile()], "black"),
    ],
    "key": [
        ([corners("-.14,-.3 .14,-.3 .14,.42 .55,.42 .55,.64 .14,.64 .14,.8 .55,.8 .55,1.02 -.14,1.02")], "teal"),
        ([moved(arc(0.46), 0, -0.58), moved(arc(0.2), 0, -0.58)], "teal"),
    ],
    "mushroom": [
        ([corners("-.34,-.1 .34,-.1 .46,1 -.46,1")], "white"),
        ([moved(arc(0.98, 180, 360), 0, 0.02)], "red"),
    ],
    "pebble": [([own_outline(np.random.default_rng(22))], "pink")],
}
THINGS = {  # as the world would have them, if it knew the shape
    "snowman": Thing("snowman", "white", None, "red"),
    "letter": Thing("letter", "purple"),
    "face": Thing("face", "yellow", None, "black"),
    "key": Thing("key", "teal"),
    "mushroom": Thing("mushroom", "red", None, "white"),
    "pebble": Thing("pebble", "pink"),
}


def draw_figure(picture: Picture, size: int) -> Image.Image:
    """As the world draws a photo of one thing: somewhere near the middle, leaning a little, of uneven shade."""
    rng = np.random.default_rng(picture.seed)
    (spot,), parts = arrange(picture, rng), FIGURES[picture.things[0].shape]
    canvas = ground(picture, size, rng)
    shades = {colour: shade(colour, rng) for colour in dict.fromkeys(colour for _, colour in parts)}
    for outlines, colour in parts:
        canvas.paste(shades[colour], mask=mask_of(outlines, spot, canvas.width))
    return lit(canvas.reduce(OVERSAMPLE))


def figure_mask(name: str, spot: Spot) -> Image.Image:
    """White where any part of the figure is, DRAWN pixels wide."""
    mask = Image.new("L", (DRAWN, DRAWN))
    for outlines, _ in FIGURES[name]:
        mask = ImageChops.lighter(mask, mask_of(outlines, spot, DRAWN))
    return mask


@cache
def figure_silhouettes(name: str) -> np.ndarray:
    """As outlines.true_silhouettes, of the whole figure."""
    return leaning_silhouettes(lambda spot: figure_mask(name, spot))
