"""`python -m tinyldm.lab.world` writes pictures and the truth about them, the examples, the sheet and the glossary."""

import json

import numpy as np
from conftest import EXAMPLES
from PIL import Image

from tinyldm.lab.world.distribution import make_pictures
from tinyldm.lab.world.nouns import INVENTED_NOUNS, noun_thing
from tinyldm.lab.world.styles import INVENTED_STYLES, draw
from tinyldm.lab.world.things import Picture

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


def test_the_glossary_shows_invented_words_each_with_its_name_above_it(run, tmp_path):
    assert run(WORLD, "--glossary", tmp_path / "glossary.png").status == 0
    sheet = Image.open(tmp_path / "glossary.png")
    gap, label, tile = 4, 20, 64
    assert sheet.size == (10 * (tile + gap) + gap, 12 * (label + tile + gap) + gap)
    nouns, styles = list(INVENTED_NOUNS)[:100], list(INVENTED_STYLES)[:20]
    words = set()
    for i, word in enumerate([*nouns, *styles]):
        x, y = gap + i % 10 * (tile + gap), gap + i // 10 * (label + tile + gap)
        picture = np.asarray(sheet.crop((x, y + label, x + tile, y + label + tile)))
        thing, style = (noun_thing(word), "photo") if word in nouns else (noun_thing("kite"), word)
        drawn = [draw(Picture((thing,), background, style)) for background in ("gray", "white", "blue")]
        assert any(np.array_equal(picture, one) for one in drawn), word
        written = np.asarray(sheet.crop((x, y, x + tile, y + label)))
        assert written.min() < 100 and (written[:, -1] == 255).all(), word  # the whole word is there
        words.add(written.tobytes())
    assert len(words) == 120


def test_pictures_may_be_of_any_size(run, tmp_path):
    for size in (1, 100):
        assert run(WORLD, "--out", tmp_path / str(size), "--count", 2, "--size", size).status == 0
        assert Image.open(tmp_path / str(size) / "00001.png").size == (size, size)


def test_nobodys_files_are_overwritten(run, tmp_path):
    (tmp_path / "captions.jsonl").write_text("mine")
    assert "already holds captions.jsonl, expected a new or empty folder" in run(WORLD, "--out", tmp_path).error
    assert (tmp_path / "captions.jsonl").read_text() == "mine"
