"""Pretraining in small: both stages run, stop, go on and end in a checkpoint that samples."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tinyldm.checkpoint import load_checkpoint
from tinyldm.lab import evaluate, pretrain
from tinyldm.lab.world import make_pictures


def linear_training(folder, steps=6):
    torch.manual_seed(0)
    recipe = pretrain.Recipe(steps=steps, batch=4, lr=0.01, warmup=2)
    training = pretrain.Training(folder, nn.Linear(3, 2), recipe, seed=5, device="cpu")

    def loss_of(draw, noise):
        x = torch.from_numpy(draw.normal(size=(4, 3))).float() + torch.randn(4, 3, generator=noise)
        return {"loss": (training.model(x) - x[:, :2]).square().mean()}

    return training, loss_of


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, loss_of = linear_training(tmp_path / "whole")
    assert whole.run(loss_of, lambda: None, math.inf)

    first, loss_of = linear_training(tmp_path / "parts")
    for _ in range(3):
        first.update(loss_of)
    first.save()
    second, loss_of = linear_training(tmp_path / "parts")
    assert second.step == 3
    assert second.run(loss_of, lambda: None, math.inf)
    for name, p in whole.parameters.items():  # but for the 16-bit numbers in the files
        assert torch.allclose(second.parameters[name], p, atol=1e-3)
        assert torch.allclose(second.ema[name], whole.ema[name], atol=1e-3)


def test_training_stops_by_the_clock_and_keeps_its_state(tmp_path):
    training, loss_of = linear_training(tmp_path)
    assert not training.run(loss_of, lambda: None, stop_at=0)
    assert (tmp_path / "state" / "state.json").exists()


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = pretrain.Recipe(steps=1000, batch=1, lr=1.0, warmup=100)
    rates = [recipe.lr_at(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.95 and rates[1000] == pytest.approx(0)


def test_shards_hold_everything_in_small_files(monkeypatch):
    monkeypatch.setattr(pretrain, "MAX_FILE_BYTES", 100)
    tensors = {str(i): torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    parts = pretrain.shards(tensors)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert {name for part in parts for name in part} == set(tensors)


def test_standardizing_changes_the_latents_and_no_decoded_picture(tmp_path):
    torch.manual_seed(0)
    model = pretrain.AutoencoderKL(pretrain.AUTOENCODER)
    nn.init.normal_(model.quant_conv.bias, std=2.0)
    training = pretrain.Training(tmp_path / "autoencoder", model, pretrain.Recipe(1, 1, 1e-3), 0, "cpu")
    training.ema = {name: p.detach().half().float() for name, p in training.parameters.items()}
    training.load(training.ema)
    training.save()
    pixels = torch.from_numpy(make_pictures(32, 0)[0])
    standard = pretrain.standardized_autoencoder(tmp_path, pixels, "cpu")
    pictures = pretrain.batch_of(pixels, np.arange(8), "cpu")
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


def test_all_stages_make_a_checkpoint_that_samples(tmp_path, capsys):
    pretrain.main(
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
    for stage in ("autoencoder", "diffusion"):
        files = list((tmp_path / "run" / stage / "state").iterdir())
        assert files and max(file.stat().st_size for file in files) <= 16_777_216
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "diffusion" / "state").iterdir()) <= 64 * 2**20
    model = load_checkpoint(tmp_path / "w")
    (image,) = evaluate.generate(model, ["a photo of a red circle"])
    assert image.size == (64, 64)
    assert (tmp_path / "w" / "model.safetensors").stat().st_size <= 25_000_000
