"""The judge on pictures it never saw, and the figures of weights/tiny/README.md on smaller samples."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import WEIGHTS
from tinyldm.lab.measure.evaluate import colours_right, flat_colour_error, generate

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.lab.measure import judge, report
from tinyldm.lab.world.captions import with_articles
from tinyldm.lab.world.distribution import is_held_out
from tinyldm.lab.world.drawing import draw
from tinyldm.lab.world.things import Picture, Thing, noun_thing


@pytest.fixture(scope="module")
def trained():
    return judge.load_judge()


def test_the_judge_is_right_about_real_pictures(trained):
    shares = judge.right(trained, count=800)
    assert set(shares) == set(judge.ANSWERS)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize(
    "picture, expected",
    [
        (Picture((Thing("star", "red"),), "blue"), {"count": "one", "shape": "star", "pattern": "plain"}),
        (Picture((Thing("star", "red"),) * 2, "blue"), {"count": "two", "shape": "star", "right shape": "star"}),
        (Picture((noun_thing("kite", "small"),), "snow", "sketch"), {"pattern": "halved", "size": "small"}),
        (Picture((Thing("ring", "red"), Thing("drop", "blue")), "grass"), {"shape": "ring", "right shape": "drop"}),
        (Picture((Thing("ring", "red"),), "grass", place="top"), {"scene": "grass", "place": "top", "style": "photo"}),
    ],
)
def test_the_truth_is_what_the_picture_says(picture, expected):
    assert expected.items() <= judge.truth(picture).items()


def test_questions_have_exactly_the_answers_that_there_are():
    rng = np.random.default_rng(0)
    for questions_of, _ in report.PROMPTS.values():
        asked = questions_of(rng)
        for question in (next(asked) for _ in range(60)):
            assert question.checks and question.prompt == " ".join(question.prompt.split())


@cache
def seen_by_judge(thing, background, style="photo"):
    pixels = np.stack([np.asarray(draw(Picture((thing,), background, style, seed=seed))) for seed in range(8)])
    return pixels, judge.load_judge().answers(judge.to_tensor(pixels))


def test_checks_pass_on_what_they_ask_for_and_on_nothing_else():
    thing, other = Thing("star", "red"), Thing("circle", "green", "striped", "white")
    question = report.Question("", {"colour": report.has_colours(thing), "background": report.behind("blue")})
    question.checks["shape"] = report.sees("shape", "star")
    for shown, background, expected in ((thing, "blue", True), (other, "yellow", False)):
        for pixels, said in zip(*seen_by_judge(shown, background), strict=True):
            assert {what: check(pixels, said) for what, check in question.checks.items()} == dict.fromkeys(
                question.checks, expected
            )


def test_a_learned_word_is_asked_on_four_backgrounds_and_to_combine():
    thing = report.OBJECTS[0]
    asked = report.of_a_word("S*", thing)
    assert len(asked["word"]) == 16 and len({question.prompt for question in asked["word"]}) == 4
    assert all("S*" in question.prompt for questions in asked.values() for question in questions)
    assert asked["two"][0].prompt == "a photo of two S*s"
    assert len(report.OBJECTS) == 8 and all(is_held_out(thing) for thing in report.OBJECTS)


def test_blue_words_may_keep_or_lose_their_second_colour():
    thing = Thing("circle", "orange", "striped", "white")
    (question,) = {id(q): q for q in report.of_a_word("S*", thing)["blue"]}.values()
    check = question.checks["a blue S*"]
    for look, expected in (("blue", None), True), (("blue", "white"), True), (("orange", "white"), False):
        drawn = Thing("circle", look[0], look[1] and "striped", look[1])
        assert check(np.asarray(draw(Picture((drawn,), "gray", seed=1))), {}) is expected
    assert with_articles(question.prompt) == "a photo of a blue S* on a white background"


def test_no_figure_is_of_fewer_than_six_pictures():
    of_styles = report.first(report.styles(np.random.default_rng(8)), 6)
    asked = [style for question in of_styles for style in question.checks]
    assert len(asked) == 30 and {asked.count(style) for style in asked} == {6}
    assert len(report.first(report.two(np.random.default_rng(4)), 0)) == 6
    assert len(report.first(report.two(np.random.default_rng(4)), 7)) == 7


def test_the_tiny_checkpoint_obeys_its_prompts(trained):
    """What `--only prompts` measures, on a twentieth of its prompts, or six for each figure."""
    figures = report.report_prompts(WEIGHTS, trained, 0.05, None)
    assert len(figures) == 18
    assert min(figures.values()) >= 0.8 and np.mean(list(figures.values())) >= 0.95, figures


def test_the_autoencoder_keeps_flat_colours_and_patterns(trained, capsys):
    model = load_checkpoint(WEIGHTS)
    assert flat_colour_error(model) <= 8
    report.report_autoencoder(model, trained, 60)
    quality, _, patterns = capsys.readouterr().out.splitlines()
    assert float(re.search(r"([\d.]+) dB", quality)[1]) >= 31
    assert int(re.search(r"(\d+)% of", patterns)[1]) >= 85


def test_seeds_differ_as_in_the_world_and_guidance_burns_no_colour():
    """What `python -m tinyldm.lab.measure.report --only variety` measures, of 16 seeds."""
    red_star = Picture((Thing("star", "red"),), "gray")
    world = report.spread([np.asarray(draw(replace(red_star, seed=seed))) for seed in range(64)])
    model, prompts = load_checkpoint(WEIGHTS), ["a photo of a red star on a gray background"] * 16
    for guidance in (1, 8):
        pictures = [np.asarray(image) for image in generate(model, prompts, guidance=guidance)]
        assert all(colours_right(picture, ("red",)) for picture in pictures)
        assert report.spread(pictures)["centre"] > 0.6 * world["centre"]
        if guidance == 1:
            assert report.spread(pictures)["area"] > 0.5 * world["area"]
        assert np.mean([(picture == 0) | (picture == 255) for picture in pictures]) < 0.01
