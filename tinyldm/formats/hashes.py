"""SHA-256 of large files, remembered from one run to the next: 4 GB take seconds to hash, and seldom change.

What is remembered lies in ~/.cache/tinyldm/sha256.json, or under $XDG_CACHE_HOME: {path: [bytes, mtime_ns, ctime_ns,
sha256]}. It only saves time. A broken entry is not believed, and where the file can't be read or written, files are
hashed again.
"""

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from tinyldm.files import write_atomically

MAX_ENTRIES = 1000
MAX_CACHE_BYTES = 1_000_000
SETTLED = 2_000_000_000  # ns: a file may change twice within one tick of the clock that its times are taken from

Entry = tuple[int, int, int, str]  # size in bytes, mtime and ctime in ns, SHA-256 in hexadecimal


def file_sha256(path: Path) -> str:
    """In hexadecimal, 64 digits. The file is not read if it has the size and the times that it had last time.

    Its ctime, too: a copy may keep the mtime, as `cp -p` does.
    """
    name, before = str(path.resolve()), path.stat()
    seen = before.st_size, before.st_mtime_ns, before.st_ctime_ns
    *known, digest = remembered().get(name, ("",))
    if tuple(known) == seen:
        return digest
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - max(seen[1:]) > SETTLED:
        remember(name, (*seen, digest))
    return digest


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return Path(folder if os.path.isabs(folder) else os.path.expanduser("~/.cache"), "tinyldm", "sha256.json")


def remembered() -> dict[str, Entry]:
    """The well-formed entries of the cache file; none if there is no such file, or a broken one."""
    try:
        with open(cache_file(), encoding="utf-8") as file:
            content = json.loads(file.read(MAX_CACHE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: tuple(entry) for name, entry in entries if is_entry(entry)}


def is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [int, int, int, str]
        and re.fullmatch("[0-9a-f]{64}", entry[3]) is not None
    )


def remember(name: str, entry: Entry) -> None:
    others = {other: known for other, known in remembered().items() if other != name}
    entries = dict([*others.items(), (name, entry)][-MAX_ENTRIES:])
    with suppress(OSError):  # a read-only home, a full disk
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(cache_file()) as temporary:
            temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
