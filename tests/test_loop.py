"""A stage of training stops, goes on, and keeps its state in one file, whole."""

import math
import signal
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from tinyldm import InputError, files
from tinyldm.lab.pretraining import loop
from tinyldm.lab.pretraining.loop import Batch, Batches, Loss, Recipe, Training

PRETRAINING = "tinyldm.lab.pretraining"
SECTIONS = ("weights", "average", "moment1", "moment2")


def noisy_batch(_step: int, rng: np.random.Generator, generator: torch.Generator) -> Batch:
    x = torch.from_numpy(rng.normal(size=(4, 3))).float()
    return {"x": x + torch.randn(4, 3, generator=generator)}


def ones(*_) -> Batch:
    return {"x": torch.ones(1, 1)}


def linear_training(folder, steps=6) -> tuple[Training, Loss]:
    torch.manual_seed(0)
    recipe = Recipe(steps=steps, batch=4, lr=0.01, warmup=2)
    trained = Training(folder, nn.Linear(3, 2), recipe, seed=5, device="cpu")

    def loss_of(batch):
        return {"loss": (trained.model(batch["x"]) - batch["x"][:, :2]).square().mean()}

    return trained, loss_of


def take_steps(trained: Training, loss_of: Loss, count: int) -> None:
    for batch, _ in zip(trained.batches(noisy_batch), range(count), strict=False):
        trained.update(batch, partial(trained.take_step, loss_of))


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, loss_of = linear_training(tmp_path / "whole")
    assert whole.run(noisy_batch, loss_of, lambda: None, math.inf)

    first, loss_of = linear_training(tmp_path / "parts")
    take_steps(first, loss_of, 3)
    first.save()
    second, loss_of = linear_training(tmp_path / "parts")
    assert second.step == 3
    assert second.run(noisy_batch, loss_of, lambda: None, math.inf)
    for name, p in whole.parameters.items():  # but for the 16-bit numbers in the files
        assert torch.allclose(second.parameters[name], p, atol=1e-3)
        assert torch.allclose(second.ema[name], whole.ema[name], atol=1e-3)


# ---- Batches


def test_a_steps_batch_depends_on_seed_and_step_only():
    batches, others = Batches(noisy_batch, seed=5), Batches(noisy_batch, seed=6)
    late, early = batches[7]["x"], batches[2]["x"]
    assert batches[7]["x"].equal(late) and batches[2]["x"].equal(early)
    assert not late.equal(early) and not late.equal(others[7]["x"])


def test_whichever_process_draws_a_batch_it_is_the_same():
    batches = Batches(noisy_batch, seed=5)
    here, elsewhere = (
        list(DataLoader(batches, batch_size=None, sampler=range(6), num_workers=workers, **how))
        for workers, how in ((0, {}), (2, {"multiprocessing_context": "fork"}))
    )
    assert len(here) == len(elsewhere) == 6
    assert all(one["x"].equal(other["x"]) for one, other in zip(here, elsewhere, strict=True))
    assert not here[0]["x"].equal(here[1]["x"])


def test_a_resumed_training_draws_the_batches_of_the_steps_to_come(tmp_path):
    trained, loss_of = linear_training(tmp_path)
    every = [batch["x"] for batch in trained.batches(noisy_batch)]
    assert len(every) == 6
    take_steps(trained, loss_of, 4)
    trained.save()
    resumed, _ = linear_training(tmp_path)
    rest = [batch["x"] for batch in resumed.batches(noisy_batch)]
    assert [x.tolist() for x in rest] == [x.tolist() for x in every[4:]]


# ---- The clock, the rate, the state


def test_training_stops_by_the_clock_and_keeps_its_state(tmp_path):
    trained, loss_of = linear_training(tmp_path)
    assert not trained.run(noisy_batch, loss_of, lambda: None, stop_at=0)
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
    take_steps(trained, loss_of, 1)
    trained.save()
    old = {section: loop.load_section(tmp_path, section) for section in SECTIONS}
    take_steps(trained, loss_of, 2)

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
    take_steps(trained, loss_of, 1)
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


# ---- The losses


def test_every_fiftieth_step_is_a_row_of_the_losses(tmp_path):
    training = Training(tmp_path / "stage", nn.Linear(1, 1), Recipe(120, 1, 1e-3), 0, "cpu")
    training.run(ones, lambda batch: {"loss": training.model(batch["x"]).square().mean()}, lambda: None, math.inf)
    again = Training(tmp_path / "stage", nn.Linear(1, 1), Recipe(150, 1, 1e-3), 0, "cpu")
    again.run(ones, lambda batch: {"loss": again.model(batch["x"]).square().mean()}, lambda: None, math.inf)
    header, *rows = (tmp_path / "stage" / "loss.csv").read_text().splitlines()
    assert header == "step,loss"
    assert [row.split(",")[0] for row in rows] == ["50", "100", "150"]


def test_losses_of_all_stages_so_far_are_drawn(run, tmp_path):
    for stage in ("autoencoder", "diffusion"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "loss.csv").write_text("step,loss,mse\n50,0.5,1\n100,0.25,1\n")
    assert run(PRETRAINING, "--out", tmp_path, "--losses", tmp_path / "losses.png").status == 0
    with Image.open(tmp_path / "losses.png") as image:
        assert image.size == (960, 360)  # two panels
        assert np.asarray(image.convert("L")).min() < 50
    assert "try losses.png" in run(PRETRAINING, "--out", tmp_path, "--losses", tmp_path / "losses.xyz").error
    assert not (tmp_path / "losses.xyz").exists()


def test_losses_are_asked_for_before_there_are_any(run, tmp_path):
    outcome = run(PRETRAINING, "--out", tmp_path, "--losses", tmp_path / "losses.png")
    assert "found no stage's loss.csv" in outcome.error
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_how_to_get_it(run, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "loss.csv").write_text("step,loss\n50,0.5\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = run(PRETRAINING, "--out", tmp_path, "--losses", tmp_path / "losses.png")
    assert 'type pip install -e ".[plot]"' in outcome.error
