"""Learned embeddings on disk: a word and its few vectors, some kilobytes that anyone can pass on.

    python -m tinyldm.formats.embeddings outputs/S/embedding.safetensors                 says what is in it
    python -m tinyldm.formats.embeddings some.pt --weights weights/some                  and which known words are near
    python -m tinyldm.formats.embeddings a.safetensors --to a1111 --out a.pt             converts it
    python -m tinyldm.formats.embeddings a.pt "b.png:<b>" --to diffusers --out ab.safetensors   merges several

A file is one of any public tool: diffusers, the paper's, A1111's (.pt or embedding image), kohya's, invoke-training's,
OneTrainer's. The word of an A1111, ComfyUI or kohya file is the file's name. "FILE:WORD" calls a file's word WORD, or
takes this one of several. What train.py writes is diffusers' format.
"""

import os
import reprlib
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyldm import InputError, cli
from tinyldm.files import check_is_file, write_atomically
from tinyldm.formats.embedding_layouts import FORMATS, NO_WORDS, read_content, words_of
from tinyldm.formats.recognise import MAX_VECTORS

if TYPE_CHECKING:
    from tinyldm.formats.parts import Checkpoint

# A .bin that diffusers wrote after training on a CPU drags the whole table of words along, 202 MB in SD 2.x.
MAX_FILE_BYTES = 256 * 2**20
MAX_TENSOR_BYTES = 32 * 2**20  # bytes of all words of a file: ten thousand vectors of SD 1.x
FAMILIES = {768: " (SD 1.x)", 1024: " (SD 2.x)", 1280: " (SDXL's second text encoder)"}


def save_embeddings(path: str | Path, embeddings: dict[str, Tensor], to: str = "diffusers") -> None:
    """Write {word: (vectors, width)} in float32 in one of FORMATS, all of it or nothing.

    Raises InputError as load_embeddings would, and if the format can't hold these words.
    """
    path = Path(path)
    words = check_names(path, dict(checked_vectors(path, embeddings.items())))
    if "__metadata__" in words or sorted(word for word, _ in words_of(path, words)) != sorted(words):
        found = ", ".join(map(reprlib.repr, words))
        raise InputError(f"{path}: the words {found} would not be read as the same words again; choose others")
    if len(words) > FORMATS[to].max_words:
        limit = f"there are {len(words)} words, but one file for {to} holds {FORMATS[to].max_words}"
        raise InputError(f"{path}: {limit}; convert them one by one, or to diffusers")
    try:
        content = FORMATS[to].pack(words)
    except KeyError as error:  # a ParameterDict's keys must do as names of attributes
        raise InputError(f"{path}: {to} can't hold these words ({error}); rename one, FILE:WORD") from error
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)


def load_embeddings(
    file: str | Path,  # or FILE:WORD, see split_word
    width: int | None = None,  # of the text encoder that will take them; None: any
) -> dict[str, Tensor]:
    """Read {word: (vectors, width) float32} from a file of any public format.

    float32 and whatever is narrower comes out exactly as it is in the file. Raises InputError if the file is missing,
    broken, something else than an embedding, or of another width.
    """
    path, word = split_word(file)
    word = word and normalize("NFC", word)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an embedding file: try {path / 'embedding.safetensors'}")
    check_is_file(path)
    if not path.exists():
        raise InputError(f"no such file: {path}; give an embedding file, as train.py writes it")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        found = f"has {size / 1e6:.0f} MB, an embedding only kilobytes"
        raise InputError(f"{path} {found}: if it is a checkpoint, give it as --weights")
    pairs = words_of(path, read_content(path), word)
    # A view can claim a thousand numbers where the file has one; so could a thousand words share one table.
    if (claimed := sum(tensor.numel() * tensor.element_size() for _, tensor in pairs)) > min(size, MAX_TENSOR_BYTES):
        found = f"claims {claimed} bytes of numbers, expected at most {min(size, MAX_TENSOR_BYTES)}"
        raise InputError(f"{path} {found}: if it is a checkpoint, give it as --weights")
    # A file's name on a Mac has an accent as a sign of its own; prompts are typed with it on its letter.
    words = joined((normalize("NFC", name), vectors) for name, vectors in checked_vectors(path, pairs, width))
    if word is not None and word not in words and len(words) > 1:
        raise InputError(f"{path} holds {listed(words)}, not {word!r}; after the colon give one of these")
    if word is not None:
        words = {word: words[word] if word in words else next(iter(words.values()))}
    return check_names(path, words)


