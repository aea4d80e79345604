"""Bad input ends every command of the lab as it ends train.py: one line, status 2, nothing written."""

import pytest

PICTURES = "expected a whole number of at least"
DEVICE = "invalid choice: 'tpu'"
CLIP_FIRST = "run it first: python -m tinyldm.lab.pretraining --stage clip"
WRONG = {
    "tinyldm.lab.world": [
        ("", "nothing to do, expected a folder or a file to write; give --out, --examples or --sheet"),
        ("--out new --count 0", f"argument --count: '0', {PICTURES} 1"),
        ("--out new --count -3", f"'-3', {PICTURES} 1"),
        ("--out new --count many", f"'many', {PICTURES} 1"),
        ("--out new --size 0", f"'0', {PICTURES} 1 and at most 4096"),
        ("--out new --size 100000", f"{PICTURES} 1 and at most 4096"),
        ("--out new --seed -1", f"'-1', {PICTURES} 0"),
        ("--out file/new", "Not a directory: file/new"),
        ("--out file", "File exists: file"),
        ("--examples file", "Not a directory: file/checkered-heart"),
        ("--sheet nowhere/sheet.png", "there is no folder 'nowhere'; make it first"),
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
        ("--out nowhere --steps 0", f"'0', {PICTURES} 100 and at most 15000"),
        ("--out nowhere --steps 20000", f"{PICTURES} 100 and at most 15000"),
        ("--out nowhere --pictures -1", f"'-1', {PICTURES} 8"),
    ],
    "tinyldm.lab.measure": [
        ("--weights nowhere", "no checkpoint at nowhere"),
        ("--only everything", "invalid choice: 'everything'"),
        ("--share 0", "'0', expected a number above 0"),
        ("--share half", "'half', expected a number above 0"),
        ("--guidance -1", "'-1', expected a number above 0"),
        ("--sheets file", "File exists: file"),
        ("--samples nowhere/samples.png", "there is no folder 'nowhere'; make it first"),
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
