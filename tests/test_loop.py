"""A stage of training stops, goes on, and keeps its state in one file, whole."""

import math
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinyldm import InputError, files
from tinyldm.lab.pretraining import loop
from tinyldm.lab.pretraining.loop import Recipe, Training

SECTIONS = ("weights", "average", "moment1", "moment2")


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
    assert loop.saved_step(tmp_path) == 0 and (tmp_path / loop.STATE).exists()


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


def test_the_beginning_of_a_longer_recipe_has_its_rates():
    whole = Recipe(steps=1000, batch=1, lr=1.0, restart=600)
    beginning = replace(whole, steps=700, beginning_of=1000)
    assert [beginning.lr_at(step) for step in range(700)] == [whole.lr_at(step) for step in range(700)]


@pytest.mark.parametrize("moment", ["while it is written", "before it is renamed"])
def test_a_kill_while_saving_leaves_the_old_state_whole(tmp_path, monkeypatch, moment):
    trained, loss_of = linear_training(tmp_path)
    trained.update(loss_of)
    trained.save()
    old = {section: loop.load_section(tmp_path, section) for section in SECTIONS}
    for _ in range(2):
        trained.update(loss_of)

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    if moment == "while it is written":
        monkeypatch.setattr(loop, "save_file", write_half)
    else:
        monkeypatch.setattr(files.os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trained.save()
    assert loop.saved_step(tmp_path) == 1
    for section in SECTIONS:
        new = loop.load_section(tmp_path, section)
        assert new.keys() == old[section].keys() and all(new[name].equal(old[section][name]) for name in new)
    monkeypatch.undo()
    trained.save()
    assert loop.saved_step(tmp_path) == 3
    assert [path.name for path in tmp_path.iterdir()] == [loop.STATE]


def test_the_state_has_two_bytes_a_number_of_which_adam_needs_one_more(tmp_path):
    trained, loss_of = linear_training(tmp_path)
    trained.update(loss_of)
    trained.save()
    assert {name: set(loop.load_section(tmp_path, name)) for name in SECTIONS} == {
        "weights": {"weight", "bias"},
        "average": {"weight", "bias"},
        "moment1": {"weight", "bias"},
        "moment2": {"bias"},  # Muon, which trains matrices, has only one
    }
    assert all(x.element_size() == 2 for name in SECTIONS for x in loop.load_section(tmp_path, name).values())


def test_a_state_that_is_broken_says_so(tmp_path):
    (tmp_path / loop.STATE).write_bytes(b"not a state")
    with pytest.raises(InputError, match=r"state\.safetensors is broken .*; delete .* and run the stage again"):
        linear_training(tmp_path)
