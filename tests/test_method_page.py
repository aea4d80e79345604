"""What docs/method.md says is true: its lines are in the files, its pictures and tests are there."""

import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("file", "lines"), BLOCKS, ids=[file for file, _ in BLOCKS])
def test_quoted_lines_are_in_the_file(file, lines):
    there = [line.split("  # ")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    places = [there.index(line.strip()) for line in lines.splitlines()]
    assert places == sorted(places), "they stand in another order"


def test_every_part_is_quoted():
    assert len(BLOCKS) >= 8
    assert {file for file, _ in BLOCKS} >= {"train.py", "tinyldm/clip.py", "tinyldm/schedule.py", "tinyldm/sampler.py"}


def test_every_picture_is_there_and_no_other():
    named = re.findall(r"\]\(figures/(\w+)\.png\)", PAGE)
    assert sorted(named) == sorted(file.stem for file in (ROOT / "docs" / "figures").glob("*.png"))


def test_exercises_name_files_and_tests_that_exist():
    exercises = PAGE[PAGE.index("## Exercises") :]
    files = re.findall(r"`((?:tests|tinyldm)/[\w/]+\.py|train\.py)`", exercises)
    assert len(files) >= 8
    for file in files:
        assert (ROOT / file).is_file(), file
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", exercises):
        assert f"def {name}(" in tests, name
    assert len(re.findall(r"^\d\. ", exercises, re.MULTILINE)) == 5
