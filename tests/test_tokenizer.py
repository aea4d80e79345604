"""The tokenizer against transformers' CLIPTokenizer on the same merges, and the placeholders, which are ours alone."""

import json
import os
import random
import unicodedata
import warnings
from collections import Counter
from itertools import pairwise

import pytest
import torch

from tinyldm import InputError
from tinyldm.formats.merges import read_merges, write_merges
from tinyldm.tokenizer import SPLIT, Tokenizer, clean, learn_merges, merge, word_symbols

CAPTIONS = [
    "a photo of a red circle on a blue background",
    "A sketch of two striped hearts, next to a cat-toy",
    "it's the cat's photo; you're sure they'll like 24 cats?",
    "une fenêtre à côté d'un café: 고양이 사진 🐈 한 마리",
]
# The definition (openai/CLIP, simple_tokenizer.py) and transformers agree on these as they are typed.
PLAIN_TEXTS = [
    "", "?", "...!?", "a photo of a cat", "😀 a 🐈 👨\u200d👩\u200d👧", "고양이 사진",
    "Café, naïve façade, Ünïcödé", "e\u0301te\u0301", "it's you're we've I'm they'll he'd DON'T 'tis",
    "2024 3.14 1,000 x2", "½ ² Ⅷ ٣", "a_b--c", "\ta  b\n\nc\u3000d ", "<|startoftext|> a <|endoftext|> b",
]  # fmt: skip
# Here transformers (since 5, without ftfy) leaves the definition: it knows no HTML entities and repairs no text. The
# original runs ftfy and unescapes twice, CLIP was trained so, and so do we: our cleaned text is the reference's input.
REPAIRED_TEXTS = {
    "salt &amp; pepper": "salt & pepper",
    "salt &amp;amp; pepper": "salt & pepper",
    "<b> &amp;amp;": "<b> &",  # ftfy leaves entities alone beside a "<"
    "“quoted” it’s": '"quoted" it\'s',
    "donâ€™t": "don't",
    "ﬁne Ｆｕｌｌ": "fine full",
    "a\x07b": "ab",
}


def random_words(count: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(1, 12))) for _ in range(count)]


def random_texts(count: int) -> list[str]:
    """Half from all of Unicode, half from the alphabets people type; assigned characters only.

    (Libraries of different Unicode versions do not agree on what a letter is among the newest characters. U+0345, the
    iota below, is left out: CLIP's pattern ignores case and then matches it nowhere; transformers' pattern does not.)
    """
    rng = random.Random(2)
    assigned = [chr(i) for i in range(32, 0x110000) if unicodedata.category(chr(i))[0] != "C" and i != 0x345]
    pools = [assigned, [character for character in assigned if ord(character) < 0x600]]
    return ["".join(rng.choices(pools[i % 2], k=rng.randint(1, 30))) for i in range(count)]


def reference(tokenizer: Tokenizer, folder):
    """transformers' tokenizer, made from the merges file we write and the vocabulary in our order."""
    from transformers import CLIPTokenizer

    write_merges(folder / "merges.txt", tokenizer.merges)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.id_of))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def assert_equals_reference(tokenizer: Tokenizer, folder) -> None:
    expected = reference(tokenizer, folder)
    for text in PLAIN_TEXTS:
        assert [tokenizer.start, *tokenizer.encode(text), tokenizer.end] == expected(text)["input_ids"], text
    for text in [*REPAIRED_TEXTS, *random_words(200), *random_texts(200)]:
        ids = expected(clean(text))["input_ids"]
        assert [tokenizer.start, *tokenizer.encode(text), tokenizer.end] == ids, text


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    # Some words stay in pieces, so that the order of merging matters; the random ones share many pairs.
    return learn_merges(CAPTIONS * 5 + random_words(300), 400)


@pytest.fixture
def tokenizer(merges) -> Tokenizer:
    return Tokenizer(merges)


# ---- Ids


def test_ids_equal_transformers_on_learned_merges(tokenizer, tmp_path):
    assert_equals_reference(tokenizer, tmp_path)


@pytest.mark.skipif(not os.environ.get("TINYLDM_CLIP_VOCABULARY"), reason="TINYLDM_CLIP_VOCABULARY names no file")
def test_clips_own_vocabulary_gives_its_known_ids_and_equals_transformers(tmp_path):
    tokenizer = Tokenizer(read_merges(os.environ["TINYLDM_CLIP_VOCABULARY"]))
    assert (tokenizer.vocabulary_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    assert tokenizer("a photo of a cat")[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert_equals_reference(tokenizer, tmp_path)


def test_cleaning_repairs_text_as_the_original_does():
    assert {text: clean(text) for text in REPAIRED_TEXTS} == REPAIRED_TEXTS
    assert clean("  Two\n\n WORDS\t") == "two words"


def test_vocabulary_is_bytes_then_word_ends_then_merges_then_specials():
    tokenizer = Tokenizer([("c", "a"), ("ca", "t</w>")])
    assert tokenizer.symbols[0] == "!" and tokenizer.symbols[256] == "!</w>"
    assert tokenizer.symbols[512:] == ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokenizer.symbols)) == tokenizer.vocabulary_size == 516
    assert (tokenizer.start, tokenizer.end) == (514, 515)


