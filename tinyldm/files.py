"""Writing files so that nobody ever finds half of one, and reading what others wrote."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyldm import InputError

MAX_TEXT_BYTES = 1_000_000  # of a file of prompts: ten thousand long ones


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """`with write_atomically(path) as temporary: save(temporary)`: path gets the whole new content, or stays as it was.

    Renaming is atomic only within one file system, so the temporary file lies in path's own folder, which must exist.
    It is hidden (find_images never takes it for a picture) and keeps path's suffix (some savers go by it). If the
    block raises, Ctrl-C included, the temporary file is deleted. Raises OSError if the folder can't be written.
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
    finally:
        temporary.unlink(missing_ok=True)


def check_is_file(path: str | Path) -> None:
    """Raises InputError for a pipe, which can wait for ever, and a device, which may never end. A folder can't be
    opened anyway."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path} is a pipe or a device, expected a file; save it as one first")


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, without white space around them.

    what: what the lines are, for the message. A pipe that the shell has opened will do too: /dev/stdin, <(…).
    Raises InputError if the file can't be read as UTF-8 text, or is too large to be a list of them.
    """
    if not str(path).startswith(("/dev/stdin", "/dev/fd/")):
        check_is_file(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise InputError(f"the {what} {path} take more than {MAX_TEXT_BYTES} bytes; give fewer at once")
        lines = text.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path} ({error}); expected a text file, one a line") from error
    return [line.strip() for line in lines if line.strip()]
