"""The page's commands: queues of processes that are stopped, gone on with, and seen through their folders."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES

import train
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.studio import commands as module
from tinyldm.studio.commands import OUTPUTS, Commands

# Stands in for a script: it writes down its words, shows a bar until it is stopped, and says so.
SCRIPT = """import json, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[-1].removeprefix("--out="))
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
if "--prompt=nothing" in sys.argv:
    sys.exit("sample.py: error: nothing to make")
(out / "0000.png").write_text(json.dumps(sys.argv[1:]))
while not stopped and "--prompt=short" not in sys.argv:
    print("\\rlearning S*:  35%|xx  | 21/60 [00:03<00:05,  7.0it/s]", end="", file=sys.stderr, flush=True)
    time.sleep(0.02)
print("\\nkept what was learned" if stopped else "done")
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "sample.py"):
        (tmp_path / name).write_text(SCRIPT)
    monkeypatch.setattr(module, "train_script", lambda: tmp_path / "train.py")
    ours = Commands()
    yield ours
    ours.close()


def begun(commands: Commands, name: str, script: str = "sample.py", **options: object) -> Path:
    folder = OUTPUTS / name
    folder.mkdir(parents=True, exist_ok=True)
    commands.begin(script, folder, options)
    return folder


def wait(true) -> None:
    for _ in range(500):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it never came true")


def words_of(folder: Path) -> list[str]:
    return json.loads((folder / "0000.png").read_text())


def test_a_command_tells_its_bar_while_it_goes_on_and_its_last_words_after_a_stop(commands):
    folder = begun(commands, "samples")
    wait(lambda: commands.told(folder) == "step 21 of 60, 00:05 left")
    assert commands.alive(folder)
    commands.stop(folder)
    wait(lambda: not commands.alive(folder))
    assert commands.told(folder) == "kept what was learned"


def test_commands_of_one_script_wait_for_each_other_and_those_of_the_other_do_not(commands):
    first, second, other = begun(commands, "a"), begun(commands, "b"), begun(commands, "c", "train.py")
    wait(lambda: "step" in commands.told(first) and "step" in commands.told(other))
    assert commands.told(second) == "waits for the one before it" and commands.alive(second)
    assert second in commands.folders().values()
    commands.stop(first)
    wait(lambda: "step" in commands.told(second))


def test_a_command_that_is_stopped_while_it_waits_never_begins_and_leaves_no_folder(commands):
    first, second, third = (begun(commands, name) for name in "abc")
    commands.stop(second)
    commands.stop(first)
    wait(lambda: "step" in commands.told(third))
    assert not second.exists() and not commands.alive(second)


def test_stop_is_said_once_and_what_goes_on_is_not_begun_again(commands):
    folder = begun(commands, "samples")
    wait(lambda: "step" in commands.told(folder))
    process = commands.processes[folder]
    commands.begin("sample.py", folder, {})
    commands.stop(folder)
    assert folder not in commands.processes  # a second signal would end it without saving
    commands.stop(folder)
    wait(lambda: not commands.alive(folder))
    assert commands.told(folder) == "kept what was learned" and process.returncode == 0
    time.sleep(0.1)
    assert not commands.alive(folder)


def test_a_command_that_cannot_be_started_does_not_wait_for_ever(commands):
    folder = begun(commands, "samples", prompt="a" * 10**6)
    wait(lambda: not commands.alive(folder) and not folder.exists())


def test_an_error_is_told_and_leaves_no_folder(commands):
    folder = begun(commands, "samples", prompt="nothing")
    wait(lambda: not folder.exists())
    assert commands.told(folder) == "sample.py: error: nothing to make"


def test_options_are_typed_as_the_scripts_take_them(commands):
    folder = begun(commands, "samples", prompt="short", init_image=Path("a b.png"), keep_pixels=True, vae=None, init="")
    wait(lambda: commands.told(folder) == "done")
    assert words_of(folder) == ["--prompt=short", "--init-image=a b.png", "--keep-pixels", "--out=outputs/samples"]


def test_continue_gives_train_py_the_options_that_the_run_keeps(run, commands, monkeypatch):
    run("train.py", "--images", EXAMPLES / "bolt", "--token", "<b-*>", "--steps", 2, "--seed", 7, "--lr", 0.03)
    folder = OUTPUTS / "b"
    commands.go_on(folder)
    wait(lambda: (folder / "0000.png").exists() and (folder / "0000.png").stat().st_size)
    options = train.parse_options(words_of(folder))
    saved = json.loads((folder / "settings.json").read_text())
    assert options.resume and options.out == folder and options.recipe == saved["recipe"]
    assert (options.token, options.steps, options.seed, options.lr) == ("<b-*>", 2, 7, 0.03)


def test_of_several_words_with_one_name_the_newest_counts_and_a_damaged_one_does_not(commands):
    for i, folder in enumerate(("S", "S-2", "H", "broken")):
        (OUTPUTS / folder).mkdir(parents=True)
        save_embeddings(OUTPUTS / folder / "embedding.safetensors", {f"{folder[0]}*": torch.full((1, 4), i + 1.0)})
        time.sleep(0.02)
    (OUTPUTS / "broken" / "embedding.safetensors").write_bytes(b"nothing")
    names = {word: file.parent.name for word, file in commands.words().items()}
    assert names == {"H*": "H", "S*": "S-2"}


def test_the_end_of_the_page_stops_what_goes_on_and_what_waits(commands):
    first, second = begun(commands, "a"), begun(commands, "b")
    wait(lambda: "step" in commands.told(first))
    commands.close()
    assert commands.told(first) == "kept what was learned"
    assert not second.exists()
