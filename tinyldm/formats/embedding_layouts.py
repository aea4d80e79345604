"""The formats of embedding files: three containers, and in them the layouts of everybody's tools.

    safetensors   {word: (vectors, width)}                            diffusers, tinyldm
                  {word: (width,), word_1: (width,), …}               diffusers, one entry a vector
                  {"emb_params": (vectors, width)}                    kohya's sd-scripts, invoke-training
                  {"emp_params": (vectors, width)}                    OneTrainer
                  {"clip_l": (vectors, width)}                        diffusers' advanced script for SD 1.5
    PyTorch       any of these, a list of them, a bare tensor, and
                  {"string_to_param": {"*": …}, "name": word, …}      A1111's stable-diffusion-webui
                  {"string_to_param": ParameterDict(word: …), …}      the paper's embeddings.pt
    PNG, WEBP     A1111's dictionary as JSON, in a PNG's text chunk or in the picture's borders

The first bytes tell the container, not the file's name, since files get renamed. A new container goes into
read_content, a new layout into words_of.

Nobody vouches for such files: untrusted.py reads the first two containers, and what is read here is limited likewise.
"""

import base64
import io
import json
import re
import reprlib
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from tinyldm import InputError
from tinyldm.formats.recognise import LEARNED, check_is_word
from tinyldm.formats.untrusted import (
    COPY_AGAIN,
    TENSOR_NAMES,
    Limits,
    container,
    first_sentence,
    load_pickle,
    open_safetensors,
    what_instead,
)
from tinyldm.tokenizer import ALPHABET, WORD_END

MAX_JSON_BYTES = 2**22  # in an image; 75 vectors of width 1280 as text are 2 MB
MAX_PIXELS = 2**22  # of an image
EMBEDDING = Limits(
    max_description=2**20,  # an embedding has some hundred bytes of it
    allowed_names=re.compile(rf"{TENSOR_NAMES}|torch\.nn\.modules\.container ParameterDict"),  # the paper's
    advice="don't trust the file",
)

NO_WORDS = "expected {token: (vectors, width)}, as train.py writes it"
NAMELESS = ("*", "emb_params", "emp_params", "clip_l")  # keys under which the word itself is not said


# ---- Reading the containers


def read_content(path: Path) -> object:
    """What the file holds, whatever that is; of a pickle only plain tensors and containers, never code.

    Raises InputError if the file is in none of the containers, broken, or names anything else.
    """
    found = container(path)
    if found == "safetensors":
        file = open_safetensors(path, EMBEDDING)
        return {name: file.read(name) for name in sorted(file.shapes)}  # its order changes from call to call
    if found == "PyTorch":
        return load_pickle(path, EMBEDDING)
    if found == "image":
        return read_embedding_image(path)
    neither = f"neither a safetensors nor a PyTorch file nor a PNG or WEBP image: {LEARNED}"
    raise InputError(f"{path} is {what_instead(path) or neither}")


