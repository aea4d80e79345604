"""Recipes with options behind them, and learning one word by one."""

from pathlib import Path

import pytest
from conftest import WEIGHTS

from tinyldm import InputError
from tinyldm.lab.paper import lessons
from tinyldm.lab.paper.concepts import CONCEPTS
from tinyldm.lab.paper.lessons import COMPARED, learn, settings
from tinyldm.latent_diffusion import Defaults, Learning
from tinyldm.recipes import RECIPES

DEFAULTS = Defaults(
    size=64,
    object=Learning("object", recipe="falling", steps=70, lr=0.5),
    style=Learning("painting", recipe="pairs", steps=30),
    batch=5,
)


def test_all_recipes_are_compared_and_the_default_besides():
    assert set(RECIPES) | {"default"} <= set(COMPARED)
    for recipe in COMPARED:
        settings(recipe, "object", DEFAULTS)  # raises if it is none


def test_all_have_the_protocols_settings_but_the_default_has_its_own():
    common = {"steps": 150, "batch": 16, "lr": 0.01}
    chosen = settings("2-word", "object", DEFAULTS)
    assert {name: chosen[name] for name in common} == common and chosen["recipe"] == "2-word"
    own = settings("default", "object", DEFAULTS)
    assert {name: own[name] for name in common} == {"steps": 70, "batch": 5, "lr": 0.5} and own["recipe"] == "falling"
    own = settings("default", "style", DEFAULTS)
    assert (own["recipe"], own["steps"], own["init"]) == ("pairs", 30, "painting")


def test_options_behind_a_recipe_come_after_the_protocols():
    chosen = settings("pairs,falling --steps 60", "object", DEFAULTS)
    assert (chosen["recipe"], chosen["steps"], chosen["batch"]) == ("pairs,falling", 60, 16)


def test_a_style_starts_from_its_own_word_and_has_its_own_templates():
    thing, style = (settings("paper", subject, DEFAULTS) for subject in ("object", "style"))
    assert (thing["init"], style["init"]) == ("object", "painting")
    assert thing["templates"] != style["templates"]


@pytest.mark.parametrize(
    "recipe, error",
    [
        ("fast", 'no recipe "fast", expected some of paper, '),
        ("paper --stps 3", "unrecognized arguments: --stps 3"),
        ("paper --steps many", "'many', expected a whole number"),
        ("paper '", "is no recipe, expected such as"),
        ("", "is no recipe, expected such as"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, error):
    with pytest.raises(InputError, match=error):
        settings(recipe, "object", DEFAULTS)


@pytest.fixture
def asked(monkeypatch):
    """train.py's arguments, and the files that lay there; nothing is learned, as if Ctrl-C had stopped it."""
    seen = []

    def main(arguments):
        folder = Path(arguments[arguments.index("--images") + 1])
        seen.append((arguments, {file.name: file.read_bytes() for file in folder.iterdir()}))
        return 130

    monkeypatch.setattr(lessons.train(), "main", main)
    return seen


def test_pictures_have_captions_only_where_the_recipe_reads_them(tmp_path, asked):
    for recipe in ("captions,falling", "paper"):
        with pytest.raises(KeyboardInterrupt) as stop:
            learn(recipe, CONCEPTS["face"], 3, WEIGHTS, tmp_path, DEFAULTS)
        assert stop.value.args == (2,)  # SIGINT's number
    (arguments, with_captions), (_, without) = asked
    assert without.keys() == {f"{i}.png" for i in range(5)} and with_captions.keys() - without.keys() == {
        f"{i}.txt" for i in range(5)
    }
    assert with_captions["1.txt"] == b"a photo of S* on the grass"
    assert arguments[arguments.index("--seed") + 1] == "3" and list(tmp_path.iterdir()) == []
