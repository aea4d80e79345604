"""What each way to learn a word promises, on the tiny checkpoint."""

from dataclasses import fields
from functools import partial

import pytest
import torch
from conftest import EXAMPLES
from safetensors.torch import load_file, save_file

import train
from tinyldm import InputError, recipes
from tinyldm import run as running
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.images import read_images
from tinyldm.inversion import Pictures, known_norm, vectors_of
from tinyldm.lab.world.distribution import pictures_of
from tinyldm.lab.world.nouns import noun_thing
from tinyldm.lab.world.styles import draw
from tinyldm.optimizers import OnSphere
from tinyldm.recipes import (
    CANDIDATES,
    RECIPES,
    AtTheEnd,
    Lesson,
    ProgressiveWord,
    Recipe,
    WhenFlat,
    Word,
    WordPerPicture,
    best_words,
    composed,
    constant,
    falling,
    outputs,
)

CIRCLE = EXAMPLES / "striped-circle"
SHORT = ("--images", CIRCLE, "--token", "S*", "--steps", 10, "--preview-every", 10, "--batch", 2, "--lr", 0.01)


@pytest.fixture(autouse=True)
def one_picture_a_preview(monkeypatch):
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))


@pytest.fixture
def few_candidates(monkeypatch):
    monkeypatch.setattr(recipes, "CANDIDATES", 2)


def lesson(model, kind=Word, phrase="thing", count=1, folder=CIRCLE, batch=8):
    images = [image for _, image in read_images(folder, 64)]
    word = kind(model, "S*", vectors_of(model, phrase, count), len(images))
    pictures = Pictures(*train.encode(model, images), word.captions([["a photo of a S*"]] * len(images)))
    return Lesson(model, word, pictures, batch, partial(train.inversion_loss, model), loss_scale=1.0)


def learned(folder):
    return load_embeddings(folder / "outputs" / "S" / "embedding.safetensors")["S*"]


# ---- Names


def test_a_recipe_without_names_is_the_papers():
    assert composed("paper") == Recipe()


def test_names_are_composed():
    recipe = composed("3-word,falling,fixed-norm")
    assert recipe == Recipe(vectors=3, rate=falling, optimizer=OnSphere)


def test_every_name_changes_something_that_recipes_have():
    known = {field.name for field in fields(Recipe)}
    assert all(changes and changes.keys() <= known for name, changes in RECIPES.items() if name != "paper")
    assert len({str(changes) for changes in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_a_word(run, tmp_path, name, few_candidates):
    captioned = tmp_path / "pictures"
    captioned.mkdir()
    for i, (path, _) in enumerate(read_images(CIRCLE)):
        (captioned / f"a photo of S* {i}{path.suffix}").write_bytes(path.read_bytes())
    outcome = run("train.py", *SHORT, "--images", captioned, "--steps", 3, "--recipe", name)
    assert outcome.status == 0 and learned(tmp_path).isfinite().all()


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("low-variance,slow", 'no recipe "slow", expected some of paper, high-rate'),
        ("", 'no recipe ""'),
        ("2-word,progressive", "2-word and progressive both change the vectors; choose one of them"),
        ("fixed-norm,kept-norm", "fixed-norm and kept-norm both change the optimizer"),
    ],
)
def test_names_that_make_no_recipe_are_refused(run, names, error):
    assert error in run("train.py", *SHORT, "--recipe", names).error


def test_vectors_asked_for_come_before_those_of_a_recipe(run, tmp_path):
    assert run("train.py", *SHORT, "--steps", 1, "--recipe", "3-word", "--vectors", 2).status == 0
    assert learned(tmp_path).shape == (2, 128)


# ---- Which vectors there are


def test_vectors_wait_for_their_turn(tiny):
    of = lesson(tiny, ProgressiveWord, count=3)
    word, first = of.word, tiny.tokenizer.vocabulary_size
    word.vectors = word.vectors.requires_grad_()
    for done, count in ((0, 1), (0.39, 1), (0.4, 2), (0.79, 2), (0.8, 3), (1, 3)):
        word.vectors.grad = None
        words = word.now(done)
        assert (
            words["S*"].shape == (count, 128) and tiny.tokenizer.encode("S*") == [first, first + 1, first + 2][:count]
        )
        of.loss_of(of.fixed_batch(2), words).backward()
        assert [bool(row.any()) for row in word.vectors.grad] == [i < count for i in range(3)]


