"""Bad input ends every command of the lab as it ends train.py: one line, status 2, nothing written."""

import argparse
import os
import shutil

import pytest
import torch
from conftest import WEIGHTS
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.lab import file_to_write
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.pretraining.loop import STATE

PICTURES = "expected a whole number of at least"
DEVICE = "invalid choice: 'tpu'"
CLIP_FIRST = "run it first: python -m tinyldm.lab.pretraining --stage clip"
WRONG = {
    "tinyldm.lab.world": [
        ("", "nothing to do, expected a folder or a file to write; give --out, --examples, --sheet or --glossary"),
        ("--out new --count 0", f"argument --count: '0', {PICTURES} 1"),
        ("--out new --count -3", f"'-3', {PICTURES} 1"),
        ("--out new --count 1000000000000", f"{PICTURES} 1 and at most 1000000"),
        ("--out new --count many", f"'many', {PICTURES} 1"),
        ("--out new --size 0", f"'0', {PICTURES} 1 and at most 4096"),
        ("--out new --size 100000", f"{PICTURES} 1 and at most 4096"),
        ("--out new --seed -1", f"'-1', {PICTURES} 0"),
        ("--out file/new", "Not a directory: file/new"),
        ("--out file", "Not a directory: file"),
        ("--examples file", "Not a directory: file/checkered-heart"),
        ("--sheet nowhere/sheet.png", "there is no folder 'nowhere'; make it first"),
        ("--glossary nowhere/glossary.png", "there is no folder 'nowhere'; make it first"),
        ("--sheet .", "is a folder, expected the name of a file to write"),
        ("--shet sheet.png", "unrecognized arguments: --shet sheet.png; see python tinyldm.lab.world --help"),
    ],
    "tinyldm.lab.pretraining": [
        ("--out new --stage unet", "invalid choice: 'unet'"),
        ("--out new --steps 0", f"argument --steps: '0', {PICTURES} 1"),
        ("--out new --pictures 0", f"'0', {PICTURES} 8"),
        ("--out new --pictures 7", f"'7', {PICTURES} 8"),
        ("--out new --pictures many", f"'many', {PICTURES} 8"),
        ("--out new --minutes 0", "'0', expected a number above 0"),
        ("--out new --minutes soon", "'soon', expected a number above 0"),
        ("--out new --seed -1", f"'-1', {PICTURES} 0"),
        ("--out new --seed 99999999999999999999", f"'99999999999999999999', {PICTURES} 0 and at most"),
        ("--out new --device tpu", DEVICE),
        ("--out file", "File exists: file"),
        ("--out new --weights file", "File exists: file"),
        ("--losses nowhere/losses.png", "there is no folder 'nowhere'; make it first"),
        ("--out new --losses losses.png", "new: found no stage's loss.csv"),
    ],
    "tinyldm.lab.pretraining.text_tower": [
        ("--out nowhere", f"nowhere/clip holds no state, expected that of a stage; {CLIP_FIRST}"),
        ("--out nowhere --steps 0", f"'0', {PICTURES} 100 and at most 13000"),
        ("--out nowhere --steps 20000", f"{PICTURES} 100 and at most 13000"),
        ("--out nowhere --pictures -1", f"'-1', {PICTURES} 8"),
    ],
    "tinyldm.lab.measure": [
        ("--weights nowhere", "no checkpoint at nowhere"),
        ("--only everything", "invalid choice: 'everything'"),
        ("--share 0", "'0', expected a number above 0"),
        ("--share 1e12", "'1e12', expected a number above 0 and at most 10"),
        ("--share nan", "'nan', expected a number above 0"),
        ("--share half", "'half', expected a number above 0"),
        ("--guidance -1", "'-1', expected a number above 0"),
        ("--seeds 0", f"'0', {PICTURES} 1"),
        ("--train '", 'argument --train: "\'", no closing quotation; close every quote'),
        ("--sheets file", "File exists: file"),
        ("--samples nowhere/samples.png", "there is no folder 'nowhere'; make it first"),
    ],
    "tinyldm.lab.gallery": [
        ("--only everything", "invalid choice: 'everything'"),
        ("--weights nowhere", "no checkpoint at nowhere"),
        ("--out file", "File exists: file"),
    ],
    "tinyldm.lab.figures": [
        ("--only everything", "invalid choice: 'everything'"),
        ("--weights nowhere", "no checkpoint at nowhere"),
        ("--out file", "File exists: file"),
    ],
    "tinyldm.lab.measure.zero_shot": [
        ("--weights nowhere", "nowhere/clip.safetensors can't be read"),
        ("--pictures 0", f"'0', {PICTURES} 500"),
        ("--pictures few", f"'few', {PICTURES} 500"),
    ],
    "tinyldm.lab.measure.judge": [
        ("--out new.st --pictures 0", f"'0', {PICTURES} 100"),
        ("--out new.st --steps 0", f"'0', {PICTURES} 1"),
        ("--out nowhere/judge.safetensors", "there is no folder 'nowhere'; make it first"),
        ("--out .", "is a folder, expected the name of a file to write"),
    ],
}


