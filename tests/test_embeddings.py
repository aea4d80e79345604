"""Learned words saved and loaded, called FILE:WORD, read by diffusers, and `python -m tinyldm.formats.embeddings`."""

import json
import os
import sys
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from conftest import WEIGHTS
from helpers.embedding_files import WRITERS, as_a1111, as_diffusers, as_kohya, as_tensor, refusal, rows
from safetensors.torch import load_file

from tinyldm import InputError, cli
from tinyldm.formats import embeddings
from tinyldm.formats.embedding_layouts import FORMATS
from tinyldm.formats.embeddings import load_embeddings, save_embeddings, split_word
from tinyldm.formats.merges import write_merges
from tinyldm.inversion import known_norm
from tinyldm.tokenizer import SYMBOL_OF_BYTE, Tokenizer

# ---- Saving and loading


def test_what_is_saved_is_loaded_again(tmp_path):
    table = torch.nn.Parameter(torch.randn(5, 128))
    words = {"S*": table[:2], "<고양이>": table[2:]}  # views of one parameter, with gradient
    save_embeddings(tmp_path / "e.safetensors", words)
    loaded = load_embeddings(str(tmp_path / "e.safetensors"), width=128)
    assert loaded.keys() == words.keys()
    for token, vectors in loaded.items():
        assert torch.equal(vectors, words[token])
        assert (vectors.dtype, vectors.requires_grad) == (torch.float32, False)
    assert os.listdir(tmp_path) == ["e.safetensors"]


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"S*": torch.full((1, 8), torch.nan)},
        {"S*": torch.ones(1, 8), "T": torch.ones(1, 9)},
        {"two  spaces": torch.ones(1, 8)},
        {"two\nlines": torch.ones(1, 8)},
        {" space": torch.ones(1, 8)},
        {"": torch.ones(1, 8)},
        {"__metadata__": torch.ones(1, 8)},
        {"*": torch.ones(1, 8)},  # would come back under the file's name
        {"emb_params": torch.ones(1, 8)},
        {"clip_l": torch.ones(1, 8)},
        {"S": torch.ones(1, 8), "S_1": torch.ones(1, 8)},  # would come back as one word of two vectors
    ],
)
def test_nothing_is_written_that_could_not_be_read_as_it_was(tmp_path, bad):
    save_embeddings(tmp_path / "e.safetensors", {"S*": torch.ones(1, 8)})
    with pytest.raises(InputError):
        save_embeddings(tmp_path / "e.safetensors", bad)
    assert torch.equal(load_embeddings(tmp_path / "e.safetensors")["S*"], torch.ones(1, 8))
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_several_tokens_come_in_the_same_order_every_time(tmp_path):
    save_embeddings(tmp_path / "e", {f"<{i}>": torch.ones(1, 8) for i in (3, 1, 4, 0, 2)})
    assert all(list(load_embeddings(tmp_path / "e")) == ["<0>", "<1>", "<2>", "<3>", "<4>"] for _ in range(20))


def test_the_wrong_width_says_both_and_what_to_do(tmp_path):
    save_embeddings(tmp_path / "e", {"S*": torch.ones(1, 768)})
    message = refusal(tmp_path / "e", width=128)
    assert "has width 768 (SD 1.x), this model's text encoder takes 128" in message and "--weights" in message


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing")
    assert "embedding.safetensors" in refusal(tmp_path)


# ---- FILE:WORD


@pytest.mark.parametrize(("write", "suffix", "word"), WRITERS)
def test_every_tools_file_takes_a_word_of_the_users(tmp_path, write, suffix, word):
    path = tmp_path / f"file-of-cats{suffix}"
    write(path, rows(2))
    loaded = load_embeddings(f"{path}:my-word")
    assert list(loaded) == ["my-word"] and torch.equal(loaded["my-word"], rows(2))


def test_a_name_as_a_mac_writes_it_is_the_word_that_is_typed(tmp_path):
    typed, on_a_mac = normalize("NFC", "Bär*"), normalize("NFD", "Bär*")
    assert typed != on_a_mac
    as_tensor(tmp_path / f"{on_a_mac}.pt", rows(1))
    assert [*load_embeddings(tmp_path / f"{on_a_mac}.pt")] == [typed]
    assert [*load_embeddings(f"{tmp_path / f'{on_a_mac}.pt'}:{on_a_mac}")] == [typed]
    tokenizer = Tokenizer([])
    ids = tokenizer.add_placeholder(typed)
    assert tokenizer.encode(on_a_mac) == tokenizer.encode(typed) == ids
    with pytest.raises(InputError, match="already a placeholder"):
        tokenizer.add_placeholder(on_a_mac)


