"""One cell from its pictures to its figures, small."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import WEIGHTS

from tinyldm import InputError
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.lab.measure.score import Figures, OfPrompt, Score
from tinyldm.lab.paper import cells
from tinyldm.lab.paper.cells import PLAIN, UNTRAINED, Cell, Place, keep, measured, word_file
from tinyldm.lab.paper.concepts import CONCEPTS
from tinyldm.lab.paper.lessons import Learned


def with_few_questions(concept):
    """Every fourth: each of its checks is still asked for."""
    return replace(concept, questions=lambda word: concept.questions(word)[::4])


@pytest.fixture
def place(monkeypatch, tmp_path, quick):
    monkeypatch.setattr(cells, "NUM", 1)
    monkeypatch.setattr(cells, "STEPS", 1)
    monkeypatch.setattr(cells, "CURVE", (0.5, 0.9))
    monkeypatch.setattr(cells, "CONCEPTS", {name: with_few_questions(one) for name, one in CONCEPTS.items()})
    (tmp_path / "scratch").mkdir()
    return Place(WEIGHTS, quick, tmp_path / "scratch", tmp_path / "out")


def test_a_cell_is_learned_scored_and_kept_and_its_curve_drawn_from_what_was_kept(place, capsys):
    cell = Cell("2-word --steps 2 --batch 1", "snowman")
    figures = json.loads(json.dumps(measured(cell, place)))
    ((first, early), (last, late)) = figures["times"]
    assert (first, last, figures["steps"]) == (1, 2, 2) and 0 < early <= late <= figures["seconds"]
    assert figures["truth"].keys() == {"colours", "outline", "background", "style", "count", "new colour"}
    assert figures["kinds"].keys() == {"background", "style", "composition"}
    assert -1 < figures["reconstruction"] < 1 and figures["norm"] > 0
    assert load_embeddings(word_file(place.out, cell))["S*"].shape == (2, 128)

    points = measured(cell._replace(curve=True), place)["points"]
    assert [point["steps"] for point in points] == [1, 2]
    assert points[-1]["reconstruction"] == pytest.approx(figures["reconstruction"], abs=1e-5)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""  # no progress of a thousand cells


def test_only_of_the_seed_0_it_is_kept_what_a_word_was_on_its_way(place):
    learned = Learned({1: torch.zeros(1, 128), 9: torch.ones(1, 128)}, {}, 1.0)
    for seed in (0, 1):
        keep(learned, Cell("paper,falling --lr 0.1", "yellow bolt", seed), place)
    folder = place.out / "words" / "paper,falling-lr-0.1"
    assert {file.name for file in folder.iterdir()} == {
        "yellow-bolt-0.safetensors",
        "yellow-bolt-0-steps.safetensors",
        "yellow-bolt-1.safetensors",
    }
    assert load_embeddings(folder / "yellow-bolt-1.safetensors")["S*"].eq(1).all()


@pytest.fixture
def scores(monkeypatch):
    """What score() was asked; nothing is drawn, all is the same."""
    calls = []

    def score(model, clip, tokenizer, words, *_, references, **more):
        calls.append((words["S*"], more))
        figures = Figures(0.5, (OfPrompt("style", "a sketch of", 0.25, 0.125),))
        return Score("S*", 1, 1, 0, figures, dict.fromkeys(["image only", *references], figures), {"colours": 1.0})

    monkeypatch.setattr(cells, "score", score)
    return calls


def test_plain_words_are_read_as_they_are_typed(place, scores, tiny):
    figures = measured(Cell(PLAIN, "purple star"), place)
    ((vectors, more),) = scores
    ids = tiny.tokenizer.encode("a purple star")
    assert torch.equal(vectors, tiny.text_encoder.table[ids])
    asked = [question.prompt for question in more["questions"]]
    assert "a photo of purple star on a green background" in asked
    assert "a photo of a blue star on a white background" in asked  # not of a blue purple star
    assert figures["references"] == {"image only": {"reconstruction": 0.5, "editability": 0.25}}


def test_the_word_before_it_learns_has_beside_it_what_needs_no_word(place, scores, tiny):
    figures = measured(Cell(UNTRAINED, "stained glass"), place)
    assert torch.equal(scores[0][0], tiny.text_encoder.table[tiny.tokenizer.encode("painting")])
    assert figures["references"].keys() == {"image only", "prompt only"}
    assert scores[0][1]["reconstruction"] == "a painting in the style of {}"


def test_an_error_says_of_which_cell(place):
    with pytest.raises(InputError, match=r'^paper --init zzz, face, seed 2: the init "zzz"'):
        measured(Cell("paper --init zzz", "face", 2), place)
