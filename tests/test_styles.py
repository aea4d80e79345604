"""Styles: everyday ones, two that training never sees, and two hundred invented ones that are unlike those two."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from conftest import WEIGHTS
from PIL import Image

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.lab.world import styles
from tinyldm.lab.world.nouns import INVENTED_NOUNS, INVENTED_OUTLINES, NOUN_SHAPES, NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import (
    FILLS,
    HELD_OUT_STYLES,
    INVENTED_STYLES,
    STYLES,
    TEXTURES,
    Look,
    draw,
    invented_looks,
    is_like_a_held_out_style,
    is_like_a_photo,
)
from tinyldm.lab.world.things import COLOURS, HELD_OUT_SHAPES, PATTERNS, SHAPES, Picture, Thing
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

LOOKS = (  # shape, colour, background
    ("star", "red", "gray"),
    ("circle", "yellow", "blue"),
    ("heart", "green", "white"),
    ("square", "purple", "pink"),
)


@cache
def pixels(style: str, other_seeds: int = 0) -> np.ndarray:
    """Four pictures in the style, (4, 64, 64, 3)."""
    pictures = [
        Picture((Thing(shape, colour),), background, style, seed=i + other_seeds)
        for i, (shape, colour, background) in enumerate(LOOKS)
    ]
    return np.stack([np.asarray(draw(picture), float) for picture in pictures])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


# ---- All


@pytest.mark.parametrize("style", STYLES | HELD_OUT_STYLES)
def test_sizes_show_the_same_picture(style):
    picture = Picture((noun_thing("kite"), Thing("star", "red")), "gray", style, seed=5)
    small, large = (
        np.asarray(draw(picture), float),
        np.asarray(draw(picture, 256).resize((64, 64), Image.Resampling.BOX), float),
    )
    assert np.abs(small - large).mean() < 12


def test_every_shape_can_be_drawn_in_every_everyday_style():
    for style in STYLES | HELD_OUT_STYLES:
        for i, shape in enumerate([*SHAPES, *HELD_OUT_SHAPES, *NOUN_SHAPES, *list(INVENTED_OUTLINES)[:20]]):
            thing = Thing(shape, "red", PATTERNS[i % 5], "yellow")
            assert np.asarray(draw(Picture((thing,), "gray", style, seed=i))).std() > 8


# ---- Invented ones


def test_two_hundred_names_are_words_for_nothing_else():
    assert len(INVENTED_STYLES) == 200 and not set(INVENTED_STYLES) & set(INVENTED_NOUNS)
    assert all(re.fullmatch("[a-z]+", name) for name in INVENTED_STYLES)
    phrases = [*COLOURS, *SHAPES, *HELD_OUT_SHAPES, *PATTERNS, *NOUNS, *STYLES, *HELD_OUT_STYLES]
    phrases += [*OBJECT_TEMPLATES, *STYLE_TEMPLATES, *(scene.words for scene in SCENES.values())]
    assert not set(" ".join(phrases).split()) & set(INVENTED_STYLES)


def test_every_name_is_one_token_of_the_tiny_checkpoint():
    tokenizer = load_checkpoint(WEIGHTS).tokenizer
    ids = [tokenizer.encode(name) for name in INVENTED_STYLES]
    assert all(len(row) == 1 for row in ids) and len({row[0] for row in ids}) == 200


def test_the_same_seed_invents_the_same_styles():
    assert invented_looks() == INVENTED_STYLES and list(invented_looks()) == list(INVENTED_STYLES)
    assert invented_looks(50) == dict(list(INVENTED_STYLES.items())[:50])
    assert list(invented_looks(seed=1)) != list(INVENTED_STYLES)


def test_looks_have_all_fills_and_textures():
    assert {look.fill for look in INVENTED_STYLES.values()} == set(FILLS)
    assert {look.texture for look in INVENTED_STYLES.values()} == set(TEXTURES)
    assert all(look.line or not look.ground for look in INVENTED_STYLES.values())  # else a hollow thing were nothing


def test_nearly_every_style_has_pictures_of_its_own():
    """A few have only what has no colour of the style's: grain, blotches, or gray things."""
    kinds = Counter(pixels(style).tobytes() for style in INVENTED_STYLES)
    assert len(kinds) >= 190
    assert not kinds.keys() & {pixels(style).tobytes() for style in STYLES}


