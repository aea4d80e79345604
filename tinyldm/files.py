"""Writing files so that nobody ever finds half of one, into folders of one's own, and reading what others wrote."""

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tinyldm import InputError

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl = None

LOCKS: dict[Path, int] = {}  # folders that this process has locked -> their descriptors, open as long
MAX_TEXT_BYTES = 1_000_000  # of a file of prompts: ten thousand long ones


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """`with write_atomically(path) as temporary: save(temporary)`: path gets the whole new content, or stays as it was.

    Renaming is atomic only within one file system, so the temporary file lies in path's own folder, which must exist.
    It is hidden (find_images never takes it for a picture) and keeps path's suffix (some savers go by it). If the
    block raises, Ctrl-C included, the temporary file is deleted. Raises OSError if it can't be written: a full disk, …
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)  # what the user's umask says; safetensors makes its files for the owner alone
        os.replace(temporary, path)
    except SafetensorError as error:  # safetensors' words for a full disk
        raise OSError(f"{path} can't be written ({error})") from error
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def take_folder(given: Path | None, default: Path) -> Path:
    """Make a folder that this process alone writes into: the given one, or the first free one of default, default-2, …

    Raises InputError if the given one holds something, or if another process writes into it.
    """
    if given:
        given.mkdir(parents=True, exist_ok=True)
        lock_folder(given)
        check_unused(given)
        return given
    folder = new_folder(default)
    lock_folder(folder)
    return folder


def new_folder(default: Path) -> Path:
    """Make the first of default, default-2, … that is not there."""
    default.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = default.with_name(f"{default.name}-{number}") if number > 1 else default
        with suppress(FileExistsError):
            folder.mkdir()  # of two processes that try it at once, one gets the error
            return folder


def check_unused(folder: Path) -> None:
    """Raises InputError if the folder holds anything but hidden files: nothing that is somebody's is overwritten."""
    if found := [name for name in sorted(os.listdir(folder)) if name[0] != "."] if folder.exists() else []:
        raise InputError(f"{folder} already holds {found[0]}, expected a new or empty folder; choose another --out")


def lock_folder(folder: Path) -> None:
    """Keep other runs out of the folder until this process ends or releases it.

    Raises InputError if another one holds it. The system drops the lock even after kill -9. Some network file systems
    can't lock a folder; there it stays open.
    """
    if fcntl is None or folder.resolve() in LOCKS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"another run is writing into {folder}; wait for its end, or choose another --out") from None
    except OSError:  # not supported there
        os.close(descriptor)
    else:
        LOCKS[folder.resolve()] = descriptor


def release_folder(folder: Path) -> None:
    """Let other runs into the folder, if this process kept them out."""
    if (descriptor := LOCKS.pop(folder.resolve(), None)) is not None:
        os.close(descriptor)


def check_is_file(path: str | Path) -> None:
    """Raises InputError for a pipe, which can wait for ever, and a device, which may never end. A folder can't be
    opened anyway."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path} is a pipe or a device, expected a file; save it as one first")


def read_bytes(path: str | Path, most: int) -> bytes:
    """What a file holds, or a pipe that the shell has opened: /dev/stdin, <(…).

    Raises InputError for another pipe or a device, OSError as open() does and if there are more than `most` bytes.
    """
    if not str(path).startswith(("/dev/stdin", "/dev/fd/")):
        check_is_file(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most} bytes")
    return content


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file, or of an open pipe, that are not empty, without white space around them.

    what: what the lines are, for the message. Raises InputError if it can't be read as UTF-8 text, or is too large to
    be a list of them.
    """
    try:
        lines = read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path} ({error}); expected a text file, one a line") from error
    return [line.strip() for line in lines if line.strip()]
