"""Section 5 of the paper (arXiv 2208.01618) in the tiny world: ways to learn a word, compared on many concepts.

    python -m tinyldm.lab.paper                                      the whole table: six to ten hours on two cores
    python -m tinyldm.lab.paper --quick --out outputs/paper          a look: about ten minutes
    python -m tinyldm.lab.paper --only paper "falling --steps 60"    these recipes, with options of train.py behind them
    python -m tinyldm.lab.paper --concepts choosing                  eight other concepts, to try settings on
    python -m tinyldm.lab.paper --page                               only write the page again

Writes a page with its pictures, cells.jsonl with a line for each recipe, concept and seed, and words/ with what was
learned. A run that was stopped goes on where it was. Cells whose recipe, loss, concept or weights were changed since
are measured again; of other code, such as a sampler's, that is not noticed: delete cells.jsonl then.
"""

import os
import tempfile
from argparse import Namespace
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from tinyldm import InputError, cli
from tinyldm.files import lock_folder
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.native import save_checkpoint
from tinyldm.lab import TINY
from tinyldm.lab.paper.cells import PLAIN, UNTRAINED, Cell, Place, measured, word_file
from tinyldm.lab.paper.concepts import SETS, Concept
from tinyldm.lab.paper.digest import weights_digest
from tinyldm.lab.paper.kept import CellFile, Digests
from tinyldm.lab.paper.lessons import COMPARED, DEFAULT, PAPER, SEEDS, settings
from tinyldm.lab.paper.page import Page, write_page
from tinyldm.lab.paper.plots import new_figure
from tinyldm.lab.paper.processes import in_processes
from tinyldm.lab.paper.strips import draw_strips, one_of_each_kind
from tinyldm.lab.paper.table import complete_recipes, learned_recipes, table_of
from tinyldm.lab.world.drawing import SIZE

OUT = {"reporting": Path("docs/paper"), "choosing": Path("outputs/paper-choosing")}
QUICK = (PAPER, DEFAULT, "3-word", "high-rate", "auto-start,low-variance,falling")
CURVES, QUICK_CURVES = 6, 2  # of the best recipes, on every second concept


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    new_figure(1, 1)  # without matplotlib it ends now, and not in hours
    model = load_checkpoint(options.weights)
    if model.defaults.size != SIZE:
        found = f"{options.weights} makes pictures of {model.defaults.size} pixels"
        raise InputError(f"{found}, expected {SIZE}, those of the tiny world; leave out --weights")
    for recipe in options.only:
        settings(recipe, "object", model.defaults)  # raises if it is none
    options.out.mkdir(parents=True, exist_ok=True)
    lock_folder(options.out)
    concepts = SETS[options.concepts]
    asked = [
        concept
        for concept in concepts.values()
        if not options.quick or concept in one_of_each_kind([*concepts.values()])
    ]
    file, digests = CellFile(options.out / "cells.jsonl"), Digests(weights_digest(model), model.defaults)

    def valid(curve: bool) -> list[dict]:
        """The lines that hold, of this set of concepts."""
        return [
            file.lines[cell]
            for cell in sorted(file.lines)  # the bootstrap's last digits depend on the order
            if cell.curve == curve and cell.concept in concepts and holds(digests, cell, file.lines[cell])
        ]

    with tempfile.TemporaryDirectory() as scratch:
        place = Place(options.weights, Path(scratch) / "fast", Path(scratch), options.out)
        if not options.page:
            save_checkpoint(place.fast, replace(model, defaults=replace(model.defaults, sampler_steps=1)))
            measure(cells_for(options, asked), file, digests, place, options.processes, "cells")
            best = complete_recipes(table_of(valid(curve=False)))[: QUICK_CURVES if options.quick else CURVES]
            few = [Cell(recipe, concept.name, curve=True) for concept in asked[::2] for recipe in best]
            few = [cell for cell in few if word_file(options.out, cell, "-steps").exists()]
            measure(few, file, digests, place, options.processes, "curves")
            file.tidy()
        lines = valid(curve=False)
        if not any(line["recipe"] not in (UNTRAINED, PLAIN) for line in lines):
            raise InputError(f"{file.path} has no cell of these weights; leave out --page to measure some")
        draw_strips(learned_recipes(table_of(lines)), asked, place, options.out / "strips.png")
    usual = model.defaults.object, model.defaults.style
    whole = Namespace(only=COMPARED, seeds=max(SEEDS, options.seeds))
    wanted = dict.fromkeys([*cells_for(whole, [*concepts.values()]), *cells_for(options, asked)])
    missing = 0 if options.quick else len(open_cells([*wanted], file, digests))
    write_page(Page(lines, valid(curve=True), usual, options.concepts, missing, options.quick), options.out)
    print(f"written: {cli.printable(options.out / 'README.md')}")


