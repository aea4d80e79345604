"""The words of the gallery: what they are learned from, and learning them."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from tinyldm import cli
from tinyldm.formats.embeddings import convert, load_embeddings, save_embeddings
from tinyldm.lab import ROOT
from tinyldm.lab.measure.learning import UNSEEN, Training, in_parallel, learn
from tinyldm.lab.world.distribution import BIASED, EXAMPLE_SIZE, EXAMPLES
from tinyldm.lab.world.nouns import noun_thing
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import Picture, Thing

BALLOONS = Path("balloons")  # in the gallery's folder: a small set of the biased noun's things in many colours


class Lesson(NamedTuple):
    """A word and the pictures that it is learned from."""

    token: str
    pictures: Path  # a folder
    kind: str = "object"  # or "style"

    def options(self) -> list[str]:
        """Of train.py, but for the pictures, the word and its file."""
        return ["--property", self.kind] if self.kind != "object" else []

    def file(self, out: Path) -> Path:
        return out / "words" / f"{self.pictures.name}.safetensors"

    def command(self, out: Path) -> str:
        """What a user types to learn it."""
        folder = out / self.pictures if self.pictures == BALLOONS else self.pictures.relative_to(ROOT)
        return cli.command("python", "train.py", "--images", folder, "--token", self.token, *self.options())


def example(token: str, folder: str, **more: str) -> Lesson:
    return Lesson(token, ROOT / "examples" / folder, **more)


HEART, CIRCLE = example("S*", "checkered-heart"), example("T*", "striped-circle")
CROSS, DIAMOND = example("C*", "dotted-cross"), example("D*", "rimmed-diamond")
BOLT, STYLE = example("<bolt>", "bolt"), example("B*", "blueprint", kind="style")
BALLOON = Lesson("<balloon>", BALLOONS)
LESSONS = (HEART, CIRCLE, CROSS, DIAMOND, BOLT, STYLE, BALLOON)


def thing_of(lesson: Lesson) -> Thing:
    """What its pictures show."""
    return EXAMPLES[lesson.pictures.name]


def balanced_balloons() -> list[Image.Image]:
    """Six balloons in six colours, on six backgrounds: the checkpoint takes nearly all to be red."""
    looks = {"blue": "white", "green": "sand", "yellow": "purple", "purple": "grass", "orange": "blue", "pink": "gray"}
    return [
        draw(Picture((noun_thing(BIASED[0], colour=colour),), background, seed=i), EXAMPLE_SIZE)
        for i, (colour, background) in enumerate(looks.items())
    ]


def learn_words(training: Training, lessons: Iterable[Lesson], out: Path) -> dict[str, Tensor]:
    """{token: vectors} of all lessons; each is written into out/words."""
    for folder in (out / BALLOONS, out / "words"):
        folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(balanced_balloons()):
        image.save(out / BALLOONS / f"{i}.png")

    def learned(lesson: Lesson) -> dict[str, Tensor]:
        folder = out / lesson.pictures if lesson.pictures == BALLOONS else lesson.pictures
        with tempfile.TemporaryDirectory() as run:
            (vectors,) = load_embeddings(learn(training, folder, Path(run), *lesson.options(), *UNSEEN)).values()
        save_embeddings(lesson.file(out), {lesson.token: vectors})
        return {lesson.token: vectors}

    words: dict[str, Tensor] = {}
    for found in in_parallel(learned, lessons, "words"):
        words |= found
    return words


def merged(lessons: Sequence[Lesson], out: Path) -> Path:
    """The file of all their words."""
    return out / f"{'-and-'.join(lesson.pictures.name for lesson in lessons)}.safetensors"


def merge(lessons: Sequence[Lesson], out: Path) -> dict[str, Tensor]:
    """Write that file, and read it."""
    file = merged(lessons, out / "words")
    convert([str(lesson.file(out)) for lesson in lessons], "diffusers", file)
    return load_embeddings(file)


def merging(lessons: Sequence[Lesson], out: Path, file: Path) -> str:
    """What a user types for that."""
    files = [lesson.file(out) for lesson in lessons]
    return cli.command("python", "-m", "tinyldm.formats.embeddings", *files, "--to", "diffusers", "--out", file)
