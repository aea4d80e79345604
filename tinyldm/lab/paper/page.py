"""The page, from the cells alone: no number and no verdict in it is written by hand."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tinyldm import cli
from tinyldm.files import write_atomically
from tinyldm.lab.paper.cells import NUM, PLAIN, STEPS, UNTRAINED, Cell, word_file
from tinyldm.lab.paper.claims import (
    CLAIMS,
    EQUAL,
    LEARNED_NOTHING,
    LITTLE,
    NEAR,
    NOT_DECIDED,
    Finding,
    findings,
    verdict,
)
from tinyldm.lab.paper.concepts import CONCEPTS, Concept
from tinyldm.lab.paper.lessons import DEFAULT, PAPER, PROTOCOL, SEEDS, options_of
from tinyldm.lab.paper.plots import NAMES, curves, norms, points_of, scatter
from tinyldm.lab.paper.table import (
    FEW,
    OF_STYLE,
    REFERENCES,
    RIGHT,
    Table,
    complete_recipes,
    difference,
    mean,
    table_of,
    values_of,
)
from tinyldm.lab.paper.table import learned_recipes as learned
from tinyldm.lab.paper.text import (
    as_cosine,
    as_number,
    as_share,
    bullets,
    listed,
    markdown,
    marked,
    paragraph,
    with_half_width,
    with_unit,
)
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
    missing: int = 0  # cells that are still to be measured, of the whole table
    is_look: bool = False  # it was never meant to be whole

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
    parts += [
        against_the_paper(table),
        by_kind(page, table),
        checks(table),
        picture("How long the vectors become", "norms.png"),
    ]
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
        f"**{page.missing} words are still to be learned and scored**; the same command goes on."
        if page.missing
        else "This is a quick look, at one concept of each kind." * page.is_look,
    )
    return "\n\n".join(["# Ways to learn a word, compared", text, picture("", "scatter.png")])


def in_short(table: Table) -> str:
    """Which recipe to use, by a rule, and what is to be said of the default."""
    best, *others = complete = complete_recipes(table)
    equals = [recipe for recipe in others if not difference(table, recipe, best, RIGHT).is_decided]
    quickest = min([best, *equals], key=lambda recipe: mean(table, recipe, "seconds").mean)
    seconds, steps = (mean(table, quickest, what).mean for what in ("seconds", "steps"))
    nothing = mean(table, UNTRAINED, RIGHT)
    text = paragraph(
        f"By what is right, `{best}` comes first of {len(complete)}, which is partly luck:",
        as_share(mean(table, best, RIGHT))
        + (f", where a word that has not learned has {nothing.mean:.1%}." if nothing else "."),
        f"Not shown to be worse, as the interval of the difference holds 0: {listed(equals)}."
        if equals
        else "All others are worse.",
        f"The quickest of these is `{quickest}`: {seconds:.0f} seconds of one core, {steps:.0f} steps.",
    )
    return "\n\n".join(["## In short", text, *filter(None, [advice(table, best)])])


def advice(table: Table, best: str) -> str:
    """What to begin with: train.py without any options, unless the best recipe is shown to be better."""
    if len(table.get(DEFAULT, {})) < len(table[best]):
        return ""
    if best == DEFAULT:
        return "**Begin with `train.py` without any options.**"
    lead, one, other = difference(table, best, DEFAULT, RIGHT), *(values_of(table, r, RIGHT) for r in (best, DEFAULT))
    gains = sorted(((one[concept] - other[concept], concept) for concept in one), reverse=True)[:2]
    begin = "**Begin with `train.py` without any options**"
    return paragraph(
        f"`{best}` leads `{DEFAULT}`, `train.py` without any options, by {with_unit(lead, RIGHT)}, most of it at",
        " and ".join(f"the {concept} ({100 * gain:+.1f})" for gain, concept in gains) + ".",
        {
            "agrees": f"So they are equal. {begin}.",
            "does not agree": f"So it is better. **Begin with `train.py {' '.join(options_of(best))}`.**",
            NOT_DECIDED: f"Whether it is better is not decided. {begin}, and try it if a word won't come out.",
        }[verdict(lead, EQUAL)],
    )


def protocol(page: Page) -> str:
    kinds: dict[str, list[str]] = {}
    for concept in page.concepts:
        kinds.setdefault(concept.kind, []).append(concept.name)
    chosen = {
        "reporting": "Steps and rate were chosen by other concepts, `--concepts choosing`. Not all was: `auto-start` "
        "is no part of the default because its word for the red hourglass was worse, and some of the styles that the "
        "world invents for training have seams since words for stained glass had failed.",
        "choosing": "These concepts are there to choose settings by; what is reported comes from others.",
    }
    added = any(" --" in line["recipe"] for line in page.cells)
    learning = paragraph(
        chosen[page.name],
        f"A word is learned from five pictures by `train.py --recipe … {' '.join(PROTOCOL)}`, with {seeds_of(page)}.",
        "Options in a recipe's name, which `--only` was given, take the place of these." if added else "",
        f"`{DEFAULT}` is `train.py` without any options:",
        "{}, and {}.".format(*map(in_words, page.defaults, ("an object", "a style"))),
        "`captions` is told the truth about each picture, its background or its noun; all others have the templates.",
        f"Pictures of the word, {NUM} a prompt in {STEPS} steps of DDIM (in the paper 64 and 50), are scored as",
        "`python -m tinyldm.lab.measure.score` does:",
    )
    scores = [
        "reconstruction: how near those of the word alone come to the training pictures, in the tiny CLIP's eyes;",
        "editability: how near those of a prompt come to the prompt without the word, the mean over twelve prompts; of "
        "a style, which has another scale, over four, and told by itself;",
        f"{RIGHT}: how much of what is checked, colours and outlines on the pixels, the rest by a judge that errs too; "
        "half of it is the likeness, half are the edits. Of an outline the overlap counts: all of it is out of reach.",
    ]
    intervals = paragraph(
        f"Every concept counts once; fewer than {FEW} decide nothing.",
        "Intervals are of the mean over concepts, 95%, by the bootstrap, its ends moved out",
        "as Student's t asks for few; of a difference, of the mean over pairs. Where there is no difference, one",
        "interval in twenty still leaves out 0 by chance, and here are many.",
    )
    kinds_list = bullets(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return "\n\n".join(["## What was done", kinds_list, learning, bullets(scores), intervals])


def seeds_of(page: Page) -> str:
    """How many a word was learned with."""
    counts = Counter((line["recipe"], line["concept"]) for line in page.cells if line["recipe"] not in REFERENCES)
    least, most = min(counts.values()), max(counts.values())
    return f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds a concept"


def in_words(usual: Learning, subject: str) -> str:
    return f"{subject} in {usual.steps} steps of `{usual.recipe}`"


def found(table: Table) -> str:
    rule = paragraph(
        'A verdict is "agrees" where the whole interval lies on the side that was expected, "does not agree" where it',
        f'lies on the other, else "not decided". Equal means nearer than {NEAR}, of shares {100 * NEAR:.0f} points.',
        f"Of a recipe that gains less than {100 * LITTLE:.0f} points over a word that has not learned:",
        f"{LEARNED_NOTHING}.",
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
        beside_plain_words(table),
    )
    head = ["recipe", *MEASURES, "norm", "steps", "seconds"]
    return "\n\n".join(["## The table", text, markdown(head, rows)])


def beside_plain_words(table: Table) -> str:
    """The paper's own way on the same concepts, which are easier than most."""
    same = {PAPER: {concept: row for concept, row in table.get(PAPER, {}).items() if concept in table.get(PLAIN, {})}}
    if not same[PAPER]:
        return ""
    right, *cosines = (mean(same, PAPER, measure) for measure in MEASURES)
    return f"On those concepts `{PAPER}` has {as_share(right)}, {as_cosine(cosines[0])} and {as_cosine(cosines[1])}."


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


