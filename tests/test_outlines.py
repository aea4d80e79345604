"""How alike two outlines are, on drawings whose outline is known."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.lab.measure import outlines, sampling
from tinyldm.lab.measure.questions import true_pictures
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import HELD_OUT_SHAPES, SHAPES, Picture, Thing


@pytest.mark.parametrize("shape", ["heart", "star", "bolt", "hourglass", "arrow"])
def test_a_drawn_shape_fits_its_own_outline_and_no_other(shape):
    seen = [outlines.silhouette_of(image) for image in true_pictures(Thing(shape, "red"))[::4]]
    own = outlines.mean_overlap(seen, shape)
    others = [outlines.mean_overlap(seen, other) for other in (*SHAPES, *HELD_OUT_SHAPES) if other != shape]
    assert own > 0.88 and max(others) < own - 0.15


def test_a_heart_is_near_1_and_a_cross_clearly_lower():
    seen = [outlines.silhouette_of(image) for image in true_pictures(Thing("heart", "green"))]
    assert min(outlines.overlap(heart, "heart") for heart in seen) > 0.93
    assert max(outlines.overlap(heart, "cross") for heart in seen) < 0.7


@pytest.mark.parametrize("how", [{}, {"place": "left"}, {"place": "top"}], ids=str)
def test_place_size_and_leaning_do_not_matter(how):
    for seed in range(4):
        for size in ("medium", "large") if not how else ("medium",):
            image = draw(Picture((Thing("arrow", "yellow", size=size),), "blue", seed=seed, **how))
            assert outlines.overlap(outlines.silhouette_of(image), "arrow") > 0.9


def test_two_things_are_not_one_and_an_empty_picture_is_none():
    pair = draw(Picture((Thing("heart", "green"),) * 2, "white", seed=1))
    assert outlines.overlap(outlines.silhouette_of(pair), "heart") < 0.6
    empty = outlines.silhouette_of(Image.new("RGB", (64, 64), "gray"))
    assert outlines.overlap(empty, "heart") == 0


def test_a_silhouette_fills_its_square_and_keeps_its_proportions():
    mask = np.zeros((40, 60), bool)
    mask[5:15, 10:50] = True  # four times as wide as high
    square = outlines.silhouette(mask)
    rows, columns = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
    assert len(columns) == outlines.SIDE and len(rows) == outlines.SIDE // 4
    assert abs(rows.mean() - (outlines.SIDE - 1) / 2) <= 1


def test_the_report_tells_a_word_that_keeps_its_outline_from_one_that_does_not(run, tmp_path, monkeypatch):
    """Samples of the bolt's word are bolts; those of the arrow's word are stars."""
    bolt, arrow, star = Thing("bolt", "yellow"), Thing("arrow", "blue"), Thing("star", "blue")
    monkeypatch.setattr(outlines, "UNSEEN_SHAPES", [bolt, arrow])
    monkeypatch.setattr(outlines, "KNOWN_SHAPES", [star])
    monkeypatch.setattr(outlines, "decoded", lambda model, pictures: pictures)
    monkeypatch.setattr(outlines, "word_for", lambda training, pictures, seed: {"S*": torch.ones(1, 128)})

    def sampled(model, prompts, words=None, guidance=None):  # no bolt is asked for on a background of its own yellow
        return true_pictures(star if any("yellow" in prompt for prompt in prompts) else bolt)

    monkeypatch.setattr(sampling, "sampled", sampled)
    outcome = run("tinyldm.lab.measure", "--only", "outlines", "--seeds", 2, "--sheets", tmp_path)
    *lines, unseen, known = outcome.out.splitlines()
    number = r"(0\.\d\d)"
    form = rf"(.+): colours 100%, IoU {number}; decoded true pictures {number}; other outlines {number}, (\w+) {number}"
    rows = [re.fullmatch(form, line).groups() for line in lines]
    assert [name for name, *_ in rows] == ["yellow bolt", "blue arrow", "blue star"]
    (own, reachable, others, _, most), (wrong, _, _, nearest, its), _ = ([*map(as_number, row[1:])] for row in rows)
    assert own == reachable > 0.85 and others < most < 0.65
    assert wrong < 0.65 and nearest == "star" and its > 0.88
    assert re.fullmatch(rf"mean IoU of 2 unseen shapes: {number}", unseen) and known.startswith("mean IoU of 1 known")
    assert Image.open(tmp_path / "outlines.png").width > 64


def as_number(text):
    return float(text) if text[0] == "0" else text
