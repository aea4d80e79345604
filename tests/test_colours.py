"""What is measured on pixels, on pictures whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from tinyldm.lab.measure import colours
from tinyldm.lab.world.distribution import EXAMPLES, stands_out
from tinyldm.lab.world.nouns import noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import COLOURS, PLACES, SHAPES, Picture, Thing


@pytest.mark.parametrize("colour", list(COLOURS))
def test_the_worlds_own_pictures_measure_right(colour):
    for i, behind in enumerate(COLOURS):
        if behind != colour:
            shape = list(SHAPES)[i]
            picture = np.asarray(draw(Picture((Thing(shape, colour),), behind, seed=i)))
            assert colours.background_colour(picture) == behind
            assert colours.colours_right(picture, (colour,))
            assert not colours.colours_right(picture, (behind,))


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_two_coloured_objects_measure_right(name):
    thing = EXAMPLES[name]
    expected = colours.colours_of(thing)
    picture = np.asarray(draw(Picture((thing,), "blue", seed=1)))
    assert colours.colours_right(picture, expected)
    assert not colours.colours_right(picture, (*expected[:-1], "gray"))


def test_an_empty_picture_has_no_object():
    picture = np.full((64, 64, 3), 200, np.uint8)
    assert not colours.colours_right(picture, ("red",))


def test_the_spread_of_equal_pictures_is_zero_and_grows_with_what_differs():
    star = Thing("star", "red")
    same = [np.asarray(draw(Picture((star,), "gray", seed=1)))] * 4
    assert colours.spread(same) == {"centre": 0, "area": 0, "shade": 0}
    places = [np.asarray(draw(Picture((star,), "gray", place=place, seed=1))) for place in PLACES]
    assert colours.spread(places)["centre"] > 0.2
    sizes = [np.asarray(draw(Picture((replace(star, size=size),), "gray", seed=1))) for size in ("small", "large")]
    assert colours.spread(sizes)["area"] > 0.05


def test_the_colour_error_is_that_of_the_object():
    picture = np.asarray(draw(Picture((Thing("circle", "red"),), "white", seed=1)))
    assert colours.colour_error(picture, "red") < 10 < 50 < colours.colour_error(picture, "blue")
    assert colours.colour_error(np.full((64, 64, 3), 200, np.uint8), "red") == 255


@pytest.mark.parametrize("scene", list(SCENES))
def test_what_a_scene_is_made_of_is_no_object(scene):
    """Mortar between bricks, stars, blades of grass: none of them is the egg's, or the pear's, colour."""
    right = []
    for seed in range(20):
        for thing in (noun_thing("egg"), noun_thing("pear")):
            if stands_out((thing,), scene):
                pixels = np.asarray(draw(Picture((thing,), scene, seed=seed)))
                right.append(colours.colours_right(pixels, colours.colours_of(thing)))
    assert np.mean(right) >= 0.95


def test_of_a_frame_where_no_colour_is_common_the_middle_one_counts():
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert colours.contrast_of(levels).shape == (64, 64)
    colour, other = np.uint8([255, 0, 0]), np.uint8([0, 0, 255])
    pixels = np.where((np.arange(64) < 60)[:, None, None], colour, other) + np.zeros((64, 64, 1), np.uint8)
    contrast = colours.contrast_of(pixels)  # a band of six hundredths of the frame: it is background as well
    assert contrast.max() == 0
