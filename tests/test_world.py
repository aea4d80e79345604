"""The world is rich, its distribution is as stated, what is held out is never drawn, and the command writes it all."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tinyldm.lab.world import distribution as world
from tinyldm.lab.world.__main__ import main
from tinyldm.lab.world.drawing import HELD_OUT_STYLES, STYLES, draw
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.things import (
    COLOURS,
    HELD_OUT_SHAPES,
    NOUNS,
    PATTERNS,
    PLACES,
    SHAPES,
    VIEWS,
    Picture,
    noun_thing,
)
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [world.random_picture(np.random.default_rng([7, i])) for i in range(4000)]


def test_the_world_is_rich_enough():
    assert len(COLOURS) >= 12 and len(SHAPES) >= 12 and len(PATTERNS) >= 5 and len(NOUNS) >= 24 and len(SCENES) >= 5
    assert len(STYLES) >= 6 and len(HELD_OUT_STYLES) >= 2 and len(HELD_OUT_SHAPES) >= 3
    assert len(world.HELD_OUT_COMBINATIONS) >= 8
    assert len(OBJECT_TEMPLATES) == 27 and len(STYLE_TEMPLATES) == 19


def test_nouns_have_looks_and_words_of_their_own():
    assert len(set(NOUNS.values())) == len(NOUNS)
    assert not set(NOUNS) & (set(COLOURS) | set(SHAPES) | set(PATTERNS) | set(SCENES) | set(STYLES))
    for name, noun in NOUNS.items():
        assert noun.shape in SHAPES or noun.shape == name
        assert noun.colour in COLOURS and (noun.pattern is None) == (noun.colour2 is None)
        assert not world.is_held_out(noun_thing(name))


def test_the_same_seed_makes_the_same_pictures():
    first, shown = world.make_pictures(6, seed=3)
    more, _ = world.make_pictures(9, seed=3)
    assert first.shape == (6, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, more[:6]) and np.array_equal(first[4], draw(shown[4]))
    assert not np.array_equal(first, world.make_pictures(6, seed=4)[0])


def test_held_out_things_are_never_drawn(pictures):
    held_out = {(shape, frozenset((a, b)), pattern) for shape, a, pattern, b in world.HELD_OUT_COMBINATIONS}
    for picture in pictures:
        assert picture.style in STYLES
        for thing in picture.things:
            assert thing.shape not in HELD_OUT_SHAPES
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
        ({*COLOURS, *SCENES}, {picture.background for picture in pictures}),
        (STYLES, {picture.style for picture in pictures}),
        (PLACES, {picture.place for picture in pictures}),
        (VIEWS, {picture.view for picture in pictures}),
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


# ---- The command


def test_examples_are_never_trained_on(tmp_path):
    for name, thing in world.EXAMPLES.items():
        assert thing.shape in HELD_OUT_SHAPES or world.is_held_out(thing), name
    main(["--examples", str(tmp_path)])
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert {"checkered-heart", "bolt", "blueprint"} <= set(folders) and len(folders) >= 5
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == [f"{i:02}.png" for i in range(5)]
        assert {Image.open(path).size for path in folder.iterdir()} == {(256, 256)}


def test_command_writes_pictures_and_the_truth(tmp_path):
    main(["--out", str(tmp_path), "--count", "3", "--seed", "5", "--sheet", str(tmp_path / "sheet.png")])
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
        main([])
    assert stopped.value.code == 2 and "--sheet" in capsys.readouterr().err