def test_no_look_is_a_photos_or_a_held_out_styles():
    for name, look in INVENTED_STYLES.items():
        assert not is_like_a_held_out_style(look) and not is_like_a_photo(look), name


BLUEPRINT = Look("hollow", (0, 0, 0), (24, 62, 138), "grid", (60, 98, 172), (240, 246, 255), 0.034)
STAINED_GLASS = Look("own", (0, 0, 0), None, "panes", (0, 0, 0), (16, 16, 18), 0.034)


def limits() -> dict[str, float]:
    """How near a picture may come to a blueprint, or to stained glass: no nearer than a blueprint of another seed, of
    which all are alike; no nearer than a photo."""
    blueprint, glass = (pixels(style) for style in HELD_OUT_STYLES)
    return {
        "blueprint": distance(blueprint, pixels("blueprint", other_seeds=10)),
        "stained glass": distance(glass, pixels("photo")),
    }


def test_no_invented_styles_pictures_come_near_those_of_a_held_out_style():
    for style, limit in limits().items():
        held_out = pixels(style)
        distances = {name: distance(pixels(name), held_out) for name in INVENTED_STYLES}
        assert min(distances.values()) > limit, min(distances, key=distances.get)


@pytest.mark.parametrize(("style", "look"), [("blueprint", BLUEPRINT), ("stained glass", STAINED_GLASS)])
def test_a_look_made_like_a_held_out_style_comes_near_it_and_is_refused(style, look, monkeypatch):
    monkeypatch.setitem(styles.ALL_STYLES, "made", partial(styles.invented, look))
    assert distance(pixels.__wrapped__("made"), pixels(style)) < limits()[style]
    assert is_like_a_held_out_style(look)
    assert is_like_a_photo(Look("own", (0, 0, 0), None, None, (0, 0, 0), None, 0.03))


@pytest.mark.parametrize(("size", "every"), [(64, 1), (100, 5)])
def test_invented_styles_show_every_shape(size, every):
    """On a black or a white background: a gray thing on gray ground would not show in some."""
    for i, style in enumerate(list(INVENTED_STYLES)[::every]):
        shape = list(SHAPES)[1 + i % (len(SHAPES) - 1)]
        picture = Picture((Thing(shape, "red"),), ("black", "white")[i % 2], style, seed=i)
        of_circle = replace(picture, things=(Thing("circle", "red"),))
        image, other = (np.asarray(draw(one, size), float) for one in (picture, of_circle))
        assert image.shape == (size, size, 3)
        assert (np.abs(image - other).max(axis=-1) > 40).mean() > 0.01, (style, shape)


def test_every_invented_style_draws_all_shapes():
    for style in list(INVENTED_STYLES)[:12]:
        drawn = {
            np.asarray(draw(Picture((Thing(shape, "red"),), "white", style, seed=1))).tobytes()
            for shape in [*SHAPES, *HELD_OUT_SHAPES, "balloon"]
        }
        assert len(drawn) == len(SHAPES) + len(HELD_OUT_SHAPES) + 1, style


def test_invented_styles_are_drawn_the_same_every_time():
    for style in list(INVENTED_STYLES)[::2]:
        picture = Picture((noun_thing("kite"), Thing("star", "red")), "gray", style, seed=5)
        first = np.asarray(draw(picture))
        assert np.array_equal(first, draw(picture))
        assert not np.array_equal(first, draw(replace(picture, seed=6)))
