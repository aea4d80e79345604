"""What is done already: the lines of cells.jsonl, and whether they still hold."""

import contextlib
import json
from functools import cache
from pathlib import Path

from tinyldm.files import write_atomically
from tinyldm.formats.hashes import file_sha256
from tinyldm.lab import TINY
from tinyldm.lab.measure.judge import WEIGHTS as JUDGE
from tinyldm.lab.paper.cells import CURVE, NUM, PLAIN, STEPS, UNTRAINED, Cell
from tinyldm.lab.paper.concepts import CONCEPTS, in_plain_words
from tinyldm.lab.paper.digest import concept_digest, digest_of
from tinyldm.lab.paper.lessons import PAPER, SAVES, settings
from tinyldm.latent_diffusion import Defaults

DIGITS = 5  # after the point: more than a person reads


class Digests:
    """Of cells: another digest, another figure."""

    def __init__(self, weights: str, defaults: Defaults):
        """weights: the digest of the checkpoint's."""
        instruments = [file_sha256(file) for file in (TINY / "clip.safetensors", JUDGE)]
        self.common = [weights, defaults.guidance, NUM, STEPS, SAVES, *instruments]
        self.of_concept = cache(lambda name: concept_digest(CONCEPTS[name]))
        self.of_recipe = cache(lambda recipe, subject: digest_of(settings(recipe, subject, defaults)))

    def __call__(self, cell: Cell) -> str:
        recipe = PAPER if cell.recipe in (UNTRAINED, PLAIN) else cell.recipe
        learned = self.of_recipe(recipe, CONCEPTS[cell.concept].subject)
        more: object = CURVE if cell.curve else None
        if cell.recipe == PLAIN:
            more = [question.prompt for question in in_plain_words(CONCEPTS[cell.concept].pictures[0].things[0])]
        return digest_of(cell, learned, self.of_concept(cell.concept), self.common, more)


class CellFile:
    """cells.jsonl, which grows by a line as each cell is done: a killed run goes on."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[Cell, dict] = {}  # the last one of each cell
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # it was cut off when the run was killed
                line = json.loads(text)
                self.lines[Cell(**{name: line[name] for name in Cell._fields})] = line

    def add(self, cell: Cell, digest: str, figures: dict[str, object]) -> None:
        self.lines[cell] = rounded(cell._asdict() | {"digest": digest} | figures)
        # A line that was cut off has no end, and the new one must not become part of it.
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * torn + as_text(self.lines[cell]))

    def tidy(self) -> None:
        """Leave out lines that newer ones replace, and put the others in the order of their cells."""
        with write_atomically(self.path) as temporary:
            temporary.write_text("".join(as_text(self.lines[cell]) for cell in sorted(self.lines)), encoding="utf-8")


def as_text(line: dict[str, object]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value
