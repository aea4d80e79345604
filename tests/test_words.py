"""The figures of learned words, of samples whose truth is known."""

import re
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.formats.embeddings import save_embeddings
from tinyldm.inversion import known_norm
from tinyldm.lab.measure import __main__ as command
from tinyldm.lab.measure import sampling, words
from tinyldm.lab.measure.questions import OBJECTS, TUNING_OBJECTS, true_pictures
from tinyldm.lab.world.distribution import EXAMPLES
from tinyldm.lab.world.things import Thing

MEASURE = "tinyldm.lab.measure"
HEART = Thing("heart", "orange", "checkered", "black")


@pytest.fixture
def learned(monkeypatch):
    """(five pictures, seed) of every word that was to be learned; it is all ones."""
    asked = []

    def word_for(training, pictures, seed):
        asked.append((pictures, seed, training.options))
        return {"S*": torch.ones(1, 128)}

    def learn(training, folder, out):
        out.mkdir()
        save_embeddings(out / "embedding.safetensors", {"S*": torch.ones(1, 128)})
        return out / "embedding.safetensors"

    monkeypatch.setattr(words, "word_for", word_for)
    monkeypatch.setattr(words, "learn", learn)
    return asked


@pytest.fixture
def hearts(monkeypatch):
    """Whatever the model is asked for, each 16 samples show the checkered heart on four backgrounds, 4 of each."""

    def sampled(model, prompts, vectors=None, guidance=None):
        return (true_pictures(HEART) * 3)[: len(prompts)]

    monkeypatch.setattr(sampling, "sampled", sampled)


def test_a_word_is_reported_beside_plain_words_and_its_mean_over_seeds(run, tmp_path, hearts, learned, monkeypatch):
    monkeypatch.setattr(command, "OBJECTS", [HEART, Thing("star", "purple")])
    outcome = run(MEASURE, "--only", "words", "--seeds", 2, "--train", "--steps 5", "--sheets", tmp_path)
    plain, heart, _, star, mean = outcome.out.splitlines()
    figures = "colours 100%, shape 100%, background 100%, a sketch of S* 0%, two S*s 0%, another colour 0%"
    assert plain == f"orange and black checkered heart, in plain words: {figures}"
    assert re.fullmatch(rf"orange and black checkered heart, learned: {re.escape(figures)}, norm \d+\.\d\d", heart)
    assert star.startswith("purple star, learned: colours 0%, shape 0%, background")
    assert mean.startswith("mean of 4 words for 2 things: colours 50.0% (0.0% to 100.0%), shape 50.0% (0.0% to 100.0%)")
    assert re.search(r", norm (\d+\.\d\d) \(\1 to \1\)$", mean)
    assert sorted(seed for _, seed, _ in learned) == [0, 0, 1, 1]
    assert all(options == ("--steps", "5") and len(pictures) == 5 for pictures, _, options in learned)
    assert Image.open(tmp_path / "word-orange-and-black-checkered-heart.png").width > 64


def test_settings_are_tuned_on_other_objects_than_those_reported(run, hearts, learned):
    assert not set(OBJECTS) & set(TUNING_OBJECTS) and len(TUNING_OBJECTS) == 4
    *lines, mean = run(MEASURE, "--only", "words", "--tuning", "--seeds", 1).out.splitlines()
    assert [line.split(",")[0] for line in lines] == [words.name_of(thing) for thing in TUNING_OBJECTS]
    assert mean.startswith("mean of 4 words for 4 things: ")


def test_examples_are_reported_with_their_time(run, tmp_path, hearts, learned, monkeypatch):
    monkeypatch.setattr(words, "EXAMPLES", {name: EXAMPLES[name] for name in ("checkered-heart", "bolt")})
    heart, bolt = run(MEASURE, "--only", "examples", "--sheets", tmp_path).out.splitlines()
    assert re.fullmatch(r"checkered-heart: colours 100%, shape 100%, background 100%, learned in \d+ s", heart)
    assert re.fullmatch(r"bolt: colours 0%, background \d+%, learned in \d+ s", bolt)
    assert Image.open(tmp_path / "examples.png").width > 64


def test_the_norm_is_relative_to_that_of_known_words(tiny):
    vectors = torch.nn.functional.normalize(torch.ones(2, 128)) * torch.tensor([[10.0], [20.0]])
    assert words.relative_norm(tiny, vectors) == pytest.approx(15 / known_norm(tiny))


@pytest.mark.parametrize("count", [5, 8, 17])
def test_of_few_values_too_the_interval_holds_the_mean_in_95_of_100_cases(monkeypatch, count):
    monkeypatch.setattr(words, "RESAMPLES", 1000)
    samples = np.random.default_rng(0).normal(size=(500, count))
    held = np.mean([low <= 0 <= high for low, high in map(words.interval, samples)])
    assert 0.9 < held < 0.98  # the plain bootstrap: 0.84, 0.87 and 0.91


def test_the_quantiles_of_students_t_are_those_of_the_tables():
    for freedom, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (16, 2.120), (100, 1.984)):
        assert words.student(freedom) == pytest.approx(expected, abs=0.01)


def test_the_interval_is_that_of_the_mean_and_narrows_with_more_words():
    for value in (0.7, 0.1, 0.95):
        low, high = words.interval([value] * 17)
        assert low <= fmean([value] * 17) <= high and high - low < 1e-9
    values = np.random.default_rng(0).normal(0.5, 0.2, 400)
    low, high = words.interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
    few = words.interval(values[:16])
    assert few[1] - few[0] > 3 * (high - low)