def read_embedding_image(path: Path) -> object:
    """A1111's embedding image: the dictionary as JSON, in a text chunk and, for sites that drop it, in the pixels.

    A1111 itself writes PNG only. A lossless WEBP keeps the pixels; in a lossy one, or an AVIF, they are lost.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:  # so far only the header was read
                found = f"has {image.width} x {image.height} pixels, an embedding image at most {MAX_PIXELS}"
                raise InputError(f"{path} {found}: give the embedding file that belongs to it")
            text = getattr(image, "text", {}).get("sd-ti-embedding")  # a WEBP has no text chunks
            content = base64.b64decode(text) if text else hidden_bytes(np.asarray(image.convert("RGB")))
        if not content:
            raise InputError(f"{path} is a picture with no embedding in it: give the embedding file that belongs to it")
        if len(content) > MAX_JSON_BYTES:
            found = f"hides more than {MAX_JSON_BYTES} bytes, expected one embedding"
            raise InputError(f"{path} {found}: this is no embedding image")
        return json.loads(content, object_hook=as_tensor)
    except InputError:
        raise
    except Exception as error:  # Pillow and the JSON parser have a dozen types for a broken file
        raise InputError(f"{path} can't be read as an image ({first_sentence(error)}); {COPY_AGAIN}") from error


def as_tensor(entry: dict) -> object:
    """JSON has no tensors; A1111 writes {"TORCHTENSOR": nested lists}."""
    return torch.tensor(entry["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in entry else entry


def hidden_bytes(pixels: np.ndarray) -> bytes | None:
    """Unpack what the borders of a picture, (height, width, 3) of uint8, hide; None if there is nothing.

    Between each border and the picture stands a black column. The low four bits of the left border's values are the
    low halves of the bytes, the right border's the high halves; their high four bits are only decoration.
    """
    halves = pixels & 15
    black = np.flatnonzero(~halves.any(axis=(0, 2)))
    low, high = (halves[:, : black[0]], halves[:, black[-1] + 1 :]) if len(black) else (halves, halves[:, :0])
    if low.shape != high.shape:
        return None
    # Both are xored with the pseudo-random numbers x <- 1664525 x + 1013904223 mod 2^32, taken mod 255, from x = 0 on.
    # So the k-th x is 1013904223 times the sum of the first k powers of 1664525, and uint32 does the mod by itself.
    powers = np.cumprod(np.r_[1, np.full(low.size, 1664525)][: low.size], dtype=np.uint32)
    noise = (np.cumsum(powers, dtype=np.uint32) * np.uint32(1013904223) % 255 & 15).astype(np.uint8)
    packed = (high.reshape(-1) ^ noise) << 4 | (low.reshape(-1) ^ noise)
    try:
        return zlib.decompressobj().decompress(packed.tobytes(), MAX_JSON_BYTES + 1)
    except zlib.error:  # a picture that happens to have a black column
        return None


# ---- Reading the layouts


def words_of(
    path: Path,
    content: object,
    called: str | None = None,  # what the user calls the word; None: a warning says what to type if that is in doubt
) -> list[tuple[str, Tensor]]:
    """(word, its tensor) pairs in any of the layouts; a word named several times has the vectors of all, in order.

    A word that the file does not say is the file's name without the suffix, as A1111, ComfyUI and kohya have it. A
    "name" inside, which files keep when they are renamed, counts in images only, where A1111 goes by it
    (load_from_file of modules/textual_inversion/textual_inversion.py). InputError if the content is something else.
    """
    parts = content if isinstance(content, list) else [{"*": content} if isinstance(content, Tensor) else content]
    pairs = []
    for part in parts:
        if not isinstance(part, dict) or not part:
            raise InputError(f"{path} holds no embedding: {NO_WORDS}")
        name, words = path.stem, part
        if "string_to_param" in part:
            other, words = part.get("name"), part["string_to_param"]
            if isinstance(other, str) and other not in ("", name, *NAMELESS):
                name, other = (other, name) if container(path) == "image" else (name, other)
                if called is None:
                    advice = "FILE:WORD calls it something else"
                    warnings.warn(f"{path}: type {name!r}, not {reprlib.repr(other)}; {advice}", stacklevel=2)
        check_tensors(path, words)
        pairs += [(name if word in NAMELESS else word, tensor) for word, tensor in siblings_joined(words)]
    return pairs


def check_tensors(path: Path, words: object) -> None:
    """InputError unless this is {str: tensor} and no other kind of file by its keys."""
    if not isinstance(words, dict) or not words:
        raise InputError(f"{path} holds no word: {NO_WORDS}")
    if set(words) != {"clip_l"}:  # alone it is SD 1's; with others it is for the several text encoders of SDXL, …
        check_is_word(path, words)
    for key, value in words.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = f"{type(key).__name__} -> {type(value).__name__}"
            raise InputError(f"{path} is not an embedding: found {found}, expected token -> tensor (vectors, width)")


def siblings_joined(words: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(word, tensor) pairs where the single vectors of word, word_1, word_2, … all come under the name of word.

    So diffusers calls the vectors of one word when it adds them to a tokenizer.
    """
    pairs, rest = [], dict(words)
    for word in sorted(words, key=len):  # a word before its siblings
        sibling, number = word, 0
        while sibling in rest and (number == 0 or (is_single(words[word]) and is_single(rest[sibling]))):
            pairs.append((word, rest.pop(sibling)))
            number += 1
            sibling = f"{word}_{number}"
    return pairs


def is_single(tensor: Tensor) -> bool:
    return tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[0] == 1)


# ---- Writing


def as_diffusers(words: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(words, metadata={"format": "pt"})


def as_kohya(words: dict[str, Tensor]) -> bytes:
    (vectors,) = words.values()
    return safetensors.torch.save({"emb_params": vectors}, metadata={"format": "pt"})


def as_a1111(words: dict[str, Tensor]) -> bytes:
    ((word, vectors),) = words.items()
    content = {"string_to_token": {"*": id_of("*")}, "string_to_param": {"*": vectors}, "name": word}
    content |= {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    # As before PyTorch 1.6, without a zip: A1111 refuses zips with records it doesn't know, and PyTorch adds new ones.
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_paper(words: dict[str, Tensor]) -> bytes:
    tokens = {word: torch.tensor(id_of(symbol)) for word, symbol in zip(words, PAPER_SYMBOLS, strict=False)}
    file = io.BytesIO()
    torch.save({"string_to_token": tokens, "string_to_param": nn.ParameterDict(words)}, file)
    return file.getvalue()


# The paper's code hands a learned word the place of an existing token, "*" for the first.
PAPER_SYMBOLS = "*@#$%&~^"


def id_of(symbol: str) -> int:
    """CLIP's id of a symbol that stands alone as a word; "*" is 265."""
    return ALPHABET.index(symbol + WORD_END)


class Format(NamedTuple):
    pack: Callable[[dict[str, Tensor]], bytes]  # the content of a file with these words, (vectors, width) each
    suffix: str  # that the tool goes by
    max_words: float  # that fit into one file
    typed: str  # what to type in that tool's prompts


FORMATS = {
    "diffusers": Format(as_diffusers, ".safetensors", float("inf"), "the word (its loader takes files of one word)"),
    "a1111": Format(as_a1111, ".pt", 1, "the file's name without its suffix"),
    "kohya": Format(as_kohya, ".safetensors", 1, "the file's name without its suffix"),
    "paper": Format(
        as_paper, ".pt", len(PAPER_SYMBOLS), f"{' '.join(PAPER_SYMBOLS)} for the first word, the second, …"
    ),
}
