"""Invented nouns: words of their own, looks of their own, and nothing of what training is never to see."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import WEIGHTS

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.lab.world.captions import MEDIUMS, caption, name_of, plural
from tinyldm.lab.world.distribution import random_noun, random_picture
from tinyldm.lab.world.drawing import shape_mask
from tinyldm.lab.world.nouns import (
    ALL_NOUNS,
    ANY_THING,
    HOLLOW,
    INVENTED_NOUNS,
    INVENTED_OUTLINES,
    KINDS,
    NOUNS,
    OUTLINES,
    OWN_OUTLINES,
    invented_nouns,
    noun_thing,
)
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import HELD_OUT_STYLES, INVENTED_STYLES, STYLES, draw
from tinyldm.lab.world.things import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_SHAPES,
    MARKED,
    PATTERNS,
    PLACES,
    SHAPES,
    VIEWS,
    Picture,
    Spot,
    Thing,
    is_held_out,
    nearest_colour,
)
from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

TURNS = np.radians(range(-12, 13, 4))  # how far the world turns things
RESEMBLANCE = 0.8  # of two silhouettes: the area of both, of that of either


# ---- Names


def plain_words() -> set[str]:
    """Every word that captions have for anything not invented, plurals included."""
    phrases = [*COLOURS, *SHAPES, *HELD_OUT_SHAPES, *PATTERNS, *NOUNS, *PLACES, *VIEWS, MARKED, ANY_THING]
    phrases += [*STYLES, *HELD_OUT_STYLES, *MEDIUMS.values(), *SCENES, *(scene.words for scene in SCENES.values())]
    phrases += [*OBJECT_TEMPLATES, *STYLE_TEMPLATES, "small medium large two and next to a on an background"]
    invented = {*INVENTED_NOUNS, *INVENTED_STYLES}
    for i in range(3000):
        words = caption(random_picture(np.random.default_rng([5, i])), np.random.default_rng([6, i])).split()
        phrases += [word for word in words if word not in invented]
    words = set(re.findall(r"[a-z]+", " ".join(phrases)))
    return words | set(map(plural, words))


def test_a_thousand_names_are_words_for_nothing_else():
    assert len(INVENTED_NOUNS) == 1000 and not set(INVENTED_NOUNS) & set(INVENTED_STYLES)
    assert all(re.fullmatch("[a-z]+", name) for name in INVENTED_NOUNS)
    words = plain_words()
    assert {"star", "bolts", "striped", "snow", "watercolor", "lemons", "rendition", "thing"} <= words
    assert not words & {*INVENTED_NOUNS, *map(plural, INVENTED_NOUNS)}


def test_every_name_is_one_token_of_the_tiny_checkpoint():
    tokenizer = load_checkpoint(WEIGHTS).tokenizer
    ids = [tokenizer.encode(name) for name in INVENTED_NOUNS]
    assert all(len(row) == 1 for row in ids) and len({row[0] for row in ids}) == 1000


def test_the_same_seed_invents_the_same_nouns():
    looks, outlines = invented_nouns()
    assert looks == INVENTED_NOUNS and list(looks) == list(INVENTED_NOUNS)
    assert all(np.array_equal(outlines[name][0], INVENTED_OUTLINES[name][0]) for name in outlines)
    other, _ = invented_nouns(seed=1)
    assert list(other) != list(looks) and len(set(other.values()) & set(looks.values())) < 100


# ---- Looks


def test_no_two_nouns_look_alike():
    """Of outlines that only they have, it is enough that they have them; another look is another picture."""
    assert len(set(ALL_NOUNS.values())) == len(ALL_NOUNS) == len(NOUNS) + 1000
    for name, look in INVENTED_NOUNS.items():
        assert look.shape in SHAPES or (look.shape == name and name in INVENTED_OUTLINES)
        assert look.colour in COLOURS and look.colour != look.colour2
        assert look.pattern in (None, MARKED, *PATTERNS) and (look.colour2 in COLOURS) == (look.pattern is not None)
        assert (look.mark is not None) == (look.pattern == MARKED)


def test_what_is_held_out_has_no_noun():
    held_out = {(shape, frozenset((a, b)), pattern) for shape, a, pattern, b in HELD_OUT_COMBINATIONS}
    for name, look in INVENTED_NOUNS.items():
        assert (look.shape, frozenset((look.colour, look.colour2)), look.pattern) not in held_out, name
        assert not is_held_out(noun_thing(name)), name
        assert not {look.shape, look.mark} & set(HELD_OUT_SHAPES), name


def test_kinds_and_own_outlines_have_the_stated_shares():
    kinds = Counter({None: "plain", MARKED: MARKED}.get(look.pattern, "patterned") for look in INVENTED_NOUNS.values())
    assert set(kinds) == set(KINDS)
    for kind, share in KINDS.items():
        assert kinds[kind] / 1000 == pytest.approx(share, abs=0.04), kind
    assert len(INVENTED_OUTLINES) / 1000 == pytest.approx(OWN_OUTLINES, abs=0.04)
    for option, options in (("colour", COLOURS), ("shape", SHAPES), ("pattern", PATTERNS)):
        assert set(options) <= {getattr(look, option) for look in INVENTED_NOUNS.values()}


def silhouette(outlines: list[np.ndarray], monkeypatch, angle: float = 0) -> np.ndarray:
    """Where a thing of these outlines is, (64, 64) bool: 900 pixels of them, their centre of mass in the middle."""
    monkeypatch.setitem(OUTLINES, "this", outlines)

    def mask(radius: float) -> np.ndarray:
        return np.asarray(shape_mask(Thing("this", "red"), Spot(0.5, 0.5, radius, angle), 64)) > 0

    whole = mask(0.4 * (900 / mask(0.4).sum()) ** 0.5)
    y, x = np.argwhere(whole).mean(axis=0)
    return np.roll(whole, (round(31.5 - y), round(31.5 - x)), axis=(0, 1))


def resemblance(outlines: list[np.ndarray], held_out: list[np.ndarray], monkeypatch) -> float:
    """Intersection over union, the one turned as it fits best."""
    one = silhouette(outlines, monkeypatch)
    others = (silhouette(held_out, monkeypatch, angle) for angle in TURNS)
    return max(float((one & other).sum() / (one | other).sum()) for other in others)


@pytest.mark.parametrize("shape", HELD_OUT_SHAPES)
def test_no_own_outline_resembles_a_held_out_shape(shape, monkeypatch):
    """Nearest is one that comes to 0.76 of an arrow; an oval comes to 0.72."""
    held_out = HELD_OUT_SHAPES[shape]
    found = {name: resemblance(outlines, held_out, monkeypatch) for name, outlines in INVENTED_OUTLINES.items()}
    assert max(found.values()) < RESEMBLANCE, max(found, key=found.get)


@pytest.mark.parametrize("shape", HELD_OUT_SHAPES)
def test_a_held_out_shape_drawn_by_an_unsteady_hand_resembles_it(shape, monkeypatch):
    unsteady = HELD_OUT_SHAPES[shape][0] + np.random.default_rng(0).uniform(
        -0.08, 0.08, HELD_OUT_SHAPES[shape][0].shape
    )
    assert resemblance([unsteady], HELD_OUT_SHAPES[shape], monkeypatch) > RESEMBLANCE


# ---- Pictures


def shares_of(thing: Thing, seed: int = 2) -> dict[str, float]:
    """Of the pixels of the thing's two colours, how many are of which."""
    background = next(name for name in COLOURS if name not in (thing.colour, thing.colour2, "gray", "teal"))
    count = Counter(nearest_colour(np.asarray(draw(Picture((thing,), background, seed=seed)))).ravel().tolist())
    both = count[thing.colour] + count[thing.colour2]
    return {colour: count[colour] / both for colour in (thing.colour, thing.colour2)}


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_marks_show(size):
    marked = [name for name, look in INVENTED_NOUNS.items() if look.pattern == MARKED]
    for name in marked[::3]:
        thing = noun_thing(name, size)
        shares = shares_of(thing)
        assert shares[thing.colour2] > 0.05 and shares[thing.colour] > 0.3, (name, shares)
        assert thing.shape not in HOLLOW and thing.mark not in HOLLOW


