"""What is left when a command is stopped anywhere: killed before each write, its disk full, its folder taken away.

Every fault is made for real, in a process of its own (helpers/children.py), or in a copy of the folder as it is at each
place where the command changes a file; that both leave the same is tested, too. Whatever happens, a file is whole or
not there, and a run that is taken up again ends with the same bytes as one that was never stopped.
"""

import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from fuzz import hashes, small_model, why_not_whole
from helpers.children import Children, Outcome
from PIL import Image

from tinyldm.formats.native import save_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="helpers/children.py needs Linux")


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with Children() as children:
        yield children


@pytest.fixture(scope="module")
def others() -> Iterator[Children]:
    """For a second command at the same time."""
    with Children() as children:
        yield children


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a small checkpoint and a picture; commands run in copies of it."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    save_checkpoint(folder / "small", small_model())
    (folder / "pictures").mkdir()
    Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(folder / "pictures" / "a.png")
    return folder


TRAIN = shlex.split(
    "train.py --images pictures --token S* --weights small --init circle "
    "--steps 2 --save-every 1 --preview-every 2 --out out"
)
SAMPLE = shlex.split("sample.py --prompt circle --num 13 --weights small --steps 1 --out out")  # two batches
CONVERT = shlex.split("tinyldm.formats.embeddings word.safetensors --to a1111 --out out.pt")
DRAW = shlex.split("tinyldm.lab.world --out out --count 2")
COMMANDS = {"train": TRAIN, "sample": SAMPLE, "convert": CONVERT, "draw": DRAW}


@pytest.fixture(scope="module")
def run(children, here) -> Callable[..., tuple[Outcome, Path]]:
    """run(command, fault) -> how it ended, and the folder that it ran in."""
    numbers = count()

    def run(command: list[str], fault: dict | None = None, folder: Path | None = None) -> tuple[Outcome, Path]:
        if folder is None:
            folder = here.with_name(f"{next(numbers)}")
            shutil.copytree(here, folder)
        return children.run(command, folder, fault), folder

    return run


def at_every_write(run, command: list[str], fault: str) -> Iterator[tuple[Outcome, Path]]:
    """What a kill, or a disk that is full from there on, leaves before each of the command's writes."""
    outcome, folder = run(command, {"everywhere": fault})
    assert outcome.status == 0, outcome
    through: list[int] = []
    for number in count(1):
        copy = folder.with_name(f"{folder.name}-{fault}-{number}")
        if not copy.exists():
            assert number > 2, "it wrote nothing"
            assert through in ([], [number - 1], [number - 2, number - 1]), f"without a word at {through}"
            return
        if fault == "kill":
            yield Outcome(-signal.SIGKILL, "", "", 0, 0.0), copy
        else:
            status, out, err = (Path(f"{copy}.{name}").read_text() for name in ("status", "out", "err"))
            if int(status):
                yield Outcome(int(status), out, err, 0, 0.0), copy
            else:  # the last changes, which are renames: for these there is room on a full disk
                through.append(number)
        shutil.rmtree(copy)


def check_whole(folder: Path) -> None:
    """Every file that has a name is whole; hidden ones are what a kill left of a file in the making."""
    for name in named(folder):
        assert why_not_whole(folder / name) is None, name


def check_goes_on(run, folder: Path, whole: dict[str, str]) -> None:
    """The run that stopped in the folder ends, taken up again, with the files of one that never stopped."""
    outcome, _ = run([*TRAIN, "--resume"], folder=folder)
    if "can't resume" in outcome.err:  # it was stopped before its first save; what the line advises works
        shutil.rmtree(folder / "out", ignore_errors=True)
        outcome, _ = run(TRAIN, folder=folder)
    assert outcome.status == 0, outcome
    assert named(folder / "out") == whole


def named(folder: Path) -> dict[str, str]:
    """The files that are not hidden, and their hashes."""
    return {name: digest for name, digest in hashes(folder).items() if not re.search(r"(^|/)\.", name)}


@pytest.fixture(scope="module")
def whole(run) -> dict[str, str]:
    """The files of a run that was never stopped."""
    outcome, folder = run(TRAIN)
    assert outcome.status == 0, outcome
    return named(folder / "out")


def one_line(outcome: Outcome) -> str:
    """What a command said that ended with an error."""
    lines = [
        line for line in re.split(r"[\r\n]+", outcome.err) if line and not re.search(r"it/s|s/it|it\]|: warning:", line)
    ]
    assert outcome.status == 2 and len(lines) == 1 and ": error: " in lines[0], outcome
    return lines[0]


# ---- A run of train.py


def test_a_run_that_is_killed_before_any_write_can_be_taken_up_and_ends_with_the_same_bytes(run, whole):
    seen = []
    for outcome, folder in at_every_write(run, TRAIN, "kill"):
        assert outcome.status == -9
        check_whole(folder)
        if (left := named(folder)) not in seen:  # some writes change hidden files only
            seen.append(left)
            check_goes_on(run, folder, whole)
    assert len(seen) > 10


