"""What a file is that is no checkpoint or no word is recognised by its names and said in one line."""

import time

import pytest
import torch
from helpers.public import autoencoder_file, single_file, write_merges
from safetensors.torch import save_file
from torch import Tensor

from tinyldm import InputError
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.formats.recognise import what_else
from tinyldm.formats.untrusted import open_weights

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
    "SVD": (
        names(
            "conditioner.embedders.0.open_clip.model.visual.conv1.weight",
            "model.diffusion_model.label_emb.0.0.weight",
            "model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight",
            "model.diffusion_model.input_blocks.8.0.time_mixer.mix_factor",
        ),
        "is a Stable Video Diffusion checkpoint",
    ),
    "SVD of diffusers": (
        names("conv_in.weight", "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight"),
        "is a Stable Video Diffusion checkpoint",
    ),
    "Stable Cascade": (
        names("clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight", "clf.1.weight"),
        "is a Stable Cascade checkpoint",
    ),
    "Stable Cascade of ComfyUI": (names("model.diffusion_model.clf.1.weight"), "is a Stable Cascade checkpoint"),
    "T2I-Adapter": (names("conv_in.weight", "body.0.block1.weight", "body.2.in_conv.weight"), "is a T2I-Adapter"),
    "light T2I-Adapter": (names("body.0.in_conv.weight", "body.0.body.0.block1.weight"), "is a T2I-Adapter"),
    "T2I-Adapter of diffusers": (
        names("adapter.conv_in.weight", "adapter.body.0.resnets.0.block1.weight"),
        "is a T2I-Adapter",
    ),
    "AnimateDiff": (
        names(
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"
        ),
        "is a motion module of AnimateDiff",
    ),
    "text encoder of transformers 5": (
        names("embeddings.position_embedding.weight", "encoder.layers.0.layer_norm1.weight", "final_layer_norm.bias"),
        "is a text encoder alone",
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


# ---- Other tools' pickles


def hypernetwork(path):
    """Hypernetwork.save of A1111's modules/hypernetworks/hypernetwork.py: for each width two networks."""
    layers = {"linear.0.weight": torch.ones(16, 8), "linear.0.bias": torch.ones(16)}
    content = {8: (layers, layers), "step": 100, "name": "x", "layer_structure": [1, 2, 1], "activation_func": "relu"}
    torch.save(content | {"is_layer_norm": False, "sd_checkpoint": "81761151", "optional_info": None}, path)


def optimiser(path):
    """Embedding.save of A1111's modules/textual_inversion/textual_inversion.py, the file x.pt.optim."""
    moments = {"step": torch.tensor(9.0), "exp_avg": torch.ones(2, 768), "exp_avg_sq": torch.ones(2, 768)}
    state = {"state": {0: moments}, "param_groups": [{"lr": 0.005, "params": [0]}]}
    torch.save({"hash": "8f3a", "optimizer_state_dict": state}, path)


@pytest.mark.parametrize(
    "write, message",
    [
        (hypernetwork, "is a hypernetwork of A1111's"),
        (optimiser, "is the state of an optimiser.*give the file beside it, of the same name without .optim"),
    ],
)
def test_what_a1111_writes_besides_embeddings_is_told_by_name(run, tmp_path, write, message):
    write(tmp_path / "x.pt")
    refused(run, tmp_path / "x.pt", message)
    with pytest.raises(InputError, match=message.partition(".*")[0]):
        load_embeddings(tmp_path / "x.pt")


def test_a_word_for_each_layer_is_told_by_name(run, tmp_path):
    """save_weights of kohya's train_textual_inversion_XTI.py."""
    inside = [f"IN{i:02}" for i in (1, 2, 4, 5, 7, 8)] + ["MID"] + [f"OUT{i:02}" for i in range(3, 12)]
    save_file({layer: torch.ones(2, 768) for layer in inside}, tmp_path / "x.safetensors")
    refused(run, tmp_path / "x.safetensors", "is an XTI embedding of kohya's")
    with pytest.raises(InputError, match=r"is an XTI embedding of kohya's.*train it again without XTI"):
        load_embeddings(tmp_path / "x.safetensors")


# ---- What downloads leave in place of a file

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa
size 4265146304
"""
DOWNLOADS = {
    "a git-lfs pointer": (POINTER, "is a pointer of git-lfs and not yet the file; fetch that with: git lfs pull"),
    "a page": (
        b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
        "is a web page; the download went wrong",
    ),
    "a page in capitals": (b"\r\n<HTML><BODY>Access denied</BODY></HTML>", "is a web page"),
    "XML": (b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "JSON": (
        b'{"error":"Access to model x is restricted. You must be authenticated."}',
        "is JSON, perhaps a server's error",
    ),
    "JSON with a bracket where safetensors has one": (b'{"err": {"code": 401}}', "is JSON, perhaps a server's error"),
    "words": (b"Invalid username or password.", "is a server's error message; .* perhaps it needs a login"),
    "a few words": (b"Entry not found", "is a server's error message"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file, which is quantised; get the .safetensors"),
}


@pytest.mark.parametrize("name", DOWNLOADS)
@pytest.mark.parametrize("file", ["x.safetensors", "x.ckpt"])
def test_what_a_download_left_in_place_of_a_file_is_told(run, tmp_path, name, file):
    content, message = DOWNLOADS[name]
    (tmp_path / file).write_bytes(content)
    refused(run, tmp_path / file, message)
    with pytest.raises(InputError, match=message):
        load_embeddings(tmp_path / file)


@pytest.mark.parametrize("length", [0x7B, 0x227B, 0x22227B, 0x0A0A3C])
def test_no_safetensors_file_is_taken_for_one_of_these_by_its_length(tmp_path, length):
    """A header's length stands first, and its bytes can be letters."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert open_weights(tmp_path / "x.safetensors").shapes == {"w": (1,)}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_fp8_checkpoint_is_told_by_name(run, tmp_path, dtype):
    tensors = {name: p.to(dtype) if p.ndim > 1 else p for name, p in single_file("1.x").items()}
    save_file(tensors, tmp_path / "x.safetensors")
    write_merges(tmp_path)
    error = run("sample.py", "--prompt", "a", "--weights", tmp_path / "x.safetensors").error
    assert "expected one of float64, float32, float16, bfloat16; get the fp16 of this fp8 checkpoint" in error


# ---- The same table for words


@pytest.mark.parametrize(
    "name",
    [
        "LoRA of kohya",
        "LoRA of PEFT",
        "ControlNet",
        "text encoder",
        "Flux",
        "unCLIP",
        "SDXL",
        "SVD",
        "T2I-Adapter",
        "AnimateDiff",
        "Stable Cascade",
    ],
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