def test_own_outlines_are_large_enough_to_see_and_stay_in_their_place():
    for name, (outline,) in INVENTED_OUTLINES.items():
        mask = np.asarray(shape_mask(Thing(name, "red"), Spot(0.5, 0.5, 0.4, 0), 64)) > 0
        assert 500 < mask.sum() < 2200 and np.linalg.norm(outline, axis=1).max() <= 1.15, name  # a circle has 1850


def test_a_noun_looks_the_same_wherever_it_is_shown_but_for_a_colour_that_captions_say():
    rng, replaced = np.random.default_rng(0), set()
    for name in list(INVENTED_NOUNS)[:60]:
        own, look = noun_thing(name), INVENTED_NOUNS[name]
        assert (own.shape, own.colour, own.pattern, own.colour2, own.mark) == (
            look.shape,
            look.colour,
            look.pattern,
            look.colour2,
            look.mark,
        )
        for thing in (random_noun(rng, [name], "medium") for _ in range(20)):
            if thing == own:
                assert name_of(thing) == name
                continue
            assert thing == noun_thing(name, colour=thing.colour) and thing.colour not in (look.colour, look.colour2)
            assert name_of(thing) == f"{thing.colour} {name}"
            replaced.add(name)
    assert len(replaced) == 60


def test_a_thing_is_drawn_as_what_its_noun_stands_for():
    """The word changes nothing in the picture."""
    for name in list(INVENTED_NOUNS)[:40]:
        thing = noun_thing(name)
        unnamed = Thing(thing.shape, thing.colour, thing.pattern, thing.colour2, mark=thing.mark)
        background = next(c for c in COLOURS if c not in (thing.colour, thing.colour2))
        named, plain = (np.asarray(draw(Picture((one,), background, seed=3))) for one in (thing, unnamed))
        assert np.array_equal(named, plain)