def split_word(file: str | Path) -> tuple[Path, str | None]:
    """The path, and WORD if it is FILE:WORD, else None. An existing file of the whole name wins: any name will do."""
    text = str(file)
    for end in [len(text), *(i for i in range(len(text) - 1, 0, -1) if text[i] == ":")]:
        if os.path.isfile(text[:end]):
            return Path(text[:end]), text[end + 1 :] if end < len(text) else None
    return Path(text), None


def listed(words: Iterable[str]) -> str:
    """What a file holds, for a message."""
    names = [reprlib.repr(word) for word in words]
    return f"{len(names)} words ({', '.join(names[:4])}{', …' * (len(names) > 4)})" if len(names) > 1 else names[0]


def checked_vectors(
    path: Path, pairs: Iterable[tuple[str, Tensor]], width: int | None = None
) -> list[tuple[str, Tensor]]:
    """The pairs' tensors as (vectors, width) float32, each in memory of its own; InputError if they can't be."""
    rows = [(word, tensor[None] if tensor.ndim == 1 else tensor) for word, tensor in pairs]
    if not rows:
        raise InputError(f"{path} holds no embedding: {NO_WORDS}")
    for word, tensor in rows:
        name, shape = f"{path}: {reprlib.repr(word)}", tuple(tensor.shape)
        if tensor.ndim != 2 or not 1 <= shape[0] <= MAX_VECTORS or shape[1] == 0:
            expected = f"expected (1 to {MAX_VECTORS} vectors, width)"
            raise InputError(f"{name} has shape {shape}, {expected}: if it is a checkpoint, give it as --weights")
        if not tensor.is_floating_point() or "float4" in str(tensor.dtype):  # which PyTorch can't convert
            raise InputError(f"{name} holds {tensor.dtype}, expected floating-point numbers: this is not an embedding")
    if len(widths := {tensor.shape[1] for _, tensor in rows}) > 1:
        found = f"vectors of widths {sorted(widths)}, expected one"
        raise InputError(f"{path} holds {found}: it is for several text encoders, as SDXL has; take one for SD 1 or 2")
    if width and widths != {width}:
        found, wanted = (f"{n}{FAMILIES.get(n, '')}" for n in (*widths, width))
        advice = "choose the --weights it was learned on, or learn it again on these with train.py"
        raise InputError(f"{path} has width {found}, this model's text encoder takes {wanted}: {advice}")
    # A copy, because a view would keep (and save) the whole table that it may be a row of.
    rows = [(word, tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)) for word, tensor in rows]
    for word, tensor in rows:
        if not tensor.isfinite().all():
            name = f"{path}: {reprlib.repr(word)}"
            raise InputError(f"{name} holds NaN or infinite values: its training failed; train again, at a lower --lr")
    return rows


