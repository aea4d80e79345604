"""What there is in the small world: colours, shapes, patterns; and plain data of what is where in a Picture.

To add a colour or a shape: add an entry to COLOURS or SHAPES. To add a pattern: name it in PATTERNS, and say in
drawing.patches where its second colour goes. Nouns are in nouns.py, what training never sees is here.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

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


def nearest_colour(rgb) -> np.ndarray:
    """The names of the colours nearest to (..., 3) values of 0 to 255."""
    difference = np.asarray(rgb, dtype=np.float32)[..., None, :] - np.array(list(COLOURS.values()))
    return np.array(list(COLOURS))[np.linalg.norm(difference, axis=-1).argmin(-1)]


# ---- Shapes: closed outlines in [-1, 1]², y downwards; the first is filled, any further one is a hole in it.


def corners(text: str) -> np.ndarray:
    """'x,y x,y …' -> (n, 2)."""
    return np.array([[float(number) for number in point.split(",")] for point in text.split()])


def moved(points: np.ndarray, x: float, y: float) -> np.ndarray:
    """(n, 2), all shifted by (x, y)."""
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
    """The well-known curve of cosines, (49, 2)."""
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

PATTERNS = ("striped", "dotted", "checkered", "halved", "rimmed")
MARKED = "marked"  # a smaller shape in the middle, of the second colour: no caption has a word for it, only nouns do


# ---- What is where

VIEWS = ("dark", "bright", "close-up", "cropped")
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    pattern: str | None = None
    colour2: str | None = None
    noun: str | None = None
    said_colour: bool = False  # a noun's own colour was replaced, so captions say it
    size: str = "medium"  # small | medium | large
    mark: str | None = None  # of a MARKED thing: the shape in its middle


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
        cos, sin = self.radius * np.cos(self.angle), self.radius * np.sin(self.angle)
        placed = points @ np.array([[cos, sin], [-sin, cos]]) + (self.x, self.y)
        return [tuple(point) for point in (placed * width).tolist()]


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
    """Whether training never sees this combination, whatever its size."""
    look = (thing.shape, {thing.colour, thing.colour2}, thing.pattern)
    return any(look == (shape, {colour, colour2}, pattern) for shape, colour, pattern, colour2 in HELD_OUT_COMBINATIONS)


Option = TypeVar("Option")


def choice(rng: np.random.Generator, options: Iterable[Option], avoid: Container = ()) -> Option:
    """One of the options but for those to avoid, each as likely as any other."""
    options = [option for option in options if option not in avoid]
    return options[rng.integers(len(options))]
