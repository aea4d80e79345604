"""Strips of pictures, drawn from the words that were kept."""

import pytest
import torch
from conftest import WEIGHTS
from PIL import Image

from tinyldm.formats.embeddings import save_embeddings
from tinyldm.lab.paper import strips
from tinyldm.lab.paper.cells import Cell, Place, word_file
from tinyldm.lab.paper.concepts import REPORTING
from tinyldm.lab.paper.strips import PROMPTS, draw_strips, one_of_each_kind


@pytest.fixture
def asked(monkeypatch, tiny):
    """The prompts and words of each call; what is drawn is gray."""
    calls = []

    def load_checkpoint(path):  # which takes its time
        tiny.tokenizer.placeholders.clear()
        return tiny

    def samples(model, prompts, seeds, words):
        calls.append((prompts, words["S*"].mean().item()))
        return [Image.new("RGB", (64, 64), "gray") for _ in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(strips, "samples", samples)
    monkeypatch.setattr(strips, "load_checkpoint", load_checkpoint)
    return calls


def keep_word(out, recipe, concept, value):
    file = word_file(out, Cell(recipe, concept))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_embeddings(file, {"S*": torch.full((1, 128), value)})


def test_a_strip_shows_a_concept_of_each_kind():
    shown = one_of_each_kind([*REPORTING.values()])
    assert [concept.kind for concept in shown] == ["combination", "shape", "figure", "style"]
    assert shown[0] is next(iter(REPORTING.values()))


def test_strips_are_drawn_of_the_words_that_are_there_and_anew_only_if_these_change(tmp_path, asked):
    shown = one_of_each_kind([*REPORTING.values()])
    place, file = Place(WEIGHTS, WEIGHTS, tmp_path, tmp_path), tmp_path / "strips.png"
    for concept in shown:
        keep_word(tmp_path, "paper", concept.name, 1.0)
    keep_word(tmp_path, "falling", shown[0].name, 1.0)  # not all four
    for _ in range(2):
        draw_strips(["paper", "falling"], shown, place, file)
        assert [prompts for prompts, _ in asked] == [PROMPTS["object"]] * 3 + [PROMPTS["style"]]
    sheet = Image.open(file)
    assert sheet.width == 16 * 68 + 4 and sheet.height == 2 * (20 + 68) + 4
    keep_word(tmp_path, "paper", shown[1].name, 2.0)
    draw_strips(["paper"], shown, place, file)
    assert [value for _, value in asked[4:]] == [1.0, 2.0, 1.0, 1.0]


def test_without_words_no_sheet_is_written(tmp_path, asked):
    draw_strips(["paper"], [*REPORTING.values()], Place(WEIGHTS, WEIGHTS, tmp_path, tmp_path), tmp_path / "strips.png")
    assert not asked and not (tmp_path / "strips.png").exists()
