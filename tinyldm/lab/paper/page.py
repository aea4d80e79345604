"""The page, from the cells alone: no number and no verdict in it is written by hand."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyldm import cli
from tinyldm.files import write_atomically
from tinyldm.lab.paper.cells import NUM, PLAIN, STEPS, Cell, word_file
from tinyldm.lab.paper.claims import CLAIMS, NEAR, Finding, findings
from tinyldm.lab.paper.concepts import CONCEPTS, Concept
from tinyldm.lab.paper.lessons import DEFAULT, PAPER, PROTOCOL
from tinyldm.lab.paper.plots import NAMES, curves, norms, points_of, scatter
from tinyldm.lab.paper.table import REFERENCES, RIGHT, Estimate, Table, complete_recipes, difference, mean, table_of
from tinyldm.lab.paper.table import learned_recipes as learned
from tinyldm.latent_diffusion import Learning

MEASURES = (RIGHT, "reconstruction", "editability")
CHECKS = {  # as table.py calls them -> as the page does
    "likeness": "likeness",
    "colours": "colours",
    "shape": "shape",
    "outline": "outline",
    "pattern": "pattern",
    "its own style": "its style",
    "edits": "edits",
    "background": "background",
    "style": "sketch",
    "count": "two",
    "new colour": "new colour",
    "the noun's shape": "noun in it",
}


class Page(NamedTuple):
    """What there is to write of."""

    cells: list[dict]  # lines that are no curves
    curves: list[dict]  # and those that are
    defaults: tuple[Learning, Learning]  # train.py's, for an object and for a style
    name: str  # of the set of concepts
    missing: int = 0  # cells that are still to be measured

    @property
    def concepts(self) -> list[Concept]:
        there = {line["concept"] for line in self.cells}
        return [concept for name, concept in CONCEPTS.items() if name in there]


def write_page(page: Page, out: Path) -> None:
    """README.md and its plots."""
    table = table_of(page.cells)
    scatter(table, out / "scatter.png")
    norms(table, out / "norms.png")
    parts = [headline(page, table), in_short(table), protocol(page), found(table), everything(table)]
    parts += [against_the_paper(table), checks(table), picture("How long the vectors become", "norms.png")]
    if page.curves:
        points = points_of(page.curves, page.cells)
        curves({recipe: points[recipe] for recipe in learned(table) if recipe in points}, out / "curves.png")
        text = "The best recipes, by the vectors that were saved while they learned, with few pictures of each."
        parts.append(picture("While they learn", "curves.png", text))
    if (out / "strips.png").exists():
        parts.append(picture("What they look like", "strips.png", "The words of seed 0, the same noise in every row."))
    parts.append(again(page, table, out))
    with write_atomically(out / "README.md") as temporary:
        temporary.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


# ---- Its parts


def headline(page: Page, table: Table) -> str:
    text = paragraph(
        "Section 5 of the paper ([Gal et al. 2022](https://arxiv.org/abs/2208.01618)) with the tiny checkpoint:",
        f"{len(learned(table))} recipes, {len(page.concepts)} concepts that the checkpoint never saw.",
        "`python -m tinyldm.lab.paper` writes this page, every number and every verdict from `cells.jsonl`.",
        f"**{page.missing} words are still to be learned and scored**; the same command goes on." * bool(page.missing),
    )
    return "\n\n".join(["# Ways to learn a word, compared", text, picture("", "scatter.png")])


def in_short(table: Table) -> str:
    """Which recipe to use, by a rule, and what is to be said of the default."""
    best, *others = complete = complete_recipes(table)
    equals = [recipe for recipe in others if not difference(table, recipe, best, RIGHT).is_decided]
    quickest = min([best, *equals], key=lambda recipe: mean(table, recipe, "seconds").mean)
    seconds, steps = (mean(table, quickest, what).mean for what in ("seconds", "steps"))
    lead = difference(table, best, DEFAULT, RIGHT)
    text = paragraph(
        f"Most of what is asked of a word is right with `{best}`: {as_share(mean(table, best, RIGHT))} of all checks.",
        f"Not shown to be worse, as the interval of the difference holds 0: {listed(equals)}."
        if equals
        else "No other is as good.",
        f"The quickest of these is `{quickest}`: {seconds:.0f} seconds of one core, {steps:.0f} steps.",
        f"`{best}` leads `{DEFAULT}`, `train.py` without any options, by {with_unit(lead, RIGHT)}: "
        + ("another recipe is better." if lead.is_decided else "no option is needed.")
        if DEFAULT in complete and best != DEFAULT
        else "",
    )
    return f"## In short\n\n{text}"


def protocol(page: Page) -> str:
    kinds: dict[str, list[str]] = {}
    for concept in page.concepts:
        kinds.setdefault(concept.kind, []).append(concept.name)
    chosen = {
        "reporting": "Settings are never chosen by these concepts; there are others for that: `--concepts choosing`.",
        "choosing": "These concepts are there to choose settings by; what is reported comes from others.",
    }
    seeds = len({line["seed"] for line in page.cells})
    learning = paragraph(
        chosen[page.name],
        f"A word is learned from five pictures by `train.py --recipe … {' '.join(PROTOCOL)}`,",
        f"with {seeds} seed{'s' * (seeds > 1)}.",
        f"`{DEFAULT}` is `train.py` without any options:",
        "{}, and {}.".format(*map(in_words, page.defaults, ("an object", "a style"))),
        "`captions` is told the truth about each picture, its background or its noun; all others have the templates.",
        f"Pictures of the word, {NUM} a prompt in {STEPS} steps of DDIM (in the paper 64 and 50), are scored as",
        "`python -m tinyldm.lab.measure.score` does:",
    )
    scores = [
        "reconstruction: how near those of the word alone come to the training pictures, in the tiny CLIP's eyes;",
        "editability: how near those of a prompt come to the prompt without the word, the mean over twelve prompts, "
        "of a style four;",
        f"{RIGHT}: how much of what is checked, colours and outlines on the pixels, the rest by a judge; half of it is "
        "the likeness, half are the edits.",
    ]
    intervals = paragraph(
        "Every concept counts once.",
        "Intervals are of the mean over concepts, 95%, by the bootstrap; of a difference, of the mean over pairs.",
        "Where there is no difference, one interval in twenty still leaves out 0 by chance.",
    )
    kinds_list = bullets(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return "\n\n".join(["## What was done", kinds_list, learning, bullets(scores), intervals])


def in_words(usual: Learning, subject: str) -> str:
    return f"{subject} in {usual.steps} steps of `{usual.recipe}`"


def found(table: Table) -> str:
    rule = paragraph(
        'A verdict is "agrees" where the whole interval lies on the side that was expected, "does not agree" where it',
        f'lies on the other, else "not decided". Equal means nearer than {NEAR}, of shares {100 * NEAR:.0f} points.',
    )
    parts = ["## What the paper and others found, and what we find", rule]
    for claim in CLAIMS:
        if rows := findings(table, claim):
            parts += [paragraph(f"**{claim.text}** ({claim.source})."), bullets(map(as_sentence, rows))]
    return "\n\n".join(parts)


def as_sentence(finding: Finding) -> str:
    (recipe, measure, how, than), gap, verdict = finding
    name = NAMES.get(measure, measure)
    return f"`{recipe}` minus `{than}`, {name}, expected {how}: {with_unit(gap, measure)}: **{verdict}**"


def everything(table: Table) -> str:
    rows = []
    for recipe in recipes_and_references(table):
        scores = [
            as_share(mean(table, recipe, RIGHT)),
            *(as_cosine(mean(table, recipe, what)) for what in MEASURES[1:]),
        ]
        others = [as_number(mean(table, recipe, what)) for what in ("norm", "steps", "seconds")]
        rows.append([named(recipe, table), *scores, *others])
    text = paragraph(
        "The best first. Norm is that of the vectors, 1 the median of known words. Seconds are of one core.",
        "The last rows stand in the word's place: the training pictures themselves, no word, plain words for those",
        f"{len(table.get(PLAIN, {}))} concepts that have some, and the word before it learned anything.",
    )
    head = ["recipe", *MEASURES, "norm", "steps", "seconds"]
    return "\n\n".join(["## The table", text, markdown(head, rows)])


def against_the_paper(table: Table) -> str:
    if PAPER not in table:
        return ""
    rows = [
        [named(recipe, table), *(marked(difference(table, recipe, PAPER, measure), measure) for measure in MEASURES)]
        for recipe in learned(table)
        if recipe != PAPER
    ]
    text = f"In percentage points and in cosines; bold where the interval leaves out 0. All minus `{PAPER}`."
    return "\n\n".join(["## Against the paper's own way", text, markdown(["recipe", *MEASURES], rows)])


def checks(table: Table) -> str:
    recipes = [recipe for recipe in recipes_and_references(table) if mean(table, recipe, RIGHT)]
    columns = [check for check in CHECKS if any(mean(table, recipe, f"{RIGHT}, {check}") for recipe in recipes)]
    found = {recipe: [mean(table, recipe, f"{RIGHT}, {check}") for check in columns] for recipe in recipes}
    rows = [[named(recipe, table), *map(with_half_width, of_recipe)] for recipe, of_recipe in found.items()]
    text = paragraph(
        "In percent, with half of the interval's width. Likeness and edits are the means of what comes after each.",
        "Outline: what the true one and the picture's have in common, of all that they cover.",
        r'Sketch, two, new colour: of "a sketch of S\*", "two S\*s" and "a blue S\*".',
        "Its style, noun in it: of a word for a style.",
    )
    return "\n\n".join(["## What their pictures show", text, markdown(["recipe", *map(CHECKS.get, columns)], rows)])


def again(page: Page, table: Table, out: Path) -> str:
    word = word_file(out, Cell(complete_recipes(table)[0], page.concepts[0].name)).as_posix()
    commands = [
        "python -m tinyldm.lab.paper",
        "python -m tinyldm.lab.paper --quick --out outputs/paper",
        f'python -m tinyldm.lab.paper --only {PAPER} "falling,low-variance --steps 60"',
        cli.command("python", "sample.py", "--prompt", "a photo of S* on the grass", "--embedding", word),
    ]
    text = paragraph(
        "Only what has changed is measured again: a recipe's code or settings, a concept's pictures, the weights. The",
        "third command adds a recipe of your own to the table; the last draws with a word that was learned for it.",
    )
    return "\n\n".join(["## Again, and more", "\n".join(f"    {command}" for command in commands), text])


# ---- Text


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def picture(title: str, file: str, text: str = "") -> str:
    said = {
        "scatter.png": "Reconstruction against editability of every recipe, with 95% intervals.",
        "norms.png": "The norm of the vectors of every recipe.",
        "curves.png": "What is right, and reconstruction, against steps and seconds.",
        "strips.png": "Pictures of every recipe's words, a strip each.",
    }[file]
    return "\n\n".join(filter(None, [title and f"## {title}", text, f"![{said}]({file})"]))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def listed(recipes: Iterable[str]) -> str:
    return ", ".join(f"`{recipe}`" for recipe in recipes)


def recipes_and_references(table: Table) -> list[str]:
    return [*learned(table), *(recipe for recipe in REFERENCES if recipe in table)]


def named(recipe: str, table: Table) -> str:
    """With the number of its concepts, if others have more."""
    if recipe in REFERENCES:
        return recipe
    most = max(map(len, table.values()))
    return f"`{recipe}`" if len(table[recipe]) == most else f"`{recipe}` ({len(table[recipe])} of {most} concepts)"


# ---- Numbers as text


def as_cosine(value: Estimate | None) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})" if value else ""


def as_share(value: Estimate | None) -> str:
    return f"{value.mean:.1%} ({value.low:.1%} to {value.high:.1%})" if value else ""


def as_number(value: Estimate | None) -> str:
    return f"{value.mean:.{1 if value.mean < 10 else 0}f}" if value else ""


def with_half_width(value: Estimate | None) -> str:
    return f"{100 * value.mean:.0f} ±{50 * (value.high - value.low):.0f}" if value else ""


def with_unit(value: Estimate, measure: str) -> str:
    scale, form, unit = {RIGHT: (100, "+.1f", " points"), "seconds": (1, "+.1f", " s")}.get(measure, (1, "+.3f", ""))
    mean, low, high = (scale * number for number in value)
    return f"{mean:{form}}{unit} ({low:{form}} to {high:{form}})"


def marked(value: Estimate | None, measure: str) -> str:
    text = with_unit(value, measure).replace(" points", "") if value else ""
    return f"**{text}**" if value and value.is_decided else text
