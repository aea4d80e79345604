"""What is done already, and whether it still holds."""

import json
from functools import partial

import pytest

from tinyldm import recipes
from tinyldm.lab.paper.cells import PLAIN, UNTRAINED, Cell
from tinyldm.lab.paper.kept import CellFile, Digests
from tinyldm.latent_diffusion import Defaults, Learning
from tinyldm.recipes import RECIPES

CELLS = [
    Cell(recipe, concept, seed) for recipe in ("paper", "regularised") for concept in ("face", "key") for seed in (0, 1)
]
CELLS += [Cell(UNTRAINED, "face"), Cell(PLAIN, "purple star"), Cell("regularised", "face", curve=True)]


def digests(weights="w", **changes):
    made = Digests(weights, Defaults(size=64, **changes))
    return {cell: made(cell) for cell in CELLS}


def test_a_changed_recipe_redoes_its_own_cells_alone(monkeypatch):
    before = digests()
    monkeypatch.setitem(RECIPES, "regularised", {"penalty": partial(recipes.squared_distance, weight=1.0)})
    after = digests()
    assert {cell for cell in CELLS if after[cell] != before[cell]} == {c for c in CELLS if c.recipe == "regularised"}


def test_other_weights_redo_all_and_another_default_recipe_none():
    before = digests()
    assert not set(before.values()) & set(digests("other").values())
    assert before == digests(object=Learning("object", recipe="falling", steps=9), save_every=7)
    assert len(set(before.values())) == len(CELLS)


def test_lines_are_read_again_and_the_last_of_a_cell_counts(tmp_path):
    file = CellFile(tmp_path / "cells.jsonl")
    for value in (1 / 3, 0.25):
        file.add(CELLS[1], "d", {"truth": {"colours": value}, "times": [[1, value]]})
    file.add(CELLS[0], "d", {})
    again = CellFile(file.path)
    assert again.lines == file.lines and list(again.lines) == [CELLS[1], CELLS[0]]
    assert again.lines[CELLS[1]]["truth"] == {"colours": 0.25}
    file.tidy()
    assert [json.loads(line)["seed"] for line in file.path.read_text().splitlines()] == [0, 1]
    assert CellFile(file.path).lines == file.lines


@pytest.mark.parametrize("torn", ['{"recipe": "paper", "conc', '{"recipe": "paper"}\n', "\x00\x00", "[]\n", "3\n"])
def test_a_line_that_was_cut_off_spoils_no_other(tmp_path, torn):
    file = CellFile(tmp_path / "cells.jsonl")
    file.add(CELLS[0], "d", {})
    with open(file.path, "a") as end:
        end.write(torn)
    again = CellFile(file.path)
    assert list(again.lines) == [CELLS[0]]
    again.add(CELLS[1], "d", {})
    assert list(CellFile(file.path).lines) == CELLS[:2]
