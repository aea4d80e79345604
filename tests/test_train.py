"""train.py from end to end on the tiny checkpoint, and every mistake a user can make with it."""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, largest_file
from helpers.embedding_files import WRITERS
from PIL import Image

import train
from tinyldm import InputError, recipes
from tinyldm import run as running
from tinyldm.formats.checkpoint import load_checkpoint, open_checkpoint
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.inversion import add_words, captions_of, templates_for
from tinyldm.latent_diffusion import Defaults, Learning

HEART = EXAMPLES / "checkered-heart"
SHORT = ("--token", "S*", "--steps", 4, "--preview-every", 2, "--batch", 2)


@pytest.fixture(autouse=True)
def one_picture_a_preview(monkeypatch):
    """Previews would be most of these tests' time."""
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))


def learned(folder):
    return load_embeddings(folder / "embedding.safetensors")["S*"]


def test_a_run_writes_everything_and_says_what_to_type_next(run, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(5))
    outcome = run("train.py", "--images", HEART, *SHORT, "--init", "heart", "--save-every", 2)
    assert outcome.status == 0
    folder = tmp_path / "outputs" / "S"
    assert 'python sample.py --prompt "a photo of S* on a green background"' in outcome.out
    assert "--embedding outputs/S/embedding.safetensors" in outcome.out
    assert learned(folder).shape == (1, 128)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["init"] == "heart" and settings["steps"] == 4 and settings["size"] == 64
    assert settings["weights_sha256"] == open_checkpoint(quick).sha256()
    rows = list(csv.DictReader((folder / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    preview = Image.open(folder / "preview.png")
    assert preview.width > 5 * 128 and preview.height > 4 * 128  # training pictures, then steps 0, 2 and 4
    assert sorted(file.stem for file in folder.glob("embedding-*")) == ["embedding-000002", "embedding-000004"]


def test_the_same_seed_learns_the_same_vectors_and_another_seed_others(run, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("train.py", "--images", HEART, *SHORT, "--seed", seed, "--out", tmp_path / name).status == 0
    assert torch.equal(learned(tmp_path / "a"), learned(tmp_path / "b"))
    assert not torch.equal(learned(tmp_path / "a"), learned(tmp_path / "c"))


def test_with_low_memory_the_word_and_the_previews_are_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(3))
    previews = {}
    for out, more in (("usual", []), ("low", ["--low-memory"])):
        assert run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / out, *more).status == 0
        previews[out] = np.asarray(Image.open(tmp_path / out / "preview.png")).astype(int)
    assert learned(tmp_path / "low").equal(learned(tmp_path / "usual"))
    assert abs(previews["low"] - previews["usual"]).max() <= 1


def test_a_second_run_gets_a_folder_of_its_own(run, tmp_path):
    run("train.py", "--images", HEART, *SHORT)
    run("train.py", "--images", HEART, *SHORT)
    assert learned(tmp_path / "outputs" / "S-2").shape == (1, 128)


def test_interrupted_and_resumed_equals_uninterrupted(run, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train.py", "--images", HEART, *SHORT, "--out", whole)

    log = running.Run.log

    def interrupted_log(self, loss):
        log(self, loss)
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", interrupted_log)
        outcome = run("train.py", "--images", HEART, *SHORT, "--out", parts)
    assert outcome.status == 130
    assert "stopped after 3 of 4 steps" in outcome.out and "--resume" in outcome.out
    assert not torch.equal(learned(parts), learned(whole))

    assert run("train.py", "--images", HEART, *SHORT, "--out", parts, "--resume").status == 0
    assert torch.equal(learned(parts), learned(whole))
    assert (parts / "loss.csv").read_bytes() == (whole / "loss.csv").read_bytes()


def test_on_a_full_disk_a_run_stops_with_one_line_and_goes_on_when_there_is_room(run, tmp_path, monkeypatch):
    monkeypatch.setattr(running.Run, "preview", lambda *_: None)
    command = ("train.py", "--images", HEART, *SHORT, "--init", "heart", "--out", "o")
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:

        def log_on_a_filling_disk(self, loss, log=running.Run.log):
            log(self, loss)
            if self.done == 3:  # the word fits, resume.safetensors does not
                stack.enter_context(largest_file(3000))

        patch.setattr(running.Run, "log", log_on_a_filling_disk)
        assert "resume.safetensors can't be written" in run(*command).error
    assert not list((tmp_path / "o").glob(".*"))
    assert run(*command, "--resume").status == 0
    assert [line.split(",")[0] for line in (tmp_path / "o" / "loss.csv").read_text().split()] == ["step", *"1234"]


def test_an_interrupt_in_the_last_preview_is_one_line_and_the_word_is_kept(run, tmp_path, monkeypatch):
    def preview(self, model):
        if self.done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(running.Run, "preview", preview)
    outcome = run("train.py", "--images", HEART, *SHORT)
    assert outcome.status == 130
    assert outcome.err.strip() == "train.py: stopped by SIGINT; what was saved before is kept"
    assert (tmp_path / "outputs" / "S" / "embedding-000004.safetensors").exists()


def test_resume_refuses_other_pictures_and_other_templates(run, tmp_path, monkeypatch):
    monkeypatch.setattr(running.Run, "preview", lambda *_: None)
    shutil.copytree(HEART, tmp_path / "pictures")
    (tmp_path / "mine.txt").write_text("a {}\n")
    command = ("train.py", "--images", "pictures", *SHORT, "--templates", "mine.txt", "--out", "o")
    assert run(*command).status == 0
    (tmp_path / "mine.txt").write_text("the {}\n")
    assert "the templates are not those that the run in o began with" in run(*command, "--resume").error
    (tmp_path / "mine.txt").write_text("\na {}  \n")
    (tmp_path / "pictures" / "00.png").unlink()
    assert "the pictures are not those that the run in o began with" in run(*command, "--resume").error


def test_the_learning_rate_falls_in_a_straight_line_to_zero(run, tmp_path, monkeypatch):
    rates, log = [], running.Run.log

    def noting_log(self, loss):
        rates.append(self.optimizer.lr)
        log(self, loss)

    monkeypatch.setattr(running.Run, "log", noting_log)
    run("train.py", "--images", HEART, *SHORT, "--recipe", "falling", "--lr", "1e-3", "--out", tmp_path / "o")
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_resume_refuses_other_options_than_the_run_had(run, tmp_path):
    run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / "o")
    outcome = run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / "o", "--resume", "--lr", 0.1)
    assert "has lr 0.01, not 0.1" in outcome.error


def test_resume_can_lengthen_a_run(run, tmp_path):
    run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / "o")
    longer = [6 if word == 4 else word for word in SHORT]
    assert run("train.py", "--images", HEART, *longer, "--out", tmp_path / "o", "--resume").status == 0
    assert len((tmp_path / "o" / "loss.csv").read_text().splitlines()) == 1 + 6


