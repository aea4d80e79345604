"""What the paper and others found, each as differences that should be above, below or near 0 here."""

from typing import NamedTuple

from tinyldm.lab.paper.cells import PLAIN, UNTRAINED
from tinyldm.lab.paper.lessons import PAPER
from tinyldm.lab.paper.table import IMAGE_ONLY, RIGHT, Estimate, Table, difference, differences, estimate

HIGHER, LOWER, EQUAL = "higher", "lower", "equal"
NOT_DECIDED = "not decided"
LEARNED_NOTHING = "it learned too little to tell"
NEAR = 0.02  # what is equal differs by less
LITTLE = 0.05  # of what is right: a word that has learned gains more


class Expected(NamedTuple):
    """How a recipe should differ from another."""

    recipe: str
    measure: str
    how: str  # HIGHER, LOWER or EQUAL
    than: str = PAPER


class Claim(NamedTuple):
    text: str
    source: str
    expected: list[Expected]


SECTION_5_3 = "the paper, section 5.3"
CLAIMS = [
    Claim(
        "One vector reconstructs about as well as copies of the training pictures",
        SECTION_5_3,
        [Expected(PAPER, "reconstruction", EQUAL, than=IMAGE_ONLY)],
    ),
    Claim(
        "Several vectors are much harder to edit than one, and show more details where they are far from known words",
        SECTION_5_3,
        [
            Expected(recipe, measure, how)
            for recipe in ("2-word", "3-word", "progressive")
            for measure, how in (("editability", LOWER), ("reconstruction", HIGHER))
        ],
    ),
    Claim(
        "What is kept near known words by regularisation edits better and shows fewer details",
        SECTION_5_3,
        [Expected("regularised", "editability", HIGHER), Expected("regularised", "reconstruction", LOWER)],
    ),
    Claim(
        "The rate moves a word along this curve: a higher one reconstructs better, a lower one edits better",
        SECTION_5_3,
        [
            Expected("high-rate", "reconstruction", HIGHER),
            Expected("high-rate", "editability", LOWER),
            Expected("low-rate", "reconstruction", LOWER),
            Expected("low-rate", "editability", HIGHER),
        ],
    ),
    Claim(
        "A token for each picture takes what only that one shows, so the word is free of it (hoped, no figure is told)",
        "the paper, section 5.2",
        [Expected("per-image", "editability", HIGHER), Expected("per-image", RIGHT, HIGHER)],
    ),
    Claim(
        "A person's caption in the word's place neither captures the likeness nor edits better",
        SECTION_5_3,
        [Expected(PLAIN, "reconstruction", LOWER), Expected(PLAIN, "editability", LOWER)],
    ),
    Claim(
        "A word of the known words' length leaves the rest of the prompt free",
        "Directional Textual Inversion, arXiv 2512.13672",
        [Expected(recipe, "editability", HIGHER) for recipe in ("fixed-norm", "kept-norm", "norm-decay")],
    ),
    Claim(
        "A start from the text encoder's output, and a pull towards it, edit better",
        "Cross Initialization, arXiv 2312.15905",
        [Expected("cross", "editability", HIGHER)],
    ),
    Claim(
        "Stopping when a fixed batch's loss is flat saves time and loses nothing",
        "DVAR, arXiv 2302.04841",
        [
            Expected("early-stop", "seconds", LOWER),
            Expected("early-stop", "reconstruction", EQUAL),
            Expected("early-stop", RIGHT, EQUAL),
        ],
    ),
    Claim(
        "Draws that vary less, a rate that falls and a start that suits the pictures learn more in the same steps",
        "what recipes.py says of them",
        [Expected(recipe, RIGHT, HIGHER) for recipe in ("low-variance", "pairs", "falling", "auto-start")],
    ),
]


class Finding(NamedTuple):
    expected: Expected
    difference: Estimate
    verdict: str


def findings(table: Table, claim: Claim) -> list[Finding]:
    """Of those expectations that the table has figures for."""
    found = []
    for each in claim.expected:
        if pairs := differences(table, each.recipe, each.than, each.measure):
            gap, too_little = estimate(pairs), has_learned_nothing(table, each.recipe)
            found.append(Finding(each, gap, LEARNED_NOTHING if too_little else verdict(gap, each.how)))
    return found


def has_learned_nothing(table: Table, recipe: str) -> bool:
    """Whether its words are hardly better than before they learned; then they say nothing of its way."""
    gained = difference(table, recipe, UNTRAINED, RIGHT)
    return gained is not None and gained.mean < LITTLE


def verdict(found: Estimate, how: str) -> str:
    """Whether the whole interval is where it was expected, or none of it, or neither. Few concepts decide nothing."""
    if not found.is_told:
        return NOT_DECIDED
    if how == EQUAL:
        agrees = max(abs(found.low), abs(found.high)) < NEAR
        differs = found.low > NEAR or found.high < -NEAR
    else:
        agrees, differs = (found.low > 0, found.high < 0) if how == HIGHER else (found.high < 0, found.low > 0)
    return "agrees" if agrees else "does not agree" if differs else NOT_DECIDED
