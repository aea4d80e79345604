"""Pretraining in small: all stages run, stop, go on and end in a checkpoint that samples."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextEncoder
from tinyldm.formats.checkpoint import load_checkpoint, load_clip
from tinyldm.images import from_pixels, to_images
from tinyldm.lab.measure import report
from tinyldm.lab.pretraining import __main__ as command
from tinyldm.lab.pretraining import loop, stages
from tinyldm.lab.pretraining.loop import STATE, Job, Recipe, Training, load_section
from tinyldm.lab.pretraining.sizes import AUTOENCODER, text_config
from tinyldm.lab.world.captions import TEXT_LENGTH
from tinyldm.lab.world.distribution import make_pictures

PRETRAINING = "tinyldm.lab.pretraining"


def test_standardizing_changes_the_latents_and_no_decoded_picture(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(AUTOENCODER)
    nn.init.normal_(model.quant_conv.bias, std=2.0)
    training = Training(tmp_path / "autoencoder", model, Recipe(1, 1, 1e-3), 0, "cpu")
    training.ema = {name: p.detach().half().float() for name, p in training.parameters.items()}
    training.load(training.ema)
    training.save()
    pixels = torch.from_numpy(make_pictures(32, 0)[0])
    standard = stages.standardized_autoencoder(tmp_path, pixels, "cpu")
    pictures = from_pixels(pixels[:8])
    with torch.no_grad():
        mean, log_variance = model.encode(pictures)
        new_mean, new_log_variance = standard.encode(pictures)
        assert torch.allclose(standard.decode(new_mean), model.decode(mean), atol=1e-3)
        eps = torch.randn(mean.shape)
        new = standard.decode(standard.sample(new_mean, new_log_variance, eps))
        assert torch.allclose(new, model.decode(model.sample(mean, log_variance, eps)), atol=1e-3)
    means, log_variances = stages.encode_all(standard, pixels, "cpu")
    assert means.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (means.var(dim=(0, 2, 3)) + log_variances.exp().mean(dim=(0, 2, 3)) - 1).abs().max() < 0.1


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        for stage, (recipe, train) in stages.STAGES.items():
            patch.setitem(stages.STAGES, stage, (replace(recipe, batch=2), train))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole pretraining of two steps a stage: its states in run/, its checkpoint in weights/."""
    folder = tmp_path_factory.mktemp("pretraining")
    folders = ["--out", str(folder / "run"), "--weights", str(folder / "weights")]
    command.main([*folders, "--pictures", "16", "--steps", "2", "--device", "cpu"])
    return folder


def test_all_stages_make_a_checkpoint_that_samples(done):
    for stage in stages.STAGES:
        assert (done / "run" / stage / STATE).stat().st_size <= 64 * 2**20
    model = load_checkpoint(done / "weights")
    first_stage = load_file(done / "run" / "diffusion" / "autoencoder.safetensors")
    parameters = model.autoencoder.state_dict()
    moved = {name for name, x in first_stage.items() if not torch.equal(x.half().float(), parameters[name].float())}
    # the last stage changes the decoder, and nothing that the UNet was trained with
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    *_, z_0 = model.generate(["a photo of a red circle"], [0])
    (image,) = to_images(model.decode(z_0))
    assert image.size == (64, 64)
    assert (done / "weights" / "model.safetensors").stat().st_size <= 25_000_000
    assert load_clip(done / "weights" / "clip.safetensors").config.text.length == TEXT_LENGTH


def test_stages_that_are_done_draw_no_pictures(run, done, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_pictures", None)
    assert run(PRETRAINING, "--out", done / "run", "--weights", tmp_path / "again", "--steps", 2).status == 0
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", done / "weights"))
    assert again.keys() == first.keys() and all(again[name].equal(first[name]) for name in first)


def test_sheets_show_what_a_stage_has_learned(done, tmp_path, monkeypatch):
    """After a thousand steps, a stage draws one; here after each."""
    shutil.copytree(done / "run", tmp_path / "run")
    monkeypatch.setattr(loop, "SHEET_EVERY", 1)
    monkeypatch.setattr(report, "SHEET_PROMPTS", stages.SHEET_PROMPTS[:1])
    monkeypatch.setattr(stages, "SHEET_PROMPTS", stages.SHEET_PROMPTS[:1])
    monkeypatch.setattr(stages, "DEFAULTS", replace(stages.DEFAULTS, sampler_steps=2))
    pixels, pictures = make_pictures(8, 0)  # as few as the command allows
    for stage, (_, train) in stages.STAGES.items():
        recipe = Recipe(steps=3, batch=2, lr=1e-3)
        assert train(Job(tmp_path / "run", stage, recipe, torch.from_numpy(pixels), pictures, 0, "cpu"))
        with Image.open(tmp_path / "run" / stage / "step-000003.png") as sheet:
            assert np.asarray(sheet).std() > 5


def test_a_frozen_text_encoder_keeps_the_weights_it_is_given(done, tmp_path):
    pixels, pictures = make_pictures(8, 0)
    folder = tmp_path / "frozen"
    folder.mkdir()
    for file in ("autoencoder.safetensors", "merges.txt"):
        shutil.copy(done / "run" / "diffusion" / file, folder)
    _, tokenizer = stages.load_first_stage(folder)
    torch.manual_seed(5)
    given = CLIPTextEncoder(text_config(tokenizer.vocabulary_size)).state_dict()
    recipe = Recipe(steps=2, batch=2, lr=1e-3)
    job = Job(tmp_path, "frozen", recipe, torch.from_numpy(pixels), pictures, 0, "cpu")
    assert stages.train_diffusion(job, given)
    learned = load_section(folder, "average")
    assert learned and not any(name.startswith("text_encoder.") for name in learned)  # only what learns is kept


@pytest.mark.parametrize(
    "stage, found, needed",
    [
        ("fine-clip", "clip holds no state, expected that of a stage", "clip"),
        ("diffusion", "autoencoder holds no state, expected that of a stage", "autoencoder"),
        ("decoder", "diffusion holds no merges.txt, expected that of the stage", "diffusion"),
        ("export", "diffusion holds no merges.txt, expected that of the stage", "diffusion"),
    ],
)
def test_a_stage_before_its_time_says_what_is_missing(run, tmp_path, stage, found, needed):
    folders = ["--out", tmp_path / "run", "--weights", tmp_path / "w"]
    error = run(PRETRAINING, *folders, "--stage", stage, "--pictures", 8, "--steps", 1).error
    assert f"{found}; run it first: python -m {PRETRAINING} --stage {needed}" in error
    assert not (tmp_path / "w" / "model.safetensors").exists()


def test_a_stage_that_the_clock_stops_goes_on_by_the_same_command(run, tmp_path):
    words = ["--out", tmp_path / "run", "--stage", "autoencoder", "--pictures", 8, "--steps", 1]
    stopped = run(PRETRAINING, *words, "--minutes", 1e-9)
    assert stopped.out == "stopped before the end of stage autoencoder; the same command goes on from here\n"
    assert run(PRETRAINING, *words).out == ""