def test_resume_of_nothing_is_an_error(run, tmp_path):
    outcome = run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / "nothing", "--resume")
    assert "can't resume" in outcome.error


def test_a_style_learns_with_the_style_templates(run, tmp_path):
    outcome = run("train.py", "--images", EXAMPLES / "blueprint", *SHORT, "--property", "style")
    assert outcome.status == 0
    assert '--prompt "a painting in the style of S*"' in outcome.out


def test_a_phrase_starts_one_vector_per_token(run, tmp_path):
    assert run("train.py", "--images", HEART, *SHORT, "--init", "orange heart").status == 0
    assert learned(tmp_path / "outputs" / "S").shape == (2, 128)


@pytest.mark.parametrize(
    ("vectors", "init"), [(1, "square"), (None, "striped halved square"), (5, "striped halved square")]
)
def test_without_an_init_as_many_words_are_taken_as_there_are_to_be_vectors(tiny, vectors, init):
    defaults = replace(tiny.defaults, object=Learning("striped halved square"))
    options = Namespace(
        resume=False,
        concepts=None,
        templates=None,
        init=None,
        vectors=vectors,
        property="object",
        save_every=None,
        captions=False,
        recipe="paper",
    )
    options.steps = options.batch = options.lr = options.size = None
    train.fill_in_defaults(options, defaults)
    assert options.init == init


@pytest.mark.parametrize(("learns", "word"), [("object", "thing"), ("style", "painting")])
def test_the_tiny_model_starts_from_one_word_that_says_little(tiny, learns, word):
    options = Namespace(
        resume=False,
        concepts=None,
        templates=None,
        init=None,
        vectors=None,
        property=learns,
        save_every=None,
        captions=False,
        recipe="paper",
    )
    options.steps = options.batch = options.lr = options.size = None
    train.fill_in_defaults(options, tiny.defaults)
    assert options.init == word and len(tiny.tokenizer.encode(word)) == 1


