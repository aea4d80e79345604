"""From cells to figures with intervals: each concept counts once, whatever its number of seeds."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from tinyldm.lab.measure.words import interval
from tinyldm.lab.paper.cells import PLAIN, UNTRAINED
from tinyldm.lab.paper.concepts import CONCEPTS

IMAGE_ONLY, PROMPT_ONLY = "image only", "prompt only"
OF_STYLE = "editability of a style"  # on a scale of its own: what looks like the style looks less like the prompt
FEW = 5  # concepts
REFERENCES = (IMAGE_ONLY, PROMPT_ONLY, PLAIN, UNTRAINED)
RIGHT = "right"  # how much of what is checked: the mean of both halves below
LIKENESS, EDITS = f"{RIGHT}, likeness", f"{RIGHT}, edits"
OF_LIKENESS = ("colours", "shape", "outline", "pattern", "its own style")  # checks; all others are of edits

Table = dict[str, dict[str, dict[str, float]]]  # recipe -> concept -> measure -> its mean over the seeds


class Estimate(NamedTuple):
    """A mean over concepts, its 95% interval (words.interval), and how many concepts there are."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def is_told(self) -> bool:
        """Whether the interval says something: of few concepts it ends at the least and the most, and is too narrow."""
        return self.count >= FEW

    @property
    def is_decided(self) -> bool:
        """Whether it is surely above or below 0."""
        return self.is_told and (self.low > 0 or self.high < 0)


def table_of(lines: Iterable[dict]) -> Table:
    """Of the lines of cells that are no curves. What needs no word has rows of its own."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for line in lines:
        found = {line["recipe"]: measures_of(line)}
        found |= line.get("references", {}) if line["recipe"] == UNTRAINED else {}
        for name, figures in found.items():
            if (concept := CONCEPTS.get(line["concept"])) and concept.subject == "style":
                others = {measure: value for measure, value in figures.items() if measure != "editability"}
                figures = others | {OF_STYLE: figures["editability"]}
            rows.setdefault((name, line["concept"]), []).append(figures)
    table: Table = {}
    for (recipe, concept), of_seeds in rows.items():
        means = {measure: fmean(row[measure] for row in of_seeds) for measure in of_seeds[0]}
        table.setdefault(recipe, {})[concept] = means
    return table


def measures_of(line: dict) -> dict[str, float]:
    """All numbers of a cell or of a curve's point by their names."""
    names = ("reconstruction", "editability", "mean_of_cosines", "norm", "steps", "seconds")
    truth = line["truth"]
    likeness = fmean(share for check, share in truth.items() if check in OF_LIKENESS)
    edits = fmean(share for check, share in truth.items() if check not in OF_LIKENESS)
    return (
        {name: line[name] for name in names if name in line}
        | {f"editability, {kind}": value for kind, value in line["kinds"].items()}
        | {f"{RIGHT}, {check}": value for check, value in truth.items()}
        | {LIKENESS: likeness, EDITS: edits, RIGHT: (likeness + edits) / 2}
    )


def learned_recipes(table: Table) -> list[str]:
    """Those that are no references, the best first: of whose pictures most is right."""
    recipes = [recipe for recipe in table if recipe not in REFERENCES]
    return sorted(recipes, key=lambda recipe: -fmean(measures[RIGHT] for measures in table[recipe].values()))


def complete_recipes(table: Table) -> list[str]:
    """Those of them with the most concepts, which alone can be compared by their means."""
    most = max(len(table[recipe]) for recipe in learned_recipes(table))
    return [recipe for recipe in learned_recipes(table) if len(table[recipe]) == most]


def values_of(table: Table, recipe: str, measure: str) -> dict[str, float]:
    """concept -> its measure, of those that have it."""
    return {concept: row[measure] for concept, row in table.get(recipe, {}).items() if measure in row}


def estimate(values: Sequence[float]) -> Estimate | None:
    """None of no values."""
    return Estimate(fmean(values), *interval(values), len(values)) if values else None


def mean(table: Table, recipe: str, measure: str) -> Estimate | None:
    return estimate([*values_of(table, recipe, measure).values()])


def differences(table: Table, recipe: str, than: str, measure: str) -> list[float]:
    """Of the two recipes, one for each concept that both have."""
    one, other = values_of(table, recipe, measure), values_of(table, than, measure)
    return [one[concept] - other[concept] for concept in one if concept in other]


def difference(table: Table, recipe: str, than: str, measure: str) -> Estimate | None:
    """Their mean; None if they have no concept in common."""
    return estimate(differences(table, recipe, than, measure))
