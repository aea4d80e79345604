"""Single files of Stable Diffusion: what they are is recognised, what they are not is refused, eps or v is known."""

import pytest
import torch
from helpers.public import single_file, write_merges
from safetensors.torch import save_file

from tinyldm.formats import checkpoint
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.single_file import prediction_of_2x
from tinyldm.formats.untrusted import WeightsFile
from tinyldm.unet import UNet, UNetConfig

LAST = "output_blocks.5.1.transformer_blocks.0.norm1.bias"  # 11 in the real ones

# ---- eps or v


def test_a_single_file_of_1x_predicts_eps_and_nobody_is_warned(tmp_path, recwarn):
    model = load_checkpoint(written(tmp_path, "1.x"))
    assert model.schedule.prediction == "eps" and model.tokenizer.pad == "end" and model.defaults.size == 512
    assert not [warning for warning in recwarn if "predicts" in str(warning.message)]


@pytest.mark.parametrize("deviation, target, size", [(0.02, "eps", 512), (0.089, "eps", 512), (0.1, "v", 768)])
def test_the_deviation_of_one_weight_tells_21_from_21_base(tmp_path, capsys, recwarn, deviation, target, size):
    """SD20.model_type of ComfyUI's comfy/supported_models.py: the population's, and above 0.09 it is v."""
    path = written(tmp_path, "2.x", bias=torch.tensor([deviation, -deviation]).repeat(32) + 3)
    model = load_checkpoint(path)
    assert (model.schedule.prediction, model.defaults.size, model.tokenizer.pad) == (target, size, "zero")
    assert len(recwarn) == 0
    checkpoint.main([str(path)])
    known = f"predicts {target}, known from the deviation of {LAST}, {deviation:.3f}: above 0.09 it is v, as ComfyUI"
    assert known in capsys.readouterr().out


def test_of_the_real_ones_it_is_the_weight_that_comfyui_looks_at(tmp_path):
    """Headers of the real sizes, with a hole in place of the numbers: all that opening reads is this one weight."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(context_width=1024, heads=None, head_width=64, linear_projections=True)).state_dict()
    shapes = {f"model.diffusion_model.{name}": (320,) for name in unet}
    reads = []
    weights = WeightsFile((tmp_path,), shapes, {}, {}, lambda name: reads.append(name) or torch.zeros(320))
    assert prediction_of_2x(weights).target == "eps"
    assert reads == ["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"]


def test_the_flag_is_stronger_than_the_deviation(tmp_path):
    path = written(tmp_path, "2.x", bias=torch.zeros(64))
    assert load_checkpoint(path).schedule.prediction == "eps"
    model = load_checkpoint(path, prediction="v")
    assert model.schedule.prediction == "v" and model.defaults.size == 768


@pytest.mark.parametrize("bias", [None, torch.zeros(200, 200)])
def test_without_that_weight_a_file_of_2x_is_broken(run, tmp_path, bias):
    path = written(tmp_path, "2.x", bias=bias)
    assert "lacks weights that tell its sizes" in run("sample.py", "--prompt", "a", "--weights", path).error


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
@pytest.mark.parametrize("stated, expected", [("epsilon", "eps"), ("v", "v"), ("V-Prediction", "v")])
def test_metadata_is_believed_before_any_default_and_nobody_is_warned(tmp_path, recwarn, kind, stated, expected):
    path = written(tmp_path, kind, {"modelspec.prediction_type": stated})
    assert load_checkpoint(path).schedule.prediction == expected
    assert not [warning for warning in recwarn if "predicts" in str(warning.message)]


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
@pytest.mark.parametrize("key, expected", [("epsilon", "eps"), ("v", "v")])
def test_a_file_that_comfyui_saved_says_what_it_predicts(tmp_path, recwarn, kind, key, expected):
    """As its nodes_model_merging.py writes it: modelspec.predict_key, and of v an empty tensor besides."""
    path = written(
        tmp_path, kind, {"modelspec.predict_key": key}, extra={"v_pred": torch.zeros(0)} if key == "v" else {}
    )
    assert load_checkpoint(path).schedule.prediction == expected
    path = written(tmp_path, kind, extra={"v_pred": torch.zeros(0)})  # older versions wrote no such metadata
    assert load_checkpoint(path).schedule.prediction == "v"
    assert not [warning for warning in recwarn if "predicts" in str(warning.message)]


def test_a_file_whose_tensors_have_no_such_dimensions_is_one_line(run, tmp_path):
    unet = "model.diffusion_model."
    save_file(
        {f"{unet}{name}.weight": torch.zeros(4) for name in ("input_blocks.0.0", "out.2")}, tmp_path / "x.safetensors"
    )
    assert (
        "x.safetensors: its configuration is incomplete or broken"
        in run("sample.py", "--prompt", "a", "--weights", tmp_path / "x.safetensors").error
    )


def test_a_file_of_another_noise_schedule_is_refused(run, tmp_path):
    path = written(tmp_path, "2.x", extra={"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    error = run("sample.py", "--prompt", "a", "--weights", path).error
    assert "is of a zero terminal SNR (it holds ztsnr), whose noise schedule is another" in error


def test_a_flag_that_contradicts_what_the_checkpoint_states_is_refused(run, tmp_path):
    path = written(tmp_path, "2.x", {"modelspec.prediction_type": "v"})
    error = run("sample.py", "--prompt", "a", "--weights", path, "--prediction", "eps").error
    assert f"--prediction eps contradicts {path}, of which its metadata states v; leave it out" in error
    assert load_checkpoint(path, prediction="v").schedule.prediction == "v"


def written(folder, kind, metadata=None, extra=None, **bias):
    tensors = single_file(kind) | (extra or {})
    for value in bias.values():
        tensors[f"model.diffusion_model.{LAST}"] = value
    save_file({name: p for name, p in tensors.items() if p is not None}, folder / "x.safetensors", metadata=metadata)
    write_merges(folder)
    return folder / "x.safetensors"