@pytest.mark.parametrize(
    ("typed", "recipe"),
    [
        ([], "auto-start,falling"),
        (["--init", "heart"], "falling"),
        (["--init", "heart", "--recipe", "auto-start"], "auto-start"),
        (["--captions"], "auto-start,falling,captions"),
        (["--recipe", "paper,captions", "--captions"], "paper,captions"),
    ],
)
def test_a_start_that_was_given_is_not_looked_for(typed, recipe):
    options = train.parse_options(["--images", "pictures", "--token", "S*", *typed])
    train.fill_in_defaults(options, Defaults(object=Learning("object", recipe="auto-start,falling")))
    assert options.recipe == recipe


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--templates t.txt --recipe falling,captions", "--templates and the recipe captions each say the captions"),
        ("--init old.pt --recipe auto-start", "--init old.pt and the recipe auto-start each say the start"),
    ],
)
def test_two_options_that_say_the_same_are_refused_and_not_when_a_run_goes_on(typed, expected):
    """A run's own settings have all of them: what it took from the recipe stands beside it."""
    options = ["--images", "pictures", "--token", "S*", *typed.split()]
    with pytest.raises(InputError, match=expected):
        train.fill_in_defaults(train.parse_options(options), Defaults())
    train.fill_in_defaults(train.parse_options([*options, "--resume"]), Defaults())
    with pytest.raises(InputError, match=expected):  # of many words some may be new
        train.fill_in_defaults(train.parse_options(["--concepts", "examples", *typed.split(), "--resume"]), Defaults())


def test_of_the_checkpoints_start_as_many_words_are_taken_as_the_recipe_has_vectors():
    options = train.parse_options(["--images", "pictures", "--token", "S*", "--recipe", "2-word"])
    train.fill_in_defaults(options, Defaults(object=Learning("striped halved square")))
    assert (options.vectors, options.init) == (2, "halved square")


def test_more_vectors_than_init_tokens_are_allowed(run, tmp_path):
    assert run("train.py", "--images", HEART, *SHORT, "--init", "heart", "--vectors", 3).status == 0
    assert learned(tmp_path / "outputs" / "S").shape == (3, 128)


@pytest.mark.parametrize(("to", "suffix"), [("diffusers", "safetensors"), ("a1111", "pt"), ("paper", "pt")])
def test_an_embedding_file_is_where_learning_goes_on_from(run, tmp_path, to, suffix):
    vectors = 0.1 * torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    save_embeddings(tmp_path / f"old.{suffix}", {"old*": vectors}, to)
    short = ("--images", HEART, *SHORT, "--init", f"old.{suffix}", "--lr", "1e-9")
    assert run("train.py", *short).status == 0
    assert torch.allclose(learned(tmp_path / "outputs" / "S"), vectors, atol=1e-7)
    assert run("train.py", *short, "--vectors", 3, "--out", "o").status == 0
    longer = [6 if word == 4 else word for word in short]
    assert run("train.py", *longer, "--vectors", 3, "--out", "o", "--resume").status == 0


@pytest.mark.filterwarnings("ignore:.*calls it something else")
def test_every_tools_file_can_be_the_start(tiny, tmp_path):
    vectors = 0.1 * torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for write, suffix, _ in WRITERS:
        write(tmp_path / f"e{suffix}", vectors)
        for name in (f"e{suffix}", f"E{suffix.upper()}"):
            (tmp_path / f"e{suffix}").rename(tmp_path / name)
            options = Namespace(init=str(tmp_path / name), vectors=None)
            assert torch.equal(train.first_vectors(tiny, options), vectors), write
            (tmp_path / name).rename(tmp_path / f"e{suffix}")


def test_a_word_of_a_file_of_several_can_be_the_start(run, tmp_path):
    words = {"a*": torch.full((1, 128), 0.01), "b*": torch.full((2, 128), 0.02)}
    save_embeddings(tmp_path / "ab.safetensors", words)
    assert run("train.py", "--images", HEART, *SHORT, "--init", "ab.safetensors:b*", "--lr", "1e-9").status == 0
    assert torch.allclose(learned(tmp_path / "outputs" / "S"), words["b*"], atol=1e-7)


def test_words_that_are_a_files_name_too_are_words(run, tmp_path):
    (tmp_path / "heart").write_text("no embedding")
    assert run("train.py", "--images", HEART, *SHORT, "--init", "heart").status == 0


