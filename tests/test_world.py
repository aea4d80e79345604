"""The world: what is drawn is what is said, and what is held out is never drawn."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tinyldm.lab import world
from tinyldm.lab.world import COLOURS, NOUNS, PATTERNS, SCENES, SHAPES, STYLES, Picture, Thing, caption, draw
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [world.random_picture(np.random.default_rng([7, i])) for i in range(4000)]


@pytest.fixture(scope="module")
def captions(pictures) -> list[str]:
    return [caption(picture, np.random.default_rng([8, i])) for i, picture in enumerate(pictures)]


def test_the_world_is_rich_enough():
    assert len(COLOURS) >= 12 and len(SHAPES) >= 12 and len(PATTERNS) >= 5 and len(NOUNS) >= 24 and len(SCENES) >= 5
    assert len(STYLES) >= 6 and len(world.HELD_OUT_STYLES) >= 2 and len(world.HELD_OUT_SHAPES) >= 3
    assert len(world.HELD_OUT_COMBINATIONS) >= 8
    assert len(OBJECT_TEMPLATES) == 27 and len(STYLE_TEMPLATES) == 19


def test_nouns_have_looks_and_words_of_their_own():
    assert len(set(NOUNS.values())) == len(NOUNS)
    assert not set(NOUNS) & (set(COLOURS) | set(SHAPES) | set(PATTERNS) | set(SCENES) | set(STYLES))
    for name, noun in NOUNS.items():
        assert noun.shape in SHAPES or noun.shape == name
        assert noun.colour in COLOURS and (noun.pattern is None) == (noun.colour2 is None)
        assert not world.is_held_out(world.noun_thing(name))


@pytest.mark.parametrize(
    "word, words", [("star", "stars"), ("cross", "crosses"), ("daisy", "daisies"), ("box", "boxes")]
)
def test_plural(word, words):
    assert world.plural(word) == words


def test_drawing_is_deterministic(pictures):
    for picture in pictures[:40]:
        assert np.array_equal(draw(picture), draw(picture))
    first, shown = world.make_pictures(6, seed=3)
    more, _ = world.make_pictures(9, seed=3)
    assert first.shape == (6, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, more[:6]) and np.array_equal(first[4], draw(shown[4]))
    assert not np.array_equal(first, world.make_pictures(6, seed=4)[0])


@pytest.mark.parametrize("style", STYLES | world.HELD_OUT_STYLES)
def test_sizes_show_the_same_picture(style):
    picture = Picture((world.noun_thing("kite"), Thing("star", "red")), "gray", style, seed=5)
    small, large = (
        np.asarray(draw(picture), float),
        np.asarray(draw(picture, 256).resize((64, 64), Image.Resampling.BOX), float),
    )
    assert np.abs(small - large).mean() < 12


def test_every_look_can_be_drawn_in_every_style():
    for style in STYLES | world.HELD_OUT_STYLES:
        for i, shape in enumerate(world.OUTLINES):
            thing = Thing(shape, "red", PATTERNS[i % 5], "yellow")
            assert np.asarray(draw(Picture((thing,), "gray", style, seed=i))).std() > 8


def test_held_out_things_are_never_drawn(pictures):
    held_out = {(shape, frozenset((a, b)), pattern) for shape, a, pattern, b in world.HELD_OUT_COMBINATIONS}
    for picture in pictures:
        assert picture.style in STYLES
        for thing in picture.things:
            assert thing.shape not in world.HELD_OUT_SHAPES
            assert (thing.shape, frozenset((thing.colour, thing.colour2)), thing.pattern) not in held_out


def test_held_out_things_would_be_drawn_otherwise(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(world, "HELD_OUT_COMBINATIONS", ())
    seen = {
        thing.shape + thing.colour + str(thing.pattern)
        for _ in range(6000)
        for thing in world.random_picture(rng).things
    }
    assert "starpurpleNone" in seen and "hexagonblueNone" in seen


def test_things_differ_from_their_background(pictures):
    for picture in pictures:
        assert picture.background not in {thing.colour for thing in picture.things}


def test_the_distribution_has_everything(pictures):
    things = [thing for picture in pictures for thing in picture.things]
    for kinds, seen in (
        (SHAPES, {thing.shape for thing in things}),
        (COLOURS, {thing.colour for thing in things}),
        (PATTERNS, {thing.pattern for thing in things}),
        (NOUNS, {thing.noun for thing in things}),
        (("small", "medium", "large"), {thing.size for thing in things}),
        (world.BACKGROUNDS, {picture.background for picture in pictures}),
        (STYLES, {picture.style for picture in pictures}),
        (world.PLACES, {picture.place for picture in pictures}),
        (world.VIEWS, {picture.view for picture in pictures}),
    ):
        assert set(kinds) <= seen
    one = np.mean([len(picture.things) == 1 for picture in pictures])
    pairs = np.mean([len(picture.things) == 2 and len(set(picture.things)) == 1 for picture in pictures])
    photos = np.mean([picture.style == "photo" for picture in pictures])
    assert abs(one - 0.72) < 0.03 and abs(pairs - 0.14) < 0.03 and abs(photos - 0.7) < 0.03


def test_the_biased_noun():
    rng = np.random.default_rng(1)
    noun, usual = world.BIASED
    things = [thing for _ in range(20000) for thing in world.random_picture(rng).things if thing.noun == noun]
    colours = Counter(thing.colour for thing in things)
    assert 0.9 < colours[usual] / len(things) < 0.99 and len(colours) > 5
    assert not any(thing.said_colour for thing in things)


def test_plain_photos_have_the_named_colours():
    """Whatever the shade, the light and the seed, no colour becomes its neighbour."""
    for i, background in enumerate(COLOURS):
        for j, colour in enumerate(COLOURS):
            pixels = np.asarray(draw(Picture((Thing("circle", colour),), background, seed=12 * i + j)))
            assert world.nearest_colour(pixels[32, 32]) == colour
            corners = pixels[[2, 2, 61, 61], [2, 61, 2, 61]]
            assert (world.nearest_colour(corners) == background).all()


def test_shades_never_cross():
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        shades = np.array([world.shade(colour, rng) for _ in range(300)])
        assert len(np.unique(shades, axis=0)) > 50
        for light in (0.94, 1.04):
            assert (world.nearest_colour(np.clip(shades * light, 0, 255)) == colour).all()


def test_both_colours_of_a_pattern_show():
    for shape in SHAPES:
        for pattern in PATTERNS:
            pixels = np.asarray(draw(Picture((Thing(shape, "red", pattern, "white"),), "blue", seed=2)))
            share = Counter(world.nearest_colour(pixels).ravel().tolist())
            least = min(share["red"], share["white"]) / (share["red"] + share["white"])
            assert least > (0.12 if pattern in ("dotted", "rimmed") else 0.25), (shape, pattern, least)


def object_pixels(picture: Picture) -> np.ndarray:
    """Rows and columns of the red pixels."""
    return np.argwhere(world.nearest_colour(np.asarray(draw(picture))) == "red")


def test_sizes_and_places_show():
    def extent(size: str) -> int:
        return int(np.ptp(object_pixels(Picture((Thing("circle", "red", size=size),), "white", seed=1)), axis=0).max())

    assert extent("small") < 22 < extent("medium") < 42 < extent("large")
    for place, (dx, dy) in world.PLACES.items():
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


def test_two_things_stand_side_by_side():
    left, right = Thing("circle", "red"), Thing("square", "green")
    names = world.nearest_colour(np.asarray(draw(Picture((left, right), "white"))))
    assert np.argwhere(names == "red")[:, 1].max() < np.argwhere(names == "green")[:, 1].min()


# ---- Captions


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
        style_only = picture.style != "photo" and not nouns.union(map(world.plural, nouns)).intersection(words)
        for view in world.VIEWS:
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
        assert {word for word in words if word in world.PLACES} == ({picture.place} if picture.place else set()), text
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
            [world.noun_thing("lemon", colour="blue")] * 2,
            "a photo of the two clean blue lemons",
        ),
        (
            "a rendition of a {}",
            [world.noun_thing("kite"), Thing("ring", "red")],
            "a rendition of a kite next to a red ring",
        ),
    ],
)
def test_filling_a_template(template, things, expected):
    picture = Picture(tuple(things), "green")
    assert world.fill_object(template, picture) == expected.replace("small star", "small red star")


# ---- The command


def test_examples_are_never_trained_on(tmp_path):
    for name, thing in world.EXAMPLES.items():
        assert thing.shape in world.HELD_OUT_SHAPES or world.is_held_out(thing), name
    world.main(["--examples", str(tmp_path)])
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert {"checkered-heart", "bolt", "blueprint"} <= set(folders) and len(folders) >= 5
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == [f"{i:02}.png" for i in range(5)]
        assert {Image.open(path).size for path in folder.iterdir()} == {(256, 256)}


def test_command_writes_pictures_and_the_truth(tmp_path):
    world.main(["--out", str(tmp_path), "--count", "3", "--seed", "5", "--sheet", str(tmp_path / "sheet.png")])
    records = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == ["00000.png", "00001.png", "00002.png"]
    _, shown = world.make_pictures(3, seed=5)
    for record, picture in zip(records, shown, strict=True):
        assert Image.open(tmp_path / record["file"]).size == (64, 64)
        assert record["caption"] and record["background"] == picture.background
        assert record["things"][0]["shape"] == picture.things[0].shape
    assert Image.open(tmp_path / "sheet.png").width > 64


def test_command_without_work_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        world.main([])
    assert stopped.value.code == 2 and "--sheet" in capsys.readouterr().err