def test_a_run_whose_disk_is_full_from_any_write_on_says_so_in_one_line_and_can_be_taken_up(run, whole):
    for number, (outcome, folder) in enumerate(at_every_write(run, TRAIN, "full")):
        assert "No space left" in one_line(outcome)
        check_whole(folder)
        if number % 4 == 0:
            check_goes_on(run, folder, whole)


@pytest.mark.parametrize(("first", "name"), [(1, "SIGINT"), (5, "SIGTERM"), (9, "SIGHUP")])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(run, whole, first, name):
    for number in range(first, 40, 12):
        outcome, folder = run(TRAIN, {"signal_at": [number, name]})
        assert outcome.status in (0, 128 + signal.Signals[name]), outcome
        assert "Traceback" not in outcome.err
        check_whole(folder)
        check_goes_on(run, folder, whole)


def test_a_run_whose_folder_is_deleted_says_so_in_one_line(run):
    for number in range(4, 32, 4):  # where it starts, the folder is only made again
        outcome, folder = run(TRAIN, {"remove": [number, "out"]})
        assert "No such file or directory: out" in one_line(outcome)
        check_whole(folder)


# ---- Commands that write once


@pytest.fixture(scope="module")
def word(run, here) -> None:
    """word.safetensors stands among the files, to be converted."""
    _, folder = run(TRAIN)
    shutil.copy(folder / "out" / "embedding.safetensors", here / "word.safetensors")


@pytest.mark.parametrize("command", [TRAIN, SAMPLE], ids=["train", "sample"])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_a_fault_made_by_itself_leaves_what_it_leaves_among_all(run, command, fault):
    """At every eleventh place."""
    for number, (among_all, copy) in enumerate(at_every_write(run, command, fault), start=1):
        if number % 11 == 3:
            outcome, folder = run(command, {fault: number})
            assert outcome.status == among_all.status
            assert named(folder) == named(copy) and len(hashes(folder)) == len(hashes(copy))
            if fault == "full":
                assert one_line(outcome) == one_line(among_all)
            shutil.rmtree(folder)


@pytest.mark.parametrize("command", [SAMPLE, CONVERT, DRAW], ids=["sample", "convert", "draw"])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_whatever_writes_leaves_whole_files_alone_wherever_it_ends(run, word, command, fault):
    for outcome, folder in at_every_write(run, command, fault):
        if fault == "full":
            assert "No space left" in one_line(outcome)
        check_whole(folder)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_file_that_grows_too_large_for_its_disk_is_one_line(run, word, command):
    """The operating system refuses the write itself, also to libraries that are not Python's."""
    outcome, folder = run(command, {"file_size": 600})
    one_line(outcome)
    check_whole(folder)


# ---- Disks


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """mounted(options) -> a file system of its own in memory."""
    places = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if made.returncode:
            pytest.skip("no file system can be mounted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("kilobytes", [4, 16, 64])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_disk_that_fills_up_is_one_line_and_what_was_whole_stays_whole(run, word, here, mounted, command, kilobytes):
    disk = mounted(f"size={kilobytes}k")
    out = command.index("--out") + 1
    outcome, _ = run(
        [*command[:out], str(disk / "new" if command is not CONVERT else disk / "new.pt"), *command[out + 1 :]]
    )
    if outcome.status == 0:
        assert outcome.err.count("error") == 0 and any(disk.iterdir())
    else:
        assert "No space left" in one_line(outcome)
    check_whole(disk)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_that_may_not_be_written_is_one_line(run, word, mounted, command):
    disk = mounted("ro")  # root may write into a folder whatever its mode
    out = command.index("--out") + 1
    outcome, _ = run([*command[:out], str(disk / "new.pt"), *command[out + 1 :]])
    assert "Read-only" in one_line(outcome) and str(disk) in one_line(outcome)


# ---- Two at once


@pytest.mark.parametrize("command", [TRAIN, SAMPLE], ids=["train", "sample"])
def test_of_two_that_start_at_once_with_one_folder_only_one_writes_into_it(run, children, others, command):
    _, folder = run(["sample.py", "--help"])
    children.start(command, folder)
    others.start(command, folder)
    ends = [children.wait(), others.wait()]
    assert sorted(end.status for end in ends) == [0, 2], ends
    one_line(max(ends, key=lambda end: end.status))
    check_whole(folder)


@pytest.mark.parametrize("command", [TRAIN, SAMPLE], ids=["train", "sample"])
def test_two_that_start_at_once_and_choose_their_folders_choose_different_ones(run, children, others, command):
    _, folder = run(["sample.py", "--help"])
    out = command.index("--out")
    command = command[:out] + command[out + 2 :]
    children.start(command, folder)
    others.start(command, folder)
    ends = [children.wait(), others.wait()]
    assert [end.status for end in ends] == [0, 0], ends
    made = sorted(path.name for path in (folder / "outputs").iterdir())
    assert len(made) == 2, made
    for name in made:
        assert hashes(folder / "outputs" / name), name