def test_a_word_that_no_prompt_can_hold_asks_for_another(tmp_path):
    as_tensor(tmp_path / "my  cat.pt", rows(1))
    assert ":my-word" in refusal(tmp_path / "my  cat.pt")
    assert list(load_embeddings(f"{tmp_path / 'my  cat.pt'}:my-cat")) == ["my-cat"]
    assert "''" in refusal(f"{tmp_path / 'my  cat.pt'}:")
    torch.save({"\x1b[31mred": rows(1)}, tmp_path / "e.pt")
    assert "\x1b" not in refusal(tmp_path / "e.pt")


def test_names_to_try_can_be_pasted_into_a_shell(run, shell_words, tmp_path):
    torch.save({"two  spaces": rows(1)}, tmp_path / "a $(touch x).pt")
    error = run("tinyldm.formats.embeddings", "a $(touch x).pt").error
    assert shell_words([f"python {error.partition('as in ')[2]}"]) == [["a $(touch x).pt:my-word"]]
    error = run("tinyldm.formats.embeddings", "b.pt", "--to", "a1111", "--out", "`touch x`.bin").error
    assert shell_words([f"python {error.partition('try ')[2]}"]) == [["--out", "`touch x`.pt"]]


def test_the_users_word_chooses_among_several(tmp_path):
    save_embeddings(tmp_path / "e", {"<a>": rows(1), "<b>": rows(2)})
    loaded = load_embeddings(f"{tmp_path / 'e'}:<b>")
    assert list(loaded) == ["<b>"] and torch.equal(loaded["<b>"], rows(2))
    message = refusal(f"{tmp_path / 'e'}:<c>")
    assert "2 words ('<a>', '<b>'), not '<c>'" in message and "after the colon" in message


def test_an_existing_file_of_the_whole_name_wins_over_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("e.pt", "C:\\cats\\e.pt", "a:b.pt", "a"):
        Path(name).write_bytes(b"")
    assert split_word("e.pt") == (Path("e.pt"), None)
    assert split_word("e.pt:S*") == (Path("e.pt"), "S*")
    assert split_word("e.pt:<a:b>") == (Path("e.pt"), "<a:b>")
    assert split_word("C:\\cats\\e.pt") == (Path("C:\\cats\\e.pt"), None)
    assert split_word("C:\\cats\\e.pt:S*") == (Path("C:\\cats\\e.pt"), "S*")
    assert split_word("a:b.pt") == (Path("a:b.pt"), None)
    assert split_word("a:b.pt:w") == (Path("a:b.pt"), "w")
    assert split_word("nothing.pt:S*") == (Path("nothing.pt:S*"), None)
    assert split_word("C:\\nothing.pt") == (Path("C:\\nothing.pt"), None)
    assert split_word("") == (Path(""), None)


# ---- Reading by diffusers


