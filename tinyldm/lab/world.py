"""A small procedural world: captioned pictures for the tiny model to learn from.

    python -m tinyldm.lab.world --sheet world.png                      everything there is, on one sheet
    python -m tinyldm.lab.world --out pictures --count 100 --seed 0    pictures and captions.jsonl
    python -m tinyldm.lab.world --examples examples                    folders of things never seen in training

A Picture is plain data (what is where, in which style), `draw` makes its pixels, `caption` one true sentence about it.
All lengths are in picture widths, so that `draw` works at any size.

To add a shape, a noun, a colour or a scene: add an entry to SHAPES, NOUNS, COLOURS or SCENES (a scene needs a function
that draws it and the words that say it). To add a style: write `style(picture, spots, size, rng) -> Image`, enter it in
STYLES, and say in MEDIUMS how a caption names it.
"""

import argparse
import dataclasses
import json
import multiprocessing
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

SIZE = 64
OVERSAMPLE = 4  # drawn this much larger, then averaged down: antialiasing

COLOURS = {
    "red": (218, 28, 36),
    "orange": (246, 128, 16),
    "yellow": (252, 228, 50),
    "green": (38, 152, 56),
    "blue": (32, 78, 216),
    "purple": (132, 42, 168),
    "pink": (250, 146, 190),
    "brown": (118, 70, 32),
    "black": (20, 20, 24),
    "white": (248, 248, 248),
    "gray": (140, 140, 144),
    "teal": (24, 176, 176),
}


# ---- Shapes: closed outlines in [-1, 1]², y downwards; the first is filled, any further one is a hole in it.


def corners(text: str) -> np.ndarray:
    return np.array([[float(number) for number in point.split(",")] for point in text.split()])


def moved(points: np.ndarray, x: float, y: float) -> np.ndarray:
    return points + np.array((x, y))


def arc(radius: float = 1.0, start: float = 0, stop: float = 360) -> np.ndarray:
    """Part of a circle, by default all; degrees from the right, clockwise."""
    angle = np.radians(np.linspace(start, stop, 37))
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def around(radii: np.ndarray) -> np.ndarray:
    """Points at these distances from the middle, equally far apart in angle, clockwise from the top."""
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return radii[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 49)
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([np.sin(t) ** 3, -y - 0.1], axis=1)


SHAPES = {
    "circle": [arc(0.95)],
    "square": [corners("-0.85,-0.85 0.85,-0.85 0.85,0.85 -0.85,0.85")],
    "triangle": [corners("0,-0.95 1,0.8 -1,0.8")],
    "star": [moved(around(np.array([1.1, 0.53] * 5)), 0, 0.05)],
    "heart": [heart()],
    "diamond": [corners("0,-1.05 0.8,0 0,1.05 -0.8,0")],
    "crescent": [moved(np.concatenate([arc(1, 50, 310), moved(arc(0.78, 278, 82), 0.53, 0)]), 0.18, 0)],
    "cross": [corners("-.38,-1 .38,-1 .38,-.38 1,-.38 1,.38 .38,.38 .38,1 -.38,1 -.38,.38 -1,.38 -1,-.38 -.38,-.38")],
    "ring": [arc(1), arc(0.4)],
    "hexagon": [around(np.ones(6))[:, ::-1]],
    "oval": [arc(0.68) * (1.5, 1)],
    "drop": [np.concatenate([moved(arc(0.68, -25, 205), 0, 0.32), corners("0,-1")])],
    "flower": [around(0.58 + 0.44 * np.abs(np.cos(2.5 * np.linspace(0, 2 * np.pi, 60, endpoint=False))) ** 0.7)],
    "arch": [
        np.concatenate([arc(1, 180, 360), corners("1,.85 .4,.85"), arc(0.4, 360, 180), corners("-.4,.85 -1,.85")])
    ],
}
HELD_OUT_SHAPES = {
    "bolt": [corners(".35,-1.05 -.85,.2 -.12,.2 -.45,1.05 .85,-.25 .12,-.25 .9,-1.05")],
    "hourglass": [corners("-.85,-1 .85,-1 .18,0 .85,1 -.85,1 -.18,0")],
    "arrow": [corners("1.05,0 .15,-.9 .15,-.38 -1,-.38 -1,.38 .15,.38 .15,.9")],
}
NOUN_SHAPES = {  # those that have no word of their own
    "balloon": [np.concatenate([moved(arc(0.84, 97, 443) * (0.9, 1), 0, -0.16), corners(".2,1 -.2,1")])],
}
OUTLINES = SHAPES | HELD_OUT_SHAPES | NOUN_SHAPES

