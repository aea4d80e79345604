"""Training, sampling and every application on a pretend device: no operation mixes devices, and waits are counted.

helpers/pretend.py has that device, test_cuda.py the same on a real one. The model is random, of 8x8 pictures.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import small_model
from helpers.pretend import PretendDevice, PretendTensor
from PIL import Image

from tinyldm import cli, recipes
from tinyldm import run as running
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.formats.native import save_checkpoint
from tinyldm.recipes import RECIPES
from tinyldm.sampler import SAMPLERS

WAITS = 1  # a step, for its loss and the vectors' norm
MORE_WAITS = {"early-stop": 1}  # for the loss of its fixed batch
STEPS = 3


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(folder, small_model())
    return folder


@pytest.fixture(autouse=True)
def one_picture_a_preview(monkeypatch) -> None:
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))


@pytest.fixture
def device() -> PretendDevice:
    return PretendDevice()


@pytest.fixture
def run_there(run, monkeypatch, device) -> Callable[..., object]:
    """run(…), with all networks on the pretend device."""

    def run_there(*words: object):
        with monkeypatch.context() as patch, device:
            patch.setattr(cli, "choose_device", lambda name: "meta")
            return run(*words)

    return run_there


# ---- The pretend device itself


def test_an_operation_on_both_sides_is_an_error():
    with PretendDevice():
        there, here = torch.arange(3.0, device="meta"), torch.arange(3.0)
        assert (there * 2.0 + torch.tensor(1.0)).cpu().tolist() == [1, 3, 5]
        with pytest.raises(RuntimeError, match=r"mul.*\[3\] on the CPU, \[3\] elsewhere"):
            there * here
        with pytest.raises(RuntimeError, match="index"):
            there[torch.tensor([0])]
        for mixed in (lambda: torch.stack([there.sum(), here.sum()]), lambda: here.sum().add_(there.sum())):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        there.copy_(here + 1)
        assert there.cpu().tolist() == [1, 2, 3]
        assert there.add_(there) is there and there.cpu().tolist() == [2, 4, 6]
    with pytest.raises(RuntimeError, match="used outside"):
        there + 1


def test_numbers_that_come_back_to_the_host_are_counted():
    with PretendDevice() as device:
        there = torch.tensor([1.0, 2.0], device="meta").requires_grad_()
        (there * there).sum().backward()
        assert isinstance(there.grad, PretendTensor) and device.waits == 0
        assert there.grad[1].item() == 4.0 and device.waits == 1
        assert there.detach().tolist() == [1, 2] and device.waits == 2
        assert there.grad.to("cpu").equal(torch.tensor([2.0, 4.0])) and device.waits == 3
        assert bool((there > 0).all()) and device.waits == 4
        assert torch.ones(2).sum().item() == 2 and device.waits == 4
        assert there.equal(there) and device.waits == 5
        assert len(there[there > 1]) == 1 and device.waits == 6


# ---- train.py


@pytest.fixture
def training(tmp_path, small) -> Callable[[str], list[object]]:
    """The command that learns a word into a folder."""
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(["a S*", "the S* again"]):
        picture = Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5 + i), 50).convert("RGB")
        picture.save(tmp_path / "pictures" / f"{name}.png")

    def command(out: str, *words: object) -> list[object]:
        start = ["train.py", "--images", tmp_path / "pictures", "--token", "S*", "--weights", small, "--init", "circle"]
        return [*start, "--steps", STEPS, "--batch", 2, "--lr", 0.01, "--out", tmp_path / out, *words]

    return command


@pytest.fixture
def waits(monkeypatch, device) -> list[int]:
    """How often the device had been waited for when each of a run's steps was over."""
    found: list[int] = []
    log = running.Run.log

    def noted(self, loss):
        log(self, loss)
        found.append(device.waits)

    monkeypatch.setattr(running.Run, "log", noted)
    return found


def learned(folder: Path) -> tuple[np.ndarray, torch.Tensor]:
    losses = np.loadtxt(folder / "loss.csv", delimiter=",", skiprows=1)[:, 1]
    return losses, load_embeddings(folder / "embedding.safetensors")["S*"]


