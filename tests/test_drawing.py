"""The world's pictures show what they should: colours, patterns, marks, sizes, places and views."""

from collections import Counter

import numpy as np

from tinyldm.lab.world.distribution import random_picture
from tinyldm.lab.world.drawing import MARK, shade
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import COLOURS, MARKED, PATTERNS, PLACES, SHAPES, Picture, Thing, nearest_colour


def test_drawing_is_deterministic():
    for i in range(40):
        picture = random_picture(np.random.default_rng([7, i]))
        assert np.array_equal(draw(picture), draw(picture))


def test_plain_photos_have_the_named_colours():
    """Whatever the shade, the light and the seed, no colour becomes its neighbour."""
    for i, background in enumerate(COLOURS):
        for j, colour in enumerate(COLOURS):
            pixels = np.asarray(draw(Picture((Thing("circle", colour),), background, seed=12 * i + j)))
            assert nearest_colour(pixels[32, 32]) == colour
            corners = pixels[[2, 2, 61, 61], [2, 61, 2, 61]]
            assert (nearest_colour(corners) == background).all()


def test_shades_never_cross():
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        shades = np.array([shade(colour, rng) for _ in range(300)])
        assert len(np.unique(shades, axis=0)) > 50
        for light in (0.94, 1.04):
            assert (nearest_colour(np.clip(shades * light, 0, 255)) == colour).all()


def test_both_colours_of_a_pattern_show():
    for shape in SHAPES:
        for pattern in PATTERNS:
            pixels = np.asarray(draw(Picture((Thing(shape, "red", pattern, "white"),), "blue", seed=2)))
            share = Counter(nearest_colour(pixels).ravel().tolist())
            least = min(share["red"], share["white"]) / (share["red"] + share["white"])
            assert least > (0.12 if pattern in ("dotted", "rimmed") else 0.25), (shape, pattern, least)


def object_pixels(picture: Picture) -> np.ndarray:
    """Rows and columns of the red pixels."""
    return np.argwhere(nearest_colour(np.asarray(draw(picture))) == "red")


def test_sizes_and_places_show():
    def extent(size: str) -> int:
        return int(np.ptp(object_pixels(Picture((Thing("circle", "red", size=size),), "white", seed=1)), axis=0).max())

    assert extent("small") < 22 < extent("medium") < 42 < extent("large")
    for place, (dx, dy) in PLACES.items():
        y, x = object_pixels(Picture((Thing("star", "red"),), "white", place=place, seed=1)).mean(axis=0) - 32
        assert dx * x >= 0 and dy * y >= 0 and dx * x + dy * y > 6


def test_views_show():
    star = Thing("star", "red")
    plain, dark, bright, near, cropped = (
        Picture((star,), "gray", view=view, seed=1) for view in (None, "dark", "bright", "close-up", "cropped")
    )
    brightness = [np.asarray(draw(picture)).mean() for picture in (dark, plain, bright)]
    assert brightness[0] < 0.6 * brightness[1] and brightness[2] > 1.3 * brightness[1]
    assert np.ptp(object_pixels(near), axis=0).max() > 50
    edges = object_pixels(cropped)
    assert edges.min() == 0 or edges.max() == 63
    plain_edges = object_pixels(plain)
    assert plain_edges.min() > 0 and plain_edges.max() < 63


def test_a_mark_is_a_smaller_shape_in_the_middle_in_the_second_colour():
    plain, marked = (
        nearest_colour(np.asarray(draw(Picture((thing,), "white", seed=1))))
        for thing in (Thing("circle", "red"), Thing("circle", "red", MARKED, "blue", mark="square"))
    )
    where = np.argwhere(marked == "blue")
    thing, middle = np.argwhere(plain == "red"), np.argwhere(plain == "red").mean(axis=0)
    assert np.abs(where.mean(axis=0) - middle).max() < 1
    assert (plain[tuple(where.T)] == "red").all()  # all of it lies on the thing
    share = MARK**2 * 1.7**2 / (np.pi * 0.95**2)  # a square of side 1.7, a circle of radius 0.95
    assert abs(len(where) / len(thing) - share) < 0.04


def test_two_things_stand_side_by_side():
    left, right = Thing("circle", "red"), Thing("square", "green")
    names = nearest_colour(np.asarray(draw(Picture((left, right), "white"))))
    assert np.argwhere(names == "red")[:, 1].max() < np.argwhere(names == "green")[:, 1].min()
