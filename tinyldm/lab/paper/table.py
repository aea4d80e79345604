"""From cells to figures with intervals: each concept counts once, whatever its number of seeds."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from tinyldm.lab.measure.words import interval
from tinyldm.lab.paper.cells import PLAIN, UNTRAINED

IMAGE_ONLY, PROMPT_ONLY = "image only", "prompt only"
REFERENCES = (IMAGE_ONLY, PROMPT_ONLY, PLAIN, UNTRAINED)
RIGHT = "right"  # the mean of all shares that are checked

Table = dict[str, dict[str, dict[str, float]]]  # way -> concept -> measure -> its mean over the seeds


class Estimate(NamedTuple):
    """A mean over concepts, and within which 95% of such means lie (words.interval)."""

    mean: float
    low: float
    high: float

    @property
    def is_decided(self) -> bool:
        """Whether it is surely above or below 0."""
        return self.low > 0 or self.high < 0


def table_of(lines: Iterable[dict]) -> Table:
    """Of the lines of cells that are no curves. What needs no word has rows of its own."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for line in lines:
        rows.setdefault((line["way"], line["concept"]), []).append(measures_of(line))
        for name, figures in line.get("references", {}).items():
            if line["way"] == UNTRAINED:
                rows.setdefault((name, line["concept"]), []).append(figures)
    table: Table = {}
    for (way, concept), of_seeds in rows.items():
        means = {measure: fmean(row[measure] for row in of_seeds) for measure in of_seeds[0]}
        table.setdefault(way, {})[concept] = means
    return table


def measures_of(line: dict) -> dict[str, float]:
    """All numbers of a cell or of a curve's point by their names."""
    names = ("reconstruction", "editability", "mean_of_cosines", "norm", "steps", "seconds")
    return (
        {name: line[name] for name in names if name in line}
        | {f"editability, {kind}": value for kind, value in line["kinds"].items()}
        | {f"right, {check}": value for check, value in line["truth"].items()}
        | {RIGHT: fmean(line["truth"].values())}
    )


def learned_ways(table: Table) -> list[str]:
    """Those that are no references, the best first: where most of what is checked is right."""
    ways = [way for way in table if way not in REFERENCES]
    return sorted(ways, key=lambda way: -fmean(measures[RIGHT] for measures in table[way].values()))


def values_of(table: Table, way: str, measure: str) -> dict[str, float]:
    """concept -> its measure, of those that have it."""
    return {concept: row[measure] for concept, row in table.get(way, {}).items() if measure in row}


def estimate(values: Sequence[float]) -> Estimate | None:
    """None of no values."""
    return Estimate(fmean(values), *interval(values)) if values else None


def mean(table: Table, way: str, measure: str) -> Estimate | None:
    return estimate([*values_of(table, way, measure).values()])


def difference(table: Table, way: str, than: str, measure: str) -> Estimate | None:
    """Of the two ways on the same concepts, pair by pair; None if they have none in common."""
    one, other = values_of(table, way, measure), values_of(table, than, measure)
    return estimate([one[concept] - other[concept] for concept in one if concept in other])
