"""What README says is true: its commands run, its lines of code exist, its file guide has the right lengths."""

import re
import shlex

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, WEIGHTS
from helpers.public import single_file, write_merges
from PIL import Image
from safetensors.torch import save_file

from tinyldm.formats import embeddings
from tinyldm.formats.checkpoint import GET_MERGES, GET_WEIGHTS, load_checkpoint
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.measure.report import ask_word
from tinyldm.lab.world.distribution import EXAMPLES as THINGS

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^ {4}((?:pip|python) .+)$", README, re.MULTILINE)
COMMANDS = [words for line in LINES if (words := shlex.split(line.split("&&")[-1]))[0] == "python"]
WEIGHTS_README = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
README_DOWNLOADS, DOWNLOADS = (
    [shlex.split(line) for line in re.findall(r"^ {4}(hf .+)$", text, re.MULTILINE)]
    for text in (README, WEIGHTS_README)
)
SHORT = ["--steps", "4", "--preview-every", "4", "--batch", "2"]


def test_the_first_command_and_the_sample_command_do_what_they_promise(run, tmp_path):
    """But in a quarter of the steps: the word's colours are right in 80% of 16 samples, and the background in 80%."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    train, *_ = [words for words in COMMANDS if words[1] == "train.py"]
    sample, *_ = [words for words in COMMANDS if words[1] == "sample.py"]
    assert run(*train[1:], "--steps", load_checkpoint(WEIGHTS).defaults.steps // 4).status == 0
    embedding = tmp_path / "outputs" / "S" / "embedding.safetensors"
    assert load_embeddings(embedding)["S*"].shape == (3, 128)
    figures, _ = ask_word(WEIGHTS, load_judge(), embedding, THINGS["striped-circle"])
    assert figures["colours"] >= 0.8 and figures["background"] >= 0.8

    assert run(*sample[1:]).status == 0
    sheet = Image.open(tmp_path / "outputs" / "samples" / "sheet.png")
    assert np.asarray(sheet).std() > 20
    assert len(list((tmp_path / "outputs" / "samples").glob("0*.png"))) == 24


def commands(script: str, public: bool) -> list[list[str]]:
    """README's further commands of a script: of the tiny checkpoint, or of the public one, which nobody has here."""
    return [words for words in COMMANDS if words[1] == script and ("--weights" in words) == public]


@pytest.mark.parametrize("words", commands("train.py", public=False)[1:], ids=" ".join)
def test_the_other_training_commands_run(run, tmp_path, words):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    steps = words.index("--steps") if "--steps" in words else len(words)
    assert run(*words[1:steps], *words[steps + 2 :], *SHORT).status == 0


def test_the_commands_for_a_public_checkpoint_run(run, tmp_path):
    """With a small random model in the file that README downloads, and small pictures."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (download,) = README_DOWNLOADS
    folder = tmp_path / download[-1]
    folder.mkdir(parents=True)
    save_file(single_file("1.x"), folder / download[3])
    (folder / download[4]).parent.mkdir()
    write_merges((folder / download[4]).parent)
    ((_, train, *training),), ((_, sample, *sampling),) = (commands(s, public=True) for s in ("train.py", "sample.py"))
    assert training[:2] == sampling[:2] == ["--weights", download[-1]]
    assert run(train, *training, *SHORT, "--size", 32).status == 0
    assert run(sample, *sampling, "--height", 32, "--width", 32, "--steps", 2).status == 0
    assert (tmp_path / "outputs" / "samples" / "0000.png").is_file()


def test_the_download_commands_are_those_that_errors_print():
    lines = [" ".join(words) for words in DOWNLOADS]
    assert GET_WEIGHTS in lines and GET_MERGES in lines
    assert all(words in DOWNLOADS for words in README_DOWNLOADS)
    for program, command, repository, *files, option, folder in DOWNLOADS:
        assert (program, command, option) == ("hf", "download", "--local-dir")
        assert repository.count("/") == 1 and files and folder.startswith("weights")


def test_the_commands_for_words_of_other_tools_run_one_after_the_other(run, capsys, tmp_path):
    (tmp_path / "outputs" / "S").mkdir(parents=True)
    save_embeddings(tmp_path / "outputs" / "S" / "embedding.safetensors", {"S*": torch.full((1, 128), 0.01)})
    described, converted = [words for words in COMMANDS if words[1:3] == ["-m", "tinyldm.formats.embeddings"]]
    for words in (described, converted):
        assert embeddings.main(words[3:]) == 0
        assert "'S*'" in capsys.readouterr().out
    sample = [words for words in COMMANDS if words[1] == "sample.py"][-1]
    outcome = run(*sample[1:], "--steps", 2)
    assert outcome.status == 0 and outcome.err == ""  # no warning that no prompt uses the word


def test_the_lab_commands_run(run, tmp_path):
    lab = [words for words in COMMANDS if words[1] == "-m" and words[2].startswith("tinyldm.lab.")]
    (count,) = [words for words in lab if words[2].endswith("world")]
    assert run(*count[2:]).status == 0
    assert len(list((tmp_path / "world").glob("*.png"))) == 100
    # The others, in small, are tested in their own files; here their options must exist.
    for words in lab:
        helped = run(words[2], "--help").out
        assert [word for word in words if word.startswith("--") and word not in helped] == []


def test_the_lines_of_the_method_stand_in_the_code():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = (ROOT / "train.py").read_text() + (ROOT / "tinyldm" / "inversion.py").read_text()
    lines = [line.strip() for line in block.splitlines()]
    assert len(lines) == 9
    assert [line for line in lines if line not in code] == []


def test_the_file_guide_is_complete_and_its_lengths_are_right():
    rows = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", README, re.MULTILINE))
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "tinyldm").rglob("*.py")} | {"train.py", "sample.py"}
    assert set(rows) == {file for file in files if not file.endswith("__init__.py")}
    for file, stated in rows.items():
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(int(stated) - lines) <= max(5, 0.05 * lines), f"{file} has {lines} lines"


def test_every_picture_exists():
    notes = ROOT / "tinyldm" / "lab" / "pretraining" / "NOTES.md"
    for document in (ROOT / "README.md", ROOT / "weights" / "tiny" / "README.md", notes):
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            with Image.open(document.parent / path) as image:
                assert image.width > 100


def test_scripts_docstrings_hold_only_options_that_exist(run):
    for script in ("train.py", "sample.py"):
        helped = run(script, "--help").out
        for option in re.findall(r"(--[a-z-]+)", (ROOT / script).read_text().split('"""')[1]):
            assert option in helped
