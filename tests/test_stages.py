"""Pretraining in small: all stages run, stop, go on and end in a checkpoint that samples."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint, load_clip
from tinyldm.lab.measure import evaluate
from tinyldm.lab.pretraining import __main__ as command
from tinyldm.lab.pretraining import stages as pretrain
from tinyldm.lab.pretraining.loop import Recipe, Training, batch_of
from tinyldm.lab.world.captions import TEXT_LENGTH
from tinyldm.lab.world.distribution import make_pictures


def test_standardizing_changes_the_latents_and_no_decoded_picture(tmp_path):
    torch.manual_seed(0)
    model = pretrain.AutoencoderKL(pretrain.AUTOENCODER)
    nn.init.normal_(model.quant_conv.bias, std=2.0)
    training = Training(tmp_path / "autoencoder", model, Recipe(1, 1, 1e-3), 0, "cpu")
    training.ema = {name: p.detach().half().float() for name, p in training.parameters.items()}
    training.load(training.ema)
    training.save()
    pixels = torch.from_numpy(make_pictures(32, 0)[0])
    standard = pretrain.standardized_autoencoder(tmp_path, pixels, "cpu")
    pictures = batch_of(pixels, np.arange(8), "cpu")
    with torch.no_grad():
        mean, log_variance = model.encode(pictures)
        new_mean, new_log_variance = standard.encode(pictures)
        assert torch.allclose(standard.decode(new_mean), model.decode(mean), atol=1e-3)
        eps = torch.randn(mean.shape)
        new = standard.decode(standard.sample(new_mean, new_log_variance, eps))
        assert torch.allclose(new, model.decode(model.sample(mean, log_variance, eps)), atol=1e-3)
    means, variances = pretrain.encode_all(standard, pixels, "cpu")
    assert means.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (means.var(dim=(0, 2, 3)) + variances.mean(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_all_stages_make_a_checkpoint_that_samples(tmp_path, capsys, monkeypatch):
    command.main(
        [
            "--out",
            str(tmp_path / "run"),
            "--weights",
            str(tmp_path / "w"),
            "--pictures",
            "64",
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
    )
    for stage in ("clip", "fine-clip", "autoencoder", "diffusion", "decoder"):
        files = list((tmp_path / "run" / stage / "state").iterdir())
        assert files and max(file.stat().st_size for file in files) <= 16_777_216
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "diffusion" / "state").iterdir()) <= 64 * 2**20
    model = load_checkpoint(tmp_path / "w")
    first_stage = load_file(tmp_path / "run" / "diffusion" / "autoencoder.safetensors")
    parameters = model.autoencoder.state_dict()
    moved = {name for name, x in first_stage.items() if not torch.equal(x.half().float(), parameters[name].float())}
    # the last stage changes the decoder, and nothing that the UNet was trained with
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    (image,) = evaluate.generate(model, ["a photo of a red circle"])
    assert image.size == (64, 64)
    assert (tmp_path / "w" / "model.safetensors").stat().st_size <= 25_000_000
    assert load_clip(tmp_path / "w" / "clip.safetensors").config.text.length == TEXT_LENGTH

    monkeypatch.setattr(command, "make_pictures", None)  # the same again: stages that are done draw no pictures
    (tmp_path / "w" / "model.safetensors").unlink()
    command.main(["--out", str(tmp_path / "run"), "--weights", str(tmp_path / "w"), "--steps", "2"])
    assert (tmp_path / "w" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "stage, found",
    [
        ("fine-clip", r"clip holds no state, .* run it first: --stage clip"),
        ("diffusion", r"autoencoder holds no state, .* run it first: --stage autoencoder"),
        ("decoder", r"merges\.txt"),
        ("export", r"merges\.txt"),
    ],
)
def test_a_stage_before_its_time_says_what_is_missing(tmp_path, stage, found):
    folders = ["--out", str(tmp_path / "run"), "--weights", str(tmp_path / "w")]
    with pytest.raises(InputError, match=found):
        command.main([*folders, "--stage", stage, "--pictures", "8", "--steps", "1"])
    assert not (tmp_path / "w" / "model.safetensors").exists()


def test_losses_of_all_stages_so_far_are_drawn(tmp_path, capsys):
    for stage in ("autoencoder", "diffusion"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "loss.csv").write_text("step,loss,mse\n50,0.5,1\n100,0.25,1\n")
    command.main(["--out", str(tmp_path), "--losses", str(tmp_path / "losses.png")])
    with Image.open(tmp_path / "losses.png") as image:
        assert image.size == (960, 360)  # two panels
        assert np.asarray(image.convert("L")).min() < 50


def test_losses_are_asked_for_before_there_are_any(tmp_path):
    with pytest.raises(InputError, match=r"found no stage's loss\.csv"):
        command.main(["--out", str(tmp_path), "--losses", str(tmp_path / "losses.png")])
    assert not list(tmp_path.iterdir())


def test_every_fiftieth_step_is_a_row_of_the_losses(tmp_path):
    training = Training(tmp_path / "stage", nn.Linear(1, 1), Recipe(120, 1, 1e-3), 0, "cpu")
    training.run(lambda *_: {"loss": training.model(torch.ones(1, 1)).square().mean()}, lambda: None, math.inf)
    again = Training(tmp_path / "stage", nn.Linear(1, 1), Recipe(150, 1, 1e-3), 0, "cpu")
    again.run(lambda *_: {"loss": again.model(torch.ones(1, 1)).square().mean()}, lambda: None, math.inf)
    header, *rows = (tmp_path / "stage" / "loss.csv").read_text().splitlines()
    assert header == "step,loss"
    assert [row.split(",")[0] for row in rows] == ["50", "100", "150"]
