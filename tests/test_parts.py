"""Loading a checkpoint that is open: each weight is checked, cast and put in its place, or the file is refused."""

import pytest
import torch
from conftest import WEIGHTS
from helpers.public import single_file, write_merges
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint, open_checkpoint

KEY = "model.diffusion_model.out.2.bias"
TO_Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def test_a_checkpoint_is_frozen_and_in_the_asked_dtype():
    model = load_checkpoint(WEIGHTS, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for module in model.networks() for p in module.parameters())
    *_, z = model.generate(["a red star"], [0], steps=2)
    assert model.decode(z).isfinite().all()


def test_weights_are_mapped_and_not_copied_when_they_are_in_the_asked_dtype_already(tmp_path):
    """What is on disk in float32 stays there until it is used: the file's numbers are the model's."""
    save_file(single_file("1.x"), tmp_path / "x.safetensors")
    write_merges(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    mapped = checkpoint.parts["unet"].file.read("model.diffusion_model.out.2.weight")
    model = checkpoint.load()
    assert torch.equal(model.unet.out[2].weight, mapped)
    assert not any(p.is_meta for module in model.networks() for p in module.parameters())


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_kernels_that_are_copied_in_float32_get_their_channels_last(tmp_path, dtype, expected):
    model = load_checkpoint(WEIGHTS, dtype=dtype)  # its file is in float16
    kernels = [p for network in model.networks() for p in network.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert len(kernels) > 20
    assert {kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels} == {expected}
    save_file(single_file("1.x"), tmp_path / "x.safetensors")
    write_merges(tmp_path)
    mapped = load_checkpoint(tmp_path / "x.safetensors").unet.out[2].weight
    assert mapped.is_contiguous()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(KEY), f"lacks {KEY}; expected a whole checkpoint, copy it again"),
        (lambda t: t.update({f"{KEY}2": torch.zeros(1)}), f"holds {KEY}2, which is not known"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "holds extra.weight, which is not known"),
        (lambda t: t.update({TO_Q: t[TO_Q][:5].clone()}), r"to_q.weight is \(5, 32\), expected \(32, 32\)"),
        (lambda t: t.update({TO_Q: t[TO_Q][None].clone()}), r"to_q.weight is \(1, 32, 32\), expected \(32, 32\)"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), r"holds (I8|int8), expected one of .*not quantised"),
        (lambda t: t.update({KEY: t[KEY] * torch.nan}), f"{KEY} holds NaN or infinite values as float32"),
        (lambda t: t.update({KEY: t[KEY] + torch.inf}), f"{KEY} holds NaN or infinite values as float32"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_file_that_is_not_as_it_should_be_is_refused_in_one_line(tmp_path, suffix, change, message):
    tensors = single_file("1.x")
    change(tensors)
    path = tmp_path / f"x.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    write_merges(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_numbers_too_large_for_float16_are_pointed_out(tmp_path):
    save_file(single_file("1.x") | {KEY: torch.full((4,), 1e5)}, tmp_path / "x.safetensors")
    write_merges(tmp_path)
    with pytest.raises(InputError, match=r"infinite values as float16, expected finite ones; .* try --dtype bfloat16"):
        load_checkpoint(tmp_path / "x.safetensors", dtype=torch.float16)
    assert load_checkpoint(tmp_path / "x.safetensors", dtype=torch.bfloat16).unet.out[2].bias[0] > 9e4
