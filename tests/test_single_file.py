"""Single files of Stable Diffusion: what they are is recognised, what they are not is refused, eps or v is known."""

import json

import pytest
import torch
from conftest import WEIGHTS
from helpers.public import autoencoder_file, save_lightning, single_file, write_merges
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint, open_checkpoint

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def names(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(80, 80) for name in names}


def with_inputs(channels: int) -> dict[str, torch.Tensor]:
    tensors = single_file("1.x")
    return tensors | {FIRST: torch.zeros(32, channels, 3, 3)}


# Names from real files of each sort, and what the line says.
OTHERS = {
    "inpainting": (with_inputs(9), "is an inpainting model: its UNet reads 9 channels, expected 4"),
    "depth": (with_inputs(5), "is a depth-to-image model"),
    "instruct-pix2pix": (with_inputs(8), "is an instruct-pix2pix model"),
    "SDXL": (
        names(
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
            "conditioner.embedders.1.model.ln_final.weight",
            "first_stage_model.decoder.conv_in.weight",
            "model.diffusion_model.label_emb.0.0.weight",
        ),
        "is an SDXL checkpoint",
    ),
    "SD3": (
        names("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "first_stage_model.x.weight"),
        "is a Stable Diffusion 3 checkpoint",
    ),
    "Flux": (names("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "is a Flux checkpoint"),
    "Flux with its text encoders": (
        names("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "text_encoders.t5xxl.weight"),
        "is a Flux checkpoint",
    ),
    "Flux of diffusers": (
        names("single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.weight"),
        "is a Flux checkpoint",
    ),
    "unCLIP": (with_inputs(4) | names("noise_augmentor.data_mean"), "is a Stable unCLIP checkpoint"),
    "LoRA of kohya": (
        names("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.alpha"),
        "is a LoRA.*merge it into one",
    ),
    "LoRA of diffusers": (
        names("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"),
        "is a LoRA",
    ),
    "LoRA of PEFT": (names("base_model.model.unet.mid_block.attentions.0.to_k.lora_A.weight"), "is a LoRA"),
    "ControlNet": (names("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "ControlNet of diffusers": (names("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"), "ControlNet"),
    "UNet of diffusers": (
        names("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "is one part of a diffusers folder; give the folder",
    ),
    "text encoder": (names("text_model.final_layer_norm.weight"), "is a text encoder alone"),
    "VAE": (autoencoder_file("1.x"), "is an autoencoder alone; give it as --vae"),
    "VAE in a checkpoint's names": (autoencoder_file("1.x", "first_stage_model."), "is an autoencoder alone"),
    "embedding": ({"S*": torch.zeros(2, 768)}, "is a learned embedding; give it as --embedding"),
    "SDXL embedding": ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "is a learned embedding"),
    "something else": (names("layers.0.mlp.weight"), "has no UNet and no autoencoder and no text encoder"),
    "a checkpoint without its text encoder": (
        {name: p for name, p in single_file("1.x").items() if not name.startswith("cond_stage_model")},
        "has no text encoder; expected Stable Diffusion 1.x or 2.x",
    ),
    "a checkpoint without a weight that tells a size": (
        {name: p for name, p in single_file("1.x").items() if not name.endswith("attn2.to_k.weight")},
        "lacks weights that tell its sizes",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_checkpoint_of_these_is_refused_in_one_line_that_says_what_it_is(run, tmp_path, name):
    tensors, message = OTHERS[name]
    save_file(tensors, tmp_path / "x.safetensors")
    refused(run, tmp_path / "x.safetensors", message)


def refused(run, path, message):
    error = run("sample.py", "--prompt", "a", "--weights", path).error
    with pytest.raises(InputError, match=message) as raised:
        open_checkpoint(path)
    assert str(raised.value) in error and str(path) in error


@pytest.mark.parametrize(
    "content",
    [
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "x", "step": 100},
        {"<cat>": torch.zeros(768)},
        {"emb_params": torch.zeros(3, 1024)},
    ],
)
def test_embeddings_in_pickles_are_recognised_too(run, tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    refused(run, tmp_path / "x.pt", "is a learned embedding; give it as --embedding")


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
    assert "contradicts" in run("sample.py", "--prompt", "a", "--prediction", "eps").error  # weights/tiny


def written(folder, kind, metadata=None):
    save_file(single_file(kind), folder / "x.safetensors", metadata=metadata)
    write_merges(folder)
    return folder / "x.safetensors"


# ---- our own format


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config["text_encoder"].update(layers=10**9), "layers is 1000000000, expected 1 to 100"),
        (lambda config: config["unet"].update(channels=[32] * 1000), "channels has 1000 entries"),
        (lambda config: config["schedule"].update(steps=10**12), "steps is 1000000000000, expected 1 to 100000"),
        (lambda config: config["unet"].update(norm_groups=0), "configuration"),
        (lambda config: config.pop("schedule"), "configuration is incomplete or broken"),
        (lambda config: config.update(unet=3), "configuration"),
    ],
)
def test_a_configuration_that_would_keep_the_computer_busy_is_refused(tmp_path, change, message):
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        config = json.loads(file.metadata()["tinyldm"])
    change(config)
    path = tmp_path / "model.safetensors"
    save_file(load_file(WEIGHTS / "model.safetensors"), path, metadata={"tinyldm": json.dumps(config)})
    write_merges(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
