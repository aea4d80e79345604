"""The figures of docs/method.md are drawn by the command, from a word that is there."""

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.formats.embeddings import save_embeddings
from tinyldm.inversion import vectors_of
from tinyldm.lab.figures import drawn, subject
from tinyldm.lab.figures.__main__ import FIGURES
from tinyldm.lab.figures.drawn import in_grey, predicted
from tinyldm.lab.figures.subject import Subject


@pytest.fixture
def learned(tiny, monkeypatch):
    """A word that takes no time to learn: it goes from "thing" to "star"."""
    start, end = (vectors_of(tiny, word) for word in ("thing", "star"))

    def learn(training, folder, out, *options):
        for step in (5, 10):
            save_embeddings(out / f"embedding-{step:06d}.safetensors", {"S*": torch.lerp(start, end, step / 10)})

    monkeypatch.setattr(subject, "learn", learn)


def test_the_command_draws_every_figure(run, learned, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(drawn, "STEPS", 3)
    fast = [name for name in FIGURES if name != "loss"]
    outcome = run("tinyldm.lab.figures", "--out", tmp_path / "f", "--weights", quick, "--only", *fast)
    assert outcome.status == 0, outcome.err
    assert sorted(file.stem for file in (tmp_path / "f").glob("*.png")) == sorted(fast)
    for file in (tmp_path / "f").glob("*.png"):
        assert np.asarray(Image.open(file).convert("RGB")).std() > 10, file


def test_the_way_is_in_the_order_of_the_steps_and_its_end_is_the_word(learned, quick, tiny):
    about = Subject.learned(quick)
    assert [*about.way] == [0, 5, 10]
    assert torch.equal(about.words["S*"], vectors_of(tiny, "star"))
    assert about.plainly == "a teal and white striped circle" and about.pictures.shape == (5, 3, 64, 64)


def test_with_hardly_any_noise_the_picture_itself_is_seen(learned, quick):
    about = Subject.learned(quick)
    z_0 = about.model.encode(about.pictures[:1])[0]
    seen = predicted(about, about.model.schedule.add_noise(z_0, torch.randn_like(z_0), 1), 1, "a photo of S*")
    assert (seen - z_0).abs().mean() < 0.1


def test_greys_go_from_minus_three_to_three():
    pixels = np.asarray(in_grey(torch.tensor([[-4.0, -3.0], [0.0, 3.0]])))
    assert pixels[..., 0].tolist() == [[0, 0], [127, 255]]
