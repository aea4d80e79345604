"""The figures of a word: known answers on features made by hand, and the command on small models."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, WEIGHTS
from helpers.public import SMALL_TEXT, save_folder, write_merges
from helpers.reference import CLIPS, randomise
from PIL import Image

from tinyldm.clip_image import CLIP
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.inversion import add_words
from tinyldm.lab.measure import score as module
from tinyldm.lab.measure.judge import ANSWERS
from tinyldm.lab.measure.prompts import STABLE_DIFFUSION_PROMPTS, TINY_PROMPTS, TINY_STYLE_PROMPTS
from tinyldm.lab.measure.questions import Sees
from tinyldm.lab.measure.score import Target, compared, mean_cosine_among, mean_pairwise_cosine, questions_of_thing
from tinyldm.lab.measure.zero_shot import read_clip
from tinyldm.lab.world.things import Thing

SCORE = "tinyldm.lab.measure.score"
CIRCLE = "teal and white striped circle"
TINY_CLIP = WEIGHTS / "clip.safetensors"
NORTH, EAST, BETWEEN = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])


# ---- Of features


def test_the_pairwise_cosine_is_the_mean_over_all_pairs():
    pairs = mean_pairwise_cosine(torch.stack([NORTH, EAST]), torch.stack([EAST, BETWEEN]))
    assert pairs == pytest.approx((0 + 0.8 + 1 + 0.6) / 4)


def test_training_pictures_are_compared_with_other_ones_only():
    assert mean_cosine_among(torch.stack([NORTH, EAST, BETWEEN])) == pytest.approx((0 + 0.8 + 0.6) / 3)
    assert mean_cosine_among(NORTH[None]) is None


def test_the_cosine_of_the_mean_is_not_the_mean_of_the_cosines():
    """Their mean is (0.5, 0.5), of length sqrt(0.5)."""
    (row,) = compared(None, [Target("style", "a sketch of", BETWEEN)], [torch.stack([NORTH, EAST])]).prompts
    assert row.editability == pytest.approx(0.7 / 0.5**0.5)
    assert row.mean_of_cosines == pytest.approx(0.7)


def test_prompts_are_averaged_over_all_and_over_each_kind():
    targets = [Target("style", "a", NORTH), Target("composition", "b", EAST), Target("style", "c", BETWEEN)]
    figures = compared(0.5, targets, [NORTH[None], NORTH[None], EAST[None]]).as_dict()
    assert figures["editability"] == pytest.approx((1 + 0 + 0.6) / 3)
    assert {kind: values["editability"] for kind, values in figures["kinds"].items()} == {
        "style": pytest.approx(0.8),
        "composition": 0,
    }


# ---- What is drawn


@pytest.fixture
def asked(monkeypatch):
    """Nothing is drawn: what was asked for is kept, (prompts, seeds, sampler's steps) of each call."""
    calls = []

    def samples(model, prompts, seeds, words, batch):
        if prompts:
            calls.append((prompts, list(seeds), model.defaults.sampler_steps, model.defaults.sampler))
        return [Image.new("RGB", (64, 64), (i, 0, 0)) for i in seeds]

    monkeypatch.setattr(module, "samples", samples)
    return calls


def test_word_and_references_get_the_same_prompts_and_seeds(tiny, asked):
    words = {"S*": torch.ones(1, 128)}
    add_words(tiny, words)
    prompts = [("background", "a photo of the {} on the grass"), ("style", "a sketch of {}")]
    references = {"prompt only": "", "plain words": "an egg"}
    clip = read_clip(TINY_CLIP)
    training = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    result = module.score(tiny, *clip, words, "S*", training, prompts, references=references, num=3, steps=7, seed=5)
    assert [prompts for prompts, *_ in asked] == [
        [prompt] * 3
        for prompt in (
            "a photo of S*",
            "a photo of the S* on the grass",
            "a sketch of S*",
            "a photo of",
            "a photo of on the grass",
            "a sketch of",
            "a photo of an egg",
            "a photo of an egg on the grass",
            "a sketch of an egg",
        )
    ]
    assert all(call[1:] == ([5, 6, 7], 7, "ddim") for call in asked)
    assert list(result.references) == ["image only", "prompt only", "plain words"]
    assert [row.prompt for row in result.figures.prompts] == ["a photo of on the grass", "a sketch of"]
    assert result.truth == {}


@pytest.mark.parametrize("thing", [Thing("circle", "teal", "striped", "white"), Thing("star", "purple")])
def test_a_thing_is_checked_in_all_that_the_paper_edits(thing):
    checks = {what: check for question in questions_of_thing("S*", thing) for what, check in question.checks.items()}
    assert list(checks) == ["colours", "shape", "background", "pattern", "style", "count", "new colour"]
    assert checks["pattern"] == Sees("pattern", thing.pattern or "plain")
    assert checks["pattern"].answer in ANSWERS["pattern"]


# ---- The command


@pytest.fixture
def word(tmp_path):
    path = tmp_path / "word.safetensors"
    save_embeddings(path, {"S*": torch.full((1, 128), 0.01)})
    return path


@pytest.fixture
def command(word):
    """The options that the tests have in common."""
    return [SCORE, "--embedding", word, "--images", EXAMPLES / "striped-circle", "--num", 2, "--steps", 2]


PARTS = {"reconstruction", "editability", "mean_of_cosines", "kinds", "prompts"}


def test_the_command_writes_all_figures_and_the_same_ones_whatever_stands_beside_the_word(run, tmp_path, command):
    (tmp_path / "prompts.txt").write_text("a photo of a {} on the grass\n")
    command += ["--prompts", "prompts.txt", "--json", "score.json"]
    assert run(*command).err == ""
    alone = json.loads((tmp_path / "score.json").read_text())
    outcome = run(*command, "--thing", CIRCLE, "--short", "a striped circle", "--long", "a teal circle")
    text = (tmp_path / "score.json").read_text()
    assert text.count("\n") == 1
    figures = json.loads(text)
    assert set(figures) == set(alone) == {"word", "num", "steps", "seed", "references", "truth"} | PARTS
    assert [figures[part] for part in PARTS] == [alone[part] for part in PARTS]
    assert [row["prompt"] for row in figures["prompts"]] == ["a photo of on the grass"]
    names = ["image only", "prompt only", "plain words", "short caption", "long caption"]
    assert list(figures["references"]) == names and list(alone["references"]) == names[:2]
    assert all(set(reference) == PARTS for reference in figures["references"].values())
    assert figures["truth"].keys() == {"colours", "shape", "background", "pattern", "style", "count", "new colour"}
    assert alone["truth"] == {}
    head, *rows, truth = outcome.out.splitlines()
    assert head.split() == ["reconstruction", "editability", "mean", "of", "cosines"]
    assert [row.rsplit(maxsplit=3)[0] for row in rows] == ["S*", *names]
    assert rows[0].split()[1:3] == [f"{figures[what]:.3f}" for what in ("reconstruction", "editability")]
    assert truth.startswith("S*: colours ")


def test_the_tiny_worlds_prompts_are_asked_and_no_truth_is_told_of_what_is_not_named(run, asked, command):
    outcome = run(*command)
    assert [prompts[0] for prompts, *_ in asked[:13]] == [
        "a photo of S*",
        *(template.format("S*") for _, template in TINY_PROMPTS),
    ]
    head, *rows = outcome.out.splitlines()
    assert head.split()[2:5] == ["background", "style", "composition"]
    assert [row.rsplit(maxsplit=6)[0] for row in rows] == ["S*", "image only", "prompt only"]


def test_a_style_is_asked_for_as_a_style(run, asked, command):
    truth = run(*command, "--style", "stained glass").out.splitlines()[-1]
    assert [prompts[0] for prompts, *_ in asked[:5]] == [
        "a painting in the style of S*",
        *(template.format("S*") for _, template in TINY_STYLE_PROMPTS),
    ]
    assert truth.startswith("S*: style 0%, shape ") and len(asked[-1][0]) == 64


def test_of_one_picture_alone_there_are_no_pairs(run, tmp_path, asked, command):
    (tmp_path / "one").mkdir()
    Image.fromarray(np.full((80, 64, 3), 90, np.uint8)).save(tmp_path / "one" / "0.png")
    rows = run(*command, "--images", "one").out.splitlines()
    assert rows[2].split()[:3] == ["image", "only", "-"]


@pytest.fixture
def public(tmp_path):
    """A small random Stable Diffusion, whose CLIP has OpenAI's names and shapes. -> their options."""
    save_folder(tmp_path / "sd", "1.x")
    small = CLIPS["openai"]
    clip = CLIP(replace(small, text=replace(small.text, vocabulary_size=SMALL_TEXT.vocabulary_size, length=77)))
    randomise(clip)
    (tmp_path / "clip").mkdir()
    torch.save(clip.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    write_merges(tmp_path / "clip")
    return ["--weights", tmp_path / "sd", "--clip", tmp_path / "clip" / "pytorch_model.bin"]


def test_stable_diffusion_is_asked_its_own_prompts_and_seen_by_openais_clip(run, tmp_path, command, public):
    outcome = run(*command, *public, "--num", 1, "--steps", 1, "--json", "sd.json")
    assert (outcome.status, outcome.err) == (0, "")
    figures = json.loads((tmp_path / "sd.json").read_text())
    assert [row["kind"] for row in figures["prompts"]] == [kind for kind, _ in STABLE_DIFFUSION_PROMPTS]
    assert "a photo of on a snowy mountain" in [row["prompt"] for row in figures["prompts"]]
    assert -1 <= figures["reconstruction"] <= 1 and figures["references"]["image only"]["reconstruction"] > 0.5


# ---- Wrong input

LONG = " ".join(["a red star and"] * 7)
WRONG = {
    "a thing of no world": (["--thing", "striped teal"], "'striped teal' names nothing of the tiny world"),
    "a style and a thing": (["--style", "sketch", "--thing", CIRCLE], "not allowed with argument"),
    "an unknown style": (["--style", "cubism"], "invalid choice: 'cubism'"),
    "a short caption that is long": (["--short", LONG], "has 28 words, expected 1 to 12"),
    "an empty caption": (["--long", " "], "has 0 words, expected 1 to 30"),
    "a caption that the model can't read": (["--long", LONG], "tokens, the model reads at most 30; shorten it"),
    "no CLIP": (["--clip", "nowhere.safetensors"], "nowhere.safetensors can't be read"),
    "no pictures": (["--images", "nowhere"], "no such folder: nowhere"),
    "no embedding": (["--embedding", "nowhere.pt"], "no such file: nowhere.pt"),
    "two words": (["--embedding", "two.safetensors"], 'expected one; try --embedding "two.safetensors:A*"'),
    "a word of the vocabulary": (["--embedding", "word.safetensors:star"], "--embedding FILE:WORD calls the word"),
    "no prompts": (["--prompts", "empty.txt"], "no template in empty.txt"),
    "a prompt of the word alone": (["--prompts", "alone.txt"], "is empty without the word"),
    "a prompt that hides the word": (["--prompts", "hidden.txt"], "hides S*"),
    "nowhere to write": (["--json", "nowhere/score.json"], "there is no folder 'nowhere'; make it first"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(run, tmp_path, command, name):
    options, error = WRONG[name]
    save_embeddings(tmp_path / "two.safetensors", {"A*": torch.ones(1, 128), "B*": torch.ones(1, 128)})
    for file, text in {"empty": "", "alone": "a {}", "hidden": "a photo of x{}"}.items():
        (tmp_path / f"{file}.txt").write_text(text)
    assert error in run(*command, *options).error


@pytest.mark.parametrize(
    "options, error",
    [
        (["--thing", CIRCLE], "makes pictures of 32 pixels; --thing and --style are for the tiny world"),
        ([], "expected another: hf download openai/clip-vit-base-patch32"),
        (["--clip", TINY_CLIP, "--prompts", "long.txt"], "tokens, CLIP reads at most 30; shorten it"),
    ],
    ids=["a thing", "its CLIP", "the length of its CLIP"],
)
def test_what_is_of_the_tiny_world_is_refused_for_another(run, tmp_path, command, public, options, error):
    (tmp_path / "long.txt").write_text(f"{LONG} a red star {{}}")
    assert error in run(*command, *public[:2], *options).error
