"""What captions say is so, in plain short English, and they say everything there is."""

import re

import numpy as np
import pytest
from conftest import WEIGHTS

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.lab.world import captions as module
from tinyldm.lab.world.captions import (
    TEXT_LENGTH,
    caption,
    fill_object,
    has_background,
    make_tokenizer,
    name_of,
    plural,
    subject,
    thing_named,
    vaguely,
)
from tinyldm.lab.world.distribution import EXAMPLES, random_picture
from tinyldm.lab.world.nouns import ALL_NOUNS, ANY_THING, INVENTED_NOUNS, NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import INVENTED_STYLES, STYLES
from tinyldm.lab.world.things import COLOURS, PATTERNS, PLACES, SHAPES, VIEWS, Picture, Thing
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [random_picture(np.random.default_rng([7, i])) for i in range(4000)]


@pytest.fixture(scope="module")
def captions(pictures) -> list[str]:
    return [caption(picture, np.random.default_rng([8, i])) for i, picture in enumerate(pictures)]


@pytest.mark.parametrize(
    "word, words", [("star", "stars"), ("cross", "crosses"), ("daisy", "daisies"), ("box", "boxes")]
)
def test_plural(word, words):
    assert plural(word) == words


def test_a_name_names_its_thing(pictures):
    things = {thing for picture in pictures for thing in picture.things} | set(EXAMPLES.values())
    assert {thing.size for thing in things} == {"small", "medium", "large"} and len(things) > 1000
    wrong = [thing for thing in things if thing_named(name_of(thing)) != thing]
    assert {thing.noun for thing in wrong} <= {"balloon"}  # of any colour, which no caption says


@pytest.mark.parametrize(
    "name",
    [
        "",
        "circle",
        "teal",
        "teal and white circle",
        "teal striped circle",
        "teal and teal striped circle",
        "teal and white spotted circle",
        "teal and white striped lemon",
        "tiny teal circle",
        "orange sun",  # whose rim is orange: a plain circle, and nothing could be said of its two colours
        "a teal circle",
        "teal circle ",
    ],
)
def test_what_names_nothing_is_told_what_there_is(name):
    with pytest.raises(InputError) as error:
        thing_named(name)
    assert str(error.value).startswith(f"{name!r} names nothing of the tiny world, expected such as ")
    assert all(word in str(error.value) for word in (*COLOURS, *PATTERNS, *SHAPES, "bolt", *NOUNS))


def test_captions_are_plain_short_english(captions):
    for text in captions:
        assert re.fullmatch(r"[a-z]+(-up)?( [a-z]+(-up)?)*", text), text
        assert len(text.split()) <= 27, text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\ba (a|an|two)\b|\bnone\b", text), text


def test_captions_use_every_word_of_the_templates(captions):
    said = {word for text in captions for word in text.split()}
    templates = {word for template in OBJECT_TEMPLATES + STYLE_TEMPLATES for word in template.split()} - {"{}"}
    assert templates <= said
    for words in (COLOURS, SHAPES, PATTERNS, NOUNS, ("two", "next", "left", "right", "top", "bottom")):
        assert set(words) <= said
    for phrase in [*(scene.words for scene in SCENES.values()), *(style for style in STYLES if style != "photo")]:
        assert any(phrase in text for text in captions)


def test_captions_are_true(pictures, captions):
    words_for_things = {word for noun in (*SHAPES, *ALL_NOUNS) for word in (noun, plural(noun))}
    for picture, text in zip(pictures, captions, strict=True):
        words, first = text.split(), picture.things[0]
        nouns = {ANY_THING} | {thing.noun or thing.shape for thing in picture.things}
        style_only = picture.style != "photo" and not nouns.union(map(plural, nouns)).intersection(words)
        for view in VIEWS:
            assert (view in words) == (picture.view == view), text
        for size in ("small", "large"):
            if size in words:
                assert size in {thing.size for thing in picture.things}, text
        if style_only:
            assert text.endswith(f"in the style of {picture.style}"), text
            continue
        assert first.size in ("medium", *words), text
        assert ("two" in words) == (len(picture.things) == 2 and len(set(picture.things)) == 1), text
        assert ("next" in words) == (len(set(picture.things)) == 2), text
        assert {word for word in words if word in PLACES} == ({picture.place} if picture.place else set()), text
        assert ("photo" in words) <= (picture.style == "photo"), text
        if picture.style != "photo":
            assert picture.style in text, text
        if match := re.search(r"on an? (\w+) background", text):
            assert match[1] == picture.background, text
        for name, scene in SCENES.items():
            assert (scene.words in text) <= (picture.background == name), text
        said = {word for word in words if word in COLOURS}
        if {ANY_THING, plural(ANY_THING)}.intersection(words):
            assert said <= {first.colour, picture.background} and len(set(picture.things)) == 1, text
            assert not words_for_things.intersection(words), text
            continue
        colours = {thing.colour for thing in picture.things if thing.said_colour or not thing.noun}
        colours |= {thing.colour2 for thing in picture.things if thing.pattern and not thing.noun}
        assert colours <= said <= colours | {picture.background}, text
        meant = {word for noun in nouns for word in (noun, plural(noun))}
        assert meant.intersection(words) and not words_for_things.difference(meant).intersection(words), text