@pytest.fixture
def pipeline(tmp_path):
    """diffusers' loader with a small CLIP of random weights, and the same tokenizer and weights here."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tinyldm.clip import CLIPTextConfig as OurConfig
    from tinyldm.clip import CLIPTextEncoder
    from tinyldm.tokenizer import Tokenizer

    merges = [("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>"), ("o", "f</w>")]
    ours = Tokenizer(merges, length=77)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_merges(folder / "merges.txt", merges)
    (folder / "vocab.json").write_text(json.dumps(ours.id_of))
    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token="<|endoftext|>", model_max_length=77)
    assert len(tokenizer) == ours.vocabulary_size
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="quick_gelu",
        bos_token_id=ours.start,
        eos_token_id=ours.end,
        pad_token_id=ours.end,
    )

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict = {}  # noqa: RUF012

    pipeline = Pipeline()
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, CLIPTextModel(config).eval()
    pipeline.ours = ours
    pipeline.encoder = CLIPTextEncoder(OurConfig(ours.vocabulary_size, width=16, layers=2, heads=2))
    theirs = pipeline.text_encoder.state_dict()
    prefix = "" if next(iter(theirs)).startswith("text_model.") else "text_model."
    pipeline.encoder.load_state_dict({prefix + name: t for name, t in theirs.items() if "position_ids" not in name})
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("to", ["diffusers", "a1111", "kohya"])
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_what_we_write_and_encodes_it_alike(tmp_path, pipeline, to, count):
    vectors = rows(count, 16)
    path = tmp_path / f"heart{FORMATS[to].suffix}"
    save_embeddings(path, {"<heart>": vectors}, to)
    token = "<heart>" if to == "kohya" else None  # which has no word of its own
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name, token=token)

    prompt = "a photo of a <heart>, a photo"
    converted = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    ids = pipeline.tokenizer(converted, padding="max_length", max_length=77, return_tensors="pt").input_ids
    theirs = pipeline.text_encoder(ids).last_hidden_state

    pipeline.ours.add_placeholder("<heart>", count)
    our_ids = pipeline.ours(prompt)
    ours = pipeline.encoder(our_ids, load_embeddings(f"{path}:<heart>")["<heart>"])
    assert torch.equal(our_ids, ids)
    assert (ids >= pipeline.ours.vocabulary_size).sum() == count
    assert (ours - theirs).abs().max() < 1e-5


def test_comfyui_reads_the_file_as_it_is(tmp_path):
    """load_embed of its comfy/sd1_clip.py: without "string_to_param" or "clip_l", the first tensor there is."""
    save_embeddings(tmp_path / "my-circle.safetensors", {"S*": rows(2)})
    read = load_file(tmp_path / "my-circle.safetensors")
    assert not {"string_to_param", "clip_l"} & set(read) and torch.equal(next(iter(read.values())), rows(2))


@torch.no_grad()
def test_diffusers_reads_words_with_capitals_by_their_lower_case_name(tmp_path, pipeline):
    """What `--to diffusers` says to type. As the file has it, S* is found with transformers 5, but not with its other
    vectors: _maybe_convert_prompt of diffusers' textual_inversion.py looks for "s*" among the added tokens."""
    import transformers

    vectors, tokenizer = rows(3, 16), pipeline.tokenizer
    save_embeddings(tmp_path / "e.safetensors", {"S*": vectors})
    encoded = {}
    for word in ("S*", "s*"):
        pipeline.load_textual_inversion(str(tmp_path), weight_name="e.safetensors", token=word)
        prompt = pipeline.maybe_convert_prompt(f"a photo of {word}, a photo", tokenizer)
        ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        encoded[word] = pipeline.text_encoder(ids).last_hidden_state
        pipeline.unload_textual_inversion(word)

    pipeline.ours.add_placeholder("S*", 3)
    ours = pipeline.encoder(pipeline.ours("a photo of S*, a photo"), vectors)
    assert (ours - encoded["s*"]).abs().max() < 1e-5
    works = int(transformers.__version__.split(".")[0]) < 5  # if ever it does again, the warning can go
    assert ((ours - encoded["S*"]).abs().max() < 1e-5) == works


# ---- python -m tinyldm.formats.embeddings


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command("a.pt", "--to", …): (exit status, what it printed, its errors), in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["embeddings.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.run(embeddings.main)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run_command


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("write", "suffix", "word"), WRITERS)
def test_every_format_converts_to_every_other(command, write, suffix, word, to):
    write(Path(f"file-of-cats{suffix}"), rows(2))
    out = f"out/file-of-cats{FORMATS[to].suffix}"
    Path("out").mkdir()
    status, printed, _ = command(f"file-of-cats{suffix}", "--to", to, "--out", out)
    assert status == 0 and printed.startswith(f"wrote {out}: ")
    loaded = load_embeddings(out)
    assert list(loaded) == [word if to not in ("a1111", "kohya") else "file-of-cats"]
    assert torch.equal(*loaded.values(), rows(2))


def test_conversion_merges_and_renames(command):
    as_a1111(Path("cat.pt"), rows(1))
    as_kohya(Path("b.safetensors"), rows(2))
    assert command("cat.pt", "b.safetensors:<b>", "--to", "diffusers", "--out", "ab.safetensors")[0] == 0
    assert command("ab.safetensors", "--to", "paper", "--out", "ab.pt")[0] == 0
    loaded = load_embeddings("ab.pt")
    assert loaded.keys() == {"cat", "<b>"}
    assert torch.equal(loaded["cat"], rows(1)) and torch.equal(loaded["<b>"], rows(2))


