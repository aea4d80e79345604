"""Random accidents and strangers' files, some hundred; and that the fuzzer would see what it looks for."""

import random
import re
from dataclasses import replace

import pytest
from fuzz import KINDS, damaged, damaged_json, faults, hashes, main
from helpers.children import Outcome
from PIL import Image

CASES = 110  # ten of each kind; tests/fuzz.py alone makes as many as are asked for


def test_random_accidents_end_in_the_work_done_or_in_one_line(tmp_path, capsys):
    status = main(["--cases", str(CASES), "--quiet", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert not status and f"{CASES} cases, 0 faults" in out, out
    for kind in KINDS:  # there were accidents, and not everything is refused
        assert re.search(rf"^{kind}: status .*\b2", out, re.MULTILINE), kind
    assert out.count(" x 0") > len(KINDS) / 2


GOOD = Outcome(
    status=2, out="", err="train.py: warning: odd\ntrain.py: error: no such file: x\n", memory=0, seconds=1.0
)


def test_one_line_and_status_2_is_no_fault(tmp_path):
    assert list(faults(GOOD, {}, tmp_path)) == []
    assert (
        list(faults(replace(GOOD, status=0, err="learning: 100%|###| 1/1 [00:00<00:00, 9.0it/s]\n"), {}, tmp_path))
        == []
    )


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"status": 1, "err": "Traceback (most recent call last):\nKeyError: 'x'\n"}, "a traceback: KeyError: 'x'"),
        ({"status": None}, "no end after 1 s"),
        ({"status": -11}, "status -11"),
        ({"err": ""}, "0 lines for one error"),
        ({"err": "a: error: b\nc\n"}, "2 lines for one error"),
        ({"err": "something went wrong\n"}, "1 lines for one error"),
        ({"status": 0}, "an error and status 0"),
        ({"err": "a: error: \x1b[2J\n"}, "not printable"),
        ({"out": "a \x07\n"}, "a terminal would obey"),
        ({"memory": 10**9}, "1000 MB of memory, 157 allowed"),
    ],
)
def test_a_command_that_ends_otherwise_is_seen(tmp_path, change, fault):
    assert [found for found in faults(replace(GOOD, **change), {}, tmp_path) if fault in found]


def test_files_that_are_changed_half_written_left_over_or_executed_are_seen(tmp_path):
    (tmp_path / "mine").write_text("before")
    before = hashes(tmp_path)
    (tmp_path / "mine").write_text("after")
    Image.new("RGB", (99, 99)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:-40])
    (tmp_path / "half.json").write_text('{"a"')
    (tmp_path / ".0123456789abcdef.csv").touch()
    (tmp_path / "executed").touch()
    found = " ".join(faults(GOOD, before, tmp_path))
    for fault in ("other files than before: ['mine']", "half.png is not whole", "half.json is not whole"):
        assert fault in found
    assert "a temporary file is left" in found and "executed" in found


def test_a_case_is_made_from_its_number_alone():
    whole = bytes(range(256)) * 8
    for number in range(50):
        assert damaged(random.Random(number), whole) == damaged(random.Random(number), whole)
        config = {"a": [1, 2], "b": {"c": "x"}}
        again = damaged_json(random.Random(number), config), damaged_json(random.Random(number), config)
        assert repr(again[0]) == repr(again[1]) and config == {"a": [1, 2], "b": {"c": "x"}}