def test_resume_refuses_a_start_of_more_vectors_than_the_run_has(run, tmp_path):
    command = ("train.py", "--images", HEART, *SHORT, "--init", "old.pt", "--out", "o")
    save_embeddings(tmp_path / "old.pt", {"old*": torch.ones(1, 128)}, "a1111")
    assert run(*command).status == 0
    before = learned(tmp_path / "o")
    save_embeddings(tmp_path / "old.pt", {"old*": torch.ones(3, 128)}, "a1111")
    assert "has vectors 1, not 3; give the same options and files again" in run(*command, "--resume").error
    assert torch.equal(learned(tmp_path / "o"), before)


def test_templates_that_the_checkpoint_takes_at_their_word_are_left_out(run, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(recipes, "captions_of", lambda *args: used.extend(captions_of(*args)) or used)
    assert run("train.py", "--images", HEART, *SHORT, "--init", "heart").status == 0
    assert "a photo of a S*" in used and not any("close-up" in caption for caption in used)


def test_own_templates_are_used(run, tmp_path):
    (tmp_path / "mine.txt").write_text("a sketch of a {}\n\ntwo {} next to a circle\n")
    assert run("train.py", "--images", HEART, *SHORT, "--templates", tmp_path / "mine.txt").status == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_with_frozen_weights_of_half_precision_the_vectors_and_the_optimiser_stay_float32(
    run, tmp_path, monkeypatch, dtype
):
    runs, start = [], running.Run.start
    monkeypatch.setattr(running.Run, "start", lambda self, images: (runs.append(self), start(self, images)))
    monkeypatch.setattr(running.Run, "preview", lambda *_: None)  # convolutions in float16 take the CPU a second each
    (tmp_path / "heart").mkdir()
    picture = sorted(HEART.glob("*.png"))[0]
    (tmp_path / "heart" / picture.name).symlink_to(picture)
    learn = ("train.py", "--images", tmp_path / "heart", *SHORT, "--lr", "4e-3")
    assert run(*learn, "--dtype", dtype, "--out", tmp_path / "half").status == 0
    assert run(*learn, "--out", tmp_path / "whole").status == 0
    assert {tensor.dtype for tensor in runs[0].optimizer.state.values()} == {torch.float32}
    half, whole = learned(tmp_path / "half"), learned(tmp_path / "whole")
    assert half.dtype == torch.float32 and not torch.equal(half, half.half().float())
    assert (half - whole).norm() < 0.02 * whole.norm()


def test_learning_changes_the_vectors_and_not_one_weight(run, quick, tmp_path, monkeypatch):
    models, preview = [], running.Run.preview
    monkeypatch.setattr(running.Run, "preview", lambda self, model: (models.append(model), preview(self, model)))
    assert run("train.py", "--images", HEART, *SHORT, "--init", "heart").status == 0
    fresh = load_checkpoint(quick)
    for trained, original in zip(models[-1].networks(), fresh.networks(), strict=True):
        for name, tensor in original.state_dict().items():
            assert torch.equal(trained.state_dict()[name], tensor), name
    heart = fresh.text_encoder.table[fresh.tokenizer.encode("heart")]
    assert (learned(tmp_path / "outputs" / "S") - heart).norm() > 0.01


def test_optimiser_state_is_vectors_by_width(run, tmp_path):
    from safetensors.torch import load_file

    run("train.py", "--images", HEART, *SHORT, "--vectors", 2)
    state = load_file(tmp_path / "outputs" / "S" / "resume.safetensors")
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (2, 128)
    assert state["exp_avg_sq"].abs().sum() > 0


def test_a_nan_loss_stops_and_keeps_the_last_good_vectors(run, tmp_path, monkeypatch):
    real = train.inversion_loss
    calls = []

    def sometimes_nan(model, batch, words):
        calls.append(words["S*"].detach().clone())
        return real(model, batch, words) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "inversion_loss", sometimes_nan)
    outcome = run("train.py", "--images", HEART, *SHORT)
    assert "the loss became nan and the norm nan at step 2" in outcome.error
    assert torch.equal(learned(tmp_path / "outputs" / "S"), calls[1])


# ---- Mistakes: one line, status 2, nothing written


@pytest.fixture
def refused(run, tmp_path):
    def refused(*arguments):
        before = sorted(tmp_path.rglob("*"))
        outcome = run("train.py", *arguments)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return outcome.error

    return refused


