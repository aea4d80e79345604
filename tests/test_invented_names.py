"""Invented names: pronounceable, different, and the same for the same seed."""

import re

from tinyldm.lab.world.names import CODAS, MIDDLES, ONSETS, VOWELS, invented_names


def test_names_are_two_syllables_and_all_different():
    names = invented_names(2000, seed=1)
    assert len(set(names)) == 2000
    onset, vowel, middle, coda = ("|".join(part) for part in (ONSETS, VOWELS, MIDDLES, CODAS))
    for name in names:
        assert re.fullmatch(f"({onset})({vowel})({middle})({vowel})({coda})", name), name


def test_the_same_seed_gives_the_same_names_and_another_seed_others():
    names = invented_names(300, seed=1)
    assert names == invented_names(300, seed=1)
    assert len(set(names) & set(invented_names(300, seed=2))) < 10


def test_a_longer_list_begins_with_the_shorter_one():
    assert invented_names(300, seed=1)[:100] == invented_names(100, seed=1)
    assert invented_names(0, seed=1) == []


def test_names_to_avoid_are_passed_over():
    names = invented_names(300, seed=1)
    others = invented_names(300, seed=1, avoid=names[::2])
    assert others[:150] == names[1::2] and not set(others) & set(names[::2])
