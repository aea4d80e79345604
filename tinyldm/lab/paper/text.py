"""Paragraphs, tables and numbers as Markdown has them."""

import textwrap
from collections.abc import Iterable, Sequence

from tinyldm.lab.paper.table import RIGHT, Estimate


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(filter(None, sentences)), 120, break_long_words=False, break_on_hyphens=False)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def listed(recipes: Iterable[str]) -> str:
    return ", ".join(f"`{recipe}`" for recipe in recipes)


def as_cosine(value: Estimate | None) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})" if value else ""


def as_share(value: Estimate | None) -> str:
    return f"{value.mean:.1%} ({value.low:.1%} to {value.high:.1%})" if value else ""


def as_number(value: Estimate | None, digits: int | None = None) -> str:
    """With so many digits after the point, or with one if it is small."""
    digits = digits or (1 if value and value.mean < 10 else 0)
    return f"{value.mean:.{digits}f}" if value else ""


def with_half_width(value: Estimate | None) -> str:
    """In percent; without the half width of the interval, if that says little."""
    if value is None:
        return ""
    half = f" ±{50 * (value.high - value.low):.0f}" if value.is_told else ""
    return f"{100 * value.mean:.0f}{half}"


def with_unit(value: Estimate, measure: str) -> str:
    scale, form, unit = {RIGHT: (100, "+.1f", " points"), "seconds": (1, "+.1f", " s")}.get(measure, (1, "+.3f", ""))
    mean, low, high = (scale * number for number in value[:3])
    return f"{mean:{form}}{unit} ({low:{form}} to {high:{form}})"


def marked(value: Estimate | None, measure: str) -> str:
    text = with_unit(value, measure).replace(" points", "") if value else ""
    return f"**{text}**" if value and value.is_decided else text
