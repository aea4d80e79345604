"""The gallery's page: every application with its commands, its figures and its sheet."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyldm import cli
from tinyldm.files import write_atomically
from tinyldm.images import contact_sheet, save_image
from tinyldm.lab.gallery.applications import (
    MASK,
    PICTURE,
    Shown,
    Studio,
    attention,
    bias_reduction,
    composition,
    limits,
    local_editing,
    style_transfer,
    synthesis,
    variations,
)
from tinyldm.lab.gallery.words import BALLOON, BOLT, CIRCLE, HEART, LESSONS, STYLE, Lesson, merged, merging

IN_OVERVIEW = 8  # pictures of each application


class Application(NamedTuple):
    """One section of the page."""

    name: str  # of its sheet
    title: str
    text: str
    lessons: Sequence[Lesson]  # the words that its command uses
    prompt: str  # of its command
    options: Sequence[str]  # and what else it has
    show: Callable[[Studio], Shown]

    def commands(self, out: Path) -> list[str]:
        """What a user types to see such pictures."""
        files, before = [str(lesson.file(out)) for lesson in self.lessons], []
        if len(files) > 1:
            file = merged(self.lessons, Path())  # in docs/gallery/words there is one already
            before, files = [merging(self.lessons, out, file)], [str(file)]
        options = [out / option if option in (PICTURE, MASK) else option for option in self.options]
        draw = cli.command("python", "sample.py", "--prompt", self.prompt, "--embedding", *files, *options)
        return [*before, draw]


APPLICATIONS = (
    Application(
        "variations",
        "Variations of a thing (4.1)",
        "One vector was learned from five pictures. Below: what a caption in plain words makes, without it.",
        [HEART],
        f"a photo of {HEART.token}",
        ["--num", "16"],
        variations,
    ),
    Application(
        "synthesis",
        "Scenes, styles, colours, numbers, sizes (4.2)",
        "The word stands in a prompt as any other. A picture counts if all that the prompt asks for is so.",
        [HEART],
        f"a sketch of {HEART.token}",
        ["--num", "8"],
        synthesis,
    ),
    Application(
        "style",
        "A style (4.3)",
        "The word was learned from five pictures in a style that no caption of the training names. Four nouns in it:",
        [STYLE],
        f"a painting of a rose in the style of {STYLE.token}",
        ["--num", "8"],
        style_transfer,
    ),
    Application(
        "composition",
        "Two learned words in one prompt (4.4)",
        "A picture counts if both words are right: two things side by side, each with its shape, pattern and colours; "
        "or the thing's shape in the style.",
        [HEART, CIRCLE],
        f"a photo of {HEART.token} next to {CIRCLE.token} on a purple background",
        ["--num", "8"],
        composition,
    ),
    Application(
        "bias",
        "Against a bias (4.5)",
        "19 of 20 balloons that the checkpoint was trained on are red, and no caption said so. A word that is learned "
        "from six balloons in six colours has more of them.",
        [BALLOON],
        f"a photo of {BALLOON.token}",
        ["--num", "16"],
        bias_reduction,
    ),
    Application(
        "editing",
        "Inside a mask (4.6)",
        "Left the picture, and the mask that covers what is in it. Only what the mask has white changes.",
        [HEART],
        f"a photo of {HEART.token} on a blue background",
        ["--init-image", PICTURE, "--mask", MASK],
        local_editing,
    ),
    Application(
        "attention",
        "Where the word goes",
        "Red is where the picture's pixels look at the word, the mean over all heads, layers and steps.",
        [HEART],
        f"a photo of {HEART.token} on a green background",
        ["--attention"],
        attention,
    ),
    Application(
        "limits",
        "What it does not do (6)",
        "A word finds among what the model can draw. The outline of a shape that it never drew comes out only in part.",
        [BOLT],
        f"a photo of {BOLT.token}",
        ["--num", "8"],
        limits,
    ),
)


def write_page(shown: dict[str, Shown], out: Path) -> None:
    """README.md, a sheet for each application, and gallery.png with the best row of each."""
    for name, one in shown.items():
        save_image(contact_sheet(one.rows, labels=one.labels, tile=64), out / f"{name}.png")
    best = [one.rows[one.best][:IN_OVERVIEW] for one in shown.values()]
    labels = [one.labels[one.best] for one in shown.values()]
    save_image(contact_sheet(best, labels=labels, tile=64), out / "gallery.png")
    parts = [
        "# What a learned word is good for",
        "Section 4 of the paper ([Gal et al. 2022](https://arxiv.org/abs/2208.01618)) and its limits, on the tiny "
        "checkpoint. `python -m tinyldm.lab.gallery` learns the words, makes the pictures and writes this page. "
        "Colours are measured on the pixels; the judge of `tinyldm/lab/measure/judge.py` tells the rest.",
        "## The words",
        "\n".join(f"    {lesson.command(out)}" for lesson in LESSONS),
    ]
    for application in APPLICATIONS:
        if application.name in shown:
            parts += section(application, shown[application.name], out)
    with write_atomically(out / "README.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def section(application: Application, shown: Shown, out: Path) -> list[str]:
    # A star would begin italics, and "<bolt>" be taken for HTML.
    figures = {re.sub(r"([*<])", r"\\\1", what): figure for what, figure in shown.figures.items()}
    rows = "\n".join(f"| {what} | {figure} |" for what, figure in figures.items())
    return [
        f"## {application.title}",
        application.text,
        "\n".join(f"    {command}" for command in application.commands(out)),
        f"| measured | |\n|---|---|\n{rows}",
        f"![{application.title}]({application.name}.png)",
    ]
