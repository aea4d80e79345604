"""SHA-256 of files, remembered between runs: never wrong, and never in the way."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, WEIGHTS

from tinyldm.formats import hashes
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.hashes import file_sha256

OLD = 1_600_000_000  # seconds; a file that was just written is not remembered


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tinyldm" / "sha256.json"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """That was written long ago, as far as a test can make it so: its ctime is of now."""
    monkeypatch.setattr(hashes, "SETTLED", 0)
    return written(tmp_path / "file", b"some weights", OLD)


def written(path, content, seconds):
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))
    return path


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def read_once(monkeypatch):
    """What is hashed by reading it."""
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    return read


def test_a_file_is_read_once(cache, file, read_once):
    assert file_sha256(file) == file_sha256(file) == sha256(b"some weights")
    assert read_once == [str(file)]


def test_another_process_does_not_read_it_again(cache, file):
    file_sha256(file)
    code = "import hashlib, sys; hashlib.file_digest = None; from pathlib import Path\n"
    code += "from tinyldm.formats.hashes import file_sha256; print(file_sha256(Path(sys.argv[1])))"
    process = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == sha256(b"some weights")


@pytest.mark.parametrize("content, seconds", [(b"more of weights", OLD), (b"SOME WEIGHTS", OLD + 1)])
def test_a_file_of_another_size_or_time_is_read_anew(cache, file, content, seconds):
    file_sha256(file)
    written(file, content, seconds)
    assert file_sha256(file) == sha256(content)


def test_a_file_that_another_one_of_its_size_and_mtime_replaces_is_read_anew(cache, file, tmp_path):
    """As `cp -p` and `rsync -t` do."""
    file_sha256(file)
    before = file.stat().st_ctime_ns
    while written(tmp_path / "other", b"SOME WEIGHTS", OLD).stat().st_ctime_ns == before:
        pass  # within one tick of the clock
    (tmp_path / "other").replace(file)
    assert file_sha256(file) == sha256(b"SOME WEIGHTS")


def test_a_file_that_may_change_within_one_tick_of_the_clock_is_not_remembered(cache, tmp_path):
    (tmp_path / "new").write_bytes(b"just now")
    assert file_sha256(tmp_path / "new") == sha256(b"just now")
    assert not cache.exists()


def test_a_link_and_its_target_are_one_file(cache, file, tmp_path, read_once):
    (tmp_path / "link").symlink_to(file)
    assert file_sha256(tmp_path / "link") == file_sha256(file)
    assert len(read_once) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "[" * 100_000,
        '{"FILE": 3}',
        '{"FILE": [12, 1600000000000000000, CTIME]}',
        '{"FILE": [12, 1600000000000000000, "DIGEST"]}',
        '{"FILE": [12, 1600000000000000000, CTIME, 7]}',
        '{"FILE": [12, 1600000000000000000, CTIME, "beef"]}',
        '{"FILE": [12.0, 1600000000000000000, CTIME, "DIGEST"]}',
        '{"FILE": [12, 1600000000000000000, CTIME, "DIGEST\\n"]}',
        '{"FILE": [12, 1600000000000000000, CTIME, "DIGEST"], "x": ' + "1" * 10_000 + "}",
        '{"FILE": [12, 1600000000000000000, CTIME, "DIGEST"], "x": ' + " " * 1_000_000 + "1}",
        b"\xff\xfe",
    ],
)
def test_a_broken_cache_is_not_believed_and_put_right(cache, file, content):
    if isinstance(content, str):
        content = content.replace("FILE", str(file)).replace("DIGEST", 64 * "0")
        content = content.replace("CTIME", str(file.stat().st_ctime_ns)).encode()
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert file_sha256(file) == sha256(b"some weights")
    entry = [12, OLD * 10**9, file.stat().st_ctime_ns, sha256(b"some weights")]
    assert json.loads(cache.read_text()) == {str(file): entry}


def test_a_cache_that_cannot_be_written_is_no_error(file, tmp_path, monkeypatch):
    for place in (file, "/dev/null", "/proc/none"):  # no folders
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert file_sha256(file) == sha256(b"some weights")


def test_without_xdg_cache_home_it_lies_in_the_home_and_a_relative_one_does_not_count(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert hashes.cache_file() == tmp_path / "home" / ".cache" / "tinyldm" / "sha256.json"
    file_sha256(file)
    assert (tmp_path / "home" / ".cache" / "tinyldm" / "sha256.json").is_file()


def test_only_the_last_thousand_are_kept(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "MAX_ENTRIES", 2)
    monkeypatch.setattr(hashes, "SETTLED", 0)
    for i in range(3):
        file_sha256(written(tmp_path / str(i), b"x", OLD))
    assert list(json.loads(cache.read_text())) == [str(tmp_path / "1"), str(tmp_path / "2")]


def test_a_checkpoint_of_one_file_has_that_files_hash(cache):
    path = WEIGHTS / "model.safetensors"
    assert open_checkpoint(WEIGHTS).sha256() == sha256(path.read_bytes())
