"""What can be measured on the pixels of a picture: which colours it has. Everything else is for the judge."""

from collections import Counter

import numpy as np

from tinyldm.lab.world.things import COLOURS, Thing, nearest_colour

EDGE = 60  # levels of 255, as a distance in RGB: two colours further apart than this are different things
SHARE = 0.15  # of the object's pixels: a colour of a pattern has at least as many


def frame(picture: np.ndarray) -> np.ndarray:
    """The outermost two pixels all around, (n, 3)."""
    inner = np.zeros(picture.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    return picture[~inner]


def background_colour(picture: np.ndarray) -> str:
    """The named colour that most pixels of the frame, two wide, are nearest to. picture: (h, w, 3) uint8."""
    return Counter(nearest_colour(frame(picture)).tolist()).most_common(1)[0][0]


def object_pixels(picture: np.ndarray) -> np.ndarray:
    """The pixels, (n, 3), that stand out from the background."""
    background = np.median(frame(picture), axis=0)
    distance = np.linalg.norm(picture.astype(np.float32) - background, axis=-1)
    return picture[distance > EDGE]


def colours_of(thing: Thing) -> tuple[str, ...]:
    """The one or two colours that the object of its pictures should have."""
    return (thing.colour,) if thing.colour2 is None else (thing.colour, thing.colour2)


def colours_right(picture: np.ndarray, expected: tuple[str, ...]) -> bool:
    """Whether the object has the expected colours, one or two, and no others.

    One: most of its pixels are nearest to it. Two: each is the nearest of at least SHARE of the pixels, and most pixels
    are one of them or a blend: the edges of a small pattern are blurred, and orange blurred into black is brown.
    """
    pixels = object_pixels(picture).astype(np.float32)
    if len(pixels) == 0:
        return False
    names = nearest_colour(pixels)
    if len(expected) == 1:
        return Counter(names.tolist()).most_common(1)[0][0] == expected[0]
    one, other = (np.array(COLOURS[name], np.float32) for name in expected)
    along = ((pixels - one) @ (other - one) / ((other - one) @ (other - one))).clip(0, 1)
    distance = np.linalg.norm(pixels - (one + along[:, None] * (other - one)), axis=-1)
    return all((names == name).mean() >= SHARE for name in expected) and (distance < EDGE).mean() > 0.5


def colour_error(picture: np.ndarray, colour: str) -> float:
    """Mean distance per channel of the object's median colour from the named one, in levels of 255."""
    pixels = object_pixels(picture)
    return float(np.abs(np.median(pixels, axis=0) - COLOURS[colour]).mean()) if len(pixels) else 255.0


def spread(pictures: list[np.ndarray]) -> dict[str, float]:
    """Standard deviations over pictures: of the object's centre and area, as shares of the picture, and its shade."""
    centres, areas, shades = [], [], []
    for picture in pictures:
        background = np.median(picture[[0, -1]].reshape(-1, 3), axis=0)
        mask = np.linalg.norm(picture.astype(float) - background, axis=-1) > EDGE
        if mask.any():
            centres.append(np.argwhere(mask).mean(axis=0) / len(picture))
            areas.append(mask.mean())
            shades.append(picture[mask].mean() / 255)
    centre = np.linalg.norm(np.std(centres, axis=0))
    return {"centre": float(centre), "area": float(np.std(areas)), "shade": float(np.std(shades))}
