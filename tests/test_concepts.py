"""Many words in one run: the words of runs of their own, whatever breaks, and each part of them once."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, Outcome, locked_elsewhere
from safetensors.torch import load_file

from tinyldm import InputError
from tinyldm import concepts as concepts_module
from tinyldm.concepts import Shard, find_concepts, parse_shard
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.recipes import WhenFlat
from tinyldm.run import Run, is_done

QUICK = ["--batch", "2", "--steps", "4", "--save-every", "2", "--preview-every", "100"]


@pytest.fixture
def concepts(tmp_path) -> Path:
    """Two, "<bolt>" and "H*", the second named by its token.txt."""
    folder = tmp_path / "concepts"
    add_concept(folder / "<bolt>", "bolt")
    add_concept(folder / "heart", "checkered-heart", token="H*")
    return folder


def add_concept(folder: Path, example: str, token: str | None = None) -> None:
    folder.mkdir(parents=True)
    for file in sorted((EXAMPLES / example).glob("*.png"))[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    if token:
        (folder / "token.txt").write_text(token + "\n")


def word(folder: Path) -> torch.Tensor:
    (vectors,) = load_embeddings(folder / "embedding.safetensors").values()
    return vectors


@pytest.fixture
def on_their_own(run, concepts, tmp_path) -> dict[str, torch.Tensor]:
    """The words of the two concepts, each of a run of its own."""
    words = {"<bolt>": "<bolt>", "heart": "H*"}
    for name, token in words.items():
        learned = run(
            "train.py", "--images", concepts / name, "--token", token, *QUICK, "--out", tmp_path / "own" / name
        )
        assert learned.status == 0 and "not pictures" not in learned.err
    return {name: word(tmp_path / "own" / name) for name in words}


def together(run, concepts: Path, *more: object, count: int = 2) -> Outcome:
    return run("train.py", "--concepts", concepts, "--together", count, *QUICK, "--out", "out", *more)


def test_words_that_are_learned_together_are_those_of_runs_of_their_own(run, concepts, on_their_own):
    learned = together(run, concepts)
    assert learned.status == 0 and learned.out == "2 of 2 words are learned, in out\n"
    for name, vectors in on_their_own.items():
        torch.testing.assert_close(word(Path("out", name)), vectors, rtol=0, atol=1e-5)
        assert Path("out", name, "preview.png").exists()
    assert [*load_embeddings("out/heart/embedding.safetensors")] == ["H*"]


@pytest.mark.parametrize("recipe", ["progressive", "per-image,regularised", "fixed-norm,falling"])
def test_whatever_the_recipe(run, concepts, tmp_path, recipe):
    assert together(run, concepts, "--recipe", recipe).status == 0
    own = tmp_path / "own"
    run("train.py", "--images", concepts / "heart", "--token", "H*", *QUICK, "--recipe", recipe, "--out", own)
    torch.testing.assert_close(word(Path("out/heart")), word(own), rtol=0, atol=1e-5)


def test_the_next_word_takes_the_place_of_one_that_is_done(run, concepts, monkeypatch):
    add_concept(concepts / "third", "bolt", token="T*")
    half = ["--images", concepts / "<bolt>", "--token", "<bolt>", *QUICK, "--steps", 2]
    assert run("train.py", *half, "--out", "out/<bolt>").status == 0
    steps, log = [], Run.log

    def watched(self: Run, loss: torch.Tensor) -> None:
        steps.append(self.folder.name)
        log(self, loss)

    monkeypatch.setattr(Run, "log", watched)
    assert together(run, concepts, "--resume").out.startswith("3 of 3 words")
    assert steps == 2 * ["<bolt>", "heart"] + ["heart"] + ["heart", "third"] + 3 * ["third"]


def test_a_word_whose_preview_fails_and_a_folder_that_may_not_be_read_are_left_out(run, concepts, monkeypatch):
    add_concept(concepts / "third", "bolt", token="T*")
    preview, read = Run.preview, concepts_module.Concept.token

    def fails(self: Run, model: object) -> None:
        if self.done == 4 and self.folder.name == "heart":
            raise InputError("the model made NaN")
        preview(self, model)

    def refused(self: concepts_module.Concept) -> str:
        if self.folder.name == "third":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Run, "preview", fails)
    monkeypatch.setattr(concepts_module.Concept, "token", refused)
    learned = together(run, concepts)
    assert learned.status == 2 and learned.out == "1 of 3 words are learned, in out\n"
    assert "heart: the model made NaN" in learned.err and "third: [Errno 13] Permission denied" in learned.err


def test_a_folder_that_another_run_is_in_is_left_alone(run, concepts):
    Path("out/heart/previews").mkdir(parents=True)
    with locked_elsewhere(Path("out/heart")):
        goes_on = together(run, concepts, "--resume")
    assert goes_on.out == "1 of 2 words are learned, in out\n"
    assert "another run is writing into out/heart" in goes_on.err and Path("out/heart/previews").exists()


def test_a_broken_folder_is_named_and_left_out(run, concepts):
    (concepts / "empty").mkdir()
    add_concept(concepts / "circle", "bolt")
    add_concept(concepts / "two", "bolt", token="A*\nB*")
    learned = together(run, concepts)
    assert learned.status == 2 and learned.out == "2 of 5 words are learned, in out\n"
    said = [line for line in learned.err.splitlines() if "left out" in line]
    assert [line.split(":")[0].rsplit("/", 1)[1] for line in said] == ["circle", "empty", "two"]
    assert "already a word of the vocabulary" in said[0] and "no picture in" in said[1] and "has 2 lines" in said[2]


def test_a_word_whose_loss_is_not_finite_is_left_out_and_the_others_are_as_ever(
    run, concepts, on_their_own, monkeypatch
):
    log = Run.log

    def broken(self: Run, loss: torch.Tensor) -> None:
        log(self, loss)
        if self.done == 3 and self.folder.name == "heart":
            self.vectors.data.fill_(float("nan"))  # which the next step's batch reads

    monkeypatch.setattr(Run, "log", broken)
    learned = together(run, concepts)
    assert learned.status == 2 and "heart: the loss became nan" in learned.err
    torch.testing.assert_close(word(Path("out/<bolt>")), on_their_own["<bolt>"], rtol=0, atol=1e-5)


def test_a_run_that_ended_loses_no_finished_word_and_resume_goes_on(run, concepts, on_their_own, monkeypatch):
    log = Run.log

    def killed(self: Run, loss: torch.Tensor) -> None:
        if self.done == 3 and self.folder.name == "heart":
            raise KeyboardInterrupt(15)
        log(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", killed)
        assert together(run, concepts, count=1).status == 143
    assert torch.equal(word(Path("out/<bolt>")), on_their_own["<bolt>"])
    finished = Path("out/<bolt>/resume.safetensors").stat().st_mtime_ns

    again = together(run, concepts, count=1)
    assert "out/<bolt> already holds a learned word; add --resume" in again.error
    goes_on = together(run, concepts, "--resume", count=1)
    assert goes_on.status == 0 and goes_on.out == "2 of 2 words are learned, in out\n"
    assert torch.equal(word(Path("out/heart")), on_their_own["heart"])
    assert Path("out/<bolt>/resume.safetensors").stat().st_mtime_ns == finished


def test_a_last_preview_that_is_missing_is_made_when_the_run_is_taken_up_again(run, concepts):
    """As after a kill between the last save and it."""
    assert together(run, concepts).status == 0
    preview, other = (Path("out", name, "previews", "000004.png") for name in ("heart", "<bolt>"))
    pixels, untouched = preview.read_bytes(), other.stat().st_mtime_ns
    preview.unlink()
    goes_on = together(run, concepts, "--resume")
    assert goes_on.status == 0 and goes_on.out == "2 of 2 words are learned, in out\n"
    assert preview.read_bytes() == pixels and other.stat().st_mtime_ns == untouched


def test_a_word_that_has_taken_more_steps_than_are_asked_for_is_done(run, concepts):
    """Also one whose run was stopped, before it made a last preview."""
    assert together(run, concepts).status == 0
    before = word(Path("out/heart"))
    Path("out/heart/previews/000004.png").unlink()
    goes_on = together(run, concepts, "--resume", "--steps", 3)
    assert goes_on.status == 0 and goes_on.out == "2 of 2 words are learned, in out\n"
    assert torch.equal(word(Path("out/heart")), before)


@pytest.mark.parametrize(
    ("options", "expected"), [(["--lr", "0.5"], "lr 0.01, not 0.5"), (["--vectors", "2"], "vectors 1, not 2")]
)
def test_a_word_that_is_done_with_other_options_is_named_and_not_counted(run, concepts, options, expected):
    assert together(run, concepts, "--lr", "0.01").status == 0
    before = word(Path("out/heart"))
    again = together(run, concepts, "--lr", "0.01", *options, "--resume")
    assert again.status == 2 and again.out == "0 of 2 words are learned, in out\n"
    assert f"heart: the run in out/heart has {expected}; give the same options" in again.err
    assert torch.equal(word(Path("out/heart")), before)
    for damaged in ("null", "[" * 100_000):  # a word that is done is done
        Path("out/heart/settings.json").write_text(damaged)
        assert together(run, concepts, "--lr", "0.01", "--resume").out == "2 of 2 words are learned, in out\n"


def test_a_word_that_stopped_early_is_done(run, concepts, monkeypatch):
    monkeypatch.setattr(WhenFlat, "reason", lambda self: "enough" if len(self.history) == 3 else "")
    assert together(run, concepts, "--recipe", "early-stop").status == 0
    state = Path("out/heart/resume.safetensors")
    written = state.stat().st_mtime_ns
    goes_on = together(run, concepts, "--recipe", "early-stop", "--resume")
    assert goes_on.status == 0 and goes_on.out == "2 of 2 words are learned, in out\n"
    assert state.stat().st_mtime_ns == written and load_file(state)["done"] == 3
    assert is_done(state.parent, 4) and not is_done(state.parent, 5)  # by its rule, more steps may need more of them


def test_a_wrong_start_is_one_error_and_not_one_for_each_word(run, concepts):
    assert "no such file: word.pt" in together(run, concepts, "--init", "word.pt").error
    assert not Path("out").exists()


def test_a_run_that_ended_before_its_first_save_begins_again_and_a_word_alone_is_never_deleted(run, concepts):
    (Path("out/heart/previews")).mkdir(parents=True)
    Path("out/heart/settings.json").write_text("{}")
    Path("out/<bolt>").mkdir()
    save_embeddings(Path("out/<bolt>/embedding.safetensors"), {"<bolt>": torch.ones(1, 128)})
    goes_on = together(run, concepts, "--resume")
    assert goes_on.status == 2 and goes_on.out == "1 of 2 words are learned, in out\n"
    assert "<bolt> already holds embedding.safetensors" in goes_on.err
    assert torch.equal(word(Path("out/<bolt>")), torch.ones(1, 128))


def test_the_shards_are_all_concepts_each_once(run, concepts):
    for name in "abc":
        (concepts / name).mkdir()
    shards = [find_concepts(concepts, Path("out"), Shard(number, 3)) for number in (1, 2, 3)]
    assert sorted(concept.folder.name for shard in shards for concept in shard) == ["<bolt>", "a", "b", "c", "heart"]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_the_folder_that_is_written_into_is_no_concept_wherever_it_lies(concepts, tmp_path):
    """It would move the others from one shard to another as soon as it is there."""
    before = [find_concepts(concepts, concepts / "a" / "out", Shard(number, 2)) for number in (1, 2)]
    add_concept(concepts / "a" / "out" / "<bolt>", "bolt")
    assert [find_concepts(concepts, concepts / "a" / "out", Shard(number, 2)) for number in (1, 2)] == before
    assert [concept.folder.name for (concept,) in before] == ["<bolt>", "heart"]
    with pytest.raises(InputError, match=r"--out is .*, in .*heart, where pictures are; choose another --out"):
        find_concepts(concepts, concepts / "heart" / "out", None)


def test_two_shards_may_share_the_folder_that_they_write_into(run, concepts):
    for shard in ("1/2", "2/2"):
        learned = together(run, concepts, "--shard", shard)
        assert learned.status == 0 and learned.out == "1 of 1 words are learned, in out\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["<bolt>", "heart"]


def test_hidden_folders_and_files_are_no_concepts_and_a_folder_without_any_is_refused(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r"no folder in .*expected one with pictures for each word; or try --images"):
        find_concepts(tmp_path, Path("out"), None)
    with pytest.raises(InputError, match="no such folder"):
        find_concepts(tmp_path / "nowhere", Path("out"), None)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1/0", "1/" + "9" * 50])
def test_a_shard_is_one_of_some(text):
    assert parse_shard("2/8") == Shard(2, 8)
    with pytest.raises(ArgumentTypeError, match="expected such as 2/8"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--images", "a"], "no --token, expected --images with --token, or --concepts alone"),
        (["--concepts", "a", "--token", "S*"], "both --concepts and --token, expected --images with --token"),
        (["--images", "a", "--token", "S*", "--shard", "1/2"], "--shard and --together are for many words"),
        (["--images", "a", "--token", "S*", "--together", "2"], "--shard and --together are for many words"),
        (["--concepts", "a", "--images", "b"], "not allowed with argument"),
        (["--concepts", "a", "--out", "./a"], "--out and --concepts are both a, expected two folders"),
    ],
)
def test_options_that_do_not_fit_are_one_line(run, options, expected):
    assert expected in run("train.py", *options).error


def test_torchrun_is_for_one_word(run, concepts, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("RANK", "0")
    assert "--concepts does not run under torchrun" in together(run, concepts).error
