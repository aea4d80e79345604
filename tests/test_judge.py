"""The judge on pictures it never saw, and how it is trained."""

import numpy as np
import pytest
import torch

from tinyldm import InputError
from tinyldm.images import from_pixels
from tinyldm.lab.measure import judge
from tinyldm.lab.world.distribution import make_pictures
from tinyldm.lab.world.nouns import INVENTED_NOUNS, INVENTED_OUTLINES, noun_thing
from tinyldm.lab.world.styles import HELD_OUT_STYLES, INVENTED_STYLES, STYLES
from tinyldm.lab.world.things import MARKED, Picture, Thing

INVENTED_STYLE, OWN_OUTLINE = next(iter(INVENTED_STYLES)), next(iter(INVENTED_OUTLINES))
WITH_MARK = next(noun for noun, look in INVENTED_NOUNS.items() if look.pattern == MARKED)


def test_the_judge_is_right_about_real_pictures():
    shares = judge.shares_right(judge.load_judge(), count=500)
    assert set(shares) == set(judge.ANSWERS)
    assert shares.pop("style") >= 0.96, shares  # some invented styles are hardly more than a photo
    assert min(shares.values()) >= 0.98, shares


def test_it_knows_the_held_out_styles_and_what_is_shown_in_them():
    shares = judge.shares_right(judge.load_judge(), 200, judge.in_held_out_style)
    assert min(shares.values()) >= 0.9, shares


def test_it_knows_every_style_that_prompts_name():
    """Of oil paintings too, whose strokes are faint where the colour is dark."""
    pixels, pictures = make_pictures(700, judge.TEST_SEED, random=judge.in_named_style)
    said = judge.load_judge().answers(from_pixels(torch.from_numpy(pixels)))
    for style in STYLES:
        right = [answer["style"] == style for answer, p in zip(said, pictures, strict=True) if p.style == style]
        assert len(right) > 50 and np.mean(right) >= 0.95, style


def test_of_the_pictures_it_learns_from_some_are_in_held_out_styles():
    pictures = [judge.picture_to_judge(np.random.default_rng([5, i])) for i in range(1000)]
    shares = [np.mean([picture.style == style for picture in pictures]) for style in HELD_OUT_STYLES]
    assert sum(shares) == pytest.approx(judge.HELD_OUT_SHARE, abs=0.04) and min(shares) > 0.05


@pytest.mark.parametrize(
    "picture, expected",
    [
        (Picture((Thing("star", "red"),), "blue"), {"count": "one", "shape": "star", "pattern": "plain"}),
        (Picture((Thing("star", "red"),) * 2, "blue"), {"count": "two", "shape": "star", "right shape": "star"}),
        (Picture((noun_thing("kite", "small"),), "snow", "sketch"), {"pattern": "halved", "size": "small"}),
        (Picture((Thing("ring", "red"), Thing("drop", "blue")), "grass"), {"shape": "ring", "right shape": "drop"}),
        (Picture((Thing("ring", "red"),), "grass", place="top"), {"scene": "grass", "place": "top", "style": "photo"}),
        (Picture((noun_thing("balloon"),), "sea", "blueprint"), {"shape": "balloon", "style": "blueprint"}),
        (Picture((noun_thing(OWN_OUTLINE),), "sea"), {"shape": "other", "right shape": "other"}),
        (
            Picture((noun_thing(WITH_MARK),), "sea", next(iter(INVENTED_STYLES))),
            {"pattern": MARKED, "style": "invented"},
        ),
    ],
)
def test_the_truth_is_what_the_picture_says(picture, expected):
    assert expected.items() <= judge.truth(picture).items()


def test_the_command_trains_writes_and_measures_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "BATCH", 8)
    monkeypatch.setattr(judge, "shares_right", lambda trained, *_, **__: {"shape": 0.5})
    outcome = run("tinyldm.lab.measure.judge", "--pictures", 100, "--steps", 2, "--out", tmp_path / "new.safetensors")
    assert outcome.status == 0 and outcome.out == (
        "shape: 50.0% right on pictures it never saw\n"
        "shape: 50.0% right on such pictures in blueprint and stained glass\n"
    )
    judge.load_judge(tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").stat().st_size < 1_500_000


def test_a_judge_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"no judge at .*; it comes with the project, or: python -m tinyldm"):
        judge.load_judge(tmp_path / "judge.safetensors")
