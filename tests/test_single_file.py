"""Single files of Stable Diffusion: what they are is recognised, what they are not is refused, eps or v is known."""

import pytest
from helpers.public import save_lightning, single_file, write_merges
from safetensors.torch import save_file

from tinyldm.formats.checkpoint import load_checkpoint

# ---- eps or v


def test_a_single_file_of_1x_predicts_eps_and_nobody_is_warned(tmp_path, recwarn):
    model = load_checkpoint(written(tmp_path, "1.x"))
    assert model.schedule.prediction == "eps" and model.tokenizer.pad == "end" and model.defaults.size == 512
    assert not [warning for warning in recwarn if "predicts" in str(warning.message)]


def test_a_single_file_of_2x_predicts_v_by_default_and_says_how_that_was_chosen(run, tmp_path):
    path = written(tmp_path, "2.x")
    small = ("--height", 32, "--width", 32, "--steps", 1)
    outcome = run("sample.py", "--prompt", "a", "--weights", path, *small)
    assert outcome.status == 0
    assert f"{path} predicts v: a guess, as for most of 2.x" in outcome.err and "--prediction eps" in outcome.err
    model = load_checkpoint(path)
    assert model.tokenizer.pad == "zero" and model.defaults.size == 768

    outcome = run("sample.py", "--prompt", "a", "--weights", path, *small, "--prediction", "eps")
    assert outcome.status == 0 and "guess" not in outcome.err
    model = load_checkpoint(path, prediction="eps")
    assert model.schedule.prediction == "eps" and model.defaults.size == 512


@pytest.mark.parametrize("steps, expected", [(875_000, "eps"), (110_000, "v")])
def test_the_training_steps_of_20_base_say_that_it_predicts_eps(tmp_path, steps, expected):
    save_lightning(tmp_path / "x.ckpt", single_file("2.x"), steps=steps)
    write_merges(tmp_path)
    with pytest.warns(UserWarning, match=f"predicts {expected}: a guess"):
        assert load_checkpoint(tmp_path / "x.ckpt").schedule.prediction == expected


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
@pytest.mark.parametrize("stated, expected", [("epsilon", "eps"), ("v", "v"), ("V-Prediction", "v")])
def test_metadata_is_believed_before_any_default_and_nobody_is_warned(tmp_path, recwarn, kind, stated, expected):
    path = written(tmp_path, kind, {"modelspec.prediction_type": stated})
    assert load_checkpoint(path).schedule.prediction == expected
    assert not [warning for warning in recwarn if "predicts" in str(warning.message)]


def test_a_flag_that_contradicts_what_the_checkpoint_states_is_refused(run, tmp_path):
    path = written(tmp_path, "2.x", {"modelspec.prediction_type": "v"})
    error = run("sample.py", "--prompt", "a", "--weights", path, "--prediction", "eps").error
    assert f"--prediction eps contradicts {path}, of which its metadata states v; leave it out" in error
    assert load_checkpoint(path, prediction="v").schedule.prediction == "v"


def written(folder, kind, metadata=None):
    save_file(single_file(kind), folder / "x.safetensors", metadata=metadata)
    write_merges(folder)
    return folder / "x.safetensors"
