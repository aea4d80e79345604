"""What words are learned for: eight concepts to choose settings by, and seventeen others, to report.

Nothing may be tuned on those that are reported. To add one: build it below and enter it in one of the two sets.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from tinyldm.lab.measure.outlines import UNSEEN_SHAPES, HasOutline, true_silhouettes
from tinyldm.lab.measure.prompts import TINY_PROMPTS, TINY_STYLE_PROMPTS, Prompts
from tinyldm.lab.measure.questions import OBJECTS, TUNING_OBJECTS, Check, Question, in_style, new_colour
from tinyldm.lab.measure.score import questions_of_thing
from tinyldm.lab.paper.figures import THINGS, draw_figure, figure_silhouettes
from tinyldm.lab.world.captions import background_phrase, name_of, with_articles
from tinyldm.lab.world.distribution import EXAMPLE_SIZE, pictures_in_style, pictures_of
from tinyldm.lab.world.drawing import arrange
from tinyldm.lab.world.styles import HELD_OUT_STYLES, Look, draw, invented, random_look
from tinyldm.lab.world.things import MARKED, Picture, Thing
from tinyldm.run import PREVIEWS

FRESH_LOOK = random_look(np.random.default_rng(26))  # a style that is neither trained nor held out
MARKED_THING = Thing("hexagon", "orange", MARKED, "teal", mark="circle")  # which no noun means


@dataclass(frozen=True)
class Concept:
    """Something that the checkpoint never saw, and that a word can be learned for."""

    name: str
    kind: str  # combination | mark | shape | figure | style
    pictures: list[Picture]  # to learn from
    draw: Callable[[Picture, int], Image.Image]  # at a size in pixels
    plain: str | None  # what captions would call it; None: they have no words for it
    questions: Callable[[str], list[Question]]  # about pictures of a word, or of other text in its place

    @property
    def subject(self) -> str:
        """What the pictures share, as train.py's --property has it."""
        return "style" if self.kind == "style" else "object"

    @property
    def prompts(self) -> Prompts:
        """That ask the word for more than what it means."""
        return TINY_STYLE_PROMPTS if self.kind == "style" else TINY_PROMPTS

    @property
    def reconstruction(self) -> str:
        """The prompt whose pictures should be like those it is learned from."""
        return PREVIEWS[self.subject]

    def images(self, size: int = EXAMPLE_SIZE) -> list[Image.Image]:
        return [self.draw(picture, size) for picture in self.pictures]

    def captions(self, word: str) -> list[str]:
        """A true one for each of the pictures."""
        texts = [
            f"a painting of a {name_of(picture.things[0])} in the style of {word}"
            if self.kind == "style"
            else f"a photo of {word} {background_phrase(picture.background)}"
            for picture in self.pictures
        ]
        return [with_articles(text) for text in texts]


def of_thing(thing: Thing, kind: str = "combination") -> Concept:
    name = name_of(thing)
    return Concept(name, kind, pictures_of(thing), draw, with_articles(f"a {name}"), partial(about_thing, thing=thing))


def of_mark(thing: Thing) -> Concept:
    """Of a thing with a mark in its middle, which captions can't say."""
    return replace(of_thing(thing, "mark"), name=f"{thing.colour} {thing.shape} with a {thing.mark}", plain=None)


def of_shape(thing: Thing) -> Concept:
    outline = HasOutline(partial(true_silhouettes, thing.shape))
    return replace(of_thing(thing, "shape"), plain=None, questions=partial(about_thing, thing=thing, outline=outline))


def of_figure(name: str) -> Concept:
    thing, outline = THINGS[name], HasOutline(partial(figure_silhouettes, name))
    questions = partial(about_thing, thing=thing, outline=outline)
    return Concept(name, "figure", pictures_of(thing), draw_figure, None, questions)


def of_style(style: str) -> Concept:
    return Concept(style, "style", pictures_in_style(style), draw, None, partial(about_style, style=style))


def of_look(name: str, look: Look) -> Concept:
    """Of an invented style that has no name; the judge calls all of those invented."""
    questions = partial(about_style, style="invented")
    return Concept(name, "style", pictures_in_style("photo"), partial(draw_look, look=look), None, questions)


def draw_look(picture: Picture, size: int, look: Look) -> Image.Image:
    rng = np.random.default_rng(picture.seed)
    return invented(look, picture, arrange(picture, rng), size, rng)


# ---- Questions, of each of the measures' own every second or fourth, which seeds make up for


def about_thing(word: str, thing: Thing, outline: HasOutline | None = None) -> list[Question]:
    """8 pictures over four backgrounds and 4 of each of a sketch, two, and another colour.

    outline: of a thing whose shape the judge never saw. It can't tell the pattern of such a thing either.
    """
    asked = questions_of_thing(word, thing)[::2]
    return [replace(question, checks=measured(question.checks, outline)) for question in asked] if outline else asked


def in_plain_words(thing: Thing) -> list[Question]:
    """The same of a name in the word's place. Another colour stands for its own one, not before it."""
    other = name_of(replace(thing, colour=new_colour(thing)))
    return [
        replace(question, prompt=f"a photo of a {other} on a white background")
        if "new colour" in question.checks
        else question
        for question in about_thing(name_of(thing), thing)
    ]


def measured(checks: dict[str, Check], outline: HasOutline) -> dict[str, Check]:
    """With the outline in the pattern's place, which is asked for on plain backgrounds."""
    others = {what: check for what, check in checks.items() if what != "pattern"}
    return others | {"outline": outline} if "pattern" in checks else checks


def about_style(word: str, style: str) -> list[Question]:
    """4 pictures of each of four nouns."""
    names = {"style": "its own style", "shape": "the noun's shape"}
    return [
        replace(question, checks={names[what]: check for what, check in question.checks.items()})
        for question in in_style(word, style)[::4]
    ]


# ---- The two sets


def by_name(concepts: Iterable[Concept]) -> dict[str, Concept]:
    return {concept.name: concept for concept in concepts}


CHOOSING = by_name(
    [
        *map(of_thing, TUNING_OBJECTS),
        of_mark(MARKED_THING),
        of_figure("mushroom"),
        of_figure("pebble"),
        of_look("fresh look", FRESH_LOOK),
    ]
)
REPORTING = by_name(
    [
        *map(of_thing, OBJECTS),
        *map(of_shape, UNSEEN_SHAPES),
        *map(of_figure, ("snowman", "letter", "face", "key")),
        *map(of_style, HELD_OUT_STYLES),
    ]
)
SETS = {"choosing": CHOOSING, "reporting": REPORTING}
CONCEPTS = CHOOSING | REPORTING