@pytest.mark.parametrize(
    "command, words, error",
    [(command, words, error) for command, cases in WRONG.items() for words, error in cases],
    ids=lambda value: value.removeprefix("tinyldm.lab."),
)
def test_wrong_input_is_one_line(run, tmp_path, command, words, error):
    (tmp_path / "file").write_text("a file, no folder")
    line = run(command, *words.split()).error
    assert line.startswith(f"{command}: error: ") and error in line
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} - {"file", "new"}
    assert written == set()


@pytest.mark.parametrize("command", WRONG)
def test_help_shows_the_commands_as_they_are_typed(run, command):
    outcome = run(command, "--help")
    assert outcome.status == 0 and f"python -m {command}" in outcome.out


# ---- Folders that hold something else


def state(folder, tensors, **metadata):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / STATE, metadata=metadata)


def other_network(path):
    sections = ("weights", "average", "moment1", "moment2")
    state(path / "autoencoder", {f"{section}/x": torch.zeros(3) for section in sections}, step="7")


def log(text):
    def write(path):
        (path / "clip").mkdir()
        (path / "clip" / "loss.csv").write_bytes(text)

    return write


def first_stage(content):
    def write(path):
        (path / "diffusion").mkdir()
        shutil.copy(WEIGHTS / "merges.txt", path / "diffusion")
        content(path / "diffusion" / "autoencoder.safetensors")

    return write


def clip_and_merges(path, merges=100, size=None):
    (path / "clip.safetensors").write_bytes((WEIGHTS / "clip.safetensors").read_bytes()[:size])
    lines = (WEIGHTS / "merges.txt").read_text().splitlines()
    (path / "merges.txt").write_text("\n".join(lines[:merges]))


STAGE = ["--pictures", 8, "--minutes", 0.001, "--stage"]
PRETRAINING, ZERO_SHOT = "tinyldm.lab.pretraining", "tinyldm.lab.measure.zero_shot"
AUTOENCODER = "autoencoder/state.safetensors is broken or of another network"
LOG = "clip/loss.csv is no log of losses"
FOLDERS = {
    "a state of text": (PRETRAINING, lambda path: text(path), "--out", [*STAGE, "autoencoder"], AUTOENCODER),
    "a state without a step": (
        PRETRAINING,
        lambda path: state(path / "autoencoder", {"x": torch.zeros(1)}),
        "--out",
        [*STAGE, "autoencoder"],
        AUTOENCODER,
    ),
    "a step that is none": (
        PRETRAINING,
        lambda path: state(path / "autoencoder", {"x": torch.zeros(1)}, step="many"),
        "--out",
        [*STAGE, "autoencoder"],
        AUTOENCODER,
    ),
    "a state of another network": (PRETRAINING, other_network, "--out", [*STAGE, "autoencoder"], AUTOENCODER),
    "an average of another network": (PRETRAINING, other_network, "--out", [*STAGE, "diffusion"], AUTOENCODER),
    "a log of words": (PRETRAINING, log(b"step,loss\nx,y\n"), "--out", ["--losses", "l.png"], LOG),
    "a log without losses": (PRETRAINING, log(b"step\n1\n"), "--out", ["--losses", "l.png"], LOG),
    "a log that is no text": (PRETRAINING, log(b"\xff\xfe\0"), "--out", ["--losses", "l.png"], LOG),
    "an autoencoder of text": (
        PRETRAINING,
        first_stage(lambda file: file.write_text("junk")),
        "--out",
        [*STAGE, "decoder"],
        "autoencoder.safetensors is broken",
    ),
    "another autoencoder": (
        PRETRAINING,
        first_stage(lambda file: save_file({"x": torch.zeros(1)}, file)),
        "--out",
        [*STAGE, "export"],
        "autoencoder.safetensors is broken",
    ),
    "merges of another vocabulary": (
        ZERO_SHOT,
        clip_and_merges,
        "--weights",
        [],
        "makes a vocabulary of 613, expected",
    ),
    "a CLIP that is cut off": (
        ZERO_SHOT,
        lambda path: clip_and_merges(path, size=10**5),
        "--weights",
        [],
        "no readable safetensors file",
    ),
}


def text(path):
    (path / "autoencoder").mkdir()
    (path / "autoencoder" / STATE).write_text("junk")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_holds_something_else_is_one_line(run, tmp_path, name):
    command, write, option, words, error = FOLDERS[name]
    write(tmp_path)
    assert error in run(command, option, tmp_path, *words).error


def test_a_judge_that_is_none_is_refused(tmp_path):
    path = tmp_path / "judge.safetensors"
    for write in (lambda: path.write_text("junk"), lambda: save_file({"x": torch.zeros(1)}, path)):
        write()
        with pytest.raises(InputError, match="does not hold the judge's weights") as caught:
            load_judge(path)
        assert "\n" not in str(caught.value)


def test_a_device_is_no_file_to_write(tmp_path):
    """Renaming a finished picture onto it would take the device away from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(argparse.ArgumentTypeError, match="is a device or the like"):
        file_to_write(str(tmp_path / "pipe"))
    assert file_to_write(str(tmp_path / "new.png")) == tmp_path / "new.png"
