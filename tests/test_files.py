"""write_atomically: a reader finds the old content or the new one, never half; whose a folder is; reading lines."""

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import largest_file, locked_elsewhere
from PIL import Image
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.files import MAX_TEXT_BYTES, check_is_file, lock_folder, read_lines, take_folder, write_atomically


def test_the_path_keeps_its_old_content_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_text("old")
    with write_atomically(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["loss.csv"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, failure):
    path = tmp_path / "loss.csv"
    path.write_text("old")
    with pytest.raises(failure), write_atomically(path) as temporary:
        temporary.write_text("ne")
        raise failure
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["loss.csv"]


def test_the_temporary_file_is_hidden_in_the_same_folder_with_the_same_suffix(tmp_path):
    with write_atomically(str(tmp_path / "a.png")) as temporary:
        assert (temporary.parent, temporary.name[0], temporary.suffix) == (tmp_path, ".", ".png")
        temporary.touch()


@pytest.mark.parametrize("save", [Path.touch, partial(save_file, {"x": torch.zeros(1)})], ids=["plain", "safetensors"])
def test_the_file_can_be_read_by_whom_the_umask_lets_read(tmp_path, save):
    before = os.umask(0o022)
    try:
        with write_atomically(tmp_path / "a") as temporary:
            save(temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_block_that_writes_nothing_is_an_error_and_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


SAVERS = {
    "text": lambda path: path.write_text("x" * 50_000),
    "safetensors": partial(save_file, {"x": torch.zeros(20_000)}),
    "png": partial(Image.effect_noise((300, 300), 50).save, format="PNG"),
}


@pytest.fixture(params=["a disk of 20 kB", "files of 20 kB at most"])
def little_space(request, tmp_path):
    """A folder with room for a small file, and none for what SAVERS write."""
    if "files" in request.param:
        with largest_file(20_000):
            yield tmp_path
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_on_a_full_disk_the_old_content_stays_and_the_error_names_the_file(little_space, save):
    path = little_space / "a.png"
    path.write_text("old")
    with pytest.raises(OSError) as error, write_atomically(path) as temporary:
        save(temporary)
    assert str(path) in str(error.value)
    assert path.read_text() == "old" and os.listdir(little_space) == ["a.png"]


def test_of_many_that_start_at_once_each_gets_a_folder_of_its_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: take_folder(None, tmp_path / "outputs" / "S"), range(8)))
    assert sorted(folder.name for folder in taken) == ["S", *(f"S-{number}" for number in range(2, 9))]


def test_a_given_folder_is_taken_if_it_is_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    for folder in (tmp_path / "a" / "new", tmp_path / "empty"):
        assert take_folder(folder, tmp_path / "other") == folder and folder.is_dir()


def test_a_given_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0000.png").touch()
    with pytest.raises(InputError, match=r"already holds 0000.png, .* choose another --out"):
        take_folder(tmp_path / "mine", tmp_path / "other")


def test_a_folder_is_locked_until_the_process_that_writes_there_ends_even_by_kill_9(tmp_path):
    with locked_elsewhere(tmp_path) as process:
        for take in (lock_folder, lambda folder: take_folder(folder, tmp_path / "other")):
            with pytest.raises(InputError, match="another run is writing"):
                take(tmp_path)
        process.kill()
        process.wait()
        lock_folder(tmp_path)
        lock_folder(tmp_path)  # it is our own by now
    assert os.listdir(tmp_path) == []  # no lock lies about


def test_lines_are_read_without_those_that_are_empty(tmp_path):
    (tmp_path / "a.txt").write_text("a red star \n\n  two lemons\n", encoding="utf-8")
    assert read_lines(tmp_path / "a.txt", "prompts") == ["a red star", "two lemons"]


def test_what_is_no_text_file_is_named_with_what_it_should_hold(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    for name in ("picture.png", "missing.txt", "."):
        with pytest.raises(InputError, match=r"cannot read the prompts .*; expected a text file, one a line"):
            read_lines(tmp_path / name, "prompts")


def test_lines_of_a_windows_editor_are_read_without_its_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("a red star\r\ntwo lemons\r\n".encode("utf-8-sig"))
    assert read_lines(tmp_path / "a.txt", "prompts") == ["a red star", "two lemons"]


def test_lines_come_through_a_pipe_that_is_open():
    reading, writing = os.pipe()
    os.write(writing, b"a red star\n")
    os.close(writing)
    assert read_lines(f"/dev/fd/{reading}", "prompts") == ["a red star"]
    os.close(reading)


def test_pipes_sockets_and_devices_are_refused_unopened(tmp_path, no_hang):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/zero"):
            for read in (check_is_file, partial(read_lines, what="prompts")):
                with pytest.raises(InputError, match="is a pipe or a device, expected a file"):
                    read(path)


def test_a_file_too_large_to_be_a_list_of_lines_is_not_read(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    with pytest.raises(InputError, match=f"it has more than {MAX_TEXT_BYTES} bytes.; expected a text file, one a line"):
        read_lines(tmp_path / "a.txt", "prompts")


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(OSError) as error, write_atomically(tmp_path / "list.txt"):
        (tmp_path / "nowhere" / "picture.png").write_bytes(b"")
    assert error.value.filename == str(tmp_path / "nowhere" / "picture.png")
