"""A stage of training stops, goes on, and keeps its state in small files."""

import math

import pytest
import torch
from torch import nn

from tinyldm.lab.pretraining import loop as training
from tinyldm.lab.pretraining.loop import Recipe, Training


def linear_training(folder, steps=6):
    torch.manual_seed(0)
    recipe = Recipe(steps=steps, batch=4, lr=0.01, warmup=2)
    trained = Training(folder, nn.Linear(3, 2), recipe, seed=5, device="cpu")

    def loss_of(draw, noise):
        x = torch.from_numpy(draw.normal(size=(4, 3))).float() + torch.randn(4, 3, generator=noise)
        return {"loss": (trained.model(x) - x[:, :2]).square().mean()}

    return trained, loss_of


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
    trained, loss_of = linear_training(tmp_path)
    assert not trained.run(loss_of, lambda: None, stop_at=0)
    assert (tmp_path / "state" / "state.json").exists()


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(steps=1000, batch=1, lr=1.0, warmup=100)
    rates = [recipe.lr_at(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.95 and rates[1000] == pytest.approx(0)


def test_the_learning_rate_comes_to_zero_at_a_restart_and_goes_on_with_the_longer_cosine():
    with_restart = Recipe(steps=1000, batch=1, lr=1.0, restart=600)
    rates = [with_restart.lr_at(step) for step in range(1001)]
    assert rates[:600] == [Recipe(600, 1, 1.0).lr_at(step) for step in range(600)]
    assert rates[600:] == [Recipe(1000, 1, 1.0).lr_at(step) for step in range(600, 1001)]
    assert rates[599] < 0.001 < 0.3 < rates[600] and rates[1000] == pytest.approx(0)
    shorter = Recipe(steps=500, batch=1, lr=1.0, restart=600)
    assert shorter.lr_at(500) == pytest.approx(0), "a run that ends before the restart ends at zero"


def test_shards_hold_everything_in_small_files(monkeypatch):
    monkeypatch.setattr(training, "MAX_FILE_BYTES", 100)
    tensors = {str(i): torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    parts = training.shards(tensors)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert {name for part in parts for name in part} == set(tensors)
