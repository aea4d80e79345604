"""The figures of learned styles, of samples whose truth is known."""

import re

import pytest
import torch
from PIL import Image

from tinyldm.lab.measure import learned_styles, sampling
from tinyldm.lab.measure.questions import true_pictures_in_style
from tinyldm.lab.world.styles import HELD_OUT_STYLES


@pytest.mark.parametrize("shown, expected", [("blueprint", (90, 0)), ("stained glass", (0, 90)), ("photo", (0, 0))])
def test_the_style_is_seen_where_it_is_and_the_shape_wherever(run, tmp_path, monkeypatch, shown, expected):
    """Whichever style the word is of, its samples are the world's own pictures in the one shown."""
    learned = []

    def word_for(training, pictures, seed, kind):
        learned.append((pictures[0].style, len(pictures), seed, kind))
        return {"S*": torch.ones(1, 128)}

    monkeypatch.setattr(learned_styles, "word_for", word_for)
    monkeypatch.setattr(learned_styles, "decoded", lambda model, pictures: pictures)
    monkeypatch.setattr(sampling, "sampled", lambda *_: true_pictures_in_style(shown))
    outcome = run("tinyldm.lab.measure", "--only", "styles", "--seeds", 1, "--sheets", tmp_path)
    lines = re.findall(r"^(.+), (the world's own|decoded|learned): style (\d+)%, shape (\d+)%$", outcome.out, re.M)
    assert [(style, what) for style, what, *_ in lines] == [
        (style, what) for style in HELD_OUT_STYLES for what in ("the world's own", "decoded", "learned")
    ]
    assert all(int(style) >= 90 and int(shape) >= 90 for _, what, style, shape in lines if what == "the world's own")
    for (_, what, style, shape), least in zip(lines[2::3], expected, strict=True):
        assert what == "learned" and int(shape) >= 90
        assert int(style) >= least if least else int(style) <= 10
    assert sorted(learned) == sorted((style, 5, 0, "style") for style in HELD_OUT_STYLES)
    assert Image.open(tmp_path / "style-stained-glass.png").width > 64
