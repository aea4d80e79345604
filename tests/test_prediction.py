"""eps or v: what the checkpoint states comes first, then --prediction, then what else is known of it."""

import re
from pathlib import Path

import pytest

from tinyldm import InputError
from tinyldm.formats.prediction import STATED, THE_DEFAULT, Prediction, known_prediction
from tinyldm.schedule import PREDICTIONS

FILE = Path("some.safetensors")
OTHERWISE = Prediction("v", "the deviation of a weight")


@pytest.mark.parametrize("stated", PREDICTIONS)
def test_what_the_checkpoint_states_wins_over_any_default(stated):
    for default in (THE_DEFAULT, OTHERWISE):
        assert known_prediction(FILE, stated, "its metadata", None, default) == Prediction(stated, "its metadata")


@pytest.mark.parametrize("stated", PREDICTIONS)
def test_a_flag_that_says_what_the_checkpoint_states_changes_nothing(stated):
    assert known_prediction(FILE, stated, "its metadata", stated, OTHERWISE) == Prediction(stated, "its metadata")


@pytest.mark.parametrize("stated, flag", [("eps", "v"), ("v", "eps")])
def test_a_flag_that_contradicts_what_the_checkpoint_states_is_refused_in_one_line(stated, flag):
    line = f"--prediction {flag} contradicts some.safetensors, of which its scheduler states {stated}; leave it out"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        known_prediction(FILE, stated, "its scheduler", flag)


@pytest.mark.parametrize("flag", PREDICTIONS)
def test_where_nothing_is_stated_the_flag_wins(flag):
    for default in (THE_DEFAULT, OTHERWISE):
        assert known_prediction(FILE, None, "its metadata", flag, default) == Prediction(flag, "--prediction")


def test_where_nobody_says_anything_it_is_the_default():
    assert known_prediction(FILE, None, "its metadata", None) == Prediction("eps", "the default")
    assert known_prediction(FILE, None, "its metadata", None, OTHERWISE) == OTHERWISE


def test_every_word_that_others_use_means_eps_or_v_and_is_in_lower_case():
    assert set(STATED.values()) == set(PREDICTIONS)
    assert STATED["epsilon"] == "eps" and STATED["v_prediction"] == STATED["v-prediction"] == "v"
    assert all(word == word.lower() for word in STATED)  # as readers look them up
