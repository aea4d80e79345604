"""The scenes behind the things: coarse and of low contrast, so that things stand out.

To add one: write a function that draws it and enter it in SCENES, with its main colour and the words that say it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from tinyldm.lab.world.things import Spot, arc, around, corners


@dataclass(frozen=True)
class Scene:
    colour: tuple[int, int, int]  # the main one
    words: str  # how captions say it
    draw: Callable[[Image.Image, np.random.Generator], None]  # onto a canvas filled with the colour


def night_sky(canvas: Image.Image, rng: np.random.Generator) -> None:
    pen, star = ImageDraw.Draw(canvas), around(np.array([1, 0.5] * 4))
    for x, y, radius in zip(rng.random(14), rng.random(14), rng.uniform(0.02, 0.04, 14), strict=True):
        pen.polygon(Spot(x, y, radius, 0).to_pixels(star, canvas.width), fill=(250, 245, 200))


def grass(canvas: Image.Image, rng: np.random.Generator) -> None:
    pen, blade = ImageDraw.Draw(canvas), corners("-0.05,0.08 0,-0.08 0.05,0.08")
    for row in range(7):
        for x in (np.arange(9) + row % 2 / 2 + rng.uniform(-0.15, 0.15, 9)) / 8:
            fill = ((52, 128, 42), (70, 154, 50))[rng.integers(2)]
            pen.polygon(Spot(x, row / 6.3, 1, 0).to_pixels(blade, canvas.width), fill=fill)


def waves(canvas: Image.Image, rng: np.random.Generator, colour: tuple, rows: int, height: float, line: float) -> None:
    pen, x, phase = ImageDraw.Draw(canvas), np.linspace(-0.1, 1.1, 41), rng.random()
    for row in range(rows):
        y = (row + 0.5) / rows + height * np.sin(2 * np.pi * (2 * x + phase + row * 0.37))
        points = np.stack([x, y], axis=1) * canvas.width
        pen.line([tuple(point) for point in points.tolist()], colour, round(line * canvas.width), "curve")


def snow(canvas: Image.Image, rng: np.random.Generator) -> None:
    pen, flake = ImageDraw.Draw(canvas), arc()
    for i in range(6):
        for j in range(6):
            x, y = (i + j % 2 / 2 + rng.uniform(-0.2, 0.2)) / 5.5, (j + 0.5 + rng.uniform(-0.2, 0.2)) / 6
            spot = Spot(x, y, rng.uniform(0.025, 0.045), 0)
            pen.polygon(spot.to_pixels(flake, canvas.width), fill=(250, 252, 255))


def bricks(canvas: Image.Image, rng: np.random.Generator) -> None:
    canvas.paste((196, 150, 132), (0, 0, *canvas.size))  # mortar
    pen, width, shift = ImageDraw.Draw(canvas), canvas.width, rng.random() / 4
    for row in range(6):
        for column in range(-1, 5):
            x, y = (column + row % 2 / 2 + shift) / 4, row / 6
            light = int(rng.integers(-10, 11))
            fill = (160 + light, 84 + light, 66 + light)
            pen.rectangle([x * width, y * width, (x + 0.22) * width, (y + 0.137) * width], fill)


SCENES = {
    "night sky": Scene((26, 30, 84), "in the night sky", night_sky),
    "grass": Scene((84, 170, 58), "on the grass", grass),
    "sea": Scene((40, 120, 200), "on the sea", partial(waves, colour=(84, 158, 220), rows=6, height=0.022, line=0.05)),
    "snow": Scene((190, 212, 234), "in the snow", snow),
    "bricks": Scene((160, 84, 66), "in front of bricks", bricks),
    "sand": Scene(
        (232, 206, 128), "on the sand", partial(waves, colour=(210, 178, 100), rows=4, height=0.045, line=0.04)
    ),
}