def cells_for(options: Namespace, concepts: list[Concept]) -> list[Cell]:
    """The references first, then one seed after the other, in each the kinds in turn: a run that is stopped has
    compared all recipes, on concepts of every kind."""
    concepts = kinds_in_turn(concepts)
    references = [Cell(UNTRAINED, concept.name) for concept in concepts]
    references += [Cell(PLAIN, concept.name) for concept in concepts if concept.plain]
    return references + [
        Cell(recipe, concept.name, seed)
        for seed in range(options.seeds)
        for concept in concepts
        for recipe in options.only
    ]


def kinds_in_turn(concepts: list[Concept]) -> list[Concept]:
    """The first of every kind, then the second, and so on."""
    of_kind: defaultdict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        of_kind[concept.kind].append(concept)
    return [concept for of_all in zip_longest(*of_kind.values()) for concept in of_all if concept]


def measure(cells: list[Cell], file: CellFile, digests: Digests, place: Place, processes: int, what: str) -> None:
    """Those of the cells that are open."""
    todo = open_cells(cells, file, digests)
    for cell, figures in in_processes(partial(measured, place=place), todo, processes, what):
        file.add(cell, digests(cell), figures)


def open_cells(cells: list[Cell], file: CellFile, digests: Digests) -> list[Cell]:
    """Those that the file has not, or whose figures no longer hold."""
    return [cell for cell in cells if cell not in file.lines or not holds(digests, cell, file.lines[cell])]


def holds(digests: Digests, cell: Cell, line: dict) -> bool:
    try:
        return line["digest"] == digests(cell)
    except InputError:  # there is no such recipe any more
        return False


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"one seed, a concept of each kind, and only {len(QUICK)} recipes")
    add(
        "--only",
        nargs="+",
        metavar="RECIPE",
        help=f'of train.py, or "{DEFAULT}"; in quotes with options behind it (default: {len(COMPARED)} recipes)',
    )
    add("--concepts", choices=list(SETS), default="reporting", help="to learn words for (%(default)s)")
    add("--seeds", type=cli.whole_number(1, 1000), metavar="N", help=f"to learn each word with (default: {SEEDS})")
    add(
        "--processes",
        type=cli.whole_number(1, 1000),
        default=os.cpu_count() or 1,
        metavar="N",
        help="at a time, each with one thread (default: as many as there are cores, %(default)s)",
    )
    add("--weights", type=cli.path, default=TINY, metavar="PATH", help="checkpoint (%(default)s)")
    add("--out", type=cli.path, metavar="DIR", help=f"default: {OUT['reporting']}, or {OUT['choosing']}")
    add("--page", action="store_true", help="measure nothing, write the page from what is there")
    options = parser.parse_args(arguments)
    options.only = options.only or list(QUICK if options.quick else COMPARED)
    options.seeds = options.seeds or (1 if options.quick else SEEDS)
    options.out = options.out or OUT[options.concepts]
    return options


if __name__ == "__main__":
    cli.run(main)
