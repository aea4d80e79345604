"""`python -m tinyldm.lab.world` writes pictures and the truth about them, the examples, and the sheet."""

import json

import numpy as np
from conftest import EXAMPLES
from PIL import Image

from tinyldm.lab.world.distribution import make_pictures

WORLD = "tinyldm.lab.world"


def test_it_writes_the_folders_of_examples(run, tmp_path):
    assert run(WORLD, "--examples", tmp_path / "new").status == 0
    folders = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert {"checkered-heart", "bolt", "blueprint"} <= set(folders) and len(folders) >= 5
    for folder in (tmp_path / "new").iterdir():
        assert sorted(path.name for path in folder.iterdir()) == [f"{i:02}.png" for i in range(5)]
        assert {Image.open(path).size for path in folder.iterdir()} == {(256, 256)}
    for path in EXAMPLES.glob("*/*.png"):
        drawn = Image.open(tmp_path / "new" / path.relative_to(EXAMPLES))
        difference = np.abs(np.asarray(drawn, float) - np.asarray(Image.open(path), float))
        assert difference.mean() < 1, path  # Pillow's releases may round otherwise


def test_it_writes_pictures_and_the_truth(run, tmp_path):
    tmp_path /= "new"
    tmp_path.mkdir()
    assert run(WORLD, "--out", tmp_path, "--count", 3, "--seed", 5, "--sheet", tmp_path / "sheet.png").status == 0
    records = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == ["00000.png", "00001.png", "00002.png"]
    _, shown = make_pictures(3, seed=5)
    for record, picture in zip(records, shown, strict=True):
        assert Image.open(tmp_path / record["file"]).size == (64, 64)
        assert record["caption"] and record["background"] == picture.background
        assert record["things"][0]["shape"] == picture.things[0].shape
    assert Image.open(tmp_path / "sheet.png").width > 64


def test_pictures_may_be_of_any_size(run, tmp_path):
    for size in (1, 100):
        assert run(WORLD, "--out", tmp_path / str(size), "--count", 2, "--size", size).status == 0
        assert Image.open(tmp_path / str(size) / "00001.png").size == (size, size)


def test_nobodys_files_are_overwritten(run, tmp_path):
    (tmp_path / "captions.jsonl").write_text("mine")
    assert "already holds captions.jsonl, expected a new or empty folder" in run(WORLD, "--out", tmp_path).error
    assert (tmp_path / "captions.jsonl").read_text() == "mine"
