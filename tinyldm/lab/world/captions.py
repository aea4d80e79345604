"""How the small world is said: `caption(picture, rng)` is one of the many true sentences about a Picture.

They are built on the templates of Textual Inversion, the sentences in which the model later learns a new word. A new
style needs an entry in MEDIUMS, and one in WITHOUT_BACKGROUND if it draws none. An invented style is named like a
medium, "a klikod of a red star".
"""

import re
from dataclasses import replace
from functools import cache

import numpy as np
from torch import Tensor

from tinyldm import InputError
from tinyldm.lab.world.nouns import ALL_NOUNS, ANY_THING, INVENTED_NOUNS, NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import INVENTED_STYLES
from tinyldm.lab.world.things import COLOURS, HELD_OUT_SHAPES, PATTERNS, SHAPES, VIEWS, Picture, Thing, choice
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from tinyldm.tokenizer import Tokenizer, learn_merges

MEDIUMS = {  # how a caption begins that names the style; the article is put right afterwards
    "photo": "a photo",
    "sketch": "a sketch",
    "oil painting": "a oil painting",
    "pixel art": "pixel art",
    "watercolor": "a watercolor",
    "neon": "a neon sign",
    "blueprint": "a blueprint",
    "stained glass": "stained glass",
}
WITHOUT_BACKGROUND = ("sketch", "neon", "blueprint")
VAGUE = 0.06  # of the captions call what they show a "thing"
TOLD = 0.7  # of the backgrounds that show are said
MOST_WORDS = 27
TEXT_LENGTH = 32  # tokens, start and end included: room for all of them

SHEET_PROMPTS = [  # to look at while training
    "a photo of a red circle on a blue background",
    "a photo of a green star on a white background",
    "a photo of two yellow hearts on a black background",
    "a photo of a purple and white striped circle on an orange background",
    "a photo of a red star next to a blue square on a gray background",
    "a photo of a lemon on a brown background",
    "a photo of a ladybug on the grass",
    "a photo of a blue donut on a yellow background",
    "a photo of two small teal diamonds in the snow",
    "a photo of a pink crescent in the night sky",
    "a sketch of a heart",
    "an oil painting of a balloon on the sea",
    "pixel art of a pizza on a green background",
    "a neon sign of a yellow star",
    "a watercolor of an orange flower on a green background",
    "a close-up photo of a cookie on a pink background",
]


def plural(noun: str) -> str:
    """Of the last word of a name: "red cross" becomes "red crosses"."""
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|sh|ch)$", noun) else "s")


def with_articles(text: str) -> str:
    """Puts right what filling the templates got wrong: "a orange star" becomes "an orange star"."""
    return re.sub(r"\ba (?=[aeiou]|hour)", "an ", text)


def name_of(thing: Thing, size: bool = True) -> str:
    """Such as "small red and white striped star" or "blue lemon"."""
    words = [thing.size] if size and thing.size != "medium" else []
    if thing.noun:
        return " ".join([*words, *([thing.colour] if thing.said_colour else []), thing.noun])
    surface = f"{thing.colour} and {thing.colour2} {thing.pattern}" if thing.pattern else thing.colour
    return " ".join([*words, surface, thing.shape])


def thing_named(name: str) -> Thing:
    """The inverse of name_of: what "teal and white striped circle" names. Raises InputError if that is nothing."""
    colours, patterns, shapes = "|".join(COLOURS), "|".join(PATTERNS), SHAPES | HELD_OUT_SHAPES
    surface = rf"(?:({colours}) (?:and ({colours}) ({patterns}) )?)?"
    match = re.fullmatch(rf"(?:(small|large) )?{surface}(\w+)", name)
    size, colour, colour2, pattern, what = match.groups() if match else (None,) * 5
    thing = None
    if what in ALL_NOUNS and not pattern:
        thing = noun_thing(what, size or "medium", colour)
    elif what in shapes and colour:
        thing = Thing(what, colour, pattern, colour2, size=size or "medium")
    if thing is None or thing.colour == thing.colour2:
        known = {"colours": COLOURS, "patterns": PATTERNS, "shapes": shapes, "nouns": NOUNS}
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in known.items())
        expected = 'expected such as "teal and white striped circle", "small red star" or "blue lemon"'
        raise InputError(f"{name!r} names nothing of the tiny world, {expected}; {listed}")
    return thing


