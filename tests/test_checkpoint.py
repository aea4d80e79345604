"""Checkpoints of every layout: the same weights, the pictures of diffusers, and harmful ones refused in one line."""

import hashlib
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import WEIGHTS, memory_peak
from diffusers import StableDiffusionPipeline
from helpers.public import (
    KINDS,
    SHAPES,
    assert_same_weights,
    autoencoder_file,
    extras,
    in_our_names,
    merges,
    our_picture,
    pipeline,
    save_folder,
    save_lightning,
    single_file,
    their_picture,
    weights_of,
    with_word,
    write_merges,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyldm.formats import checkpoint
from tinyldm.formats.checkpoint import load_checkpoint, open_checkpoint
from tinyldm.formats.embeddings import load_embeddings, save_embeddings

KEY = "model.diffusion_model.out.2.bias"
FC1 = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


# ---- Public checkpoints: whatever they are kept in, the same networks and the same pictures


def wrapped(path, tensors):
    torch.save({"state_dict": tensors, "global_step": 1, "optimizer_states": [{"state": {0: torch.ones(3)}}]}, path)


FORMS = {
    "plain.safetensors": lambda path, tensors: save_file(tensors, path),
    "extras.safetensors": lambda path, tensors: save_file(tensors | extras(tensors), path),
    "plain.ckpt": lambda path, tensors: torch.save(tensors, path),
    "wrapped.ckpt": wrapped,
    "original.ckpt": lambda path, tensors: save_lightning(path, tensors | extras(tensors)),
    "old.pt": lambda path, tensors: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "half.safetensors": lambda path, tensors: save_file({n: t.half() for n, t in tensors.items()}, path),
    "brain.safetensors": lambda path, tensors: save_file({n: t.bfloat16() for n, t in tensors.items()}, path),
    "half.ckpt": lambda path, tensors: torch.save({n: t.half() for n, t in tensors.items()}, path),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_single_file_gives_the_same_networks(tmp_path, name, kind):
    FORMS[name](tmp_path / name, single_file(kind))
    write_merges(tmp_path)
    assert_same_weights(load_checkpoint(tmp_path / name), kind)


def test_both_spellings_of_the_text_encoders_prefix(tmp_path):
    for inner in ("text_model.", ""):
        position_ids = {f"cond_stage_model.transformer.{inner}embeddings.position_ids": torch.arange(77)[None]}
        save_file(single_file("1.x", inner) | position_ids, tmp_path / "x.safetensors")
        write_merges(tmp_path)
        assert_same_weights(load_checkpoint(tmp_path / "x.safetensors"), "1.x")


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_and_a_folder_give_the_picture_of_diffusers(tmp_path, kind):
    """From the same weights and the same first noise: 4 steps of DDIM, guidance 7.5, float32."""
    save_folder(tmp_path / "folder", kind)
    save_file(single_file(kind), tmp_path / "x.safetensors")
    write_merges(tmp_path)
    expected = their_picture(pipeline(kind))
    assert expected.std() > 10
    for path in (tmp_path / "folder", tmp_path / "x.safetensors"):
        assert np.abs(our_picture(load_checkpoint(path)) - expected).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_learned_word_the_picture_is_that_of_diffusers_too(tmp_path, kind):
    save_folder(tmp_path, kind)
    generator = torch.Generator().manual_seed(7)
    save_embeddings(tmp_path / "word.safetensors", {"<word>": torch.randn(2, 128, generator=generator)})
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a photo of a <word> on a blue background"
    without = their_picture(pipe, prompt)
    pipe.load_textual_inversion(tmp_path / "word.safetensors", token="<word>")
    expected = their_picture(pipe, prompt)
    assert np.abs(expected - without).max() > 10

    model = load_checkpoint(tmp_path)
    vectors = with_word(model, load_embeddings(tmp_path / "word.safetensors", 128))
    assert np.abs(our_picture(model, prompt, vectors) - expected).max() <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_nearly_the_same_picture(tmp_path, kind, dtype):
    save_folder(tmp_path, kind)
    model = load_checkpoint(tmp_path, dtype=dtype)
    assert {p.dtype for module in model.networks() for p in module.parameters()} == {dtype}
    assert np.abs(our_picture(model) - our_picture(load_checkpoint(tmp_path))).mean() < 6


# ---- Another autoencoder


def other_autoencoder() -> dict[str, Tensor]:
    return {name: tensor + 0.25 for name, tensor in autoencoder_file("1.x").items()}


VAES = {
    "vae.safetensors": lambda path: save_file(other_autoencoder(), path),
    "vae.ckpt": lambda path: torch.save(
        {"state_dict": other_autoencoder() | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}}, path
    ),
    "whole.safetensors": lambda path: save_file(
        single_file("1.x") | {f"first_stage_model.{name}": p for name, p in other_autoencoder().items()}, path
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_another_autoencoder_is_swapped_in(tmp_path, name):
    save_folder(tmp_path / "folder", "1.x")
    VAES[name](tmp_path / name)
    model = load_checkpoint(tmp_path / "folder", vae=tmp_path / name)
    expected = other_autoencoder()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.autoencoder.state_dict().items())
    weights, expected = weights_of(model), in_our_names("1.x")
    assert all(torch.equal(weights[key], expected[key]) for key in weights if not key.startswith("first_stage_model."))


def test_a_diffusers_folder_of_an_autoencoder_is_swapped_in_with_its_own_scale(tmp_path):
    save_folder(tmp_path / "folder", "1.x")
    vae = tmp_path / "folder" / "vae"
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "ft-mse").mkdir()
    (tmp_path / "ft-mse" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    (vae / "diffusion_pytorch_model.safetensors").rename(tmp_path / "ft-mse" / "diffusion_pytorch_model.safetensors")
    save_file(single_file("1.x"), tmp_path / "x.safetensors")
    write_merges(tmp_path)
    model = load_checkpoint(tmp_path / "x.safetensors", vae=tmp_path / "ft-mse")
    assert_same_weights(model, "1.x")
    assert model.scale == 0.5


def test_an_autoencoder_of_our_own_format_brings_its_configuration(tiny):
    model = load_checkpoint(WEIGHTS, vae=WEIGHTS / "model.safetensors")
    assert model.autoencoder.config == tiny.autoencoder.config and model.scale == tiny.scale


def test_one_file_of_diffusers_is_swapped_in_with_the_configuration_beside_it(tmp_path):
    """As `hf download stabilityai/sd-vae-ft-mse` leaves it: config.json and diffusion_pytorch_model.safetensors."""
    save_folder(tmp_path / "folder", "1.x", variant="fp16")
    vae = tmp_path / "folder" / "vae"
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    save_file(single_file("1.x"), tmp_path / "x.safetensors")
    write_merges(tmp_path)
    model = load_checkpoint(tmp_path / "x.safetensors", vae=vae / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_weights(model, "1.x")
    assert model.scale == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_without_an_autoencoder_loads_with_another(run, tmp_path, kind):
    """Many fine-tunes are passed on without; ComfyUI's and A1111's users choose one in the program."""
    save_folder(tmp_path / "folder", kind)
    (tmp_path / "folder" / "vae").rename(tmp_path / "vae")
    kept = {name: p for name, p in single_file(kind).items() if not name.startswith("first_stage_model.")}
    save_file(kept, tmp_path / "x.safetensors")
    torch.save({"state_dict": kept}, tmp_path / "x.ckpt")
    write_merges(tmp_path)
    for path in (tmp_path / "folder", tmp_path / "x.safetensors", tmp_path / "x.ckpt"):
        error = run("sample.py", "--prompt", "a", "--weights", path).error
        assert "; give one as --vae, for example vae-ft-mse-840000-ema-pruned.safetensors" in error
        model = open_checkpoint(path, vae=tmp_path / "vae").load()
        assert_same_weights(model, kind)


def test_the_hash_of_a_checkpoint_is_that_of_its_own_files_whatever_autoencoder_it_gets(tmp_path):
    save_folder(tmp_path / "folder", "1.x")
    for name, tensors in {"one": other_autoencoder(), "two": autoencoder_file("1.x")}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    own = open_checkpoint(tmp_path / "folder").sha256()
    assert open_checkpoint(tmp_path / "folder", vae=one).sha256() == own
    (tmp_path / "folder" / "vae").rename(tmp_path / "vae")
    without = {open_checkpoint(tmp_path / "folder", vae=vae).sha256() for vae in (one, two)}
    assert len(without) == 1 and own not in without


def test_a_broken_configuration_of_another_autoencoder_is_called_by_its_own_name(run, tmp_path):
    save_folder(tmp_path / "folder", "1.x")
    (tmp_path / "folder" / "vae" / "config.json").write_text("{}")
    error = run("sample.py", "--prompt", "a", "--vae", tmp_path / "folder").error
    assert f"{tmp_path / 'folder'}: its configuration is incomplete or broken (KeyError('block_out_channels'))" in error


@pytest.mark.parametrize(
    "name, tensors, message",
    [
        ("e.safetensors", {"S*": torch.zeros(2, 768)}, "holds no autoencoder; expected a VAE file"),
        (
            "d.safetensors",
            {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(3, 3)},
            "is one part of a diffusers folder; give the folder with its config.json as --vae",
        ),
        ("cut.safetensors", {"encoder.conv_in.weight": torch.zeros(3, 3)}, "lacks weights that tell its sizes"),
    ],
)
def test_what_is_no_autoencoder_is_refused(run, tmp_path, name, tensors, message):
    save_file(tensors, tmp_path / name)
    assert message in run("sample.py", "--prompt", "a", "--vae", tmp_path / name).error


def test_an_autoencoder_of_another_family_is_refused(run, tmp_path):
    save_file(autoencoder_file("1.x"), tmp_path / "vae.safetensors")
    error = run("sample.py", "--prompt", "a", "--vae", tmp_path / "vae.safetensors").error
    assert "makes latents of 4 channels, expected 12" in error and "choose another --vae" in error


# ---- The tokenizer's merges


def test_without_merges_the_error_says_which_command_gets_them(run, tmp_path):
    save_file(single_file("1.x"), tmp_path / "x.safetensors")
    error = run("sample.py", "--prompt", "a", "--weights", tmp_path / "x.safetensors").error
    command = "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 tokenizer/merges.txt --local-dir weights"
    assert f"no merges.txt with {tmp_path / 'x.safetensors'}" in error and error.endswith(command)


def test_a_missing_checkpoint_is_an_error_that_says_which_command_gets_one(run, tmp_path):
    error = run("sample.py", "--prompt", "a", "--weights", tmp_path / "none").error
    assert "no checkpoint at" in error and "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 v1-5" in error


def test_a_folder_of_one_file_needs_no_more_than_its_name(run, tmp_path):
    save_file(single_file("1.x"), tmp_path / "v1-5-pruned-emaonly.safetensors")
    write_merges(tmp_path)
    assert_same_weights(load_checkpoint(tmp_path), "1.x")
    save_file(single_file("1.x"), tmp_path / "other.safetensors")
    error = run("sample.py", "--prompt", "a", "--weights", tmp_path).error
    assert "found other.safetensors, v1-5-pruned-emaonly.safetensors; name the file" in error


def test_the_tokenizer_json_of_newer_folders_has_the_same_merges(tmp_path):
    pipeline("1.x").save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "merges.txt").unlink(missing_ok=True)
    assert open_checkpoint(tmp_path).merges_file == tmp_path / "tokenizer" / "tokenizer.json"
    assert load_checkpoint(tmp_path).tokenizer.merges == merges(SHAPES["1.x"].text.vocabulary_size)


# ---- Files that are not as they should be


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


BIG = {"model_ema.padding": torch.zeros(10_000_000)}  # 40 MB, which nobody reads


def a_safetensors(path, change=lambda tensors: None):
    tensors = single_file("1.x") | BIG
    change(tensors)
    save_file(tensors, path)


def a_pickle(path, **more):
    torch.save({"state_dict": single_file("1.x") | BIG, **more}, path)


def a_zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": 1}))
        archive.writestr("x/data/0", bytes(10**8))


def cut_off(path):
    a_pickle(path)
    path.write_bytes(path.read_bytes()[:-10_000])


def with_header(path, change):
    """A safetensors file whose header was tampered with."""
    a_safetensors(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + length :])


def too_far(header):
    header[KEY]["data_offsets"] = [0, 10**12]


def overlapping(header):
    header[KEY]["data_offsets"] = header["model_ema.padding"]["data_offsets"]


HARMFUL = {
    "a pickle that calls os.system": (lambda p: a_pickle(p, x=Command()), "names posix.system"),
    "the same, deep inside": (lambda p: a_pickle(p, x=[{"y": (1, [Command()])}]), "names posix.system"),
    "a zip bomb": (a_zip_bomb, "is a compressed archive"),
    "a zip that is cut off": (cut_off, "can't be read as a PyTorch file"),
    "offsets past the end": (lambda p: with_header(p, too_far), "is no readable safetensors file"),
    "tensors that overlap": (lambda p: with_header(p, overlapping), "is no readable safetensors file"),
    "a header of 100 MB": (
        lambda p: with_header(p, lambda h: h.update({"__metadata__": {"x": " " * 10**8}})),
        "claims a header of 100",
    ),
    "NaN": (lambda p: a_safetensors(p, lambda t: t.update({KEY: t[KEY] * torch.nan})), "NaN or infinite"),
    "inf": (lambda p: a_safetensors(p, lambda t: t.update({KEY: t[KEY] + torch.inf})), "NaN or infinite"),
    "int8": (lambda p: a_safetensors(p, lambda t: t.update({KEY: t[KEY].to(torch.int8)})), "not quantised"),
    "a missing key": (lambda p: a_safetensors(p, lambda t: t.pop(KEY)), f"lacks {KEY}"),
    "an extra key": (lambda p: a_safetensors(p, lambda t: t.update({f"{KEY}2": torch.zeros(1)})), f"holds {KEY}2"),
    "a transposed shape": (
        lambda p: a_safetensors(p, lambda t: t.update({FC1: t[FC1].T.contiguous()})),
        "fc1.weight is (",
    ),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_checkpoint_is_one_line_runs_nothing_and_fills_no_memory(run, tmp_path, name):
    make, complaint = HARMFUL[name]
    make(tmp_path / "x.ckpt")  # read by what it is, not by its name
    write_merges(tmp_path)
    before, size = set(os.listdir(tmp_path)), (tmp_path / "x.ckpt").stat().st_size
    with memory_peak() as used:
        error = run("sample.py", "--prompt", "x", "--weights", tmp_path / "x.ckpt").error
    assert complaint in error
    assert used.bytes <= max(1.5 * size, 30 * 2**20), f"{used.bytes / 2**20:.0f} MiB for a file of {size / 2**20:.1f}"
    assert set(os.listdir(tmp_path)) == before  # run works in this folder: nothing executed, nothing written


# ---- python -m tinyldm.formats.checkpoint FILE


def test_a_checkpoint_is_described_in_a_few_lines(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.safetensors"
    tensors = single_file("2.x")
    tensors = {name: tensor.half() if name != KEY else tensor for name, tensor in tensors.items()}
    save_file(tensors | extras(tensors), path)
    write_merges(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(checkpoint.KNOWN, digest, "a-public-name.safetensors")
    checkpoint.main([str(path)])
    out = capsys.readouterr().out
    unet = sum(p.numel() for p in pipeline("2.x").unet.parameters())
    for part in (
        f"{path}: single file",
        "pictures 768x768",
        "predicts v, known from the deviation of output_blocks.5.1",
        f"unet {unet:,}",
        "float16 (",
        "float32 (1 tensors)",
        "the moving average of training",
        "the noise schedule, computed here",
        "the last layer, which 2.x leaves out",
        "CLIP's comparison with pictures",
        f"{path.stat().st_size:,} bytes, sha256 {digest}, the public a-public-name.safetensors",
        "merges.txt: ",
    ):
        assert part in out, part
    assert len(out.splitlines()) < 15


def test_every_layout_is_described(tmp_path, capsys):
    save_folder(tmp_path, "1.x")
    checkpoint.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert f"{tmp_path}: diffusers folder" in out and "known from scheduler_config.json" in out
    checkpoint.main([str(WEIGHTS)])
    out = capsys.readouterr().out
    assert "model.safetensors: tinyldm checkpoint" in out and "pictures 64x64" in out


def test_a_description_is_printed_escaped(tmp_path, capsys):
    path = tmp_path / "red\x1b[31m\nred.safetensors"
    path.symlink_to(WEIGHTS / "model.safetensors")
    checkpoint.main([str(path)])
    out = capsys.readouterr().out
    assert r"red\x1b[31m\nred.safetensors: tinyldm checkpoint" in out and out.replace("\n", "").isprintable()


def test_what_can_not_be_described_is_refused_in_one_line(run_process, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    outcome = run_process("-m", "tinyldm.formats.checkpoint", tmp_path / "x.ckpt")
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1 and "neither a safetensors nor a PyTorch file" in outcome.stderr


def test_the_public_files_are_known_by_their_hashes():
    assert all(len(digest) == 64 and int(digest, 16) for digest in checkpoint.KNOWN)
    assert "v1-5-pruned-emaonly.safetensors" in checkpoint.KNOWN.values()


def test_the_hash_of_a_folder_is_that_of_its_files(tmp_path):
    save_folder(tmp_path, "1.x")
    before = open_checkpoint(tmp_path).sha256()
    assert before == open_checkpoint(tmp_path).sha256() and len(before) == 64
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    assert open_checkpoint(tmp_path).sha256() != before
