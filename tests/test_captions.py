"""What captions say is so, in plain short English, and they say everything there is."""

import re

import numpy as np
import pytest

from tinyldm.lab.world.captions import caption, fill_object, plural
from tinyldm.lab.world.distribution import random_picture
from tinyldm.lab.world.nouns import NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import STYLES
from tinyldm.lab.world.things import COLOURS, PATTERNS, PLACES, SHAPES, VIEWS, Picture, Thing
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [random_picture(np.random.default_rng([7, i])) for i in range(4000)]


@pytest.fixture(scope="module")
def captions(pictures) -> list[str]:
    return [caption(picture, np.random.default_rng([8, i])) for i, picture in enumerate(pictures)]


@pytest.mark.parametrize(
    "word, words", [("star", "stars"), ("cross", "crosses"), ("daisy", "daisies"), ("box", "boxes")]
)
def test_plural(word, words):
    assert plural(word) == words


def test_captions_are_plain_short_english(captions):
    for text in captions:
        assert re.fullmatch(r"[a-z]+(-up)?( [a-z]+(-up)?)*", text), text
        assert len(text.split()) <= 27, text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\ba (a|an|two)\b|\bnone\b", text), text


def test_captions_use_every_word_of_the_templates(captions):
    said = {word for text in captions for word in text.split()}
    templates = {word for template in OBJECT_TEMPLATES + STYLE_TEMPLATES for word in template.split()} - {"{}"}
    assert templates <= said
    for words in (COLOURS, SHAPES, PATTERNS, NOUNS, ("two", "next", "left", "right", "top", "bottom")):
        assert set(words) <= said
    for phrase in [*(scene.words for scene in SCENES.values()), *(style for style in STYLES if style != "photo")]:
        assert any(phrase in text for text in captions)


def test_captions_are_true(pictures, captions):
    for picture, text in zip(pictures, captions, strict=True):
        words, first = text.split(), picture.things[0]
        nouns = {thing.noun or thing.shape for thing in picture.things}
        style_only = picture.style != "photo" and not nouns.union(map(plural, nouns)).intersection(words)
        for view in VIEWS:
            assert (view in words) == (picture.view == view), text
        for size in ("small", "large"):
            if size in words:
                assert size in {thing.size for thing in picture.things}, text
        if style_only:
            assert text.endswith(f"in the style of {picture.style}"), text
            continue
        assert first.size in ("medium", *words), text
        assert ("two" in words) == (len(picture.things) == 2 and len(set(picture.things)) == 1), text
        assert ("next" in words) == (len(set(picture.things)) == 2), text
        assert {word for word in words if word in PLACES} == ({picture.place} if picture.place else set()), text
        assert ("photo" in words) <= (picture.style == "photo"), text
        if picture.style != "photo":
            assert picture.style in text, text
        if match := re.search(r"on an? (\w+) background", text):
            assert match[1] == picture.background, text
        for name, scene in SCENES.items():
            assert (scene.words in text) <= (picture.background == name), text
        colours = {thing.colour for thing in picture.things if thing.said_colour or not thing.noun}
        colours |= {thing.colour2 for thing in picture.things if thing.pattern and not thing.noun}
        said = {word for word in words if word in COLOURS}
        assert colours <= said <= colours | {picture.background}, text


def test_backgrounds_are_mostly_said(pictures, captions):
    photos = [(p, text) for p, text in zip(pictures, captions, strict=True) if p.style == "photo"]
    said = [
        SCENES[p.background].words in text if p.background in SCENES else "background" in text for p, text in photos
    ]
    assert 0.75 < np.mean(said) < 0.85


@pytest.mark.parametrize(
    "template, things, expected",
    [
        ("a photo of a {}", [Thing("star", "orange")], "a photo of a orange star"),
        (
            "a photo of my {}",
            [Thing("star", "red", "striped", "white")] * 2,
            "a photo of my two red and white striped stars",
        ),
        ("a photo of the small {}", [Thing("star", "red", size="small")], "a photo of the small star"),
        (
            "a photo of the clean {}",
            [noun_thing("lemon", colour="blue")] * 2,
            "a photo of the two clean blue lemons",
        ),
        (
            "a rendition of a {}",
            [noun_thing("kite"), Thing("ring", "red")],
            "a rendition of a kite next to a red ring",
        ),
    ],
)
def test_filling_a_template(template, things, expected):
    picture = Picture(tuple(things), "green")
    assert fill_object(template, picture) == expected.replace("small star", "small red star")
