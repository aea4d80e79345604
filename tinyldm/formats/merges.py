"""The tokenizer's merges on disk: found, read whatever the file, and written.

A merges file is text: a line with "#version", then one merge a line, "left right", in the order they were learned.
CLIP's is such a file in a gzip. Newer folders of Hugging Face have the same merges inside a tokenizer.json.
"""

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from tinyldm import InputError
from tinyldm.files import write_atomically
from tinyldm.tokenizer import ALPHABET

CLIP_MERGES = 49408 - 512 - 2  # 48,894: CLIP uses only the head of its file of 262,144 merges
MAX_MERGES_BYTES = 20_000_000  # of the file, unpacked; CLIP's are 3.2 MB
NAMES = ("tokenizer/merges.txt", "merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer/tokenizer.json")
GET_MERGES = (
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 tokenizer/merges.txt --local-dir weights"  # CLIP's
)
EXPECTED = "expected a merges.txt, CLIP's bpe_simple_vocab_16e6.txt.gz or a tokenizer.json"

ADDED = {  # where a tokenizer's added words stand, and how to read them as id -> word
    "added_tokens.json": lambda content: {i: word for word, i in content.items()},
    "tokenizer.json": lambda content: {entry["id"]: entry["content"] for entry in content["added_tokens"]},
}


def find_merges(path: Path) -> Path | None:
    """Those of the checkpoint at path, a file or a folder: its own, else those beside it, else CLIP's in weights."""
    beside = path if path.is_dir() else path.parent
    places = [folder / name for folder in (beside, Path("weights")) for name in NAMES]
    return next((place for place in places if place.is_file()), None)


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """Pairs of symbols, in the order they were learned. The kinds of file are told apart by content.

    Raises InputError if the file is missing, broken, too large, or holds anything but merges of known symbols.
    """
    text = unpacked(path)
    if text.startswith("{"):
        text = "\n".join(["#version: tokenizer.json", *lines_of_json(path, text)])
    version, *lines = text.rstrip().split("\n")
    if "#version" not in version:
        raise InputError(f'{path}: the first line has no "#version"; {EXPECTED}')
    if not lines or ("bpe_simple_vocab_16e6" in version and len(lines) < CLIP_MERGES):
        raise InputError(f"{path}: {len(lines)} merges, the file is cut short; {EXPECTED}, please copy it again")

    merges, known = [], set(ALPHABET)
    for number, line in enumerate(lines[:CLIP_MERGES], start=2):
        pair = tuple(line.split())
        # Any two words would do as a pair, but only real merges are built from symbols that exist by then.
        if len(pair) != 2 or not known.issuperset(pair) or "".join(pair) in known:
            raise InputError(f'{path}: line {number}, "{line[:40].strip()}", is no merge of known symbols; {EXPECTED}')
        merges.append(pair)
        known.add("".join(pair))
    return merges


def unpacked(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_MERGES_BYTES + 1)
        if len(data) > MAX_MERGES_BYTES:  # a small gzip can unpack to any size
            raise InputError(f"{path} holds more than {MAX_MERGES_BYTES:,} bytes; {EXPECTED}")
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read as BPE merges ({reason}); {EXPECTED}") from error


def lines_of_json(path: str | Path, text: str) -> list[str]:
    try:
        merges = json.loads(text)["model"]["merges"]  # each "a b", or of late ["a", "b"]
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: a JSON file without model.merges ({error!r}); {EXPECTED}") from error


def added_words(folder: Path, ids: range) -> dict[str, list[int]]:
    """The words that these ids were added to a tokenizer of Hugging Face for, each with the ids of its vectors.

    transformers 4 lists them in added_tokens.json, transformers 5 in tokenizer.json. A word of several vectors is there
    as word, word_1, word_2, …, as diffusers adds them. Raises InputError if one of the files is broken.
    """
    word_of: dict[int, str] = {}
    for name, entries_of in ADDED.items():
        if (folder / name).is_file():
            try:
                word_of |= entries_of(json.loads(unpacked(folder / name)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{folder / name} is no list of added words ({error!r}); copy it again") from error
    id_of = {word: i for i in ids if isinstance(word := word_of.get(i), str) and word.strip()}
    words: dict[str, list[int]] = {}
    while id_of:
        word, i = next(iter(id_of.items()))
        words[word] = [i]
        del id_of[word]
        while (sibling := f"{word}_{len(words[word])}") in id_of:
            words[word].append(id_of.pop(sibling))
    return words


def write_merges(path: str | Path, merges: Iterable[tuple[str, str]]) -> None:
    """Write `merges.txt`, which read_merges and transformers understand; whole or not at all."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    with write_atomically(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
