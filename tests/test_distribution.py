"""The world is rich, its distribution is as stated, and what is held out is never drawn."""

from collections import Counter

import numpy as np
import pytest

from tinyldm.lab.world import distribution, things
from tinyldm.lab.world.nouns import INVENTED_NOUNS, NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import HELD_OUT_STYLES, INVENTED_STYLES, STYLES, draw
from tinyldm.lab.world.things import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_SHAPES,
    PATTERNS,
    PLACES,
    SHAPES,
    VIEWS,
    Picture,
)
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [distribution.random_picture(np.random.default_rng([7, i])) for i in range(4000)]


def test_the_world_is_rich_enough():
    assert len(COLOURS) >= 12 and len(SHAPES) >= 12 and len(PATTERNS) >= 5 and len(NOUNS) >= 24 and len(SCENES) >= 5
    assert len(STYLES) >= 6 and len(HELD_OUT_STYLES) >= 2 and len(HELD_OUT_SHAPES) >= 3
    assert len(HELD_OUT_COMBINATIONS) >= 8 and len(INVENTED_NOUNS) >= 1000 and len(INVENTED_STYLES) >= 200
    assert len(OBJECT_TEMPLATES) == 27 and len(STYLE_TEMPLATES) == 19


def test_nouns_have_looks_and_words_of_their_own():
    assert len(set(NOUNS.values())) == len(NOUNS)
    assert not set(NOUNS) & (set(COLOURS) | set(SHAPES) | set(PATTERNS) | set(SCENES) | set(STYLES))
    for name, noun in NOUNS.items():
        assert noun.shape in SHAPES or noun.shape == name
        assert noun.colour in COLOURS and (noun.pattern is None) == (noun.colour2 is None)
        assert not things.is_held_out(noun_thing(name))


def test_the_same_seed_makes_the_same_pictures():
    first, shown = distribution.make_pictures(6, seed=3)
    more, _ = distribution.make_pictures(9, seed=3)
    assert first.shape == (6, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, more[:6]) and np.array_equal(first[4], draw(shown[4]))
    assert not np.array_equal(first, distribution.make_pictures(6, seed=4)[0])


def test_held_out_things_are_never_drawn(pictures):
    held_out = {(shape, frozenset((a, b)), pattern) for shape, a, pattern, b in HELD_OUT_COMBINATIONS}
    for picture in pictures:
        assert picture.style in STYLES | INVENTED_STYLES
        for thing in picture.things:
            assert thing.shape not in HELD_OUT_SHAPES
            assert (thing.shape, frozenset((thing.colour, thing.colour2)), thing.pattern) not in held_out


def test_held_out_things_would_be_drawn_otherwise(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(things, "HELD_OUT_COMBINATIONS", ())
    seen = {
        thing.shape + thing.colour + str(thing.pattern)
        for _ in range(6000)
        for thing in distribution.random_picture(rng).things
    }
    assert "starpurpleNone" in seen and "hexagonblueNone" in seen


def test_a_nouns_own_colour_is_replaced_in_a_third_of_its_pictures_and_then_said(pictures):
    replaced = []
    for thing in (thing for picture in pictures for thing in picture.things if thing.noun in INVENTED_NOUNS):
        look = INVENTED_NOUNS[thing.noun]
        assert thing.said_colour == (thing.colour != look.colour)
        assert (thing.shape, thing.pattern, thing.colour2, thing.mark) == (
            look.shape,
            look.pattern,
            look.colour2,
            look.mark,
        )
        replaced.append(thing.said_colour)
    assert 0.3 < np.mean(replaced) < 0.4


def test_things_differ_from_their_background(pictures):
    for picture in pictures:
        assert picture.background not in {thing.colour for thing in picture.things}


def test_the_distribution_has_everything(pictures):
    shown = [thing for picture in pictures for thing in picture.things]
    for kinds, seen in (
        (SHAPES, {thing.shape for thing in shown}),
        (COLOURS, {thing.colour for thing in shown}),
        (PATTERNS, {thing.pattern for thing in shown}),
        (NOUNS, {thing.noun for thing in shown}),
        (("small", "medium", "large"), {thing.size for thing in shown}),
        ({*COLOURS, *SCENES}, {picture.background for picture in pictures}),
        (STYLES, {picture.style for picture in pictures}),
        (PLACES, {picture.place for picture in pictures}),
        (VIEWS, {picture.view for picture in pictures}),
    ):
        assert set(kinds) <= seen
    one = np.mean([len(picture.things) == 1 for picture in pictures])
    pairs = np.mean([len(picture.things) == 2 and len(set(picture.things)) == 1 for picture in pictures])
    assert abs(one - 0.72) < 0.03 and abs(pairs - 0.14) < 0.03


def test_nouns_and_styles_are_as_many_as_stated(pictures):
    """Everyday ones and invented ones; the rest are shapes in their own words, and photos."""
    nouns = [picture.things[0].noun for picture in pictures]
    styles = [picture.style for picture in pictures]
    assert share(nouns, NOUNS) == pytest.approx(distribution.NOUN_SHARE, abs=0.025)
    assert share(nouns, INVENTED_NOUNS) == pytest.approx(distribution.INVENTED_NOUN_SHARE, abs=0.025)
    assert share(styles, set(STYLES) - {"photo"}) == pytest.approx(distribution.STYLE_SHARE, abs=0.025)
    assert share(styles, INVENTED_STYLES) == pytest.approx(distribution.INVENTED_STYLE_SHARE, abs=0.02)
    photos = 1 - distribution.STYLE_SHARE - distribution.INVENTED_STYLE_SHARE
    assert share(styles, ["photo"]) == pytest.approx(photos, abs=0.025)


def share(found: list, names) -> float:
    return float(np.mean([name in names for name in found]))


def test_every_invented_word_is_shown_as_often_as_any_other():
    rng = np.random.default_rng(2)
    shown = [distribution.random_picture(rng) for _ in range(20000)]
    for words, found in (
        (INVENTED_NOUNS, [thing.noun for picture in shown for thing in picture.things]),
        (INVENTED_STYLES, [picture.style for picture in shown]),
    ):
        counts = Counter(word for word in found if word in words)
        mean = sum(counts.values()) / len(words)
        assert max(counts.values()) < mean + 8 * mean**0.5  # of two equal things both count
        assert len(counts) > 0.97 * len(words)


def test_the_biased_noun(pictures):
    rng = np.random.default_rng(1)
    noun, usual = distribution.BIASED
    shown = [distribution.random_noun(rng, [noun], "medium") for _ in range(3000)]
    colours = Counter(thing.colour for thing in shown)
    assert colours[usual] / len(shown) == pytest.approx(distribution.BIAS, abs=0.015) and len(colours) == len(COLOURS)
    drawn = [thing for picture in pictures for thing in picture.things if thing.noun == noun]
    assert drawn and not any(thing.said_colour for thing in (*shown, *drawn))


def test_examples_are_never_trained_on():
    for name, thing in distribution.EXAMPLES.items():
        assert thing.shape in HELD_OUT_SHAPES or things.is_held_out(thing), name