def test_a_word_whose_vectors_diffusers_would_lose_is_pointed_out(command):
    """By the name that works, which test_diffusers_reads_words_with_capitals_by_their_lower_case_name tries."""
    save_embeddings("e.safetensors", {"S*": rows(3)})
    status, _, errors = command("e.safetensors", "--to", "diffusers", "--out", "new.safetensors")
    assert status == 0 and errors.count("\n") == 1
    assert 'load_textual_inversion(FILE, token="s*") and type s*' in errors
    save_embeddings("one.safetensors", {"S*": rows(1), "<s>": rows(2)})
    assert command("one.safetensors", "--to", "diffusers", "--out", "2.safetensors")[2] == ""  # nothing is lost
    assert command("e.safetensors", "--to", "kohya", "--out", "3.safetensors")[2] == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required"),
        (["a.pt", "--to", "comfy", "--out", "b.pt"], "invalid choice: 'comfy'"),
        (["a.pt", "--to", "a1111"], "--to and --out go together"),
        (["a.pt", "--out", "b.pt"], "--to and --out go together"),
        (["a.pt", "--to", "a1111", "--out", "b.pt", "--weights", "w"], "--weights is for comparing"),
        (["a.pt", "--to", "diffusers", "--out", "b.pt"], "try --out b.safetensors"),
        (["a.pt", "--to", "a1111", "--out", "a.pt"], "a.pt exists"),
        (["a.pt", "a.pt", "--to", "diffusers", "--out", "b.safetensors"], "holds <cat>, as a file before it"),
        (["a.pt", "a.pt:<b>", "--to", "a1111", "--out", "b.pt"], "one file for a1111 holds 1"),
        (["a.pt", "wide.pt", "--to", "diffusers", "--out", "b.safetensors"], "wide.pt has width 1024, a file before"),
        (["nothing.pt"], "no such file"),
        (["a.pt", "--to", "a1111", "--out", "no/where.pt"], "No such file"),
    ],
)
def test_a_wrong_command_is_one_line(command, words, complaint):
    as_diffusers(Path("a.pt"), rows(1))
    as_tensor(Path("wide.pt"), rows(1, 1024))
    status, _, errors = command(*words)
    assert status == 2 and complaint in errors and errors.count("\n") == 1
    assert sorted(os.listdir()) == ["a.pt", "wide.pt"]


def test_description_without_weights(command):
    save_embeddings("e.safetensors", {"<a>": torch.full((2, 768), 0.01), "<b>": torch.zeros(1, 768)})
    status, printed, _ = command("e.safetensors")
    assert status == 0
    header, *lines = printed.splitlines()
    assert "2 words ('<a>', '<b>'), width 768 (SD 1.x)" in header and "--weights" in header
    assert lines == ["  <a> 1/2: norm 0.277", "  <a> 2/2: norm 0.277", "  <b> 1/1: norm 0.000"]


def test_description_beside_the_words_of_a_checkpoint(command, tiny):
    table = tiny.text_encoder.table
    star, lemon = (table[tiny.tokenizer.encode(word)][0] for word in ("star", "lemon"))
    save_embeddings("e.safetensors", {"S*": torch.stack([3 * star, 2 * lemon + 0.1 * star])})
    status, printed, _ = command("e.safetensors", "--weights", WEIGHTS)
    assert status == 0
    _, first, second = printed.splitlines()
    assert f"norm {3 * star.norm():.3f} (known words' median {known_norm(tiny):.3f}), nearest star 1.00, " in first
    assert "nearest lemon " in second and second.count(",") == 5

    save_embeddings("wide.safetensors", {"S*": torch.ones(1, 768)})
    status, _, errors = command("wide.safetensors", "--weights", WEIGHTS)
    assert status == 2 and "width 768" in errors


def test_what_files_say_is_printed_escaped(command, tiny):
    """Every vocabulary holds the 256 bytes, so a file can bring a terminal's escape code among the nearest words."""
    escape = tiny.text_encoder.table[tiny.tokenizer.id_of[SYMBOL_OF_BYTE[0x1B]]]
    save_embeddings("e.safetensors", {"S*": escape})
    status, printed, _ = command("e.safetensors", "--weights", WEIGHTS)
    assert status == 0 and r"nearest \x1b 1.00" in printed
    assert printed.replace("\n", "").isprintable()


def test_the_tiny_checkpoint_is_compared_with_if_it_fits(command, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "tiny").symlink_to(WEIGHTS)
    save_embeddings("e.safetensors", {"S*": torch.ones(1, 128)})
    save_embeddings("wide.safetensors", {"S*": torch.ones(1, 768)})
    assert "nearest" in command("e.safetensors")[1]
    status, printed, _ = command("wide.safetensors")
    assert status == 0 and "nearest" not in printed
