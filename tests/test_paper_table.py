"""Means, paired differences and their intervals, on known numbers."""

import pytest

from tinyldm.lab.measure.words import interval
from tinyldm.lab.paper.table import complete_recipes, difference, estimate, learned_recipes, mean, measures_of, table_of


def line(recipe, concept, value, seed=0, **more):
    """Whose pictures are right as far as `value` in likeness, and all in edits."""
    return {
        "recipe": recipe,
        "concept": concept,
        "seed": seed,
        "curve": False,
        "reconstruction": value,
        "editability": 1 - value,
        "mean_of_cosines": 0.5,
        "kinds": {"style": 0.25},
        "truth": {"colours": value, "count": 1.0},
        **more,
    }


def test_likeness_and_edits_count_the_same_however_much_is_checked_of_each():
    truth = {"colours": 0.2, "shape": 0.6, "background": 1.0, "style": 1.0, "count": 1.0, "new colour": 1.0}
    measures = measures_of(line("paper", "a", 0.5, truth=truth))
    assert (measures["right, likeness"], measures["right, edits"]) == (pytest.approx(0.4), 1.0)
    assert measures["right"] == pytest.approx(0.7) and measures["right, shape"] == 0.6
    style = measures_of(line("paper", "a", 0.5, truth={"its own style": 0.25, "the noun's shape": 0.75}))
    assert (style["right, likeness"], style["right, edits"]) == (0.25, 0.75)


def test_each_concept_counts_once_whatever_its_number_of_seeds():
    table = table_of([line("paper", "a", 0.9, seed) for seed in range(3)] + [line("paper", "b", 0.1)])
    assert mean(table, "paper", "reconstruction").mean == pytest.approx(0.5)
    assert mean(table, "paper", "editability, style").mean == 0.25


def test_a_difference_is_that_of_pairs_and_may_be_sure_where_the_means_are_not():
    """Concepts differ by much more than the two recipes do."""
    values = {"a": 0.1, "b": 0.5, "c": 0.9, "d": 0.3, "e": 0.5}
    table = table_of(
        [line("paper", concept, value) for concept, value in values.items()]
        + [
            line("falling", concept, value + gain)
            for (concept, value), gain in zip(values.items(), (0.02, 0.03, 0.04, 0.03, 0.03), strict=True)
        ]
        + [line("falling", "alone", 0.0)]
    )
    gap = difference(table, "falling", "paper", "reconstruction")
    assert gap.mean == pytest.approx(0.03)
    assert (
        gap.low == pytest.approx(interval([0.02, 0.03, 0.04, 0.03, 0.03])[0])
        and 0.0199 < gap.low < gap.mean < gap.high < 0.0401
    )
    assert gap.is_decided
    paper = mean(table, "paper", "reconstruction")
    assert paper.low < 0.3 and paper.high > 0.6
    back = difference(table, "paper", "falling", "reconstruction")
    assert back.mean == pytest.approx(-0.03) and back.is_decided


def test_it_is_not_decided_if_the_interval_holds_0():
    assert not estimate([-0.1, 0.1, 0.05, -0.02, 0.03]).is_decided
    assert not estimate([0.0] * 5).is_decided
    assert estimate([-0.1, -0.2, -0.1, -0.2, -0.1]).is_decided
    assert not estimate([-0.1, -0.2, -0.1, -0.2]).is_decided  # so few decide nothing


def test_what_no_concept_has_is_none():
    table = table_of([line("paper", "a", 0.5), line("falling", "b", 0.5)])
    assert mean(table, "paper", "right, outline") is None and mean(table, "pairs", "right") is None
    assert difference(table, "paper", "falling", "right") is None


def test_references_have_rows_and_are_no_recipes():
    references = {
        "image only": {"reconstruction": 0.9, "editability": 0.1},
        "prompt only": {"reconstruction": 0.2, "editability": 0.8},
    }
    table = table_of(
        [
            line("untrained", "a", 0.1, references=references),
            line("plain words", "a", 0.9, references=references),
            line("paper", "a", 0.5),
            line("falling", "a", 0.6),
        ]
    )
    assert mean(table, "image only", "reconstruction").mean == 0.9 and len(table["image only"]) == 1
    assert learned_recipes(table) == ["falling", "paper"]


def test_only_those_with_all_concepts_are_compared_by_their_means():
    """The third is best on the easier of the two."""
    lines = [
        line("paper", "hard", 0.1),
        line("paper", "easy", 0.8),
        line("pairs", "hard", 0.2),
        line("pairs", "easy", 0.8),
    ]
    table = table_of([*lines, line("falling", "easy", 0.9)])
    assert learned_recipes(table)[0] == "falling"
    assert complete_recipes(table) == ["pairs", "paper"]
