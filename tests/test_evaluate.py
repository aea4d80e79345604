"""The measuring instruments themselves, on pictures whose truth is known."""

import numpy as np
import pytest
from conftest import WEIGHTS

from tinyldm.lab.measure import evaluate
from tinyldm.lab.world.distribution import EXAMPLES
from tinyldm.lab.world.drawing import draw
from tinyldm.lab.world.things import COLOURS, SHAPES, Picture, Thing


@pytest.mark.parametrize("colour", list(COLOURS))
def test_the_worlds_own_pictures_measure_right(colour):
    for i, behind in enumerate(COLOURS):
        if behind != colour:
            shape = list(SHAPES)[i]
            picture = np.asarray(draw(Picture((Thing(shape, colour),), behind, seed=i)))
            assert evaluate.background_colour(picture) == behind
            assert evaluate.colours_right(picture, (colour,))
            assert not evaluate.colours_right(picture, (behind,))


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_two_coloured_objects_measure_right(name):
    thing = EXAMPLES[name]
    expected = (thing.colour,) if thing.colour2 is None else (thing.colour, thing.colour2)
    picture = np.asarray(draw(Picture((thing,), "blue", seed=1)))
    assert evaluate.colours_right(picture, expected)
    assert not evaluate.colours_right(picture, (*expected[:-1], "gray"))


def test_an_empty_picture_has_no_object():
    picture = np.full((64, 64, 3), 200, np.uint8)
    assert not evaluate.colours_right(picture, ("red",))


def test_the_tiny_checkpoint_reaches_its_figures_on_a_small_sample(tiny):
    """weights/tiny/README.md states the whole figures; these bounds leave room for the small sample's scatter."""
    assert evaluate.psnr(tiny, 100) >= 31
    objects, backgrounds = evaluate.prompts_obeyed(tiny, 20)
    assert objects >= 0.9 and backgrounds >= 0.9


def test_the_report_prints_its_figures(capsys):
    evaluate.main(["--weights", str(WEIGHTS), "--prompts", "2"])
    out = capsys.readouterr().out
    assert "dB PSNR" in out and "object colour right" in out
    assert all(f"{name}: colours still right" in out for name in EXAMPLES)
