"""What words are learned for, and what is asked about it."""

import pytest

from tinyldm.images import to_tensor
from tinyldm.lab.measure.judge import ANSWERS, load_judge
from tinyldm.lab.measure.questions import OBJECTS, TUNING_OBJECTS, Sees
from tinyldm.lab.paper.concepts import CHOOSING, CONCEPTS, FRESH_LOOK, MARKED_THING, REPORTING
from tinyldm.lab.world.captions import name_of
from tinyldm.lab.world.nouns import ALL_NOUNS, thing_of
from tinyldm.lab.world.styles import INVENTED_STYLES, is_like_a_held_out_style, is_like_a_photo


def pixels_of(concepts):
    return {image.tobytes() for concept in concepts.values() for image in concept.images(32)}


def test_the_sets_have_no_concept_and_no_picture_in_common():
    assert not CHOOSING.keys() & REPORTING.keys()
    choosing, reporting = pixels_of(CHOOSING), pixels_of(REPORTING)
    assert len(choosing) == 5 * len(CHOOSING) and len(reporting) == 5 * len(REPORTING)
    assert not choosing & reporting


def test_settings_are_chosen_on_those_that_were_chosen_by_before_and_never_on_those_reported():
    assert {name_of(thing) for thing in TUNING_OBJECTS} <= CHOOSING.keys()
    assert {name_of(thing) for thing in OBJECTS} <= REPORTING.keys()


def test_there_are_enough_of_all_kinds():
    kinds = [concept.kind for concept in REPORTING.values()]
    assert len(CHOOSING) == 8 and len(REPORTING) >= 16
    assert {kind: kinds.count(kind) for kind in kinds} == {"combination": 8, "shape": 3, "figure": 4, "style": 2}


def test_the_checkpoint_never_saw_the_marked_thing_nor_the_fresh_look():
    assert MARKED_THING not in {thing_of(look) for look in ALL_NOUNS.values()}
    assert FRESH_LOOK not in INVENTED_STYLES.values()
    assert not is_like_a_held_out_style(FRESH_LOOK) and not is_like_a_photo(FRESH_LOOK)


@pytest.mark.parametrize("name", ["yellow bolt", "snowman", "fresh look"])
def test_pictures_are_the_same_every_time(name):
    assert [one.tobytes() for one in CONCEPTS[name].images(32)] == [one.tobytes() for one in CONCEPTS[name].images(32)]


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_judge_knows_the_answers_that_are_expected(name):
    questions = CONCEPTS[name].questions("S*")
    for question in questions:
        for check in question.checks.values():
            assert not isinstance(check, Sees) or check.answer in ANSWERS[check.question]
    assert len(questions) == (16 if CONCEPTS[name].kind == "style" else 20)


def test_of_shapes_that_the_judge_never_saw_the_outline_is_measured():
    asked = {name: {what for one in CONCEPTS[name].questions("S*") for what in one.checks} for name in CONCEPTS}
    common = {"colours", "background", "style", "count", "new colour"}
    assert asked["purple star"] == asked["orange hexagon with a circle"] == common | {"shape", "pattern"}
    assert asked["yellow bolt"] == asked["face"] == common | {"outline"}
    assert asked["blueprint"] == asked["fresh look"] == {"its own style", "the noun's shape"}


def test_the_fresh_look_is_one_that_the_judge_calls_invented():
    answers = load_judge().answers(to_tensor(CONCEPTS["fresh look"].images(64)))
    assert [answer["style"] for answer in answers] == ["invented"] * 5


def test_captions_are_true_of_each_picture():
    assert CONCEPTS["purple star"].captions("S*")[:3] == [
        "a photo of S* on a blue background",
        "a photo of S* on the grass",
        "a photo of S* on a gray background",
    ]
    assert CONCEPTS["blueprint"].captions("S*")[0] == "a painting of a kite in the style of S*"


def test_only_what_captions_can_say_has_plain_words():
    plain = {name: concept.plain for name, concept in CONCEPTS.items() if concept.plain}
    assert len(plain) == 12 and plain["orange and black checkered heart"] == "an orange and black checkered heart"
    assert {CONCEPTS[name].kind for name in plain} == {"combination"}
