"""Merges files: every kind is found and read, and comes back as it was written; what is none is refused."""

import gzip
import json
from pathlib import Path

import pytest

from tinyldm import InputError
from tinyldm.formats.merges import CLIP_MERGES, find_merges, read_merges, write_merges
from tinyldm.tokenizer import learn_merges


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    return learn_merges(
        ["a photo of a red circle on a blue background", "une fenêtre à côté d'un café: 고양이 사진"], 100
    )


def test_merges_are_the_folders_own_then_those_beside_the_file_then_those_in_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    for name in ("tokenizer", "../weights/tokenizer"):
        (folder / name).mkdir(parents=True)
    names = ["tokenizer/merges.txt", "merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer/tokenizer.json"]
    places = [*(folder / name for name in names), Path("weights/tokenizer/merges.txt"), Path("weights/merges.txt")]
    for place in places:
        place.touch()
    for place in places:  # the best of those that are left, again and again
        assert find_merges(folder) == find_merges(folder / "x.safetensors") == place
        place.unlink()
    assert find_merges(folder) is None


def test_merges_survive_their_file_and_leave_nothing_beside_it(merges, tmp_path):
    write_merges(tmp_path / "merges.txt", merges)
    assert read_merges(tmp_path / "merges.txt") == merges
    assert [path.name for path in tmp_path.iterdir()] == ["merges.txt"]


def test_files_are_told_apart_by_content_and_windows_line_ends_are_read(merges, tmp_path):
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "packed").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "windows").write_bytes("\r\n".join(lines).encode())
    assert read_merges(tmp_path / "packed") == read_merges(tmp_path / "windows") == merges


def test_of_a_file_as_long_as_clips_only_the_head_is_used(tmp_path):
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)]
    pairs = [(a, b) for a in letters for b in letters]
    pairs += [(a + b, c) for a, b in pairs for c in letters]
    pairs = pairs[:CLIP_MERGES]
    (tmp_path / "merges.txt").write_text("\n".join(["#version", *map(" ".join, pairs), "never read"]))
    assert len(read_merges(tmp_path / "merges.txt")) == CLIP_MERGES


@pytest.mark.parametrize("merges", [["i n", "t h"], [["i", "n"], ["t", "h"]]], ids=["old", "new"])
def test_both_spellings_of_tokenizer_json_are_read(tmp_path, merges):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": merges}}))
    assert read_merges(tmp_path / "tokenizer.json") == [("i", "n"), ("t", "h")]


# Without the time, the tests' names, which contain it, are the same in every worker.
TWO_MERGES = b'"bpe_simple_vocab_16e6.txt#version: 0.2\ni n\nt h\n'
PACKED = gzip.compress(TWO_MERGES * 100, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", 'no "#version"'),
        (b"hello world\nhow are you\n", 'no "#version"'),
        (b"#version: 0.2\n", "0 merges, the file is cut short"),
        (b"#version: 0.2\ni n\nhello world\n", 'line 3, "hello world", is no merge'),
        (b"#version: 0.2\ni n\nin\n", 'line 3, "in", is no merge'),
        (b"#version: 0.2\ni n\ni n\n", 'line 3, "i n", is no merge'),
        (b"#version: 0.2\n\xff\xfe\n", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "cannot be read"),
        (PACKED[:-20], "cannot be read"),
        (PACKED[:2], "cannot be read"),
        (PACKED[:10] + b"broken" + PACKED[16:], "cannot be read"),
        (gzip.compress(TWO_MERGES, mtime=0), "2 merges, the file is cut short"),
        (gzip.compress(b"#version: 0.2\n" + bytes(20_000_000), mtime=0), "more than 20,000,000 bytes"),
        (b"{", "a JSON file without model.merges"),
        (b'{"model": {"type": "WordPiece"}}', "a JSON file without model.merges"),
        (b'{"model": {"merges": [3, 4]}}', "a JSON file without model.merges"),
        (b'{"model": {"merges": []}}', "0 merges, the file is cut short"),
        (b'{"model": {"merges": ["i n", "hello world"]}}', 'line 3, "hello world", is no merge'),
    ],
)
def test_a_file_that_is_not_merges_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "merges.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_merges(path)
    assert str(path) in str(error.value) and "expected a merges.txt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_not_merges(tmp_path):
    with pytest.raises(InputError, match="directory"):
        read_merges(tmp_path)
