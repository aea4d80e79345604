"""How words are learned to be measured: by train.py, as many at once as there are threads."""

import subprocess
import threading
import time

import pytest
import torch
from conftest import WEIGHTS
from PIL import Image

from tinyldm import InputError
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.lab.measure import learning
from tinyldm.lab.measure.learning import Training
from tinyldm.lab.world.distribution import pictures_in_style, pictures_of
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import Thing


@pytest.fixture
def commands(monkeypatch):
    """What train.py would have been called with: its words, its environment and its pictures."""
    called = []

    def run(command, env, **_):
        words = [*map(str, command[2:])]
        folder = command[command.index("--images") + 1]
        called.append((words, env, [Image.open(path).copy() for path in sorted(folder.glob("*.png"))]))
        out = command[command.index("--out") + 1]
        out.mkdir()
        save_embeddings(out / "embedding.safetensors", {"S*": torch.ones(2, 128)})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(learning.subprocess, "run", run)
    return called


@pytest.mark.parametrize(
    "pictures, kind", [(pictures_of(Thing("arrow", "blue")), "object"), (pictures_in_style("blueprint"), "style")]
)
def test_a_word_is_learned_from_drawings_with_the_options_and_seed_asked_for(commands, pictures, kind):
    training = Training(WEIGHTS, options=("--steps", "7", "--seed", "9"))
    words = learning.word_for(training, pictures, seed=3, kind=kind)
    assert list(words) == ["S*"] and words["S*"].shape == (2, 128)
    ((typed, environment, drawn),) = commands
    options = dict(zip(typed[::2], typed[1::2], strict=True))
    assert options.items() >= {"--property": kind, "--steps": "7", "--seed": "3", "--weights": str(WEIGHTS)}.items()
    assert [image.tobytes() for image in drawn] == [draw(picture, 256).tobytes() for picture in pictures]
    assert environment["OMP_NUM_THREADS"] == str(torch.get_num_threads())


def test_what_train_refuses_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"train\.py: error: no such folder: .*nowhere"):
        learning.learn(Training(WEIGHTS), tmp_path / "nowhere", tmp_path / "word")


def test_a_bug_in_train_is_no_input_error(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], 1, stderr="Traceback: a bug")
    monkeypatch.setattr(learning.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match="Traceback: a bug"):
        learning.learn(Training(WEIGHTS), tmp_path, tmp_path / "word")


def test_without_the_scripts_it_says_that_the_project_is_needed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    assert "no train.py in" in run("tinyldm.lab.measure", "--only", "examples").error


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_as_many_tasks_run_at_once_as_there_are_threads_and_each_has_one(two_threads):
    both = threading.Barrier(2, timeout=10)  # one task alone would wait for ever

    def task(number):
        both.wait()
        time.sleep(0.01 * (number == 0))  # results come in the order of the tasks
        return number, torch.get_num_threads()

    assert list(learning.in_parallel(task, range(6), "tasks")) == [(number, 1) for number in range(6)]
    assert torch.get_num_threads() == 2


def test_after_an_error_nothing_else_begins(two_threads):
    begun = []

    def task(number):
        begun.append(number)
        time.sleep(0.05)
        raise InputError("no such word")

    with pytest.raises(InputError, match="no such word"):
        list(learning.in_parallel(task, range(50), "tasks"))
    assert len(begun) < 10 and torch.get_num_threads() == 2