def test_no_such_folder(refused):
    assert "nowhere" in refused("--images", "nowhere", "--token", "S*")


def test_no_picture_in_the_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "picture" in refused("--images", tmp_path / "empty", "--token", "S*")


@pytest.mark.parametrize("token", ["", " ", "two  spaces"])
def test_a_token_without_a_visible_word(refused, token):
    assert "token" in refused("--images", HEART, "--token", token)


def test_a_token_that_is_a_word_already(refused):
    assert 'the token "heart" is already a word' in refused("--images", HEART, "--token", "heart")


def test_a_token_that_starts_with_a_dash_is_learned(run, tmp_path):
    assert run("train.py", "--images", HEART, "--token=-x", *SHORT[2:], "--steps", 1, "--out", "o").status == 0
    assert list(load_embeddings("o/embedding.safetensors")) == ["-x"]


def test_odd_tokens_reach_the_captions_and_the_file(tiny, tmp_path):
    tokens = ["-x", "$(touch${IFS}x)", "e\u0301", "\U0001f600", "{}", "%s", "x" * 255]
    vectors = torch.ones(1, 128)
    for token in tokens:
        add_words(tiny, {token: vectors})
        captions_of(tiny, templates_for(tiny, "object"), token)
    save_embeddings(tmp_path / "a.safetensors", dict.fromkeys(tokens, vectors))
    assert set(load_embeddings(tmp_path / "a.safetensors")) == {normalize("NFC", token) for token in tokens}


def test_a_token_too_long_for_a_files_name_gets_a_folder_all_the_same():
    assert train.folder_for("字" * 200).name == "字" * 60  # three bytes each, and a name has 255


@pytest.mark.parametrize("init", ["xylophone", "", " "])
def test_an_init_of_unknown_kind(refused, init):
    assert "init" in refused("--images", HEART, "--token", "S*", "--init", init)


@pytest.mark.parametrize("init", ["file.pt", "outputs/S/embeding.safetensors", "cat.png:<cat>"])
def test_an_init_that_is_a_mistyped_file_is_not_taken_for_words(refused, init):
    assert f"no such file: {init}" in refused("--images", HEART, "--token", "S*", "--init", init)


def test_an_init_file_that_does_not_fit(refused, tmp_path):
    save_embeddings(tmp_path / "three.safetensors", {"x*": torch.ones(3, 128)})
    save_embeddings(tmp_path / "two-words.safetensors", {"x*": torch.ones(1, 128), "y*": torch.ones(1, 128)})
    save_embeddings(tmp_path / "wide.safetensors", {"x*": torch.ones(1, 768)})
    arguments = ("--images", HEART, "--token", "S*", "--init")
    for count in (1, 4):
        assert "holds 3 vectors" in refused(*arguments, "three.safetensors", "--vectors", count)
    assert '--init "two-words.safetensors:x*"' in refused(*arguments, "two-words.safetensors")
    assert "has width 768" in refused(*arguments, "wide.safetensors")
    assert "already a word" in refused(*arguments[:3], "heart", "--init", "three.safetensors")


def test_the_init_to_try_can_be_pasted_into_a_shell(refused, shell_words, tmp_path):
    file, words = "my $(touch x).safetensors", ["$(touch${IFS}x)", "`touch${IFS}x`"]
    save_embeddings(tmp_path / file, dict.fromkeys(words, torch.ones(1, 128)))
    error = refused("--images", HEART, "--token", "S*", "--init", file)
    ((option, value),) = shell_words([f"python {error.partition('try ')[2]}"])
    assert option == "--init" and value in [f"{file}:{word}" for word in words]


def test_an_init_longer_than_its_vectors(refused):
    error = refused("--images", HEART, "--token", "S*", "--init", "orange heart", "--vectors", 1)
    assert "--vectors 2" in error


def test_a_size_the_model_cannot_take(refused):
    assert "multiples of 8" in refused("--images", HEART, "--token", "S*", "--size", 50)