COMPOSED = [  # all of RECIPES, as few as can't be composed
    "paper",
    "high-rate,2-word,regularised,fixed-norm,low-variance,falling",
    "low-rate,3-word,cross,kept-norm,pairs",
    "progressive,norm-decay,auto-start",
    "per-image,captions",
    "early-stop",
]


def test_all_recipes_are_among_those_that_are_learned_there():
    assert {name for names in COMPOSED for name in names.split(",")} == RECIPES.keys()


@pytest.mark.parametrize("recipe", COMPOSED)
def test_every_recipe_learns_there_what_it_learns_here(run, run_there, training, waits, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(recipes, "CANDIDATES", 4)
    words = ("--recipe", recipe, "--preview-every", 1000)
    assert run(*training("here", *words)).status == 0
    waits.clear()
    assert run_there(*training("there", *words)).status == 0
    (losses, vectors), (expected_losses, expected) = (learned(tmp_path / name) for name in ("there", "here"))
    assert len(losses) == STEPS and np.allclose(losses, expected_losses, rtol=1e-4)
    assert torch.allclose(vectors, expected, atol=1e-3)  # a step of AdamW changes a number by up to 1e-2
    steps = np.diff(waits)
    assert len(steps) == STEPS - 1 and set(steps) == {WAITS + MORE_WAITS.get(recipe, 0)}


def test_a_run_is_stopped_there_and_taken_up_again(run, run_there, training, tmp_path, monkeypatch):
    assert run_there(*training("whole")).status == 0
    log = running.Run.log

    def interrupted(self, loss):
        log(self, loss)
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", interrupted)
        assert run_there(*training("parts")).status == 130
    assert run_there(*training("parts", "--resume")).status == 0
    (losses, vectors), (expected_losses, expected) = (learned(tmp_path / name) for name in ("parts", "whole"))
    assert np.array_equal(losses, expected_losses) and vectors.equal(expected)
    assert run(*training("parts", "--resume", "--steps", STEPS + 1)).status == 0  # and on the CPU


# ---- Pictures


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_there_what_it_draws_here_and_never_waits(small, device, sampler):
    model = load_checkpoint(small)
    *_, expected = model.generate(["a photo of a circle"] * 2, [0, 1], sampler=sampler, steps=6)
    with device:
        model = load_checkpoint(small, "meta")
        before = device.waits
        *_, z_0 = model.generate(["a photo of a circle"] * 2, [0, 1], sampler=sampler, steps=6)
        assert isinstance(z_0, PretendTensor) and device.waits == before
        pictures = model.decode(z_0).cpu()
    assert torch.allclose(pictures, load_checkpoint(small).decode(expected), atol=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        ("--negative", "two lemons", "--attention"),
        ("--init-image", "a.png", "--strength", 0.5),
        ("--init-image", "a.png", "--mask", "mask.png", "--sampler", "euler_a", "--keep-pixels"),
        ("--interpolate", "S*", "T*", "--num", 3),
        ("--interpolate", 1, 2, "--num", 3),
    ],
    ids=["attention", "image to image", "mask", "between words", "between seeds"],
)
def test_every_application_draws_there_what_it_draws_here(run, run_there, small, tmp_path, words):
    gray = Image.effect_mandelbrot((8, 8), (-2, -1.5, 1, 1.5), 50)
    gray.convert("RGB").save(tmp_path / "a.png")
    gray.point(lambda value: 255 * (value > 20)).save(tmp_path / "mask.png")
    vectors = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    for word, own in zip(["S*", "T*"], vectors, strict=True):
        save_embeddings(tmp_path / f"{word[0]}.safetensors", {word: own})
    command = ["sample.py", "--weights", small, "--prompt", "a photo of S*", "--steps", 4, *words]
    command += ["--embedding", tmp_path / "S.safetensors", tmp_path / "T.safetensors"]
    for runs, name in ((run, "here"), (run_there, "there")):
        outcome = runs(*command, "--out", tmp_path / name)
        assert outcome.status == 0, outcome
    files = sorted(path.name for path in (tmp_path / "here").glob("*.png"))
    assert files == sorted(path.name for path in (tmp_path / "there").glob("*.png")) and len(files) > 1
    for name in files:
        here, there = (np.asarray(Image.open(tmp_path / place / name), dtype=int) for place in ("here", "there"))
        assert np.abs(here - there).max() <= 1, name
