"""The gallery: what its checks accept, and that the command makes its page from words that are there."""

import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import sample
import train
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.inversion import vectors_of
from tinyldm.lab.gallery import words
from tinyldm.lab.gallery.applications import (
    All,
    ShowsColours,
    box_around,
    entropy,
    error,
    inside_over_outside,
    psnr,
    with_mask,
)
from tinyldm.lab.gallery.page import APPLICATIONS
from tinyldm.lab.gallery.words import BALLOON, HEART, LESSONS, balanced_balloons, thing_of
from tinyldm.lab.world.distribution import stands_out
from tinyldm.lab.world.drawing import SIZE
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import Picture, Thing


@pytest.fixture
def learned(tmp_path, tiny, monkeypatch):
    """Words that take no time to learn: all are a heart."""
    file = tmp_path / "heart.safetensors"
    save_embeddings(file, {"S*": vectors_of(tiny, "heart")})
    monkeypatch.setattr(words, "learn", lambda *_: file)
    return tmp_path / "g"


def test_the_command_makes_a_page_with_a_sheet_for_each_application(run, learned, quick):
    some = ["composition", "editing", "limits"]
    outcome = run("tinyldm.lab.gallery", "--out", learned, "--weights", quick, "--only", *some)
    assert outcome.status == 0, outcome.err
    page = (learned / "README.md").read_text()
    assert re.findall(r"!\[.*\]\((\w+)\.png\)", page) == some
    for name in (*some, "gallery"):
        assert np.asarray(Image.open(learned / f"{name}.png")).std() > 10
    edited, decoded = (float(found) for found in re.findall(r" \| ([\d.]+) dB", page))
    assert edited == decoded  # as it is printed, to 0.1 dB
    assert sorted(load_embeddings(learned / "words" / "checkered-heart-and-striped-circle.safetensors")) == ["S*", "T*"]


def test_every_command_of_the_page_is_one_that_the_scripts_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lesson in LESSONS:
        typed = shlex.split(lesson.command(tmp_path / "docs"))
        assert typed[:2] == ["python", "train.py"]
        options = train.parse_options(typed[2:])
        assert options.token == lesson.token and ((ROOT / options.images).is_dir() or lesson == BALLOON)
    for application in APPLICATIONS:
        *before, draw_it = application.commands(tmp_path / "docs")
        typed = shlex.split(draw_it)
        assert typed[:2] == ["python", "sample.py"]
        options = sample.parse_options(typed[2:])
        assert application.lessons[0].token in options.prompt[0]
        for merge_them in before:
            assert shlex.split(merge_them)[-1] == options.embedding[0]


def test_words_are_merged_by_the_command_that_the_page_shows(run, tmp_path):
    ((merge_them, _),) = [lines for one in APPLICATIONS if len(lines := one.commands(ROOT / "docs/gallery")) == 2]
    program, _, module, *typed = shlex.split(merge_them)
    assert program == "python" and run(module, *typed).status == 0
    assert sorted(load_embeddings(tmp_path / typed[-1])) == ["S*", "T*"]


def test_every_word_of_a_prompt_is_one_of_its_applications_words():
    for application in APPLICATIONS:
        there = {lesson.token for lesson in LESSONS if lesson.token in application.prompt}
        assert there <= {lesson.token for lesson in application.lessons}, application.name


# ---- Checks


def coloured(*colours):
    return [Picture((Thing("star", colour),), "white", seed=i) for i, colour in enumerate(colours)]


@pytest.mark.parametrize(
    ("colours", "bits"),
    [(["red"] * 8, 0.0), (["red", "blue"] * 4, 1.0), (["red", "blue", "green", "purple"] * 2, 2.0)],
)
def test_entropy_is_that_of_the_things_colours(colours, bits):
    assert entropy([draw(picture) for picture in coloured(*colours)]) == pytest.approx(bits)


def test_two_things_show_the_colours_of_both():
    left, right = Thing("heart", "orange", "checkered", "black"), Thing("circle", "teal", "striped", "white")
    pixels = np.asarray(draw(Picture((left, right), "purple", seed=1)))
    assert ShowsColours(("orange", "black", "teal", "white"))(pixels, {})
    assert not ShowsColours(("orange", "black", "teal", "green"))(pixels, {})
    assert not ShowsColours(("red",))(np.zeros((SIZE, SIZE, 3), np.uint8), {})


def test_all_is_all():
    true, false = (lambda value: lambda pixels, said: value)(True), (lambda value: lambda pixels, said: value)(False)
    assert All((true, true))(None, {}) and not All((true, false))(None, {})


def test_a_box_covers_the_thing_with_a_margin():
    image = draw(Picture((Thing("star", "red"),), "white", seed=0))
    red = np.asarray(image)[..., 1] < 120
    box = box_around(image)
    assert box[red].all() and 1.2 * red.sum() < box.sum() < 0.8 * box.size
    rows = np.flatnonzero(red.any(axis=1))
    assert not box[: rows[0] - 8].any() and box[rows[0] - 4].any()
    assert (np.asarray(with_mask(image, box))[box] == 255).all()


def test_psnr_is_of_what_is_outside_alone():
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    b[..., :2] = 2.0  # black against white
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    assert error(a, b, ~left) == 0 and error(a, b, left) == 1
    assert psnr([0.01, 0.01]) == pytest.approx(20)


def test_a_map_is_compared_inside_and_outside_the_thing():
    image = draw(Picture((Thing("square", "red"),), "white", seed=0))
    red = torch.from_numpy(np.asarray(image)[..., 1] < 120)
    heat = torch.nn.functional.interpolate((1 + 2 * red.float())[None, None], (8, 8), mode="area")[0, 0]
    assert 2 < inside_over_outside(heat, image) <= 3.2
    assert inside_over_outside(torch.ones(8, 8), image) == pytest.approx(1, abs=0.01)


def test_the_balloons_are_of_six_colours_none_the_biased():
    images = balanced_balloons()
    assert entropy(images) == pytest.approx(np.log2(6)) and len(images) == 6


def test_the_edited_pictures_backgrounds_suit_the_word():
    assert all(stands_out((thing_of(HEART),), ground) for ground in ("white", "grass", "blue", "purple"))
