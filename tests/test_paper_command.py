"""python -m tinyldm.lab.paper, with cells that cost nothing."""

import json
from dataclasses import replace

import pytest
from conftest import WEIGHTS, locked_elsewhere
from test_paper_table import line

from tinyldm.formats.native import save_checkpoint
from tinyldm.lab.measure import words
from tinyldm.lab.paper import __main__ as command
from tinyldm.lab.paper.cells import Cell, word_file
from tinyldm.lab.paper.concepts import CHOOSING, REPORTING
from tinyldm.recipes import RECIPES, constant

PAPER = "tinyldm.lab.paper"
OTHER = "2-word --steps 60"
FEW = [PAPER, "--only", "paper", OTHER, "--seeds", 2, "--processes", 1, "--out", "page"]


class Measured:
    """In place of cells.measured: all figures are 0.5."""

    def __init__(self):
        self.done, self.most = [], None

    def __call__(self, cell, place):
        if len(self.done) == self.most:
            raise KeyboardInterrupt
        self.done.append(cell)
        point = line(cell.recipe, cell.concept, 0.5, steps=60)
        if cell.curve:
            return {"points": [point]}
        if cell.recipe in ("untrained", "plain words"):
            return figures(point) | {"references": {}}
        on_its_way = word_file(place.out, cell, "-steps")
        on_its_way.parent.mkdir(parents=True, exist_ok=True)
        on_its_way.touch()
        return figures(point) | {"norm": 1.0, "seconds": 20.0, "times": [[60, 20.0]]}


def figures(point):
    return {name: value for name, value in point.items() if name not in Cell._fields}


@pytest.fixture
def measured(monkeypatch):
    stand_in = Measured()
    monkeypatch.setattr(command, "measured", stand_in)
    monkeypatch.setattr(words, "RESAMPLES", 100)  # which takes less time
    two = {name: REPORTING[name] for name in ("purple star", "yellow bolt")}
    monkeypatch.setattr(command, "SETS", {"reporting": two, "choosing": {"pebble": CHOOSING["pebble"]}})
    return stand_in


@pytest.fixture
def pages(monkeypatch):
    """What was to be written, which takes its time, as does the checkpoint's copy, which no stand-in needs."""
    written = []
    monkeypatch.setattr(command, "save_checkpoint", lambda folder, model: None)
    monkeypatch.setattr(command, "write_page", lambda page, out: written.append(page))
    return written


def recipes(cells):
    return {cell.recipe for cell in cells}


def test_all_cells_are_measured_once_and_the_page_is_written(run, measured, tmp_path):
    outcome = run(*FEW)
    assert (outcome.status, outcome.err.strip(), outcome.out) == (0, "", "written: page/README.md\n")
    references = [
        Cell("untrained", "purple star"),
        Cell("untrained", "yellow bolt"),
        Cell("plain words", "purple star"),
    ]
    learned = [
        Cell(recipe, concept, seed)
        for seed in (0, 1)
        for concept in ("purple star", "yellow bolt")
        for recipe in ("paper", OTHER)
    ]
    # Of every second concept; all recipes are as good.
    curves = [Cell(recipe, "purple star", curve=True) for recipe in (OTHER, "paper")]
    assert measured.done == [*references, *learned, *curves]
    assert (tmp_path / "page" / "README.md").read_text().startswith("# Ways to learn a word, compared\n")


def test_a_run_that_was_stopped_goes_on_and_does_nothing_twice(run, measured, pages, tmp_path):
    measured.most = 6
    outcome = run(*FEW)
    assert outcome.status == 130 and "what was saved before is kept" in outcome.err
    assert len((tmp_path / "page" / "cells.jsonl").read_text().splitlines()) == 6
    measured.most = None
    for _ in range(2):
        assert run(*FEW).status == 0
        assert len(measured.done) == len(set(measured.done)) == 13