def by_kind(page: Page, table: Table) -> str:
    """What is right of each kind of concept."""
    kinds: dict[str, set[str]] = {}
    for concept in page.concepts:
        kinds.setdefault(concept.kind, set()).add(concept.name)
    if len(kinds) < 2:
        return ""
    rows = []
    for recipe in [recipe for recipe in recipes_and_references(table) if mean(table, recipe, RIGHT)]:
        of_kinds = ({c: row for c, row in table[recipe].items() if c in names} for names in kinds.values())
        shares = [with_half_width(mean({recipe: some}, recipe, RIGHT)) for some in of_kinds]
        rows.append([named(recipe, table), *shares, as_number(mean(table, recipe, OF_STYLE), 3)])
    text = paragraph(
        "In percent of what is checked; in brackets how many concepts there are of a kind, of fewer than five without",
        "an interval: so few decide nothing. Last the editability of a style, a cosine.",
    )
    head = ["recipe", *(f"{kind} ({len(names)})" for kind, names in kinds.items()), OF_STYLE]
    return "\n\n".join(["## What is right, by kind", text, markdown(head, rows)])


def checks(table: Table) -> str:
    recipes = [recipe for recipe in recipes_and_references(table) if mean(table, recipe, RIGHT)]
    columns = [check for check in CHECKS if any(mean(table, recipe, f"{RIGHT}, {check}") for recipe in recipes)]
    found = {recipe: [mean(table, recipe, f"{RIGHT}, {check}") for check in columns] for recipe in recipes}
    rows = [[named(recipe, table), *map(with_half_width, of_recipe)] for recipe, of_recipe in found.items()]
    counts = [max(estimate.count for estimate in column if estimate) for column in zip(*found.values(), strict=True)]
    text = paragraph(
        "In percent, with half of the interval's width, and in brackets the concepts that are asked; of fewer than",
        "five no interval is told. Likeness and edits are the means of what comes after each.",
        "Outline: what the true one and the picture's have in common, of all that they cover.",
        r'Sketch, two, new colour: of "a sketch of S\*", "two S\*s" and "a blue S\*".',
        "Its style, noun in it: of a word for a style.",
    )
    head = [f"{CHECKS[check]} ({count})" for check, count in zip(columns, counts, strict=True)]
    return "\n\n".join(["## What their pictures show", text, markdown(["recipe", *head], rows)])


