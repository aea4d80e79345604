"""Our own format: what is written is what is read, and what is broken is refused by name."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import WEIGHTS
from helpers.public import write_merges
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint, open_checkpoint
from tinyldm.formats.names import PREFIXES
from tinyldm.formats.native import save_checkpoint


def test_a_checkpoint_comes_back_as_it_was(tiny, tmp_path):
    save_checkpoint(tmp_path, tiny)
    again = load_checkpoint(tmp_path)
    for one, other in zip(tiny.networks(), again.networks(), strict=True):
        assert one.config == other.config
        for name, tensor in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    assert again.tokenizer.merges == tiny.tokenizer.merges
    assert again.schedule.config() == tiny.schedule.config()
    assert asdict(again.defaults) == asdict(tiny.defaults) and again.scale == tiny.scale
    assert open_checkpoint(tmp_path).sha256() == open_checkpoint(WEIGHTS).sha256()


def test_the_tiny_checkpoint_is_small_and_in_the_public_key_names():
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 25_000_000
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in keys
    assert "first_stage_model.encoder.down.0.block.0.norm1.weight" in keys
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in keys
    assert all(key.startswith(tuple(PREFIXES.values())) for key in keys)


def test_its_configuration_can_be_read_without_its_weights():
    checkpoint = open_checkpoint(WEIGHTS / "model.safetensors")
    assert checkpoint.text_encoder.config.width == 128 and checkpoint.defaults.size == 64


def test_a_flag_that_contradicts_its_configuration_is_refused(run):
    assert load_checkpoint(WEIGHTS, prediction="v").schedule.prediction == "v"
    assert "contradicts" in run("sample.py", "--prompt", "a", "--prediction", "eps").error


@pytest.fixture
def damaged(tmp_path):
    """damaged(change) writes the tiny checkpoint after change(tensors, metadata)."""

    def write(change):
        tensors = load_file(WEIGHTS / "model.safetensors")
        with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        change(tensors, metadata)
        save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
        (tmp_path / "merges.txt").write_bytes((WEIGHTS / "merges.txt").read_bytes())
        return tmp_path

    return write


KEY = "model.diffusion_model.out.2.bias"


def test_a_missing_key_is_named(damaged):
    folder = damaged(lambda tensors, metadata: tensors.pop(KEY))
    with pytest.raises(InputError, match=f"lacks {KEY}"):
        load_checkpoint(folder)


def test_an_extra_key_is_named(damaged):
    folder = damaged(lambda tensors, metadata: tensors.update({f"{KEY}2": torch.zeros(1)}))
    with pytest.raises(InputError, match=f"{KEY}2"):
        load_checkpoint(folder)


def test_a_wrong_shape_is_named(damaged):
    folder = damaged(lambda tensors, metadata: tensors.update({KEY: torch.zeros(5)}))
    with pytest.raises(InputError, match=rf"{KEY} is \(5,\), expected \(12,\)"):
        load_checkpoint(folder)


def test_metadata_that_is_not_ours_is_an_error(damaged):
    folder = damaged(lambda tensors, metadata: metadata.update(tinyldm="{"))
    with pytest.raises(InputError, match="configuration"):
        load_checkpoint(folder)


def test_a_configuration_with_unknown_fields_is_an_error(damaged):
    def change(tensors, metadata):
        config = json.loads(metadata["tinyldm"])
        config["unet"]["colour"] = "blue"
        config.pop("sha256", None)
        metadata["tinyldm"] = json.dumps(config)

    with pytest.raises(InputError, match="colour"):
        load_checkpoint(damaged(change))


def test_missing_merges_are_an_error(damaged):
    folder = damaged(lambda tensors, metadata: None)
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"merges\.txt"):
        load_checkpoint(folder)


def test_merges_of_another_vocabulary_are_an_error(damaged):
    folder = damaged(lambda tensors, metadata: None)
    lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(lines[:-3]))
    with pytest.raises(InputError, match="vocabulary"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: config["text_encoder"].update(layers=10**9),
            "text_encoder.layers is 1000000000, expected a whole number from 1 to 100",
        ),
        (
            lambda config: config["unet"].update(channels=[32] * 1000),
            r"unet.channels is .* expected a list of 1 to 10\b",
        ),
        (
            lambda config: config["schedule"].update(steps=10**12),
            "schedule.steps is 1000000000000, expected a whole number from 1 to 100000",
        ),
        (lambda config: config["unet"].update(norm_groups=0), "configuration"),
        (
            lambda config: config["schedule"].update(beta_start=2),
            r"configuration is broken \(schedule: betas must satisfy",
        ),
        (lambda config: config["defaults"].pop("taken_literally"), "defaults.taken_literally is missing"),
        (lambda config: config["tokenizer"].clear(), "tokenizer.length is missing"),
        (lambda config: config.update(scale="large"), "scale is 'large', expected a number from"),
        (lambda config: config.pop("schedule"), "schedule is missing"),
        (lambda config: config.update(unet=3), "configuration"),
    ],
)
def test_a_configuration_that_would_keep_the_computer_busy_is_refused(tmp_path, change, message):
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        config = json.loads(file.metadata()["tinyldm"])
    config.pop("sha256", None)  # who builds such a file would not keep the digest either
    change(config)
    path = tmp_path / "model.safetensors"
    save_file(load_file(WEIGHTS / "model.safetensors"), path, metadata={"tinyldm": json.dumps(config)})
    write_merges(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
