"""A digest changes with what a figure depends on, and with nothing else."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tinyldm import recipes
from tinyldm.lab.paper.concepts import CONCEPTS
from tinyldm.lab.paper.digest import code_of, concept_digest, definition, described, weights_digest
from tinyldm.recipes import RECIPES


def first_kind(value):
    """What it does."""
    return value + 1  # and why


def same_code(value):
    """Said otherwise."""
    return value + 1


def test_no_two_recipes_are_the_same():
    assert len({str(definition(name)) for name in RECIPES}) == len(RECIPES)


def test_a_recipe_is_its_code_and_that_of_all_it_calls_in_its_file():
    found = definition("auto-start,kept-norm")
    assert {
        "tinyldm.recipes.best_words",
        "tinyldm.optimizers.Adam",
    } <= found.keys()
    assert found["tinyldm.recipes.CANDIDATES"] == "32"
    assert found["start"] == "tinyldm.recipes.best_words"
    assert not [name for name in found if name.startswith("tinyldm.autoencoder")]


def test_numbers_count_wherever_they_stand(monkeypatch):
    before = definition("auto-start"), definition("regularised")
    monkeypatch.setattr(recipes, "CANDIDATES", 16)
    stronger = {"penalty": partial(recipes.squared_distance, weight=2e-2)}
    monkeypatch.setitem(RECIPES, "regularised", stronger)
    after = definition("auto-start"), definition("regularised")
    assert before[0] != after[0] and before[1] != after[1]


def test_a_change_of_one_recipe_leaves_the_others(monkeypatch):
    before = {name: definition(name) for name in RECIPES}
    monkeypatch.setitem(RECIPES, "falling", {"rate": recipes.constant})
    assert [name for name in RECIPES if definition(name) != before[name]] == ["falling"]


def test_comments_and_docstrings_may_change():
    assert code_of(first_kind).replace("first_kind", "same_code") == code_of(same_code)
    assert "return value + 1" in code_of(same_code)


def test_what_is_said_of_a_value_is_the_same_in_every_process():
    """No address in memory, which a function's repr has."""
    for name in RECIPES:
        assert " at 0x" not in str(definition(name))
    assert described(partial(first_kind, value=3), {}) == "test_paper_digest.first_kind with {'value': 3}"


@pytest.mark.parametrize(
    "change",
    [{"plain": "a thing"}, {"pictures": CONCEPTS["face"].pictures[1:]}, {"questions": lambda word: []}],
    ids=lambda change: next(iter(change)),
)
def test_a_concepts_pictures_and_questions_count(change):
    face = CONCEPTS["face"]
    assert concept_digest(face) == concept_digest(replace(face)) != concept_digest(replace(face, **change))


def test_the_weights_count_and_the_defaults_beside_them_do_not(tiny):
    before = weights_digest(tiny)
    assert weights_digest(replace(tiny, defaults=replace(tiny.defaults, batch=7))) == before
    with torch.no_grad():
        next(tiny.unet.parameters()).flatten()[0] += 1
    assert weights_digest(tiny) != before
