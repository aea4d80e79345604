"""From a prompt to the 77 integers the text encoder reads: CLIP's byte-level byte-pair encoding (BPE).

    "A photo of S*"  -- clean -->  "a photo of" + S*      the placeholder is cut out before cleaning
                     -- split -->  ["a", "photo", "of"]   words, single digits, runs of punctuation
                     -- bytes -->  "photo" = p h o t o</w>
                     -- merge -->  ph ot o</w> -> ph oto</w> -> photo</w>
                     -- ids   -->  49406 320 1125 539 49408 49407 49407 ...

Since the alphabet is the 256 bytes of UTF-8, every text has an encoding and there is no "unknown" token. The merges are
learned once from a corpus: join the most frequent neighbours, again and again (arXiv 1508.07909; over bytes as in
GPT-2; lower-cased and with an end-of-word mark in CLIP, arXiv 2103.00020).

A placeholder, Textual Inversion's new word (arXiv 2208.01618, section 3: "Textual inversion"), gets ids past the
vocabulary's end.
"""

import html
import shlex
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Literal
from unicodedata import normalize

import ftfy
import regex
import torch
from torch import Tensor

from tinyldm import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

# Special tokens typed out, English contractions, words, single digits, runs of anything else that is not white space.
SPLIT = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def byte_symbols() -> dict[int, str]:
    """One visible character for each byte: itself where it is printable, else the next free one from "Ā" (256) on.

    So a merges file is plain text in which white space can only be the separator. The order is the vocabulary's.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


SYMBOL_OF_BYTE = byte_symbols()
BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in SYMBOL_OF_BYTE.items()}
ALPHABET = [*SYMBOL_OF_BYTE.values(), *(symbol + WORD_END for symbol in SYMBOL_OF_BYTE.values())]


def clean(text: str) -> str:
    """Repair mis-decoded text, undo HTML entities (twice: captions from the web hold "&amp;amp;"), lower-case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def word_symbols(word: str) -> tuple[str, ...]:
    """A word as its bytes' symbols, the last one marked: "cat" -> ("c", "a", "t</w>")."""
    symbols = [SYMBOL_OF_BYTE[byte] for byte in word.encode("utf-8")]
    return (*symbols[:-1], symbols[-1] + WORD_END)


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of `pair`, from left to right."""
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        width = 2 if symbols[i : i + 2] == pair else 1
        merged.append("".join(symbols[i : i + width]))
        i += width
    return tuple(merged)


def pattern_of(token: str) -> str:
    """What finds a placeholder in a text, but not inside a longer word.

    As with \\b, an edge of it that is a letter, digit or underscore must not touch another one; any other edge is a
    boundary itself. So "S*" is found in "two S*s", but not in "XS*"; "cat-toy" not in "cat-toys".
    """
    before = r"(?<!\w)" if regex.match(r"\w", token[0]) else ""
    after = r"(?!\w)" if regex.match(r"\w", token[-1]) else ""
    return before + regex.escape(token) + after


def learn_merges(captions: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Learn at most `count` merges, fewer if every word of the captions is one token before that.

    The vocabulary then has 512 + len(merges) + 2 entries. Ties go to the pair that sorts first, so the same captions
    in any order give the same merges.
    """
    words = Counter(word for caption in captions for word in SPLIT.findall(clean(caption)) if word not in (START, END))
    symbols = {word: word_symbols(word) for word in words}
    pairs: Counter[tuple[str, str]] = Counter()  # how often each stands in the captions,
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # and the words that it has stood in

    def add(word: str, times: int) -> None:
        for pair in pairwise(symbols[word]):
            holders[pair].add(word)
            pairs[pair] += times
            if not pairs[pair]:
                del pairs[pair]

    for word, times in words.items():
        add(word, times)
    merges: list[tuple[str, str]] = []
    heap = [(-times, pair) for pair, times in pairs.items()]  # the most frequent one on top, old counts below new ones
    heapify(heap)
    while heap and len(merges) < count:
        times, best = heappop(heap)
        if pairs[best] != -times:
            continue  # it has changed since
        merges.append(best)
        changed: set[tuple[str, str]] = set()
        for word in holders.pop(best):
            changed.update(pairwise(symbols[word]))
            add(word, -words[word])
            symbols[word] = merge(symbols[word], best)
            add(word, words[word])
            changed.update(pairwise(symbols[word]))
        for pair in changed & pairs.keys():
            heappush(heap, (-pairs[pair], pair))
    return merges


