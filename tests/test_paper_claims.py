"""What was found elsewhere, and whether it is found here."""

import pytest
from test_paper_table import line

from tinyldm.lab.paper.claims import CLAIMS, EQUAL, HIGHER, LOWER, Claim, Expected, findings, verdict
from tinyldm.lab.paper.lessons import COMPARED
from tinyldm.lab.paper.table import REFERENCES, RIGHT, Estimate, table_of

AGREES, DIFFERS, OPEN = "agrees", "does not agree", "not decided"


@pytest.mark.parametrize(
    "interval, higher, lower, equal",
    [
        ((0.03, 0.05), AGREES, DIFFERS, DIFFERS),
        ((0.001, 0.015), AGREES, DIFFERS, AGREES),
        ((0.001, 0.05), AGREES, DIFFERS, OPEN),
        ((-0.01, 0.01), OPEN, OPEN, AGREES),
        ((-0.1, 0.1), OPEN, OPEN, OPEN),
        ((-0.015, -0.001), DIFFERS, AGREES, AGREES),
        ((-0.05, -0.03), DIFFERS, AGREES, DIFFERS),
        ((0.0, 0.0), OPEN, OPEN, AGREES),
    ],
)
def test_a_verdict_takes_the_whole_interval(interval, higher, lower, equal):
    found = Estimate(sum(interval) / 2, *interval, count=5)
    assert [verdict(found, how) for how in (HIGHER, LOWER, EQUAL)] == [higher, lower, equal]


def test_claims_are_of_what_is_measured():
    for claim in CLAIMS:
        for expected in claim.expected:
            assert {expected.recipe, expected.than} <= {*COMPARED, *REFERENCES}
            assert expected.measure in ("reconstruction", "editability", "right", "seconds")


def test_a_claim_is_judged_by_the_recipes_that_are_there():
    gains = (0.1, 0.2, 0.3, 0.1, 0.3)
    table = table_of(
        [line("paper", concept, 0.5) for concept in "abcde"]
        + [line("2-word", concept, 0.5 + gain) for concept, gain in zip("abcde", gains, strict=True)]
    )
    several = next(claim for claim in CLAIMS if "Several vectors" in claim.text)
    found = findings(table, several)
    assert [(one.expected.recipe, one.expected.measure, one.verdict) for one in found] == [
        ("2-word", "editability", AGREES),
        ("2-word", "reconstruction", AGREES),
    ]
    assert found[1].difference.mean == pytest.approx(0.2)


def test_of_a_recipe_that_learned_next_to_nothing_no_verdict_is_told():
    claim = Claim("", "", [Expected("low-rate", "editability", HIGHER), Expected("falling", "editability", HIGHER)])
    table = {
        recipe: {concept: {RIGHT: right, "editability": 0.5 + right / 10} for concept in "abcde"}
        for recipe, right in (("untrained", 0.55), ("low-rate", 0.58), ("falling", 0.9), ("paper", 0.4))
    }
    assert [finding.verdict for finding in findings(table, claim)] == ["it learned too little to tell", "agrees"]


def test_few_concepts_decide_nothing():
    claim = Claim("", "", [Expected("falling", RIGHT, HIGHER)])
    table = {"paper": {"a": {RIGHT: 0.5}}, "falling": {"a": {RIGHT: 0.9}}}
    assert [finding.verdict for finding in findings(table, claim)] == ["not decided"]
    table = {recipe: rows | dict.fromkeys("bcd", rows["a"]) for recipe, rows in table.items()}
    assert [finding.verdict for finding in findings(table, claim)] == ["not decided"]
    table = {recipe: rows | {"e": rows["a"]} for recipe, rows in table.items()}
    assert [finding.verdict for finding in findings(table, claim)] == ["agrees"]