def test_vectors_that_wait_do_not_move_and_are_not_in_the_file(run, tmp_path):
    words = (*SHORT, "--recipe", "progressive", "--save-every", 1, "--preview-every", 4)
    assert run("train.py", *words).status == 0
    sizes = [len(load_embeddings(tmp_path / f"outputs/S/embedding-{i:06d}.safetensors")["S*"]) for i in range(1, 11)]
    assert sizes == [1] * 3 + [2] * 4 + [3] * 3
    assert learned(tmp_path).shape == (3, 128)


def test_vectors_that_would_never_join_are_refused(run):
    error = run("train.py", *SHORT, "--recipe", "progressive", "--vectors", 5).error
    assert "5 vectors, of which the recipe progressive learns 3; try --vectors 3, or another --recipe" in error


def test_a_caption_that_a_pictures_token_makes_too_long_is_an_error_before_the_first_step(run, tmp_path):
    (tmp_path / "long.txt").write_text("a photo of a {}" + " on a red background" * 5 + " with a star beside it\n")
    assert run("train.py", *SHORT, "--templates", "long.txt", "--steps", 1).status == 0
    error = run("train.py", *SHORT, "--templates", "long.txt", "--recipe", "per-image", "--out", "new").error
    assert '"<S* in picture 1>" is cut off' in error and not (tmp_path / "new").exists()


@pytest.mark.parametrize("recipe", ["regularised", "fixed-norm"])
def test_a_resumed_run_keeps_the_start_that_it_began_with(run, tmp_path, recipe):
    """Towards which both are pulled, whatever is in the file of --init by then."""
    file = tmp_path / "init.safetensors"
    save_embeddings(file, {"S*": torch.linspace(-1, 1, 128)[None]})
    words = (*SHORT, "--recipe", recipe, "--init", file, "--out")
    assert run("train.py", *words, "whole", "--steps", 6).status == 0
    assert run("train.py", *words, "half", "--steps", 3).status == 0
    save_embeddings(file, {"S*": torch.linspace(1, -1, 128)[None]})
    assert run("train.py", *words, "half", "--steps", 6, "--resume").status == 0
    whole, half = (load_embeddings(tmp_path / name / "embedding.safetensors")["S*"] for name in ("whole", "half"))
    assert torch.equal(whole, half)


def test_a_run_that_did_not_keep_its_start_begins_as_its_recipe_says_when_it_is_resumed(run, tmp_path):
    """As those of before it was kept."""
    words = (*SHORT, "--recipe", "regularised,2-word", "--out")
    assert run("train.py", *words, "whole", "--steps", 6).status == 0
    assert run("train.py", *words, "half", "--steps", 3).status == 0
    state = load_file(tmp_path / "half" / "resume.safetensors")
    save_file({name: state[name] for name in state if name != "start"}, tmp_path / "half" / "resume.safetensors")
    assert run("train.py", *words, "half", "--steps", 6, "--resume").status == 0
    whole, half = (load_embeddings(tmp_path / name / "embedding.safetensors")["S*"] for name in ("whole", "half"))
    assert torch.equal(whole, half)


def test_a_token_for_each_picture_takes_what_only_that_one_shows(tiny):
    of = lesson(tiny, WordPerPicture)
    assert [of.pictures.captions[i] for i in (0, 4)] == [
        ["a photo of a S* with <S* in picture 1>"],
        ["a photo of a S* with <S* in picture 5>"],
    ]
    of.word.vectors = of.word.vectors.requires_grad_()
    batch = of.fixed_batch(2)
    of.loss_of(batch, of.word.now(0)).backward()
    moved = [bool(row.any()) for row in of.word.vectors.grad]
    assert moved == [True, *(any(f"picture {i}>" in text for text in batch.captions) for i in range(1, 6))]
    assert sum(moved) == 3


def test_of_the_tokens_for_pictures_only_the_word_is_kept(run, tmp_path):
    assert run("train.py", *SHORT, "--recipe", "per-image").status == 0
    assert learned(tmp_path).shape == (1, 128)
    assert load_file(tmp_path / "outputs/S/resume.safetensors")["vectors"].shape == (6, 128)