def test_templates_without_a_place_for_the_word(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("a photo of a cat\n")
    assert "expected one {}" in refused("--images", HEART, "--token", "S*", "--templates", tmp_path / "mine.txt")


def test_a_template_so_long_that_the_word_is_cut_off(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("red " * 40 + "{}\n")
    assert "cut off" in refused("--images", HEART, "--token", "S*", "--templates", tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "many"),
        ("--steps", 10**12),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--lr", "1e38"),
        ("--vectors", "0"),
        ("--vectors", 10**12),
        ("--vectors", 1000),
        ("--batch", 10**12),
        ("--size", 2**40),
        ("--seed", 2**64),
        ("--device", "tpu"),
        ("--images", ""),
        ("--out", ""),
    ],
)
def test_impossible_option_values(refused, option, value):
    assert option in refused("--images", HEART, "--token", "S*", option, value)


def test_the_largest_rate_and_seed_are_taken(run):
    outcome = run("train.py", "--images", HEART, *SHORT, "--lr", "1e37", "--seed", 2**64 - 10_000)
    assert "the loss became" in outcome.error and "try a smaller --lr" in outcome.error


def test_a_batch_that_cannot_fit_into_memory(refused):
    arguments = ("--images", HEART, "--token", "S*", "--size", 1024, "--batch", 10_000)
    assert "GiB of memory, this computer has" in refused(*arguments)


@pytest.mark.parametrize(("option", "value"), [("--templates", "fifo"), ("--init", "fifo.pt"), ("--init", "fifo.pt:x")])
def test_a_pipe_nobody_writes_to_is_refused(run, tmp_path, no_hang, option, value):
    os.mkfifo(tmp_path / value.partition(":")[0])
    assert "fifo" in run("train.py", "--images", HEART, "--token", "S*", option, value).error


def test_a_word_that_the_previews_prompt_cuts_off(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("{}\n")
    arguments = ("--images", HEART, "--token", "S*", "--templates", "mine.txt")
    assert 'the prompt "a photo of S*"' in refused(*arguments, "--vectors", 30)


def test_a_missing_checkpoint(refused, tmp_path):
    error = refused("--images", HEART, "--token", "S*", "--weights", tmp_path / "none")
    assert "no checkpoint at" in error and "weights/tiny" in error


def test_a_folder_that_already_holds_a_word_is_not_overwritten(run, tmp_path):
    run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / "o")
    before = learned(tmp_path / "o")
    outcome = run("train.py", "--images", HEART, *SHORT, "--out", tmp_path / "o", "--seed", 9)
    assert "already holds a learned word" in outcome.error
    assert torch.equal(learned(tmp_path / "o"), before)


def test_a_folder_of_ones_own_files_is_not_written_into(run, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "loss.csv").write_text("my own")
    assert "mine already holds loss.csv" in refused("--images", HEART, "--token", "S*", "--out", "mine")


def test_broken_files_among_good_ones_are_skipped_and_named(run, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(HEART, folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    outcome = run("train.py", "--images", folder, *SHORT)
    assert outcome.status == 0
    assert "empty.png" in outcome.err and "text.jpg" in outcome.err


def test_unusual_pictures_are_fine(run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    heart = Image.open(HEART / "00.png")
    heart.convert("L").save(folder / "grey.png")
    heart.convert("P").save(folder / "palette.png")
    heart.convert("RGBA").save(folder / "alpha.png")
    heart.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(heart.convert("L"), dtype=np.uint16) * 257).save(folder / "deep.png")
    outcome = run("train.py", "--images", folder, *SHORT)
    assert outcome.status == 0 and outcome.err == ""


# ---- For real


def test_a_word_is_learned_without_pytorchs_compiler(tmp_path, quick):
    """Which takes a second to load; PyTorch does so for its own optimisers, and for an embedding on the meta device."""
    words = ["--images", HEART, "--token", "S*", "--weights", quick, "--steps", 1, "--out", tmp_path / "o"]
    code = f"import sys, train; train.main({[*map(str, words)]}); sys.exit('torch._dynamo' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0, ended.stderr


def test_help_imports_only_what_the_scripts_need():
    """What else is installed, diffusers among it, would double the time that a script takes to start."""
    code = (
        "import sys, {0}\n"
        "try:\n    {0}.main(['--help'])\n"
        "finally:\n    print(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    )
    for script in ("train", "sample"):
        done = subprocess.run([sys.executable, "-c", code.format(script)], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.startswith("usage: ") and done.returncode == 0
        loaded = set(done.stderr.split())
        assert {"torch", "tinyldm", "safetensors"} <= loaded
        assert not loaded & {"diffusers", "transformers", "matplotlib", "scipy", "pandas", "huggingface_hub", "pytest"}
