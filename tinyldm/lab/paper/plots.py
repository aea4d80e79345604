"""The pictures of the page. They need matplotlib, the extra `plot`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill

from tinyldm import InputError
from tinyldm.files import write_atomically
from tinyldm.lab.paper.lessons import PAPER
from tinyldm.lab.paper.table import REFERENCES, RIGHT, Estimate, Table, difference, learned_recipes, mean, measures_of

MARKERS = "osD^vP*"
AXES = ("editability", "reconstruction")  # of the scatter plot
FAR = 0.1  # what differs by more from the paper's own way would make all others one point
NAMES = {"reconstruction": "reconstruction", "editability": "editability", RIGHT: "what is checked is right"}


def new_figure(width: float, height: float):
    """A figure of so many inches. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # only these pictures need it
    except ImportError:
        raise InputError('matplotlib is not installed, which draws the plots; type pip install -e ".[plot]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, file: Path) -> None:
    with write_atomically(file) as temporary:
        figure.savefig(temporary, dpi=110)


def look(number: int) -> dict[str, object]:
    """How one of many recipes is drawn, whichever plot it is in."""
    return {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)], "markersize": 6}


def in_lines(recipe: str) -> str:
    """The name of a recipe as a plot has room for it, which may have options of its own."""
    return fill(recipe, 44, break_on_hyphens=False)


def scatter(table: Table, file: Path) -> None:
    """Reconstruction against editability, as the paper's figure 10: with the references; then each recipe less `paper`,
    whose intervals are narrower, since what is hard about a concept is so for both."""
    figure = new_figure(11, 5)
    everything, *others = figure.subplots(1, 2 if PAPER in table else 1, squeeze=False)[0]
    recipes = [recipe for recipe in learned_recipes(table) if mean(table, recipe, AXES[0])]  # not of styles alone
    for number, recipe in enumerate(recipes):
        cross(everything, *(mean(table, recipe, measure) for measure in AXES), **look(number), label=in_lines(recipe))
    most = max((mean(table, recipe, AXES[0]).count for recipe in recipes), default=0)
    for recipe in REFERENCES:
        if mean(table, recipe, AXES[0]):
            x, y = (mean(table, recipe, measure) for measure in AXES)
            cross(everything, x, y, color="black", marker="D", markersize=8)
            some = f" (of {x.count})" * (x.count < most)  # concepts
            place = {"xytext": (-8, 6), "ha": "right"} if x.mean > 0.3 else {"xytext": (8, 6)}  # towards the middle
            everything.annotate(recipe + some, (x.mean, y.mean), **place, textcoords="offset points", fontsize=8)
    everything.set_title("with the references", fontsize=10)
    for axes in others:
        gaps = {recipe: [difference(table, recipe, PAPER, measure) for measure in AXES] for recipe in recipes}
        gaps = {recipe: found for recipe, found in gaps.items() if None not in found}  # no concept in common
        far = [recipe for recipe, found in gaps.items() if max(abs(gap.mean) for gap in found) > FAR]
        for number, recipe in enumerate(recipes):
            if recipe in gaps and recipe not in far:
                cross(axes, *gaps[recipe], **look(number))
        text = f"less {PAPER}, concept by concept"
        axes.set_title(f"{text}\n(too far away: {', '.join(far)})" if far else text, fontsize=10)
    for axes in (everything, *others):
        axes.set(xlabel="editability: nearness to prompts", ylabel="reconstruction: nearness to the pictures")
        axes.margins(0.2)  # the references have their names beside them
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=6)
    figure.legend(*everything.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    save_figure(figure, file)


def cross(axes, x: Estimate, y: Estimate, **style: object) -> None:
    """A point with the intervals of both its numbers."""
    errors = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
    axes.errorbar(x.mean, y.mean, **errors, **style, elinewidth=0.5)


def norms(table: Table, file: Path) -> None:
    """How long the vectors of each recipe are, in lengths of known words."""
    recipes = learned_recipes(table)[::-1]
    figure = new_figure(7, 0.8 + 0.3 * len(recipes))
    axes = figure.subplots()
    for row, recipe in enumerate(recipes):
        length = mean(table, recipe, "norm")
        errors = [[length.mean - length.low], [length.high - length.mean]]
        axes.errorbar(length.mean, row, xerr=errors, fmt="o", color="C0", elinewidth=1)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set(yticks=range(len(recipes)), xlabel="norm of the vectors, 1 is the median of known words", xscale="log")
    axes.set_yticklabels([*map(in_lines, recipes)], fontsize=8)
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}")  # matplotlib would write 10 to the power of 0
    axes.grid(alpha=0.3)
    save_figure(figure, file)


def curves(points: dict[str, list[dict[str, float]]], file: Path) -> None:
    """points: of each recipe, as `points_of` gives them."""
    figure = new_figure(11, 7)
    for row, measure in zip(figure.subplots(2, 2, sharey="row"), (RIGHT, "reconstruction"), strict=True):
        for axes, x in zip(row, ("steps", "seconds"), strict=True):
            for number, (recipe, means) in enumerate(points.items()):
                xs, ys = ([point[name] for point in means] for name in (x, measure))
                axes.plot(xs, ys, **look(number) | {"markersize": 4}, linewidth=1, label=in_lines(recipe))
            axes.set(xlabel="steps" if x == "steps" else "seconds of one core", ylabel=NAMES[measure])
            axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, file)


def points_of(curves: Iterable[dict], cells: Sequence[dict]) -> dict[str, list[dict[str, float]]]:
    """recipe -> its points, each the mean over the concepts. The seconds are those of the cell that learned the word.

    curves, cells: lines of both kinds.
    """
    times = {
        (line["recipe"], line["concept"]): dict(line["times"])
        for line in cells
        if line["seed"] == 0 and "times" in line
    }
    of_recipe: dict[str, list[list[dict[str, float]]]] = {}
    for line in curves:
        seconds = times.get((line["recipe"], line["concept"]), {})
        points = [measures_of(point) | {"seconds": seconds.get(point["steps"])} for point in line["points"]]
        if all(point["seconds"] is not None for point in points):
            of_recipe.setdefault(line["recipe"], []).append(points)
    names = ("steps", "seconds", RIGHT, "reconstruction")
    return {
        # Of one recipe all concepts have as many points, unless it stops some early: then only the first ones count.
        recipe: [
            {name: fmean(point[name] for point in same) for name in names} for same in zip(*concepts, strict=False)
        ]
        for recipe, concepts in of_recipe.items()
    }
