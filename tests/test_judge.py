"""The judge on pictures it never saw, and how it is trained."""

import pytest

from tinyldm import InputError
from tinyldm.lab.measure import judge
from tinyldm.lab.world.nouns import noun_thing
from tinyldm.lab.world.things import Picture, Thing


def test_the_judge_is_right_about_real_pictures():
    shares = judge.shares_right(judge.load_judge(), count=800)
    assert set(shares) == set(judge.ANSWERS)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize(
    "picture, expected",
    [
        (Picture((Thing("star", "red"),), "blue"), {"count": "one", "shape": "star", "pattern": "plain"}),
        (Picture((Thing("star", "red"),) * 2, "blue"), {"count": "two", "shape": "star", "right shape": "star"}),
        (Picture((noun_thing("kite", "small"),), "snow", "sketch"), {"pattern": "halved", "size": "small"}),
        (Picture((Thing("ring", "red"), Thing("drop", "blue")), "grass"), {"shape": "ring", "right shape": "drop"}),
        (Picture((Thing("ring", "red"),), "grass", place="top"), {"scene": "grass", "place": "top", "style": "photo"}),
    ],
)
def test_the_truth_is_what_the_picture_says(picture, expected):
    assert expected.items() <= judge.truth(picture).items()


def test_the_command_trains_writes_and_measures_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "shares_right", lambda trained, count=3000: {"shape": 0.5})
    outcome = run("tinyldm.lab.measure.judge", "--pictures", 100, "--steps", 2, "--out", tmp_path / "new.safetensors")
    assert outcome.status == 0 and outcome.out == "shape: 50.0% right on pictures it never saw\n"
    judge.load_judge(tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").stat().st_size < 1_500_000


def test_a_judge_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"no judge at .*; it comes with the project, or: python -m tinyldm"):
        judge.load_judge(tmp_path / "judge.safetensors")