PATTERNS = ("striped", "dotted", "checkered", "halved", "rimmed")


@dataclass(frozen=True)
class Noun:
    """What one everyday word says at once."""

    shape: str
    colour: str
    pattern: str | None = None
    colour2: str | None = None


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


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    pattern: str | None = None
    colour2: str | None = None
    noun: str | None = None
    said_colour: bool = False  # a noun's own colour was replaced, so captions say it
    size: str = "medium"  # small | medium | large


@dataclass(frozen=True)
class Picture:
    things: tuple[Thing, ...]  # one, or two from left to right; two equal ones are "two …s"
    background: str  # a colour or a scene
    style: str = "photo"
    place: str | None = None  # left | right | top | bottom; None: near the middle
    view: str | None = None  # dark | bright | close-up | cropped
    seed: int = 0  # everything random in the drawing


@dataclass(frozen=True)
class Spot:
    """Where a thing stands: its centre and radius in picture widths, its rotation in radians."""

    x: float
    y: float
    radius: float
    angle: float

    def to_pixels(self, points: np.ndarray, width: int) -> list[tuple[float, float]]:
        """From the shape's coordinates to those of a canvas."""
        turn = self.radius * np.array(
            [[np.cos(self.angle), np.sin(self.angle)], [-np.sin(self.angle), np.cos(self.angle)]]
        )
        return [tuple(point) for point in ((points @ turn + (self.x, self.y)) * width).tolist()]


# ---- The training distribution

VIEWS = ("dark", "bright", "close-up", "cropped")
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


def is_held_out(thing: Thing) -> bool:
    look = (thing.shape, {thing.colour, thing.colour2}, thing.pattern)
    return any(look == (shape, {colour, colour2}, pattern) for shape, colour, pattern, colour2 in HELD_OUT_COMBINATIONS)


def choice(rng: np.random.Generator, options, avoid=()) -> str:
    options = [option for option in options if option not in avoid]
    return options[rng.integers(len(options))]


def noun_thing(noun: str, size: str = "medium", colour: str | None = None) -> Thing:
    look = NOUNS[noun]
    return Thing(look.shape, colour or look.colour, look.pattern, look.colour2, noun, colour is not None, size)


def random_thing(rng: np.random.Generator, sizes: tuple[str, ...]) -> Thing:
    size = choice(rng, sizes) if rng.random() < 0.3 else "medium"
    if rng.random() < 0.35:
        noun = choice(rng, NOUNS)
        look = NOUNS[noun]
        if noun == BIASED[0]:
            colour = BIASED[1] if rng.random() < BIAS else choice(rng, COLOURS, [BIASED[1]])
            thing = dataclasses.replace(noun_thing(noun, size), colour=colour)
        else:
            override = rng.random() < 0.35
            thing = noun_thing(noun, size, choice(rng, COLOURS, [look.colour, look.colour2]) if override else None)
    else:
        shape, colour = choice(rng, SHAPES), choice(rng, COLOURS)
        pattern = choice(rng, PATTERNS) if rng.random() < 0.45 else None
        thing = Thing(shape, colour, pattern, choice(rng, COLOURS, [colour]) if pattern else None, size=size)
    return random_thing(rng, sizes) if is_held_out(thing) else thing


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


# ---- Drawing: where things stand, their masks and patterns


def arrange(picture: Picture, rng: np.random.Generator) -> list[Spot]:
    def angle() -> float:
        return np.radians(rng.uniform(-12, 12))

    if len(picture.things) == 2:
        radii = {"small": (0.115, 0.135), "medium": (0.17, 0.2), "large": (0.21, 0.225)}
        return [
            Spot(x + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.06, 0.06), rng.uniform(*radii[thing.size]), angle())
            for thing, x in zip(picture.things, (0.265, 0.735), strict=True)
        ]
    radii = {"small": (0.125, 0.155), "medium": (0.2, 0.26 if picture.place else 0.31), "large": (0.36, 0.41)}
    radius = rng.uniform(*radii[picture.things[0].size])
    x, y = 0.5 + rng.uniform(-1, 1, 2) * {"small": 0.09, "medium": 0.05, "large": 0.02}[picture.things[0].size]
    if picture.place:
        step = 0.46 - radius
        dx, dy = PLACES[picture.place]
        x, y = (0.5 + dx * step if dx else x), (0.5 + dy * step if dy else y)
    if picture.view == "close-up":
        x, y, radius = 0.5, 0.5, rng.uniform(0.47, 0.51)
    if picture.view == "cropped":
        dx, dy = PLACES[choice(rng, PLACES)]
        radius = rng.uniform(0.28, 0.34)
        x, y = (0.5 + 0.4 * dx if dx else x), (0.5 + 0.4 * dy if dy else y)
    return [Spot(x, y, radius, angle())]


