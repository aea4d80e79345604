"""Things that no code of the world draws: they look as they are said to."""

from dataclasses import replace

import numpy as np
import pytest

from tinyldm.lab.measure.colours import background_colour, colours_of, colours_right
from tinyldm.lab.measure.outlines import best_overlap, silhouette_of
from tinyldm.lab.measure.questions import backgrounds_for
from tinyldm.lab.paper.figures import FIGURES, THINGS, draw_figure, figure_silhouettes
from tinyldm.lab.world.drawing import SIZE
from tinyldm.lab.world.nouns import OUTLINES
from tinyldm.lab.world.things import Picture


@pytest.fixture(params=THINGS)
def name(request):
    return request.param


def test_figures_have_the_colours_background_and_outline_that_are_checked(name):
    thing = THINGS[name]
    for seed, background in enumerate(backgrounds_for(colours_of(thing))[::2]):
        image = draw_figure(Picture((thing,), background, seed=seed), SIZE)
        assert colours_right(np.asarray(image), colours_of(thing))
        assert background_colour(np.asarray(image)) == background
        assert best_overlap(silhouette_of(image), figure_silhouettes(name)) > 0.85


def test_every_other_figure_fits_worse(name):
    image = draw_figure(Picture((THINGS[name],), "green", seed=3), SIZE)
    fits = {other: best_overlap(silhouette_of(image), figure_silhouettes(other)) for other in FIGURES}
    assert max(fits, key=fits.get) == name


def test_the_same_seed_draws_the_same_pixels_and_another_one_does_not():
    picture = Picture((THINGS["face"],), "grass", seed=5)
    first, again, other = (draw_figure(one, SIZE) for one in (picture, picture, replace(picture, seed=6)))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_no_code_of_the_world_draws_them():
    assert FIGURES.keys() == THINGS.keys() and not FIGURES.keys() & OUTLINES.keys()


def test_through_the_hole_in_the_key_the_background_is_seen():
    """Nothing of a picture on white is white but the ground, and the hole lets more of it through than none would."""
    whole = [(outlines[:1], colour) for outlines, colour in FIGURES["key"]]
    picture = Picture((THINGS["key"],), "white", seed=0)
    with pytest.MonkeyPatch.context() as patch:
        seen = np.asarray(draw_figure(picture, SIZE)).min(axis=2) > 200
        patch.setitem(FIGURES, "key", whole)
        filled = np.asarray(draw_figure(picture, SIZE)).min(axis=2) > 200
    assert 5 < seen.sum() - filled.sum() < 40