def test_what_shows_one_thing_is_now_and_then_called_a_thing_with_its_colour_or_without(pictures, captions):
    vague = [ANY_THING in re.split("s? |s?$", text) for text in captions]
    of_one = [len(set(picture.things)) == 1 for picture in pictures]
    assert 0.03 < np.mean(np.array(vague)[of_one]) < 0.08 and not np.array(vague)[~np.array(of_one)].any()
    picture = Picture((noun_thing("kite", size="small"),) * 2, "green")
    assert subject(vaguely(picture, says_colour=False)) == "two small things"
    assert subject(vaguely(picture, says_colour=True)) == "two small blue things"


def test_two_of_an_invented_noun_are_one_word_still_the_same():
    """A learned word's plural is the word itself, "two S*", so the model is to know words that have no plural."""
    for noun in list(INVENTED_NOUNS)[:20]:
        assert subject(Picture((noun_thing(noun, colour="red"),) * 2, "green")) == f"two red {noun}"
    assert subject(Picture((noun_thing("lemon"),) * 2, "green")) == "two lemons"


def test_an_invented_style_is_named_like_a_medium_or_after_what_it_is_of():
    style = next(iter(INVENTED_STYLES))
    picture = Picture((Thing("star", "red"),), "blue", style, view="dark")
    texts = {caption(picture, np.random.default_rng(seed)) for seed in range(300)}
    assert all(style in text.split() for text in texts)
    assert any(text.startswith(f"a dark {style} of a red star") for text in texts)
    assert any(text.endswith(f" in the style of {style}") and "red star" in text for text in texts)


def test_a_background_is_spoken_of_only_where_the_style_shows_it():
    with_ground = {style for style, look in INVENTED_STYLES.items() if look.ground is not None}
    assert 50 < len(with_ground) < 180
    for style in INVENTED_STYLES:
        picture = Picture((Thing("star", "red"),), "purple", style)
        said = any("purple" in caption(picture, np.random.default_rng(seed)).split() for seed in range(30))
        assert said == has_background(style) == (style not in with_ground), style


def test_every_word_of_the_world_is_one_token_of_the_tiny_checkpoint(captions):
    tokenizer = load_checkpoint(WEIGHTS).tokenizer
    said = {word for text in captions for word in text.replace("-", " ").split()}
    for word in {*said, *INVENTED_NOUNS, *INVENTED_STYLES}:
        assert len(tokenizer.encode(word)) == 1, word
    assert max(len(tokenizer.encode(text)) for text in captions) <= TEXT_LENGTH - 2  # with start and end nothing is cut
    assert tokenizer.length == TEXT_LENGTH


def test_invented_words_are_tokens_though_no_caption_says_them(pictures, monkeypatch):
    nouns, styles = (dict(list(words.items())[:20]) for words in (INVENTED_NOUNS, INVENTED_STYLES))
    monkeypatch.setattr(module, "INVENTED_NOUNS", nouns)
    monkeypatch.setattr(module, "INVENTED_STYLES", styles)
    everyday = [picture for picture in pictures if picture.style in STYLES and not picture.things[0].mark][:100]
    tokenizer = make_tokenizer(everyday, seed=0)
    assert all(len(tokenizer.encode(word)) == 1 for word in (*nouns, *styles, "background"))
    assert len(tokenizer.encode("unsaid")) > 1


def test_backgrounds_are_mostly_said(pictures, captions):
    photos = [(p, text) for p, text in zip(pictures, captions, strict=True) if p.style == "photo"]
    said = [
        SCENES[p.background].words in text if p.background in SCENES else "background" in text for p, text in photos
    ]
    assert 0.67 < np.mean(said) < 0.75


@pytest.mark.parametrize(
    "template, things, expected",
    [
        ("a photo of a {}", [Thing("star", "orange")], "a photo of a orange star"),
        (
            "a photo of my {}",
            [Thing("star", "red", "striped", "white")] * 2,
            "a photo of my two red and white striped stars",
        ),
        ("a photo of the small {}", [Thing("star", "red", size="small")], "a photo of the small star"),
        (
            "a photo of the clean {}",
            [noun_thing("lemon", colour="blue")] * 2,
            "a photo of the two clean blue lemons",
        ),
        (
            "a rendition of a {}",
            [noun_thing("kite"), Thing("ring", "red")],
            "a rendition of a kite next to a red ring",
        ),
    ],
)
def test_filling_a_template(template, things, expected):
    picture = Picture(tuple(things), "green")
    assert fill_object(template, picture) == expected.replace("small star", "small red star")