def test_the_earliest_learned_merge_goes_first():
    # Left to right would give "ab" + "c"; the rank says "bc" first.
    tokenizer = Tokenizer([("b", "c</w>"), ("a", "b")])
    assert [tokenizer.symbols[i] for i in tokenizer.encode("abc")] == ["a", "bc</w>"]


def test_prompts_become_rows_of_start_text_end_and_padding(tokenizer):
    cat = tokenizer.encode("cat")
    rows = tokenizer(["cat", ""])
    assert rows.shape == (2, 77) and rows.dtype == torch.long
    assert rows[0].tolist() == [tokenizer.start, *cat] + [tokenizer.end] * (76 - len(cat))
    assert rows[1].tolist() == [tokenizer.start] + [tokenizer.end] * 76
    assert torch.equal(tokenizer("cat"), rows[:1])


def test_padding_is_end_of_text_or_zero_and_the_length_is_free(merges):
    tokenizer = Tokenizer(merges, length=8, pad="zero")
    assert tokenizer("")[0].tolist() == [tokenizer.start, tokenizer.end, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("text", [text for text in PLAIN_TEXTS if "<|" not in text])
def test_decode_gives_the_cleaned_text_back(tokenizer, text):
    def squeeze(string: str) -> str:  # white space between "it" and "'s" is not part of the ids
        return "".join(string.split())

    assert squeeze(tokenizer.decode(tokenizer.encode(text))) == squeeze(clean(text))
    assert tokenizer.decode(tokenizer(text)[0]) == tokenizer.decode(tokenizer.encode(text))


def test_decode_separates_words_by_one_space(tokenizer):
    assert tokenizer.decode(tokenizer("A  photo of a cat")[0]) == "a photo of a cat"


# ---- Truncation


def test_a_long_prompt_keeps_end_of_text_and_warns_with_the_words_cut(merges):
    tokenizer = Tokenizer(merges, length=6)
    with pytest.warns(UserWarning, match='has 10 tokens, 4 fit; cut off: "red circle on a blue background"$') as record:
        ids = tokenizer("a photo of a red circle on a blue background")[0]
    assert ids.tolist() == [tokenizer.start, *tokenizer.encode("a photo of a"), tokenizer.end]
    assert record[0].filename == __file__  # the warning points at the caller


def test_a_prompt_that_just_fits_does_not_warn(merges):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer(merges, length=6)("a photo of a")[0, -1] == 512 + len(merges) + 1


@pytest.mark.parametrize("prompt", ["a photo of a S*", "a photo of S*"])  # wholly, and one of its two vectors
def test_a_placeholder_that_is_cut_off_is_an_error(merges, prompt):
    tokenizer = Tokenizer(merges, length=6)
    tokenizer.add_placeholder("S*", 2)
    with pytest.raises(InputError, match=r'"S\*" is cut off.* expected at most 4; shorten it'):
        tokenizer(prompt)
    assert tokenizer("a photo S*")[0, 3:5].tolist() == tokenizer.placeholders["S*"]


# ---- Placeholders


def test_placeholder_ids_follow_the_vocabulary_and_one_another(tokenizer):
    size = tokenizer.vocabulary_size
    assert tokenizer.add_placeholder("<style>", 3) == [size, size + 1, size + 2]
    assert tokenizer.add_placeholder("S*") == [size + 3]
    assert tokenizer.placeholders == {"<style>": [size, size + 1, size + 2], "S*": [size + 3]}
    assert tokenizer.vocabulary_size == size  # the learned rows are no part of the frozen table


def test_a_placeholder_leaves_the_text_around_it_as_it_was(tokenizer):
    [new] = tokenizer.add_placeholder("S*")
    before, after = tokenizer.encode("A photo of"), tokenizer.encode("on a BLUE background")
    assert tokenizer.encode("A photo of S* on a BLUE background") == [*before, new, *after]
    assert tokenizer.encode("S*") == [new]


def test_a_placeholder_of_several_vectors_expands_each_time_it_is_used(tokenizer):
    ids = tokenizer.add_placeholder("S*", 3)
    assert tokenizer.encode("S* on S*") == [*ids, *tokenizer.encode("on"), *ids]
    assert tokenizer.decode(tokenizer("S* on S*")[0]) == "S* on S*"


def test_several_placeholders_in_one_prompt(tokenizer):
    [a], [b] = tokenizer.add_placeholder("A*"), tokenizer.add_placeholder("B*")
    assert tokenizer.encode("B* A*B*") == [b, a, b]


def test_placeholders_are_matched_with_their_case(tokenizer):
    plain = tokenizer.encode("s* photo")
    tokenizer.add_placeholder("S*")
    assert tokenizer.encode("s* photo") == plain


def test_placeholders_are_matched_before_html_is_unescaped(tokenizer):
    [new] = tokenizer.add_placeholder("&lt;x")
    assert tokenizer.encode("&lt;x") == [new]
    assert tokenizer.decode([new]) == "&lt;x"


def test_the_longest_placeholder_wins_whatever_the_order(tokenizer):
    tokenizer.add_placeholder("S*")
    [longer] = tokenizer.add_placeholder("S*2")
    assert tokenizer.encode("S*2") == [longer]


# A boundary is needed where the token's own edge is a letter, digit or underscore, as with \b.
@pytest.mark.parametrize(
    ("token", "prompt", "found"),
    [
        ("cat-toy", "a cat-toy, red", True),
        ("cat-toy", "the cat-toy's string", True),
        ("cat-toy", "two cat-toys", False),
        ("cat-toy", "a bobcat-toy", False),
        ("cat-toy", "a cat-toy_2", False),
        ("S*", "two S*s", True),  # how people write the plural
        ("S*", "(S*)", True),
        ("S*", "XS*", False),
        ("S*", "éS*", False),
        ("<cat>", "a<cat>x", True),
        ("*S", "a*S", True),
        ("*S", "*Son", False),
        ("my cat", "a photo of my cat, red", True),  # file names, which A1111 and ComfyUI go by, have spaces
        ("my cat", "a photo of my cats", False),
        ("my cat", "a photo of tommy cat", False),
        ("my cat", "a photo of my red cat", False),
    ],
)
def test_a_placeholder_is_never_found_inside_a_longer_word(tokenizer, token, prompt, found):
    [new] = tokenizer.add_placeholder(token)
    assert (new in tokenizer.encode(prompt)) is found


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "no white space but single spaces"),
        ("   ", "no white space but single spaces"),
        ("my  cat", "no white space but single spaces"),
        ("my\tcat", "no white space but single spaces"),
        (" cat", "no white space but single spaces"),
        ("S*\n", "no white space but single spaces"),
        ("\x07", "visible characters"),
        ("a\x1b[2J", "visible characters"),
        ("\udcff", "visible characters"),
        ("S*\u200f", "visible characters"),  # which would have to be typed, and nobody sees it
        ("x" * 256, "256 characters, expected at most 255"),  # as a file's name, which it may come from
        ("&nbsp;", "visible characters"),
        ("cat", "already a word of the vocabulary"),
        ("Cat", "already a word of the vocabulary"),  # the vocabulary has no capitals
        ("*", "already a word of the vocabulary"),
        ("<|endoftext|>", "already a word of the vocabulary"),
        ("S*", "already a placeholder"),
    ],
)
def test_a_token_that_cannot_be_a_placeholder_is_refused_in_one_line(tokenizer, token, message):
    tokenizer.add_placeholder("S*")
    with pytest.raises(InputError, match=message) as error:
        tokenizer.add_placeholder(token)
    assert "\n" not in str(error.value)
    assert list(tokenizer.placeholders) == ["S*"]


