"""What README says is true: its commands run, its lines of code exist, its file guide has the right lengths."""

import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, WEIGHTS
from helpers.public import single_file, write_merges
from PIL import Image
from safetensors.torch import save_file

import sample
import train
from tinyldm import InputError
from tinyldm import run as running
from tinyldm.formats import embeddings
from tinyldm.formats.checkpoint import GET_MERGES, GET_WEIGHTS
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.measure.words import ask_word
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


def test_the_first_command_and_the_sample_command_do_what_they_promise(run, tmp_path, monkeypatch):
    """The word's colours are right in 80% of 16 samples, and the background in 80%."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    learn, *_ = [words for words in COMMANDS if words[1] == "train.py"]
    draw, *_ = [words for words in COMMANDS if words[1] == "sample.py"]
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))
    assert run(*learn[1:], "--weights", WEIGHTS).status == 0
    embedding = tmp_path / "outputs" / "S" / "embedding.safetensors"
    assert load_embeddings(embedding)["S*"].shape == (1, 128)
    figures, _ = ask_word(WEIGHTS, load_judge(), embedding, THINGS["striped-circle"])
    assert figures["colours"] >= 0.8 and figures["background"] >= 0.8

    assert run(*draw[1:], "--steps", 8, "--weights", WEIGHTS).status == 0
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


def test_the_commands_for_several_devices_and_many_words_have_options_that_exist():
    """What they do is tested in test_ranks.py and test_concepts.py."""
    torchrun = [shlex.split(line) for line in re.findall(r"^ {4}(torchrun .+)$", README, re.MULTILINE)]
    assert [words[:5] for words in torchrun] == 2 * [["torchrun", "--standalone", "--nproc-per-node", "4", "--"]]
    assert train.parse_options(torchrun[0][6:]).token and sample.parse_options(torchrun[1][6:]).num == 64
    ((*_, job),) = [shlex.split(line) for line in re.findall(r"^ {4}(sbatch .+)$", README, re.MULTILINE)]
    program, script, *words = shlex.split(job.replace("$SLURM_ARRAY_TASK_ID", "3"))
    assert (program, script) == ("python", "train.py") and train.parse_options(words).shard == (3, 100)


def test_the_commands_for_a_public_checkpoint_run(run, tmp_path):
    """With a small random model in the file that README downloads, and small pictures."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    download, *downloads_of_words = README_DOWNLOADS
    folder = tmp_path / download[-1]
    folder.mkdir(parents=True)
    save_file(single_file("1.x"), folder / download[3])
    (folder / download[4]).parent.mkdir()
    write_merges((folder / download[4]).parent)
    for *_, repository, file, _, place in downloads_of_words:
        (tmp_path / place).mkdir()
        torch.save({f"<{Path(repository).name}>": torch.ones(128)}, tmp_path / place / file)
    (training,), drawing = (commands(script, public=True) for script in ("train.py", "sample.py"))
    assert all(words[2:4] == ["--weights", download[-1]] for words in (training, *drawing))
    assert run("train.py", *training[2:], *SHORT, "--size", 32).status == 0
    for words in drawing:
        outcome = run("sample.py", *words[2:], "--height", 32, "--width", 32, "--steps", 2)
        assert outcome.status == 0 and "no prompt uses" not in outcome.err
    assert len(list((tmp_path / "outputs").glob("samples*/0000.png"))) == len(drawing) == 1 + len(downloads_of_words)


def test_the_download_commands_are_those_that_errors_print():
    lines = [" ".join(words) for words in DOWNLOADS]
    assert GET_WEIGHTS in lines and GET_MERGES in lines
    assert README_DOWNLOADS[0] in DOWNLOADS  # the checkpoint; the others are words
    for program, command, repository, *files, option, folder in DOWNLOADS + README_DOWNLOADS:
        assert (program, command, option) == ("hf", "download", "--local-dir")
        assert repository.count("/") == 1 and files and folder.startswith("weights")


def test_the_commands_for_words_of_other_tools_run_one_after_the_other(run, capsys, tmp_path):
    (tmp_path / "outputs" / "S").mkdir(parents=True)
    save_embeddings(tmp_path / "outputs" / "S" / "embedding.safetensors", {"S*": torch.full((1, 128), 0.01)})
    described, converted = [words for words in COMMANDS if words[1:3] == ["-m", "tinyldm.formats.embeddings"]]
    for words in (described, converted):
        assert embeddings.main(words[3:]) == 0
        assert "'S*'" in capsys.readouterr().out
    draw = commands("sample.py", public=False)[-1]
    outcome = run(*draw[1:], "--steps", 2)
    assert outcome.status == 0 and outcome.err == ""  # no warning that no prompt uses the word


