"""Prompts of editability: filled as a person would, read by their models as they are meant."""

import pytest
from conftest import WEIGHTS

from tinyldm import InputError
from tinyldm.formats.merges import read_merges
from tinyldm.lab.measure import prompts
from tinyldm.lab.measure.prompts import check_length, filled
from tinyldm.tokenizer import Tokenizer

KINDS = ["background", "style", "composition"]
ALL = prompts.TINY_PROMPTS + prompts.TINY_STYLE_PROMPTS + prompts.STABLE_DIFFUSION_PROMPTS


@pytest.fixture
def tokenizer():
    return Tokenizer(read_merges(WEIGHTS / "merges.txt"), length=32)


@pytest.mark.parametrize(
    "template, text, expected",
    [
        ("a photo of {} on the grass", "", "a photo of on the grass"),
        ("a photo of a {} on the grass", "", "a photo of on the grass"),
        ("an oil painting of {}", "", "an oil painting of"),
        ("{} in an icon", "", "in an icon"),
        ("a photo of a {}", "S*", "a photo of a S*"),
        ("a photo of a {}", "a red star", "a photo of a red star"),
        ("a photo of the {}", "an egg", "a photo of an egg"),
        ("a photo of {}", "a orange star", "a photo of an orange star"),
        ("a photo of a {}", "orange star", "a photo of an orange star"),
        ("my banana {}", "", "my banana"),
    ],
)
def test_prompts_have_one_article_and_without_the_word_none(template, text, expected):
    assert filled(template, text) == expected


def test_every_list_has_all_kinds_and_one_place_for_the_word_in_each_prompt():
    for prompts_of_objects in (prompts.TINY_PROMPTS, prompts.STABLE_DIFFUSION_PROMPTS):
        kinds = [kind for kind, _ in prompts_of_objects]
        assert list(dict.fromkeys(kinds)) == KINDS and len({kinds.count(kind) for kind in KINDS}) == 1
    assert all(template.count("{}") == 1 and kind in KINDS for kind, template in ALL)
    assert len({template for _, template in ALL}) == len(ALL)


def test_the_tiny_world_has_a_word_for_all_that_it_is_asked(tokenizer):
    tokenizer.add_placeholder("S*")
    for _, template in prompts.TINY_PROMPTS + prompts.TINY_STYLE_PROMPTS:
        prompt = filled(template, "S*")
        assert len(tokenizer.encode(prompt)) == len(prompt.split()), prompt  # a word, a token


def test_a_prompt_that_would_be_cut_off_is_an_error(tokenizer):
    check_length([" ".join(["red"] * 30)], tokenizer, "CLIP")
    with pytest.raises(InputError, match='red" has 31 tokens, CLIP reads at most 30; shorten it'):
        check_length(["a red star", " ".join(["red"] * 31)], tokenizer, "CLIP")


def test_nothing_is_no_prompt(tokenizer):
    with pytest.raises(InputError, match="empty without the word"):
        check_length([filled("a {}", "")], tokenizer, "CLIP")