def shape_mask(thing: Thing, spot: Spot, width: int) -> Image.Image:
    mask = Image.new("L", (width, width))
    pen = ImageDraw.Draw(mask)
    for i, outline in enumerate(OUTLINES[thing.shape]):
        pen.polygon(spot.to_pixels(outline, width), fill=0 if i else 255)
    return mask


def patches(pattern: str, radius: float) -> list[np.ndarray]:
    """The areas of the second colour in the shape's coordinates; a large thing has more, not much larger ones."""
    pitch = (0.085 + 0.38 * radius) / radius  # from stripe to stripe: 9 pixels of 64 on a small thing, 12 on a medium
    steps = range(-4, 5)
    if pattern == "striped":
        bar = corners("-1.2,-1 1.2,-1 1.2,1 -1.2,1") * (1, pitch / 4)
        return [moved(bar, 0, pitch * i) for i in steps]
    if pattern == "halved":
        return [corners("0,-1.2 1.2,-1.2 1.2,1.2 0,1.2")]
    if pattern == "dotted":
        dot = arc(0.26 * pitch)[::3]
        return [moved(dot, 0.92 * pitch * (i + j % 2 / 2), 0.8 * pitch * j) for i in steps for j in steps]
    cell = 0.62 * pitch
    square = corners("-1,-1 0,-1 0,0 -1,0") * cell
    return [moved(square, cell * i, cell * j) for i in steps for j in steps if (i + j) % 2 == 0]


def trace(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], fill, width: float) -> None:
    """A closed line with round corners."""
    pen.line([*points, *points[:2]], fill=fill, width=max(1, round(width)), joint="curve")


def paint(canvas: Image.Image, thing: Thing, spot: Spot, colour: tuple, colour2: tuple | None) -> None:
    width = canvas.width
    layer = Image.new("RGB", canvas.size, colour)
    pen = ImageDraw.Draw(layer)
    if thing.pattern == "rimmed":
        for outline in OUTLINES[thing.shape]:
            trace(pen, spot.to_pixels(outline, width), colour2, 2 * rim(spot) * width)
    elif thing.pattern:
        for patch in patches(thing.pattern, spot.radius):
            pen.polygon(spot.to_pixels(patch, width), fill=colour2)
    canvas.paste(layer, mask=shape_mask(thing, spot, width))


def rim(spot: Spot) -> float:
    return 0.016 + 0.12 * spot.radius


def ink(canvas: Image.Image, thing: Thing, spot: Spot, colour: tuple, colour2: tuple, line: float = 0.034) -> None:
    """The thing as a line drawing: its outline, and the borders of its pattern."""
    width = canvas.width
    outlines = [spot.to_pixels(outline, width) for outline in OUTLINES[thing.shape]]
    inner = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(inner)
    if thing.pattern == "rimmed":
        for grow, fill in ((1, 255), (-1, 0)):
            for outline in outlines:
                trace(pen, outline, fill, (2 * rim(spot) + (grow + 0.6) * line) * width)
    elif thing.pattern:
        for patch in patches(thing.pattern, spot.radius):
            trace(pen, spot.to_pixels(patch, width), 255, 0.7 * line * width)
    canvas.paste(colour2, mask=ImageChops.multiply(inner, shape_mask(thing, spot, width)))
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        trace(pen, outline, colour, line * width)


def shade(colour: str | None, rng: np.random.Generator) -> tuple[int, int, int] | None:
    """A slightly different red for every red thing."""
    jitter = rng.integers(-6, 7) + rng.integers(-4, 5, 3)
    return colour and tuple(int(value) for value in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))


# ---- Scenes: coarse and of low contrast, so that things stand out


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
        pen.line(
            [tuple(p) for p in (np.stack([x, y], 1) * canvas.width).tolist()],
            colour,
            round(line * canvas.width),
            "curve",
        )


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
BACKGROUNDS = (*COLOURS, *SCENES)


