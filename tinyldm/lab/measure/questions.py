"""What pictures are asked for, and what has to be so in them: prompts, and sentences with a learned word."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tinyldm.lab.measure.colours import background_colour, colours_of, colours_right
from tinyldm.lab.measure.judge import ANSWERS
from tinyldm.lab.world.captions import medium, name_of, place_phrase, plural
from tinyldm.lab.world.distribution import stands_out
from tinyldm.lab.world.nouns import NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import STYLES, draw
from tinyldm.lab.world.things import COLOURS, HELD_OUT_COMBINATIONS, PATTERNS, PLACES, SHAPES, Picture, Thing, choice

Check = Callable[[np.ndarray, dict[str, str]], float]  # (pixels, the judge's answers) -> is it so, or how far, 0 to 1

LEAST = 6  # pictures behind every figure
WORD_SAMPLES = 16
WORD_BACKGROUNDS = ("green", "blue", "yellow", "white", "purple", "red", "gray")


@dataclass
class Question:
    """One prompt, and what has to be so in its picture."""

    prompt: str
    checks: dict[str, Check]


@dataclass(frozen=True)
class HasColours:
    """The object has these colours, one or two, and no others."""

    expected: tuple[str, ...]

    def __call__(self, pixels: np.ndarray, said: dict[str, str]) -> bool:
        return colours_right(pixels, self.expected)


@dataclass(frozen=True)
class Behind:
    """The background has this colour."""

    colour: str

    def __call__(self, pixels: np.ndarray, said: dict[str, str]) -> bool:
        return background_colour(pixels) == self.colour


@dataclass(frozen=True)
class Sees:
    """The judge gives this answer to this question of its own."""

    question: str
    answer: str

    def __call__(self, pixels: np.ndarray, said: dict[str, str]) -> bool:
        return said[self.question] == self.answer


# ---- Prompts. Every function yields as many questions as are taken from it.


def plain_thing(rng: np.random.Generator) -> Thing:
    return Thing(choice(rng, SHAPES), choice(rng, COLOURS))


def background_of(rng: np.random.Generator, thing: Thing) -> str:
    return choice(rng, [colour for colour in COLOURS if stands_out((thing,), colour)])


def plain(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        thing = plain_thing(rng)
        background = background_of(rng, thing)
        checks = {
            "colour": HasColours(colours_of(thing)),
            "background": Behind(background),
            "shape": Sees("shape", thing.shape),
        }
        yield Question(f"a photo of a {name_of(thing)} on a {background} background", checks)


def patterned(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        first = plain_thing(rng)
        thing = Thing(first.shape, first.colour, choice(rng, PATTERNS), choice(rng, COLOURS, [first.colour]))
        background = background_of(rng, thing)
        checks = {"colours": HasColours(colours_of(thing)), "pattern": Sees("pattern", thing.pattern)}
        yield Question(f"a photo of a {name_of(thing)} on a {background} background", checks)


def nouns(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for noun in NOUNS:
            thing = noun_thing(noun)
            yield Question(
                f"a photo of a {noun}", {"colours": HasColours(colours_of(thing)), "shape": Sees("shape", thing.shape)}
            )


def recoloured(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for noun, look in NOUNS.items():
            thing = noun_thing(noun, colour=choice(rng, COLOURS, [look.colour, look.colour2]))
            checks = {"colours": HasColours(colours_of(thing)), "shape": Sees("shape", thing.shape)}
            yield Question(f"a photo of a {name_of(thing)} on a {background_of(rng, thing)} background", checks)


def two(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        thing = plain_thing(rng)
        prompt = f"a photo of two {plural(name_of(thing))} on a {background_of(rng, thing)} background"
        yield Question(prompt, {"two": Sees("count", "two")})


def places(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for place in PLACES:
            thing = plain_thing(rng)
            background = background_of(rng, thing)
            prompt = f"a photo of a {name_of(thing)} {place_phrase(place)} on a {background} background"
            yield Question(prompt, {"place": Sees("place", place)})


def sizes(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for size in ("small", "large"):
            thing = plain_thing(rng)
            prompt = f"a photo of a {size} {name_of(thing)} on a {background_of(rng, thing)} background"
            yield Question(prompt, {"size": Sees("size", size)})


def scenes(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for scene in SCENES:
            thing = plain_thing(rng)
            if stands_out((thing,), scene):
                yield Question(f"a photo of a {name_of(thing)} {SCENES[scene].words}", {"scene": Sees("scene", scene)})


def styles(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for style in STYLES:
            if style != "photo":
                thing = plain_thing(rng)
                how = medium(Picture((thing,), "white", style))
                yield Question(f"{how} of a {name_of(thing)}", {style: Sees("style", style)})


PROMPTS = {  # what is asked -> its questions, how many in all
    "a {colour} {shape} on a {colour} background": (plain, 200),
    "a {colour} and {colour} {pattern} {shape}": (patterned, 200),
    "a {noun}": (nouns, 5 * len(NOUNS)),
    "a {colour} {noun}": (recoloured, 5 * len(NOUNS)),
    "two {colour} {shape}s": (two, 100),
    "… on the left, at the top, …": (places, 100),
    "a small, a large …": (sizes, 100),
    "… on the grass, in the snow, …": (scenes, 120),
    "a sketch of …, pixel art of …, …": (styles, 120),
}


def enough(questions: Iterator[Question], count: int) -> list[Question]:
    """The first `count` of them, or as many more as it takes to ask for each of their checks LEAST times."""
    taken, asked = [], Counter()
    while len(taken) < count or min(asked.values(), default=0) < LEAST:
        taken.append(next(questions))
        asked.update(taken[-1].checks.keys())
    return taken


# ---- One learned word

# Of combinations that training never saw: those that figures are reported of, and those to choose settings by.
OBJECTS = [Thing(*look) for look in HELD_OUT_COMBINATIONS[:8]]
TUNING_OBJECTS = [Thing(*look) for look in HELD_OUT_COMBINATIONS[8:]]


def on_backgrounds(word: str, thing: Thing) -> list[Question]:
    """16 pictures of what the word means, over 4 backgrounds."""
    checks: dict[str, Check] = {"colours": HasColours(colours_of(thing))}
    if thing.shape in ANSWERS["shape"]:  # the judge has no word for a bolt
        checks["shape"] = Sees("shape", thing.shape)
    return [
        Question(f"a photo of {word} on a {background} background", checks | {"background": Behind(background)})
        for background in backgrounds_for(colours_of(thing))
    ]


def combined(word: str, thing: Thing) -> list[Question]:
    """8 pictures of each sentence that asks the word to combine."""
    new = new_colour(thing)
    takes = [HasColours((new,))]
    if thing.colour2:  # which it may keep or lose
        takes.append(HasColours((new, thing.colour2)))
    return [
        question
        for question in (
            Question(f"a sketch of {word}", {"a sketch of S*": Sees("style", "sketch")}),
            Question(f"a photo of two {plural(word)}", {"two S*s": Sees("count", "two")}),
            Question(
                f"a photo of a {new} {word} on a white background",
                {"another colour": lambda pixels, said: any(takes_it(pixels, said) for takes_it in takes)},
            ),
        )
        for _ in range(8)
    ]


def new_colour(thing: Thing) -> str:
    """One to ask for that is none of its own."""
    return "red" if "blue" in colours_of(thing) else "blue"


def backgrounds_for(colours: tuple[str, ...]) -> list[str]:
    """One a sample: 4 backgrounds that none of these colours is lost on, each WORD_SAMPLES / 4 times."""
    names = [name for name in WORD_BACKGROUNDS if name not in colours][:4]
    return [name for name in names for _ in range(WORD_SAMPLES // 4)]


def true_pictures(thing: Thing) -> list[Image.Image]:
    """The world's own pictures of the thing, one for each of the 16 that `on_backgrounds` asks for."""
    backgrounds = backgrounds_for(colours_of(thing))
    return [draw(Picture((thing,), background, seed=i)) for i, background in enumerate(backgrounds)]


# ---- One learned style

STYLE_NOUNS = ("lemon", "tent", "rose", "medkit")  # of four shapes that pictures_in_style shows none of


def in_style(word: str, style: str) -> list[Question]:
    """16 pictures of each of four nouns in the style that the word means."""
    return [
        Question(
            f"a painting of a {noun} in the style of {word}",
            {"style": Sees("style", style), "shape": Sees("shape", noun_thing(noun).shape)},
        )
        for noun in STYLE_NOUNS
        for _ in range(WORD_SAMPLES)
    ]


def true_pictures_in_style(style: str) -> list[Image.Image]:
    """The world's own pictures of what `in_style` asks for, on all the backgrounds that suit."""
    rng = np.random.default_rng(0)
    things = [noun_thing(noun) for noun in STYLE_NOUNS for _ in range(WORD_SAMPLES)]
    return [draw(Picture((thing,), background_of(rng, thing), style, seed=i)) for i, thing in enumerate(things)]
