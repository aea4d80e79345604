"""What a file is that is no checkpoint or no word is recognised by its names and said in one line."""

import time

import pytest
import torch
from helpers.public import autoencoder_file, single_file
from safetensors.torch import save_file
from torch import Tensor

from tinyldm import InputError
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.formats.recognise import what_else

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def names(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(80, 80) for name in names}


def with_inputs(channels: int) -> dict[str, Tensor]:
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


# ---- The same table for words


@pytest.mark.parametrize(
    "name", ["LoRA of kohya", "LoRA of PEFT", "ControlNet", "text encoder", "Flux", "unCLIP", "SDXL"]
)
def test_what_is_no_word_either_is_called_the_same(tmp_path, name):
    tensors, message = OTHERS[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message.partition(".*")[0]):
        load_embeddings(tmp_path / "x.safetensors")


def test_a_checkpoint_given_as_a_word_is_sent_to_weights(tmp_path):
    save_file(single_file("1.x"), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"is a checkpoint, not a word .*; give it as --weights"):
        load_embeddings(tmp_path / "x.safetensors")


@pytest.mark.parametrize("word", ["lora_style", "my.lora", "lycoris_cat", "controlnet_style", "state_dict_", "S*"])
def test_a_word_may_be_called_as_it_likes(tmp_path, word):
    save_file({word: torch.ones(1, 8)}, tmp_path / "x.safetensors")
    assert list(load_embeddings(tmp_path / "x.safetensors")) == [word]


def test_no_name_can_keep_the_table_busy():
    start = time.process_time()
    assert what_else([1000 * "lora_lora.lora_", 15_000 * "a."]) is not None
    assert time.process_time() - start < 1