def test_a_changed_recipe_redoes_its_own_cells(run, measured, pages, monkeypatch, tmp_path):
    run(*FEW)
    measured.done.clear()
    monkeypatch.setitem(RECIPES, "2-word", {"vectors": 2, "rate": lambda done: constant(done)})
    run(*FEW)
    assert len(measured.done) == 5 and recipes(measured.done) == {OTHER}
    lines = [json.loads(text) for text in (tmp_path / "page" / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 13  # the old ones are gone


def test_more_recipes_are_added_to_the_table_and_the_page_alone_measures_none(run, measured, pages):
    run(*FEW)
    measured.done.clear()
    run(PAPER, "--only", "pairs", "--seeds", 1, "--processes", 1, "--out", "page")
    assert recipes(measured.done) == {"pairs"}
    assert run(PAPER, "--page", "--out", "page").status == 0 and len(measured.done) == 3
    for page in pages[1:]:
        assert {line["recipe"] for line in page.cells} == {"paper", OTHER, "pairs", "untrained", "plain words"}
        assert {line["recipe"] for line in page.curves} == {"paper", OTHER, "pairs"}
    assert pages[1].cells == pages[2].cells and pages[1].curves == pages[2].curves  # in one order, whatever came last
    # Of the whole table, 22 recipes and what else was asked for with three seeds; "paper" has two of them, "pairs" one.
    assert [page.missing for page in pages] == [2 * (3 * 22 - 2), *[2 * (3 * 22 - 2 - 1)] * 2]
    run(PAPER, "--quick", "--processes", 1, "--out", "look")
    assert pages[-1].missing == 0 and pages[-1].is_look and not pages[0].is_look


def test_what_is_chosen_by_has_a_folder_and_a_page_of_its_own(run, measured, pages, tmp_path):
    run(PAPER, "--concepts", "choosing", "--only", "paper", "--seeds", 1, "--processes", 1)
    assert (tmp_path / "outputs" / "paper-choosing" / "cells.jsonl").exists()
    assert {cell.concept for cell in measured.done} == {"pebble"} and pages[0].name == "choosing"


def test_quick_takes_one_seed_few_recipes_and_a_concept_of_each_kind(run, measured, pages):
    run(PAPER, "--quick", "--processes", 1, "--out", "page")
    assert {cell.seed for cell in measured.done} == {0} and len(recipes(measured.done)) == 5 + 2
    assert sum(cell.curve for cell in measured.done) == 2


def test_figures_of_other_weights_are_not_shown(run, measured, pages, tiny, tmp_path):
    run(*FEW)
    tiny.unet.out[0].bias.data += 1
    save_checkpoint(tmp_path / "other", tiny)
    error = run(PAPER, "--page", "--out", "page", "--weights", "other").error
    assert "page/cells.jsonl has no cell of these weights; leave out --page" in error


@pytest.mark.parametrize(
    "options, error",
    [
        (["--only", "fast"], 'no recipe "fast", expected some of paper'),
        (["--only", "paper --steps"], "argument --steps: expected one argument"),
        (["--only", "2-word,3-word"], "the recipes 2-word and 3-word both change the vectors"),
        (["--seeds", "0"], "'0', expected a whole number of at least 1"),
        (["--processes", "many"], "'many', expected a whole number"),
        (["--concepts", "all"], "invalid choice: 'all'"),
        (["--weights", "nowhere"], "no checkpoint at nowhere"),
        (["--page", "--out", "page"], "page/cells.jsonl has no cell of these weights"),
        (["--out", "file"], "File exists: file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(run, measured, pages, tmp_path, options, error):
    (tmp_path / "file").write_text("a file, no folder")
    assert error in run(PAPER, *options).error
    assert measured.done == []


def test_two_runs_do_not_write_into_one_folder(run, measured, tmp_path):
    (tmp_path / "page").mkdir()
    with locked_elsewhere(tmp_path / "page"):
        assert "another run is writing into page" in run(*FEW).error


def test_pictures_of_another_size_are_refused(run, measured, tiny, tmp_path):
    save_checkpoint(tmp_path / "large", replace(tiny, defaults=replace(tiny.defaults, size=128)))
    assert "large makes pictures of 128 pixels, expected 64" in run(PAPER, "--weights", "large").error
    assert WEIGHTS.exists()


def test_a_run_that_is_stopped_has_compared_concepts_of_every_kind():
    concepts = [*REPORTING.values()]
    in_turn = command.kinds_in_turn(concepts)
    assert sorted(concept.name for concept in in_turn) == sorted(REPORTING)
    kinds = [concept.kind for concept in in_turn]
    assert kinds[:6] == ["combination", "shape", "figure", "style", "combination", "shape"]
    assert [concept for concept in in_turn if concept.kind == "shape"] == [c for c in concepts if c.kind == "shape"]