def subject(picture: Picture, article: str = "a", adjective: str | None = None) -> str:
    """What is in the picture: "a red star", "two cool lemons", "the small egg next to a blue circle"."""
    first, *rest = picture.things
    words = name_of(first, size=first.size != adjective)
    if rest and rest[0] == first:
        article = "two" if article == "a" else f"{article} two"
        # As "two sheep": a plural's token would be a second word to learn, and prompts say "two S*".
        words = words if first.noun in INVENTED_NOUNS else plural(words)
    words = " ".join([article, *([adjective] if adjective else []), words])
    return f"{words} next to a {name_of(rest[0])}" if rest and rest[0] != first else words


def place_phrase(place: str) -> str:
    """How captions say one of PLACES: "on the left", "at the top"."""
    return f"{'on' if place in ('left', 'right') else 'at'} the {place}"


def whereabouts(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    """The said place and, mostly, the background: "" or words with a leading space."""
    place = f" {place_phrase(picture.place)}" if picture.place else ""
    if not has_background(picture.style) or rng.random() > TOLD:
        return place, ""
    return place, f" {background_phrase(picture.background)}"


def background_phrase(background: str) -> str:
    """How captions say a colour or a scene: "on a red background", "in the snow"."""
    return SCENES[background].words if background in SCENES else f"on a {background} background"


def has_background(style: str) -> bool:
    """Whether pictures in this style show what a caption says of the background."""
    return style not in WITHOUT_BACKGROUND and (style not in INVENTED_STYLES or INVENTED_STYLES[style].ground is None)


@cache  # there are few kinds of pictures, and a caption is said of millions
def true_templates(style: str, view: str | None, size: str, number: int) -> list[str]:
    """Those of a picture's style that say of its view exactly what is so, and of size and number nothing wrong.

    size: of its first thing; number: of its things.
    """

    def is_true(template: str) -> bool:
        words = set(template.split())
        return (
            words.intersection(VIEWS) == ({view} if view else set())
            and words.intersection(("small", "large")) <= {size}
            and not ("one" in words and number == 2)
        )

    return [*filter(is_true, OBJECT_TEMPLATES if style == "photo" else STYLE_TEMPLATES)]


def fill_object(template: str, picture: Picture) -> str:
    """One of OBJECT_TEMPLATES, with what is in the picture; "a orange star" is put right later."""
    before, article, adjective = re.fullmatch(r"(.*) (a|the|my|one)(?: (\w+))? \{\}", template).groups()
    return f"{before} {subject(picture, article, adjective)}"


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """One of the many true captions of a picture."""
    if rng.random() < VAGUE and len(set(picture.things)) == 1:
        picture = vaguely(picture, rng.random() < 0.5)
    place, background = whereabouts(picture, rng)
    template = choice(rng, true_templates(picture.style, picture.view, picture.things[0].size, len(picture.things)))
    wording, style = rng.random(), ""
    if picture.style == "photo":
        text = subject(picture) if wording < 0.1 and not picture.view else fill_object(template, picture)
    elif wording < 0.25:
        return with_articles(template.format(picture.style))
    elif wording < 0.75:
        text = f"{medium(picture)} of {subject(picture)}"
    else:
        what, style = template.removesuffix(" in the style of {}"), f" in the style of {picture.style}"
        text = f"{what} of {subject(picture)}"
    words = text + place + background + style
    if len(words.split()) > MOST_WORDS:  # rare
        words = text + place + style
    return with_articles(words)


def vaguely(picture: Picture, says_colour: bool) -> Picture:
    """The picture as someone would tell it who has no word for what it shows: "a thing", "two red things"."""
    said = [replace(thing, noun=ANY_THING, said_colour=says_colour) for thing in picture.things]
    return replace(picture, things=tuple(said))


def medium(picture: Picture) -> str:
    """How a caption names the style: "a sketch", "dark pixel art"."""
    named = MEDIUMS.get(picture.style, f"a {picture.style}")
    article, words = re.fullmatch(r"(a )?(.*)", named).groups(default="")
    return f"{article}{picture.view} {words}" if picture.view else article + words


def make_tokenizer(pictures: list[Picture], seed: int) -> Tokenizer:
    """Merges learned from captions, and every invented word once, until every word of the world is one token."""
    rng = np.random.default_rng([seed, 1])
    captions = [caption(picture, rng) for picture in pictures[:20_000]]
    return Tokenizer(learn_merges([*captions, *INVENTED_NOUNS, *INVENTED_STYLES], count=10_000), length=TEXT_LENGTH)


def trimmed(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Without the padding that all have in common: a causal tower reads the ends just the same, and sooner."""
    return ids[:, : int((ids != tokenizer.end).sum(dim=1).max()) + 1]