def test_a_placeholder_needs_a_vector(tokenizer):
    with pytest.raises(InputError, match="0 vectors, expected 1 or more"):
        tokenizer.add_placeholder("S*", 0)


# ---- Learning merges


def test_learning_stops_when_every_word_of_the_captions_is_one_token():
    merges = learn_merges(CAPTIONS, 10_000)
    tokenizer = Tokenizer(merges)
    assert len(merges) < 1000
    for word in ["a", "photo", "circle", "striped", "hearts", "background", "toy", "'re", "fenêtre", "고양이", "🐈"]:
        assert len(tokenizer.encode(word)) == 1, word


def test_learning_stops_at_the_count_and_a_longer_run_begins_the_same():
    assert learn_merges(CAPTIONS, 7) == learn_merges(CAPTIONS, 20)[:7]
    assert len(learn_merges(CAPTIONS, 7)) == 7
    assert learn_merges([""], 7) == []


def test_learning_joins_the_most_frequent_pair_and_breaks_ties_by_order():
    # h-e occurs three times; after it he-n</w> twice; then a-t</w> and he-m</w> tie at one and "a" sorts first.
    assert learn_merges(["hen hen hem at"], 10) == [("h", "e"), ("he", "n</w>"), ("a", "t</w>"), ("he", "m</w>")]


def test_learning_counts_as_if_all_words_were_counted_anew_after_each_merge():
    words = Counter(word for caption in [*CAPTIONS, "aaaa banana aaa"] for word in SPLIT.findall(clean(caption)))
    symbols = {word: word_symbols(word) for word in words}
    expected = []
    while any(len(parts) > 1 for parts in symbols.values()):
        pairs = Counter(pair for word, times in words.items() for pair in times * [*pairwise(symbols[word])])
        expected.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        symbols = {word: merge(parts, expected[-1]) for word, parts in symbols.items()}
    assert learn_merges([*CAPTIONS, "aaaa banana aaa"], 10_000) == expected


def test_learning_does_not_depend_on_the_order_of_the_captions():
    assert learn_merges(CAPTIONS, 10_000) == learn_merges(CAPTIONS[::-1], 10_000)


def test_special_tokens_in_captions_are_not_learned():
    assert learn_merges(["<|endoftext|>"], 10) == []
