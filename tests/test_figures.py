"""The figures of docs/method.md are drawn by the command, from a word that is there."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tinyldm.inversion import vectors_of
from tinyldm.lab.figures import drawn
from tinyldm.lab.figures.__main__ import FIGURES
from tinyldm.lab.figures.drawn import in_grey, predicted
from tinyldm.lab.figures.subject import KEPT, Subject


@pytest.fixture
def kept(tmp_path, tiny):
    """A folder with a word's way from "thing" to "star"."""
    start, end = (vectors_of(tiny, word) for word in ("thing", "star"))
    (tmp_path / "f").mkdir()
    save_file({str(step): torch.lerp(start, end, step / 10) for step in (0, 5, 10)}, tmp_path / "f" / KEPT)
    return tmp_path / "f"


def test_the_command_draws_every_figure(run, kept, quick, monkeypatch):
    monkeypatch.setattr(drawn, "STEPS", 3)
    fast = [name for name in FIGURES if name != "loss"]
    outcome = run("tinyldm.lab.figures", "--out", kept, "--weights", quick, "--only", *fast)
    assert outcome.status == 0, outcome.err
    assert sorted(file.stem for file in kept.glob("*.png")) == sorted(fast)
    for file in kept.glob("*.png"):
        assert np.asarray(Image.open(file).convert("RGB")).std() > 10, file


def test_the_way_is_in_the_order_of_the_steps_and_its_end_is_the_word(kept, quick, tiny):
    subject = Subject.learned(quick, kept)
    assert [*subject.way] == [0, 5, 10]
    assert torch.equal(subject.words["S*"], vectors_of(tiny, "star"))
    assert subject.plainly == "a teal and white striped circle" and subject.pictures.shape == (5, 3, 64, 64)


def test_with_hardly_any_noise_the_picture_itself_is_seen(kept, quick):
    subject = Subject.learned(quick, kept)
    z_0 = subject.model.encode(subject.pictures[:1])[0]
    seen = predicted(subject, subject.model.schedule.add_noise(z_0, torch.randn_like(z_0), 1), 1, "a photo of S*")
    assert (seen - z_0).abs().mean() < 0.1


def test_greys_go_from_minus_three_to_three():
    pixels = np.asarray(in_grey(torch.tensor([[-4.0, -3.0], [0.0, 3.0]])))
    assert pixels[..., 0].tolist() == [[0, 0], [127, 255]]