def check_names(path: Path, words: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same words; InputError if one can't be typed in a prompt."""
    for word in words:
        if not word or word != " ".join(word.split()) or not word.isprintable():
            found = f"{path}: the word {reprlib.repr(word)} can't stand in a prompt"
            expected = "expected visible characters and at most single spaces between them"
            raise InputError(f"{found}, {expected}; call it something else, as in {cli.command(f'{path}:my-word')}")
    return words


def joined(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor a word: the vectors of a word that comes several times follow one another."""
    words: dict[str, Tensor] = {}
    for word, vectors in pairs:
        words[word] = torch.cat([words[word], vectors]) if word in words else vectors
    return words


# ---- python -m tinyldm.formats.embeddings


class Vocabulary(NamedTuple):
    """Of a checkpoint."""

    table: Tensor  # (words, width)
    words: list[str]
    norm: float  # of known words, see inversion.known_norm


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.to:
        convert(options.files, options.to, options.out)
        return 0
    from tinyldm.formats.checkpoint import open_checkpoint  # here, because to convert a file no model is needed

    weights = options.weights or (cli.TINY if cli.TINY.exists() else None)
    vocabulary = read_vocabulary(open_checkpoint(weights)) if weights else None
    for file in options.files:
        words = load_embeddings(file, width=vocabulary.table.shape[1] if options.weights else None)
        print("\n".join(map(cli.printable, described(file, words, vocabulary))))
    return 0


def convert(files: list[str], to: str, out: Path) -> None:
    """Write the words of all the files into one. Raises InputError if two have one name, or other widths."""
    words: dict[str, Tensor] = {}
    for file in files:
        for word, vectors in load_embeddings(file).items():
            if word in words:
                raise InputError(f"{file} holds {word}, as a file before it does; rename one of them, FILE:WORD")
            if words and vectors.shape[1] != (width := next(iter(words.values())).shape[1]):
                found = f"{file} has width {vectors.shape[1]}, a file before it {width}"
                raise InputError(f"{found}; merge words of one kind of checkpoint only")
            words[word] = vectors
    save_embeddings(out, words, to)
    print(cli.printable(f"wrote {out}: {listed(words)}; in prompts for {to} type {FORMATS[to].typed}"))
    for word, vectors in words.items() if to == "diffusers" else ():
        if advice := advice_for_diffusers(word, vectors):
            warnings.warn(advice, stacklevel=2)


def advice_for_diffusers(word: str, vectors: Tensor) -> str | None:
    """How to use a word there that it reads only in part; None for other words.

    Its pipeline types word, word_1, word_2, … for the word, once it has found it among the prompt's tokens. But
    transformers 5 gives these in lower case, in which it does not know the word.
    """
    if len(vectors) == 1 or word == (lower := word.lower()):
        return None
    lost = f"diffusers with transformers 5 reads only one of the {len(vectors)} vectors of {word}, for its capitals"
    return f'{lost}; there, load_textual_inversion(FILE, token="{lower}") and type {lower}'


def read_vocabulary(checkpoint: "Checkpoint") -> Vocabulary:
    """What the text encoder of a checkpoint reads for each word it knows."""
    from tinyldm.inversion import known_norm  # here, because to read a file no model is needed

    model = checkpoint.load()
    words = [model.tokenizer.decode([i]) or symbol for i, symbol in enumerate(model.tokenizer.symbols)]
    table = model.text_encoder.table[: len(words)].float()  # diffusers may have added rows
    return Vocabulary(table, words, known_norm(model))


def described(file: str, words: dict[str, Tensor], vocabulary: Vocabulary | None) -> Iterator[str]:
    """Lines about the words: how long their vectors are beside those of known words, and which point the same way."""
    width = next(iter(words.values())).shape[1]
    fits = vocabulary is not None and vocabulary.table.shape[1] == width
    hint = "" if fits else "; --weights DIR compares with the words of a checkpoint"
    yield f"{file}: {listed(words)}, width {width}{FAMILIES.get(width, '')}{hint}"
    for word, vectors in words.items():
        for i, vector in enumerate(vectors, start=1):
            line = f"  {word} {i}/{len(vectors)}: norm {vector.norm():.3f}"
            if fits:
                table, names, norm = vocabulary
                cosines, rows = F.cosine_similarity(vector[None], table).topk(min(5, len(names)))
                nearest = [f"{names[row]} {cosine:.2f}" for row, cosine in zip(rows, cosines, strict=True)]
                line += f" (known words' median {norm:.3f}), nearest {', '.join(nearest)}"
            yield line


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.usage = "python -m tinyldm.formats.embeddings FILE[:WORD] … [--to FORMAT --out FILE | --weights DIR]"
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE[:WORD]", help="embedding files")
    add("--to", choices=list(FORMATS), help="convert the files into one of this format")
    add("--out", type=cli.path, metavar="FILE", help="where to; it must not exist yet")
    weights_help = f"whose words to compare with (default: {cli.TINY}, if the width fits)"
    add("--weights", type=cli.path, metavar="DIR", help=weights_help)
    options = parser.parse_args(arguments)
    if bool(options.to) != bool(options.out):
        parser.error("--to and --out go together")
    if options.to and options.weights:
        parser.error("--weights is for comparing, without --to")
    if options.out and options.out.exists():
        raise InputError(f"{options.out} exists, and nothing is overwritten; choose another --out")
    if options.to and options.out.suffix != FORMATS[options.to].suffix:
        expected = options.out.with_suffix(FORMATS[options.to].suffix)
        raise InputError(
            f"--out is {options.out}, but {options.to} goes by the suffix; try {cli.command('--out', expected)}"
        )
    return options


if __name__ == "__main__":
    cli.run(main)
