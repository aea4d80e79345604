"""What a training step costs is the same for any vocabulary, and for as many pictures or vectors as anyone has.

Counted are the numbers that the operations of a step read and write, from one line of loss.csv to the next: backward,
optimiser and bookkeeping with them. They tell on any machine, however busy, what seconds only hint at.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from fuzz import small_model
from helpers.growth import with_vocabulary
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinyldm import run as running
from tinyldm.formats.native import save_checkpoint

aten = torch.ops.aten
BY_ROWS = (aten.embedding, aten.index, aten.index_select, aten.gather)  # they read no more than they write
USUAL = {"vocabulary": 1000, "pictures": 3, "vectors": 1, "batch": 2}


class Numbers(TorchDispatchMode):
    """How many numbers were read and written so far; a view of some is neither."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        returns = function._schema.returns
        if any(value.alias_info is None or value.alias_info.is_write for value in returns):
            self.count += sum(x.numel() for x in tensors_of(result))
            if function._overloadpacket not in BY_ROWS:
                self.count += sum(x.numel() for x in tensors_of(arguments))
        return result


def tensors_of(x: object) -> Iterable[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from tensors_of(part)


@pytest.fixture
def cost_of_a_step(run, tmp_path, monkeypatch):
    """cost_of_a_step(vectors=8): numbers that the second step of train.py reads and writes, else of USUAL."""

    def cost(**changed: int) -> int:
        values, folder = USUAL | changed, tmp_path / "-".join(["run", *changed])
        weights, images = checkpoint(folder, values["vocabulary"]), pictures(folder, values["pictures"])
        after: list[int] = []
        log = running.Run.log

        def noted_log(self, loss):
            log(self, loss)
            after.append(numbers.count)

        words = ["--vectors", values["vectors"], "--batch", values["batch"], "--init", "circle", "--steps", 3]
        words += ["--save-every", 100, "--preview-every", 100, "--out", folder / "out"]
        with monkeypatch.context() as patch, Numbers() as numbers:
            patch.setattr(running.Run, "log", noted_log)
            outcome = run("train.py", "--weights", weights, "--images", images, "--token", "S*", *words)
        assert outcome.status == 0 and len(after) == 3, outcome
        return after[1] - after[0]

    return cost


def checkpoint(folder: Path, vocabulary: int) -> Path:
    save_checkpoint(folder / "weights", with_vocabulary(small_model(), vocabulary))
    return folder / "weights"


def pictures(folder: Path, count: int) -> Path:
    (folder / "images").mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "images" / f"{i:03d}.png")
    return folder / "images"


def test_a_step_costs_the_same_with_a_large_vocabulary_many_pictures_or_vectors(cost_of_a_step):
    usual = cost_of_a_step()
    for changed in ({"vocabulary": 49408}, {"pictures": 100}, {"vectors": 8}):
        assert cost_of_a_step(**changed) < 1.005 * usual, changed
    assert cost_of_a_step(batch=8) > 2 * usual  # what grows is seen to grow