def test_the_commands_that_change_and_look_into_pictures_run_one_after_the_other(run, tmp_path):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "outputs" / "S").mkdir(parents=True)
    save_embeddings(tmp_path / "outputs" / "S" / "embedding.safetensors", {"S*": torch.full((1, 128), 0.01)})
    new = {"--init-image", "--attention", "--show-steps", "--interpolate"}
    asked = [words for words in commands("sample.py", public=False) if new & {*words}]
    assert {option for words in asked for option in words if option in new} == new
    for words in asked:
        outcome = run(*words[1:], "--steps", 2)
        assert outcome.status == 0 and outcome.err == ""


def test_the_lab_commands_run(run, tmp_path):
    lab = [words for words in COMMANDS if words[1] == "-m" and words[2].startswith("tinyldm.lab.")]
    (count,) = [words for words in lab if words[2].endswith("world")]
    assert run(*count[2:]).status == 0
    assert len(list((tmp_path / "world").glob("*.png"))) == 100
    # The others, in small, are tested in their own files; here their options must exist.
    for words in lab:
        helped = run(words[2], "--help").out
        assert [word for word in words if word.startswith("--") and word not in helped] == []


def test_the_method_is_as_it_stands_in_train_py():
    loss, loop = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = (ROOT / "train.py").read_text(encoding="utf-8")
    assert loss.startswith("def inversion_loss(")
    assert f"\n\n\n{loss}\n\n" in code  # whole: between the blank lines around a function
    assert loop.startswith("for step in ")
    assert f"\n{textwrap.indent(loop, '    ')}    print(" in code  # up to the loop's last line


def lines_of(path: Path) -> int:
    """Of a file, or of all files in a folder and the folders in it."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_the_file_guide_is_complete_and_its_lengths_are_right():
    rows = {name: int(lines) for name, lines in re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \|", README, re.MULTILINE)}
    there = {f"tinyldm/{file.name}" for file in (ROOT / "tinyldm").glob("*.py")} - {"tinyldm/__init__.py"}
    assert set(rows) == there | {"train.py", "sample.py", "tinyldm/formats/", "tinyldm/studio/", "tinyldm/lab/"}
    for name, stated in rows.items():
        assert stated == lines_of(ROOT / name), name
    method, total = re.search(r"`inversion\.py`, ([\d,]+) lines.* it is ([\d,]+) lines", README, re.DOTALL).groups()
    assert int(total.replace(",", "")) == sum(rows.values())
    assert int(method.replace(",", "")) == sum([*rows.values()][: [*rows].index("tinyldm/inversion.py") + 1])


def test_no_file_of_the_method_needs_one_that_comes_after_it():
    order = [name for name in re.findall(r"^\| `tinyldm/(\w+)\.py`", README, re.MULTILINE)]
    method = order[: order.index("run")]
    assert len(method) == 11
    for i, name in enumerate(method):
        imported = set(re.findall(r"^from tinyldm\.(\w+)", (ROOT / "tinyldm" / f"{name}.py").read_text(), re.MULTILINE))
        assert imported <= {*method[:i], "files"}, name


def test_arrows_go_one_way():
    """The method needs no format, and neither of them the lab; run.py, which writes a word's file, is train.py's."""
    for folder, may_not in (("", "formats|lab"), ("formats", "lab")):
        for file in (ROOT / "tinyldm" / folder).glob("*.py"):
            if file.name != "run.py":
                found = re.findall(rf"^ *(?:from|import) tinyldm\.(?:{may_not})\b", file.read_text(), re.MULTILINE)
                assert not found, file


def test_every_picture_exists():
    notes = ROOT / "tinyldm" / "lab" / "pretraining" / "NOTES.md"
    for document in (ROOT / "README.md", ROOT / "weights" / "tiny" / "README.md", notes):
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            with Image.open(document.parent / path) as image:
                assert image.width > 100


@pytest.mark.parametrize("script", [train, sample])
def test_scripts_docstrings_hold_only_options_that_exist(script):
    commands = [shlex.split(line) for line in re.findall(r"^ {4}python \w+\.py (.+)$", script.__doc__, re.MULTILINE)]
    assert len(commands) >= 3
    for words in commands:
        script.parse_options(words)  # raises for an option that does not exist, or a value that it can't have
    with pytest.raises(InputError, match="unrecognized arguments: --nonsense"):
        script.parse_options([*commands[0], "--nonsense"])
