"""What is asked can be answered, and checks pass on what they ask for and on nothing else."""

from functools import cache

import numpy as np
import pytest
from conftest import WEIGHTS

from tinyldm.formats.merges import read_merges
from tinyldm.images import to_tensor
from tinyldm.lab.measure import questions
from tinyldm.lab.measure.judge import ANSWERS, load_judge
from tinyldm.lab.measure.questions import Behind, HasColours, Sees
from tinyldm.lab.world.captions import with_articles
from tinyldm.lab.world.distribution import pictures_in_style
from tinyldm.lab.world.styles import HELD_OUT_STYLES, STYLES, draw
from tinyldm.lab.world.things import COLOURS, PATTERNS, SHAPES, Picture, Thing, is_held_out
from tinyldm.tokenizer import Tokenizer


def can_be_right(check) -> bool:
    """Whether an answer of the judge, or a picture of the named colours, can pass it."""
    match check:
        case Sees(question, answer):
            return answer in ANSWERS[question]
        case HasColours(expected):
            return len(expected) in (1, 2) and len(set(expected)) == len(expected) and set(expected) <= set(COLOURS)
        case Behind(colour):
            return colour in COLOURS
    return False


@pytest.mark.parametrize("what", questions.PROMPTS)
def test_every_prompt_has_checks_that_can_be_right_and_words_that_the_model_knows(what):
    tokenizer = Tokenizer(read_merges(WEIGHTS / "merges.txt"), length=32)
    questions_of, count = questions.PROMPTS[what]
    asked = questions_of(np.random.default_rng(0))
    for question in (next(asked) for _ in range(count)):
        assert question.checks and all(map(can_be_right, question.checks.values())), question
        prompt = with_articles(question.prompt)
        assert len(tokenizer.encode(prompt)) == len(prompt.split()), prompt  # a word, a token


def test_the_prompts_of_a_kind_ask_for_every_answer_there_is():
    for what, question, answers in (
        ("a {colour} and {colour} {pattern} {shape}", "pattern", set(PATTERNS)),
        ("… on the left, at the top, …", "place", set(ANSWERS["place"]) - {"middle"}),
        ("… on the grass, in the snow, …", "scene", set(ANSWERS["scene"]) - {"plain"}),
        ("a sketch of …, pixel art of …, …", "style", set(STYLES) - {"photo"}),
        ("a small, a large …", "size", {"small", "large"}),
        ("a {colour} {shape} on a {colour} background", "shape", set(SHAPES)),
        ("a {noun}", "shape", {"oval", "circle", "balloon", "arch"}),
    ):
        questions_of, count = questions.PROMPTS[what]
        taken = questions.enough(questions_of(np.random.default_rng(0)), count)
        asked = [check for q in taken for check in q.checks.values() if isinstance(check, Sees)]
        assert {check.question for check in asked} == {question}
        assert answers <= {check.answer for check in asked}


@cache
def seen_by_judge(thing, background, style="photo"):
    images = [draw(Picture((thing,), background, style, seed=seed)) for seed in range(8)]
    return [np.asarray(image) for image in images], load_judge().answers(to_tensor(images))


def test_checks_pass_on_what_they_ask_for_and_on_nothing_else():
    thing, other = Thing("star", "red"), Thing("circle", "green", "striped", "white")
    checks = {"colour": HasColours(("red",)), "background": Behind("blue"), "shape": Sees("shape", "star")}
    for shown, background, expected in ((thing, "blue", True), (other, "yellow", False)):
        for pixels, said in zip(*seen_by_judge(shown, background), strict=True):
            assert {what: check(pixels, said) for what, check in checks.items()} == dict.fromkeys(checks, expected)


def test_a_learned_word_is_asked_on_four_backgrounds_and_to_combine():
    for thing in questions.OBJECTS:
        alone, combined = questions.on_backgrounds("S*", thing), questions.combined("S*", thing)
        assert len(alone) == 16 and len({question.prompt for question in alone}) == 4
        assert all(can_be_right(check) for question in alone for check in question.checks.values())
        assert [question.prompt for question in combined[::8]][:2] == ["a sketch of S*", "a photo of two S*s"]
        assert len(combined) == 24 and all("S*" in question.prompt for question in alone + combined)
    assert len(questions.OBJECTS) == 8 and all(map(is_held_out, questions.OBJECTS))


def test_shapes_that_the_judge_never_saw_are_not_asked_for():
    (checks,) = {tuple(q.checks) for q in questions.on_backgrounds("S*", Thing("bolt", "yellow"))}
    assert checks == ("colours", "background")


def test_words_in_another_colour_may_keep_or_lose_their_second_colour():
    thing = Thing("circle", "orange", "striped", "white")
    question = questions.combined("S*", thing)[-1]
    check = question.checks["another colour"]
    for look, expected in (("blue", None), True), (("blue", "white"), True), (("orange", "white"), False):
        drawn = Thing("circle", look[0], look[1] and "striped", look[1])
        assert check(np.asarray(draw(Picture((drawn,), "gray", seed=1))), {}) is expected
    assert with_articles(question.prompt) == "a photo of a blue S* on a white background"


def test_plain_words_are_asked_for_the_one_colour():
    question = questions.combined("S*", Thing("star", "blue"))[-1]
    assert question.prompt == "a photo of a red S* on a white background"
    check = question.checks["another colour"]
    for colour in ("red", "blue"):
        assert check(np.asarray(draw(Picture((Thing("star", colour),), "gray", seed=1))), {}) is (colour == "red")


@pytest.mark.parametrize("style", HELD_OUT_STYLES)
def test_a_learned_style_is_asked_of_four_nouns_that_it_was_not_learned_from(style):
    asked = questions.in_style("S*", style)
    assert len(asked) == len(questions.true_pictures_in_style(style)) == 64
    assert {question.prompt for question in asked} >= {"a painting of a lemon in the style of S*"}
    assert all(can_be_right(check) for question in asked for check in question.checks.values())
    learned_from = {thing.shape for picture in pictures_in_style(style) for thing in picture.things}
    shapes = {question.checks["shape"].answer for question in asked}
    assert len(shapes) == 4 and not shapes & learned_from


def test_no_figure_is_of_fewer_than_six_pictures():
    of_styles = questions.enough(questions.styles(np.random.default_rng(8)), 6)
    asked = [style for question in of_styles for style in question.checks]
    assert len(asked) == 30 and {asked.count(style) for style in asked} == {6}
    assert len(questions.enough(questions.two(np.random.default_rng(4)), 0)) == 6
    assert len(questions.enough(questions.two(np.random.default_rng(4)), 7)) == 7