# ---- Styles


def flat(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Things on their background, in plain colours."""
    scene, wide = SCENES.get(picture.background), (size * OVERSAMPLE, size * OVERSAMPLE)
    canvas = Image.new("RGB", wide, scene.colour if scene else shade(picture.background, rng))
    if scene:
        scene.draw(canvas, rng)
    shades = (shade(picture.things[0].colour, rng), shade(picture.things[0].colour2, rng))
    for thing, spot in zip(picture.things, spots, strict=True):
        if thing != picture.things[0]:
            shades = (shade(thing.colour, rng), shade(thing.colour2, rng))
        paint(canvas, thing, spot, *shades)
    return canvas.reduce(OVERSAMPLE)


def photo(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Soft light from above."""
    light = np.linspace(1.04, 0.94, size)[:, None, None]
    return to_image(np.asarray(flat(picture, spots, size, rng)) * light)


def line_art(picture: Picture, spots: list[Spot], canvas: Image.Image, **colours) -> Image.Image:
    for thing, spot in zip(picture.things, spots, strict=True):
        ink(canvas, thing, spot, **colours)
    return canvas.reduce(OVERSAMPLE)


def sketch(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Pencil on white paper; a darker colour is a darker gray."""
    canvas = Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE), (246, 246, 243))
    for thing, spot in zip(picture.things, spots, strict=True):
        paint(canvas, thing, spot, pencil(thing.colour), thing.colour2 and pencil(thing.colour2))
    return line_art(picture, spots, canvas, colour=(70, 70, 74), colour2=(110, 110, 114))


def pencil(colour: str) -> tuple[int, int, int]:
    return (int(246 - 0.35 * (246 - np.mean(COLOURS[colour]))),) * 3


def oil_painting(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Short thick strokes along a swirling field, each in the colour beneath it."""
    plain, width = flat(picture, spots, size, rng), size * OVERSAMPLE
    canvas = plain.resize((width, width), Image.Resampling.NEAREST)
    pen, (a, b, c) = ImageDraw.Draw(canvas), rng.uniform(0, 2 * np.pi, 3)
    grid = rng.permutation([(i / 19, j / 19) for i in range(20) for j in range(20)])
    for x, y in np.clip(grid + rng.uniform(-0.02, 0.02, grid.shape), 0, 0.999):
        angle = a + 1.6 * np.sin(4 * x + b) + 1.6 * np.cos(4 * y + c)
        dx, dy = 0.045 * np.cos(angle), 0.045 * np.sin(angle)
        light = rng.uniform(0.8, 1.15)
        fill = tuple(int(min(255, light * value + 8)) for value in plain.getpixel((int(x * size), int(y * size))))
        ends = np.array([x - dx, y - dy, x + dx, y + dy]) * width
        pen.line(ends.tolist(), fill, round(0.045 * width))
    return canvas.reduce(OVERSAMPLE)


def pixel_art(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Sixteen blocks a side."""
    upright = [dataclasses.replace(spot, angle=0) for spot in spots]
    blocks = flat(picture, upright, SIZE, rng).resize((16, 16), Image.Resampling.NEAREST)
    return blocks.resize((size, size), Image.Resampling.NEAREST)


def watercolor(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Pale, soft, of uneven wetness, with the paper's white border."""
    plain = flat(picture, spots, size, rng).filter(ImageFilter.GaussianBlur(size * 0.014))
    wet = smooth_noise(rng, 6, size) * 0.28 + 0.5
    edge = np.abs(np.linspace(-1, 1, size))
    inside = np.maximum(edge[:, None], edge[None, :]) + 0.08 * (smooth_noise(rng, 9, size) - 0.5)
    wet = wet * np.clip((0.86 - inside) * 12, 0, 1)
    paper = np.array((252, 250, 244))
    return to_image(paper + wet[..., None] * (np.asarray(plain) - paper))


def neon(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Glowing tubes in the dark."""
    canvas = Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE))
    for thing, spot in zip(picture.things, spots, strict=True):
        ink(canvas, thing, spot, tube(thing.colour), tube(thing.colour2 or thing.colour), line=0.05)
    tubes = canvas.reduce(OVERSAMPLE)
    glow = tubes.filter(ImageFilter.GaussianBlur(size * 0.05))
    return to_image(np.array((6, 6, 14)) + np.asarray(tubes) * 1.0 + 0.9 * np.asarray(glow))


def tube(colour: str) -> tuple[int, ...]:
    return tuple(max(50, c) for c in COLOURS[colour])


def blueprint(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """White lines on a blue grid."""
    width = size * OVERSAMPLE
    canvas = Image.new("RGB", (width, width), (24, 62, 138))
    pen = ImageDraw.Draw(canvas)
    for at in np.arange(1, 16, 2) / 16 * width:
        pen.line([at, 0, at, width], (60, 98, 172), width // 64)
        pen.line([0, at, width, at], (60, 98, 172), width // 64)
    return line_art(picture, spots, canvas, colour=(240, 246, 255), colour2=(200, 216, 244))


def stained_glass(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Panes of uneven light between strips of lead."""
    centres = (
        np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(16, 2) + rng.uniform(0.1, 0.9, (16, 2))
    ) / 4
    grid = (np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1) + 0.5) / size
    distance = np.linalg.norm(grid[:, :, None] - centres, axis=-1)
    nearest = np.sort(distance, axis=-1)
    light = rng.uniform(0.75, 1.3, 16)[distance.argmin(-1)]
    lead = np.clip((nearest[..., 1] - nearest[..., 0] - 0.012) * 40, 0, 1)
    panes = to_image(np.asarray(flat(picture, spots, size, rng)) * light[..., None] * lead[..., None] + 16)
    canvas = panes.resize((size * OVERSAMPLE, size * OVERSAMPLE), Image.Resampling.BICUBIC)
    return line_art(picture, spots, canvas, colour=(16, 16, 18), colour2=(16, 16, 18))


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255


def to_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(array + 0.5, 0, 255).astype(np.uint8))


STYLES = {
    "photo": photo,
    "sketch": sketch,
    "oil painting": oil_painting,
    "pixel art": pixel_art,
    "watercolor": watercolor,
    "neon": neon,
}
HELD_OUT_STYLES = {"blueprint": blueprint, "stained glass": stained_glass}


def draw(picture: Picture, size: int = SIZE) -> Image.Image:
    rng = np.random.default_rng(picture.seed)
    spots = arrange(picture, rng)
    image = (STYLES | HELD_OUT_STYLES)[picture.style](picture, spots, size, rng)
    if picture.view == "dark":
        image = image.point(lambda value: int(0.42 * value))
    if picture.view == "bright":
        image = image.point(lambda value: int(0.5 * value + 127))
    return image


def nearest_colour(rgb) -> np.ndarray:
    """The names of the colours nearest to (..., 3) values of 0 to 255."""
    distance = np.linalg.norm(
        np.asarray(rgb, dtype=np.float32)[..., None, :] - np.array(list(COLOURS.values())), axis=-1
    )
    return np.array(list(COLOURS))[distance.argmin(-1)]


# ---- Captions

MEDIUMS = {  # how a caption begins that names the style; the article is put right afterwards
    "sketch": "a sketch",
    "oil painting": "a oil painting",
    "pixel art": "pixel art",
    "watercolor": "a watercolor",
    "neon": "a neon sign",
    "blueprint": "a blueprint",
    "stained glass": "stained glass",
}
WITHOUT_BACKGROUND = ("sketch", "neon", "blueprint")
MOST_WORDS = 27


def plural(noun: str) -> str:
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|sh|ch)$", noun) else "s")


def with_articles(text: str) -> str:
    """Puts right what filling the templates got wrong: "a orange star" becomes "an orange star"."""
    return re.sub(r"\ba (?=[aeiou]|hour)", "an ", text)


def name(thing: Thing, size: bool = True) -> str:
    """Such as "small red and white striped star" or "blue lemon"."""
    words = [thing.size] if size and thing.size != "medium" else []
    if thing.noun:
        return " ".join([*words, *([thing.colour] if thing.said_colour else []), thing.noun])
    surface = f"{thing.colour} and {thing.colour2} {thing.pattern}" if thing.pattern else thing.colour
    return " ".join([*words, surface, thing.shape])


def subject(picture: Picture, article: str = "a", adjective: str | None = None) -> str:
    """What is in the picture: "a red star", "two cool lemons", "the small egg next to a blue circle"."""
    first, *rest = picture.things
    words = name(first, size=first.size != adjective)
    if rest and rest[0] == first:
        article = "two" if article == "a" else f"{article} two"
        words = plural(words)
    words = " ".join([article, *([adjective] if adjective else []), words])
    return f"{words} next to a {name(rest[0])}" if rest and rest[0] != first else words


def whereabouts(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    """The said place and, mostly, the background: "" or words with a leading space."""
    place = f" {'on' if picture.place in ('left', 'right') else 'at'} the {picture.place}" if picture.place else ""
    if picture.style in WITHOUT_BACKGROUND or rng.random() > 0.8:
        return place, ""
    scene = SCENES.get(picture.background)
    return place, f" {scene.words}" if scene else f" on a {picture.background} background"


def is_true(template: str, picture: Picture) -> bool:
    """Whether the template says of the view exactly what is so, and of the size and number nothing wrong."""
    words = set(template.split())
    return (
        words.intersection(VIEWS) == ({picture.view} if picture.view else set())
        and words.intersection(("small", "large")) <= {thing.size for thing in picture.things[:1]}
        and not ("one" in words and len(picture.things) == 2)
    )


def fill_object(template: str, picture: Picture) -> str:
    before, article, adjective = re.fullmatch(r"(.*) (a|the|my|one)(?: (\w+))? \{\}", template).groups()
    return f"{before} {subject(picture, article, adjective)}"


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """One of the many true captions of a picture."""
    place, background = whereabouts(picture, rng)
    templates = OBJECT_TEMPLATES if picture.style == "photo" else STYLE_TEMPLATES
    template = choice(rng, [template for template in templates if is_true(template, picture)])
    kind, style = rng.random(), ""
    if picture.style == "photo":
        text = subject(picture) if kind < 0.1 and not picture.view else fill_object(template, picture)
    elif kind < 0.25:
        return with_articles(template.format(picture.style))
    elif kind < 0.75:
        text = f"{medium(picture)} of {subject(picture)}"
    else:
        what, style = template.removesuffix(" in the style of {}"), f" in the style of {picture.style}"
        text = f"{what} of {subject(picture)}"
    words = text + place + background + style
    if len(words.split()) > MOST_WORDS:  # rare
        words = text + place + style
    return with_articles(words)


def medium(picture: Picture) -> str:
    """How a caption names the style: "a sketch", "dark pixel art"."""
    article, words = re.fullmatch(r"(a )?(.*)", MEDIUMS[picture.style]).groups(default="")
    return f"{article}{picture.view} {words}" if picture.view else article + words


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


def sheet(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    size, rows = images[0].width + gap, -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * size + gap, rows * size + gap), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (gap + i % columns * size, gap + i // columns * size))
    return canvas


def everything() -> Image.Image:
    """All shapes in all patterns; all nouns; a row for each of six things in all views, scenes and styles."""
    colours, images = list(COLOURS), []

    def add(thing: Thing, *backgrounds: str, **rest) -> None:
        background = next(name for name in (*backgrounds, "gray", "white", "blue") if stands_out((thing,), name))
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
    samples = [
        noun_thing("ladybug"),
        Thing("star", "green", "striped", "white"),
        Thing("heart", "purple", "rimmed", "yellow"),
    ]
    samples += [Thing("square", "orange", "checkered", "black"), Thing("circle", "brown"), noun_thing("kite")]
    for thing in samples:
        for view in VIEWS:
            add(thing, view=view)
        for scene in SCENES:
            images.append(draw(Picture((thing,), scene, seed=len(images))))
        for i, style in enumerate(STYLES | HELD_OUT_STYLES):
            add(thing, *colours[i + 3 :], style=style)
    return sheet(images, 18)


EXAMPLES = {  # folder -> what training never saw
    "checkered-heart": Thing("heart", "orange", "checkered", "black"),
    "striped-circle": Thing("circle", "teal", "striped", "white"),
    "dotted-cross": Thing("cross", "pink", "dotted", "black"),
    "halved-square": Thing("square", "green", "halved", "pink"),
    "bolt": Thing("bolt", "yellow"),
}


def write_examples(folder: Path, size: int = 256) -> None:
    """Five pictures each of unseen combinations, of an unseen shape, and of five things in an unseen style."""
    series = {}
    for name, thing in EXAMPLES.items():
        backgrounds = ("blue", "grass", "purple", "gray", "sand", "brown", "bricks")
        backgrounds = [background for background in backgrounds if stands_out((thing,), background)]
        series[name] = [Picture((thing,), background, seed=i) for i, background in enumerate(backgrounds[:5])]
    things = (
        noun_thing("kite"),
        Thing("star", "red"),
        noun_thing("donut"),
        Thing("heart", "pink"),
        noun_thing("turtle"),
    )
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