def again(page: Page, table: Table, out: Path) -> str:
    word = word_file(out, Cell(complete_recipes(table)[0], page.concepts[0].name)).as_posix()
    commands = [
        "python -m tinyldm.lab.paper",
        "python -m tinyldm.lab.paper --quick --out outputs/paper",
        f'python -m tinyldm.lab.paper --only {PAPER} "falling,low-variance --steps 60"',
        cli.command("python", "sample.py", "--prompt", "a photo of S* on the grass", "--embedding", word),
    ]
    text = paragraph(
        "Only what has changed is measured again: a recipe's code or settings, the loss, a concept's pictures and",
        "questions, the weights. Other code, as a sampler's, is not looked at: delete `cells.jsonl` when it changes.",
        f"The third command learns {SEEDS * len(page.concepts)} words, each in half a minute on two cores, and adds a",
        "recipe of your own to the table; the last draws with a word that was learned for it.",
    )
    return "\n\n".join(["## Again, and more", "\n".join(f"    {command}" for command in commands), text])


# ---- Some of their text


def picture(title: str, file: str, text: str = "") -> str:
    said = {
        "scatter.png": "Reconstruction against editability of every recipe, with 95% intervals.",
        "norms.png": "The norm of the vectors of every recipe.",
        "curves.png": "What is right, and reconstruction, against steps and seconds.",
        "strips.png": "Pictures of every recipe's words, a strip each.",
    }[file]
    return "\n\n".join(filter(None, [title and f"## {title}", text, f"![{said}]({file})"]))


def recipes_and_references(table: Table) -> list[str]:
    return [*learned(table), *(recipe for recipe in REFERENCES if recipe in table)]


def named(recipe: str, table: Table) -> str:
    """With the number of its concepts, if others have more."""
    if recipe in REFERENCES:
        return recipe
    most = max(map(len, table.values()))
    return f"`{recipe}`" if len(table[recipe]) == most else f"`{recipe}` ({len(table[recipe])} of {most} concepts)"