class Tokenizer:
    """Prompts to ids, and back. The vocabulary: 256 bytes, 256 bytes that end a word, the merges, start, end."""

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],  # in the order they were learned, which is the order they are applied in
        *,
        length: int = 77,  # ids per prompt, start and end included
        pad: Literal["end", "zero"] = "end",  # after the end: end-of-text again (SD 1.x) or id 0 (SD 2.x)
    ) -> None:
        self.merges = [tuple(pair) for pair in merges]
        self.length = length
        self.pad = pad
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.symbols = [*ALPHABET, *("".join(pair) for pair in self.merges), START, END]
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.vocabulary_size = len(self.symbols)
        self.start, self.end = self.id_of[START], self.id_of[END]
        self.placeholders: dict[str, list[int]] = {}
        self.ids_of_word: dict[str, list[int]] = {START: [self.start], END: [self.end]}

    def add_placeholder(self, token: str, vectors: int = 1) -> list[int]:
        """Let `token` stand for `vectors` new ids, counted on from the end of the vocabulary; returns them."""
        if not clean(token) or not token.isprintable() or token != " ".join(token.split()):
            expected = "expected visible characters with no white space but single spaces between them"
            raise InputError(f'the token is {token!r}, {expected}; try "S*"')
        if len(token) > 255:
            raise InputError(f"the token has {len(token)} characters, expected at most 255; give it a shorter name")
        if normalize("NFC", token) in {normalize("NFC", other) for other in self.placeholders}:
            raise InputError(f'the token "{token}" is already a placeholder; give each word a token of its own')
        if len(self.encode_plain(token)) == 1:
            raise InputError(
                f'the token "{token}" is already a word of the vocabulary, expected a new one; try '
                f'{shlex.quote(f"<{token}>")} or "S*"'
            )
        if vectors < 1:
            raise InputError(f'the token "{token}" has {vectors} vectors, expected 1 or more')

        first = self.vocabulary_size + sum(map(len, self.placeholders.values()))
        self.placeholders[token] = list(range(first, first + vectors))
        return self.placeholders[token]

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it is: no start, no end, no padding, nothing cut off."""
        ids: list[int] = []
        # Placeholders go first, on the raw text: lower-casing and BPE would make "s", "*" of "S*".
        for piece in self.split_placeholders(text):
            ids += self.placeholders[piece] if piece in self.placeholders else self.encode_plain(piece)
        return ids

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Prompts to ids (n, length): start, the text, end, padding. A text that is too long is cut before its end."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.full((len(texts), self.length), self.end if self.pad == "end" else 0, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start, *self.truncate(text, self.encode(text)), self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text behind the ids, up to end-of-text; a placeholder of several vectors is named once."""
        token_of = {token_ids[0]: token for token, token_ids in self.placeholders.items()}
        data = b""
        for i in map(int, ids):
            if i == self.end:
                break
            if i in token_of:
                data += f"{token_of[i]} ".encode()
            elif i < self.start:
                symbol = self.symbols[i]
                data += bytes(BYTE_OF_SYMBOL[character] for character in symbol.removesuffix(WORD_END))
                if symbol.endswith(WORD_END):
                    data += b" "
        return data.decode("utf-8", errors="replace").strip()

    def truncate(self, text: str, ids: list[int]) -> list[int]:
        room = self.length - 2
        kept, cut = ids[:room], ids[room:]
        for token, token_ids in self.placeholders.items():
            # Without its placeholder a prompt would train nothing, and nobody would notice.
            if not set(token_ids).isdisjoint(cut):
                raise InputError(
                    f'"{token}" is cut off: the prompt "{text}" has {len(ids)} tokens, expected at most {room}; '
                    f'shorten it, or move "{token}" to its front'
                )
        if cut:
            warnings.warn(f'the prompt has {len(ids)} tokens, {room} fit; cut off: "{self.decode(cut)}"', stacklevel=3)
        return kept

    def split_placeholders(self, text: str) -> list[str]:
        """Cut the text before and after each placeholder: longest first, and never inside a longer word. Whether an
        accent is on its letter or a sign of its own, as in the names of a Mac's files, makes no difference."""
        if not self.placeholders:
            return [text]
        placeholders = {normalize("NFC", token): token for token in self.placeholders}
        patterns = map(pattern_of, sorted(placeholders, key=len, reverse=True))
        pieces = regex.split(f"({'|'.join(patterns)})", normalize("NFC", text))
        return [placeholders.get(piece, piece) for piece in pieces]

    def encode_plain(self, text: str) -> list[int]:
        return [i for word in SPLIT.findall(clean(text)) for i in self.encode_word(word)]

    def encode_word(self, word: str) -> list[int]:
        """Apply the merges to one word, the earliest learned first, until none applies."""
        if word not in self.ids_of_word:
            symbols = word_symbols(word)
            while known := [pair for pair in pairwise(symbols) if pair in self.rank]:
                symbols = merge(symbols, min(known, key=self.rank.__getitem__))
            self.ids_of_word[word] = [self.id_of[symbol] for symbol in symbols]
        return self.ids_of_word[word]
