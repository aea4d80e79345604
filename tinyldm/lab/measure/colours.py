"""What can be measured on the pixels of a picture: which colours it has. Everything else is for the judge."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tinyldm.lab.world.things import COLOURS, Thing, nearest_colour

EDGE = 60  # levels of 255, as a distance in RGB: two colours further apart than this are different things
COMMON = 0.03  # of the frame's pixels: so many of a colour are the background's, as the mortar between bricks is
LEAST_SHARE = 0.15  # of the object's pixels: a colour of a pattern has at least as many


def frame(pixels: np.ndarray) -> np.ndarray:
    """The outermost two pixels all around, (n, 3)."""
    inner = np.zeros(pixels.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    return pixels[~inner]


def background_colour(pixels: np.ndarray) -> str:
    """The named colour that most pixels of the frame, two wide, are nearest to. pixels: (h, w, 3) uint8."""
    return Counter(nearest_colour(frame(pixels)).tolist()).most_common(1)[0][0]


def contrast_of(pixels: np.ndarray) -> np.ndarray:
    """How far each pixel is from the nearest of the background's colours, (h, w), as a distance in RGB.

    A scene has several, its bricks and its mortar: all those that COMMON of the frame's pixels have.
    """
    colours, near = [], frame(pixels).astype(np.float32)
    least = COMMON * len(near)
    while len(near) > least:
        centre = np.median(near, axis=0)
        inside = np.linalg.norm(near - centre, axis=-1) <= EDGE
        if inside.sum() < least:  # it lies between colours: take one pixel's own
            centre = near[0]
            inside = np.linalg.norm(near - centre, axis=-1) <= EDGE
        if inside.sum() >= least:
            colours.append(centre)
        near = near[~inside]
    colours = colours or [np.median(frame(pixels), axis=0)]
    return np.min([np.linalg.norm(pixels.astype(np.float32) - colour, axis=-1) for colour in colours], axis=0)


def object_pixels(pixels: np.ndarray) -> np.ndarray:
    """The pixels, (n, 3), that stand out from the background."""
    return pixels[contrast_of(pixels) > EDGE]


def colours_of(thing: Thing) -> tuple[str, ...]:
    """The one or two colours that the object of its pictures should have."""
    return (thing.colour,) if thing.colour2 is None else (thing.colour, thing.colour2)


def colours_right(pixels: np.ndarray, expected: tuple[str, ...]) -> bool:
    """Whether the object has the expected colours, one or two, and no others.

    One: most of its pixels are nearest to it. Two: each is the nearest of at least LEAST_SHARE of the pixels, and most
    pixels are one of them or a blend: the edges of a small pattern are blurred, and orange blurred into black is brown.
    """
    inside = object_pixels(pixels).astype(np.float32)
    if len(inside) == 0:
        return False
    names = nearest_colour(inside)
    if len(expected) == 1:
        return Counter(names.tolist()).most_common(1)[0][0] == expected[0]
    one, other = (np.array(COLOURS[name], np.float32) for name in expected)
    along = ((inside - one) @ (other - one) / ((other - one) @ (other - one))).clip(0, 1)
    distance = np.linalg.norm(inside - (one + along[:, None] * (other - one)), axis=-1)
    return all((names == name).mean() >= LEAST_SHARE for name in expected) and (distance < EDGE).mean() > 0.5


def colour_error(pixels: np.ndarray, colour: str) -> float:
    """Mean distance per channel of the object's median colour from the named one, in levels of 255."""
    inside = object_pixels(pixels)
    return float(np.abs(np.median(inside, axis=0) - COLOURS[colour]).mean()) if len(inside) else 255.0


def spread(pixels: Sequence[np.ndarray]) -> dict[str, float]:
    """Standard deviations over pictures: of the object's centre and area, as shares of the picture, and its shade."""
    centres, areas, shades = [], [], []
    for picture in pixels:
        background = np.median(picture[[0, -1]].reshape(-1, 3), axis=0)
        mask = np.linalg.norm(picture.astype(float) - background, axis=-1) > EDGE
        if mask.any():
            centres.append(np.argwhere(mask).mean(axis=0) / len(picture))
            areas.append(mask.mean())
            shades.append(picture[mask].mean() / 255)
    centre = np.linalg.norm(np.std(centres, axis=0))
    return {"centre": float(centre), "area": float(np.std(areas)), "shade": float(np.std(shades))}