def test_captions_beside_the_pictures_are_what_it_trains_with(run, tmp_path, monkeypatch):
    said, loss_of = set(), train.inversion_loss
    monkeypatch.setattr(
        train, "inversion_loss", lambda model, batch, words: said.update(batch.captions) or loss_of(model, batch, words)
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (path, _) in enumerate(read_images(CIRCLE)):
        (folder / f"{i}{path.suffix}").write_bytes(path.read_bytes())
        (folder / f"{i}.txt").write_text(f"a photo of S* in the snow\n{'again ' * i}")
    assert run("train.py", *SHORT, "--images", folder, "--captions").status == 0
    assert said == {" ".join(["a photo of S* in the snow", *["again"] * i]) for i in range(5)}
    (folder / "3.txt").write_text("a photo in the snow")
    assert "3.txt is captioned" in run("train.py", *SHORT, "--images", folder, "--captions").error


def test_templates_beside_captions_are_refused(run, tmp_path):
    (tmp_path / "mine.txt").write_text("a {}")
    error = run("train.py", *SHORT, "--captions", "--templates", tmp_path / "mine.txt").error
    assert "argument --templates: not allowed with argument --captions" in error


# ---- How they start


def test_a_crossed_word_starts_as_what_the_text_encoder_makes_of_its_init(tiny):
    context = tiny.context(["red star"])
    of = lesson(tiny, phrase="red star", count=2)
    assert torch.allclose(outputs(of), context[0, 1:3], atol=1e-6)


def test_the_word_that_the_pictures_show_is_found(tiny, tmp_path, capsys):
    """Five pictures of a thing that has a word: a raindrop."""
    for i, picture in enumerate(pictures_of(noun_thing("raindrop"))):
        draw(picture).save(tmp_path / f"{i}.png")
    of = lesson(tiny, folder=tmp_path)
    start = best_words(of)
    distance = (tiny.text_encoder.table - start).norm(dim=1)
    found = tiny.tokenizer.decode([int(distance.argmin())])
    assert distance.min() == 0 and f'"{found}"' in capsys.readouterr().out.split("smallest loss: ")[1].split(" ")[0]
    batch = of.fixed_batch(8)
    with torch.no_grad():
        best, thing, raindrop = (
            of.loss_of(batch, {"S*": vectors}).item()
            for vectors in (start, vectors_of(tiny, "thing"), vectors_of(tiny, "raindrop"))
        )
    assert best <= raindrop < thing


def test_a_vocabulary_without_whole_words_has_no_start_to_find(tiny, monkeypatch):
    monkeypatch.setattr(recipes, "whole_words", lambda model: torch.tensor([], dtype=torch.long))
    with pytest.raises(InputError, match=r"no whole words in the vocabulary .* --init"):
        best_words(lesson(tiny))


def test_looking_for_words_costs_no_more_than_a_pass_a_candidate(tiny):
    of, passes = lesson(tiny, count=2, batch=2), []
    of = of._replace(loss_of=lambda batch, words: passes.append(1) or (words["S*"] ** 2).sum())
    best_words(of)
    assert len(passes) == 2 * (1 + CANDIDATES)


# ---- How they move


def test_rates():
    assert [constant(done) for done in (0, 0.5, 1)] == [1, 1, 1]
    assert [falling(done) for done in (0, 0.5, 1)] == [1, 0.5, 0]


@pytest.mark.parametrize("name", ["fixed-norm", "kept-norm"])
def test_a_norm_that_is_fixed_stays(run, tmp_path, tiny, name):
    assert run("train.py", *SHORT, "--recipe", name, "--save-every", 1).status == 0
    files = [load_embeddings(path)["S*"] for path in sorted((tmp_path / "outputs" / "S").glob("embedding-*"))]
    assert len(files) == 10 and not torch.equal(files[0], files[9])
    assert all(abs(vectors.norm() / known_norm(tiny) - 1) < 1e-5 for vectors in files)


# ---- What is added to the loss


def test_penalties_are_of_the_distance_to_the_start():
    first, vectors = torch.zeros(2, 3), torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    squared, distance, nothing = (composed(name).penalty for name in ("regularised", "cross", "paper"))
    assert squared(vectors, first).item() == pytest.approx(1e-2 * (25 + 1) / 2)
    assert distance(vectors, first).item() == pytest.approx(1e-5 * (5 + 1) / 2, rel=1e-4)
    assert nothing(vectors, first).item() == 0


@pytest.mark.parametrize("name", ["regularised", "cross"])
def test_a_penalty_pulls_towards_the_start_and_not_where_it_starts(name):
    first = torch.zeros(1, 3)
    vectors = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    composed(name).penalty(vectors, first).backward()
    assert vectors.grad[0, 0] > 0 and vectors.grad[0, 1:].abs().max() < 1e-9
    here = first.clone().requires_grad_()
    composed(name).penalty(here, first).backward()
    assert here.grad.isfinite().all()


# ---- When it stops


def losses(values, kind=WhenFlat, steps=200, window=10):
    """After how many of these losses of the fixed batch it stops, and why."""
    stop = kind.__new__(kind)
    stop.history, stop.window, values = [], window, iter(values)
    stop.batch, stop.loss_of = None, lambda batch, words: torch.tensor(next(values))
    for step in range(1, steps + 1):
        stop.watch({})
        if reason := stop.reason():
            return step, reason
    return steps, ""


def test_it_stops_when_the_loss_of_a_fixed_batch_is_flat():
    values = [2.0 ** -(i / 3) for i in range(200)]
    step, reason = losses(values)
    assert (
        10 < step < 30 and values[step] < 0.05 and "in the last 10 steps the loss of a fixed batch varied 0." in reason
    )


def test_it_goes_on_while_the_loss_falls():
    assert losses([2.0**-i for i in range(9)], steps=9) == (9, "")
    assert losses([1 / (1 + i % 7) for i in range(200)]) == (200, "")  # never flat: up and down as much as ever


def test_a_steady_fall_is_not_flat():
    falls = [max(0.5, 1 - 0.01 * i) for i in range(150)]  # for 50 steps, then no more
    step, reason = losses(falls, steps=150, window=round(150 * WhenFlat.WINDOW))
    assert 50 < step < 100 and reason


def test_the_paper_stops_at_the_last_step():
    assert losses([1.0] * 200, AtTheEnd) == (200, "")


def test_an_early_stop_is_a_finished_run_that_says_why(run, tmp_path, monkeypatch):
    monkeypatch.setattr(WhenFlat, "LEAST", 100)  # anything is flat
    outcome = run("train.py", *SHORT, "--steps", 40, "--recipe", "early-stop")
    assert outcome.status == 0
    said, _, _ = outcome.out.strip().splitlines()
    assert said.startswith("stopped after 9 of 40 steps: in the last 8 steps the loss of a fixed batch varied")
    assert len((tmp_path / "outputs/S/loss.csv").read_text().splitlines()) == 1 + 9
    assert (tmp_path / "outputs/S/previews/000009.png").exists()
    again = run("train.py", *SHORT, "--steps", 40, "--recipe", "early-stop", "--resume")
    assert again.out.startswith(said) and len((tmp_path / "outputs/S/loss.csv").read_text().splitlines()) == 1 + 9


@pytest.mark.parametrize("name", ["early-stop", "progressive", "per-image", "fixed-norm", "auto-start"])
def test_a_run_of_any_recipe_is_resumed_bit_for_bit(run, tmp_path, name, monkeypatch, few_candidates):
    monkeypatch.setattr(WhenFlat, "LEAST", 1.1)
    words = (*SHORT, "--recipe", name)
    whole, parts = ("--out", tmp_path / "whole"), ("--out", tmp_path / "parts")
    assert run("train.py", *words, *whole).status == 0
    log = running.Run.log

    def interrupted(self, loss):
        log(self, loss)
        if self.done == 5:
            raise InputError("a cut")

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", interrupted)
        assert run("train.py", *words, *parts, "--save-every", 4).status == 2
    assert run("train.py", *words, *parts, "--save-every", 4, "--resume").status == 0
    one, other = (load_embeddings(tmp_path / name / "embedding.safetensors")["S*"] for name in ("whole", "parts"))
    assert torch.equal(one, other)
    assert (tmp_path / "whole/loss.csv").read_text() == (tmp_path / "parts/loss.csv").read_text()
