"""The formats of embedding files: everybody's read and written, and everything that is not an embedding refused."""

import base64
import collections
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import memory_peak
from helpers.embedding_files import (
    NAMED,
    WRITERS,
    a1111,
    a1111_json,
    as_a1111,
    as_kohya,
    as_onetrainer,
    as_paper,
    as_png_text,
    as_webp_pixels,
    hide,
    photograph,
    refusal,
    rows,
)
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyldm import InputError
from tinyldm.formats.embedding_layouts import FORMATS
from tinyldm.formats.embeddings import load_embeddings, save_embeddings

# ---- Writing


def test_the_file_is_float32_safetensors_of_token_and_vectors_and_small(tmp_path):
    path = tmp_path / "e.safetensors"
    save_embeddings(path, {"S*": torch.randn(2, 128, dtype=torch.bfloat16), "T": torch.randn(128)})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == {"S*": ("F32", [2, 128]), "T": ("F32", [1, 128])}
    assert path.stat().st_size < 3 * 128 * 4 + 300


AWKWARD = torch.tensor(
    [[0.0, -0.0, 1e-45, -3.4028235e38, 1 / 3, 1.0000001, -1.17549435e-38, 0.1]]
)  # float32, all of it


@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("back", FORMATS)
def test_a_round_trip_through_any_two_formats_is_bit_exact(tmp_path, there, back):
    words = {"cat": torch.cat([AWKWARD, rows(2, 8)])}
    first, second = (tmp_path / str(i) / f"cat{FORMATS[to].suffix}" for i, to in enumerate((there, back)))
    for path, to in ((first, there), (second, back)):
        path.parent.mkdir()
        save_embeddings(path, words, to)
        words = load_embeddings(path)
    assert list(words) == ["cat"]  # kohya's comes from the file's name
    assert words["cat"].numpy().tobytes() == torch.cat([AWKWARD, rows(2, 8)]).numpy().tobytes()


def test_a1111_gets_its_own_structure_in_a_file_that_its_loader_lets_pass(tmp_path):
    save_embeddings(tmp_path / "e.pt", {"<cat>": rows(2)}, "a1111")
    content = torch.load(tmp_path / "e.pt", weights_only=True)
    assert list(content) == [
        "string_to_token",
        "string_to_param",
        "name",
        "step",
        "sd_checkpoint",
        "sd_checkpoint_name",
    ]
    assert content["string_to_token"] == {"*": 265} and content["name"] == "<cat>"
    assert torch.equal(content["string_to_param"]["*"], rows(2))
    assert not zipfile.is_zipfile(tmp_path / "e.pt")  # modules/safe.py refuses zips with records newer than itself


def test_the_paper_gets_a_parameter_dict_and_clips_tokens(tmp_path):
    save_embeddings(tmp_path / "e.pt", {"<cat>": rows(2), "<dog>": rows(1)}, "paper")
    content = torch.load(tmp_path / "e.pt", weights_only=False)
    assert list(content) == ["string_to_token", "string_to_param"]
    assert type(content["string_to_param"]) is nn.ParameterDict
    assert {word: int(token) for word, token in content["string_to_token"].items()} == {"<cat>": 265, "<dog>": 287}
    assert {word: tuple(vectors.shape) for word, vectors in content["string_to_param"].items()} == {
        "<cat>": (2, 768),
        "<dog>": (1, 768),
    }
    assert all(isinstance(vectors, nn.Parameter) for vectors in content["string_to_param"].values())


def test_kohya_gets_emb_params(tmp_path):
    save_embeddings(tmp_path / "e.safetensors", {"<cat>": rows(2)}, "kohya")
    content = load_file(tmp_path / "e.safetensors")
    assert list(content) == ["emb_params"] and torch.equal(content["emb_params"], rows(2))


@pytest.mark.parametrize(
    ("to", "words"), [("a1111", "ab"), ("kohya", "ab"), ("paper", "abcdefghi"), ("paper", ["a.b"]), ("paper", ["keys"])]
)
def test_words_that_a_format_cannot_hold(tmp_path, to, words):
    with pytest.raises(InputError, match=to):
        save_embeddings(tmp_path / "e", {word: torch.ones(1, 8) for word in words}, to)
    assert os.listdir(tmp_path) == []


# ---- Reading what every tool writes


@pytest.mark.filterwarnings("ignore:.*calls it something else")
@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize(("write", "suffix", "word"), WRITERS)
def test_every_tools_file_is_read_bit_for_bit(tmp_path, write, suffix, word, count):
    path = tmp_path / f"file-of-cats{suffix}"
    write(path, rows(count))
    loaded = load_embeddings(path, width=768)
    assert list(loaded) == [word]
    assert torch.equal(loaded[word], rows(count))
    assert (loaded[word].dtype, loaded[word].requires_grad) == (torch.float32, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("write", [as_kohya, as_onetrainer])
def test_every_floating_point_type_comes_out_as_float32(tmp_path, write, dtype):
    vectors = rows(2).to(dtype)
    write(tmp_path / "e.safetensors", vectors)
    assert torch.equal(load_embeddings(tmp_path / "e.safetensors")["e"], vectors.float())


@pytest.mark.filterwarnings("ignore:.*calls it something else")
def test_the_format_is_told_by_the_content_not_by_the_name(tmp_path):
    for write, suffix, word in WRITERS:
        write(tmp_path / f"e{suffix}", rows(2))
        for other in {".safetensors", ".bin", ".pt", ".png", ""} - {suffix}:
            os.replace(tmp_path / f"e{suffix}", tmp_path / f"e{other}")
            assert list(load_embeddings(tmp_path / f"e{other}")) == [word if word == NAMED else "e"], (write, other)
            os.replace(tmp_path / f"e{other}", tmp_path / f"e{suffix}")


def test_what_reading_lets_pass_is_not_let_pass_elsewhere(tmp_path):
    as_paper(tmp_path / "e.pt", rows(1))
    assert list(load_embeddings(tmp_path / "e.pt")) == ["e"]
    with pytest.raises(pickle.UnpicklingError, match="ParameterDict"):
        torch.load(tmp_path / "e.pt", weights_only=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_row_of_the_whole_table_does_not_keep_the_table(tmp_path, zipped):
    """A .bin that diffusers wrote after training on a CPU holds all of it."""
    table = nn.Embedding(300, 768).weight
    for saved in (table[297:300], table[299], table[297:].detach(), nn.Parameter(table[297:].half())):
        torch.save({"<cat-toy>": saved}, tmp_path / "e.bin", _use_new_zipfile_serialization=zipped)
        loaded = load_embeddings(tmp_path / "e.bin")["<cat-toy>"]
        assert torch.equal(loaded, saved.float().reshape(-1, 768))
        assert loaded.untyped_storage().nbytes() == loaded.numel() * 4
        assert not loaded.requires_grad


def test_several_words_of_the_papers_format_stay_apart(tmp_path):
    words = {"*": rows(1), "cat": rows(2), "dog": rows(3)}
    tokens = {"*": torch.tensor(265), "cat": torch.tensor(2368), "dog": torch.tensor(1929)}
    torch.save({"string_to_token": tokens, "string_to_param": nn.ParameterDict(words)}, tmp_path / "mine.pt")
    loaded = load_embeddings(tmp_path / "mine.pt")
    assert set(loaded) == {"mine", "cat", "dog"}
    assert all(torch.equal(loaded["mine" if word == "*" else word], words[word]) for word in words)


def test_names_with_numbers_are_siblings_only_of_single_vectors_without_a_gap(tmp_path):
    save_file({"a": rows(2), "a_1": rows(1), "b": rows(1), "b_2": rows(1), "c_1": rows(1)}, tmp_path / "e")
    shapes = {word: len(vectors) for word, vectors in load_embeddings(tmp_path / "e").items()}
    assert shapes == {"a": 2, "a_1": 1, "b": 1, "b_2": 1, "c_1": 1}


@pytest.mark.parametrize("name", [None, "", "*", 7, "bad-artist"])
def test_an_a1111_file_is_called_after_the_file(tmp_path, name):
    torch.save(a1111(rows(1), name), tmp_path / "bad-artist.pt")
    with warnings.catch_warnings(action="error"):
        assert list(load_embeddings(tmp_path / "bad-artist.pt")) == ["bad-artist"]


@pytest.mark.parametrize(
    ("write", "file", "word", "other"),
    [
        (as_a1111, "bad artist.pt", "bad artist", "<cat>"),
        (as_png_text, "bad artist.png", "<cat>", "bad artist"),
        (as_webp_pixels, "bad artist.webp", "<cat>", "bad artist"),
    ],
)
def test_where_the_file_and_the_name_inside_differ_one_line_says_what_to_type(tmp_path, write, file, word, other):
    """As load_from_file of A1111's modules/textual_inversion/textual_inversion.py: the file's name, in images the name
    inside."""
    write(tmp_path / file, rows(1))
    with pytest.warns(UserWarning, match=f"type '{word}', not '{other}'") as told:
        assert list(load_embeddings(tmp_path / file)) == [word]
    assert len(told) == 1
    with warnings.catch_warnings(action="error"):
        for called in (word, other, "my-word"):
            assert list(load_embeddings(f"{tmp_path / file}:{called}")) == [called]


def test_a_lossy_image_has_lost_its_embedding(tmp_path):
    picture = hide(photograph(), zlib.compress(a1111_json(a1111(rows(1)))))
    for kind in ("WEBP", "JPEG"):
        picture.save(tmp_path / "e.webp", kind, quality=90)
        refusal(tmp_path / "e.webp")


def test_a_word_of_the_concepts_library(tmp_path):
    """sd-concepts-library/cat-toy: one row of the table under its token, as training_function of
    sd_textual_inversion_training.ipynb (huggingface/notebooks, 2022) saves it. PyTorch's zips then held no more than
    data.pkl, version and the numbers."""
    table = nn.Embedding(300, 768).weight
    content = saved({"<cat-toy>": table[299].detach().clone()})
    old = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as new, zipfile.ZipFile(old, "w") as then:
        for name in new.namelist():
            if name.split("/", 1)[1] in ("data.pkl", "version", "data/0"):
                then.writestr(name, new.read(name))
    (tmp_path / "learned_embeds.bin").write_bytes(old.getvalue())
    with warnings.catch_warnings(action="error"):
        loaded = load_embeddings(tmp_path / "learned_embeds.bin", width=768)
    assert list(loaded) == ["<cat-toy>"] and torch.equal(loaded["<cat-toy>"], table[299:].detach())


# ---- Refusing


def test_a_file_cut_off_anywhere(tmp_path):
    for write, suffix, _ in WRITERS:
        write(tmp_path / f"whole{suffix}", rows(2))
        content = (tmp_path / f"whole{suffix}").read_bytes()
        for size in (0, 1, 2, 8, 9, 20, 60, 100, 1000, len(content) // 2, len(content) - 40, len(content) - 1):
            if suffix == ".png" and size > len(content) // 2:
                continue  # the last chunk of a PNG says nothing but that it was the last
            (tmp_path / "cut").write_bytes(content[:size])
            refusal(tmp_path / "cut")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "e.safetensors").write_text("a text file\n" * 100)
    assert "neither" in refusal(tmp_path / "e.safetensors")
    (tmp_path / "e.safetensors").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "e.safetensors")


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=1)).state_dict()


def open_clip():
    return {"token_embedding.weight": torch.ones(90, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "no embedding"),
        ([], "no embedding"),
        ([torch.ones(1, 8)], "no embedding"),
        ([[{"S*": torch.ones(1, 8)}]], "no embedding"),
        ("S*", "no embedding"),
        ({"string_to_param": {}}, "no word"),
        ({"string_to_param": torch.ones(1, 8)}, "no word"),
        ({"string_to_param": {"*": [1.0, 2.0]}}, "str -> list"),
        ({"emb_params": {"S*": torch.ones(1, 8)}}, "str -> dict"),
        ({"step": 3, "S*": torch.ones(1, 8)}, "str -> int"),
        ({265: torch.ones(1, 8)}, "int -> Tensor"),
        ({"state_dict": {"conv.weight": torch.ones(4, 4, 3, 3)}}, "a checkpoint"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4, 3, 3)}, "a checkpoint"),
        ({"conv.weight": torch.ones(4, 4, 3, 3)}, "a model or a part of one"),
        (text_encoder, "a text encoder alone"),
        (open_clip, "a text encoder alone"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8)}, "a LoRA"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "for several text encoders (SDXL"),
        ([{"<cat>": torch.ones(2, 768)}, {"<cat>": torch.ones(2, 1280)}], "widths [768, 1280]"),
        ({"emp_params": torch.ones(1, 8), "emp_params_out": torch.ones(1, 8)}, "output embedding of OneTrainer"),
        ({"S*": torch.ones(1000, 8)}, "1 to 75 vectors"),
        ({"S*": torch.ones(4, 4, 3, 3)}, "shape (4, 4, 3, 3)"),
        ({"S*": torch.tensor(1.0)}, "shape ()"),
        ({"S*": torch.ones(0, 8)}, "shape (0, 8)"),
        ({"S*": torch.ones(2, 0)}, "shape (2, 0)"),
        ({"S*": torch.ones(2, 8, dtype=torch.int64)}, "torch.int64"),
        ({"S*": torch.ones(2, 8, dtype=torch.int8)}, "torch.int8"),
        ({"S*": torch.tensor([[1.0, torch.nan]])}, "NaN"),
        ({"S*": torch.tensor([[1.0, -torch.inf]])}, "infinite"),
        ({"S*": torch.full((2, 8), torch.inf, dtype=torch.float16)}, "infinite"),
        ({"S" * 10_000: torch.full((2, 8), torch.nan)}, "NaN"),
    ],
)
def test_content_that_is_no_embedding(tmp_path, content, complaint):
    content = content() if callable(content) else content
    torch.save(content, tmp_path / "e.bin")
    assert complaint in refusal(tmp_path / "e.bin")
    if isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values()) and 265 not in content:
        save_file(content, tmp_path / "e.safetensors")
        assert complaint in refusal(tmp_path / "e.safetensors")


def test_a_whole_checkpoint_is_refused_without_being_read(tmp_path):
    with (tmp_path / "model.ckpt").open("wb") as file:
        file.truncate(4_265_146_304)  # a sparse file: this takes no room
    message = refusal(tmp_path / "model.ckpt")
    assert "4265 MB" in message and "--weights" in message


# ---- Files that mean harm


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    __call__ = __reduce__  # pickle calls nothing, but wants a function


EVIL = Call(os.system, "touch evil")


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rezipped(content, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """A zip of the same records, each changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def claiming_more_numbers_than_its_record():
    def change(name, data):
        if not name.endswith("data.pkl"):
            return data
        assert data.count(b"K\x10tq") == data.count(b"K\x02K\x08\x86") == data.count(b"K\x08K\x01\x86") == 1
        data = data.replace(b"K\x10tq", b"M\xff\xfftq")  # the storage's length, 16
        return data.replace(b"K\x02K\x08\x86", b"K\x40K\xff\x86").replace(b"K\x08K\x01\x86", b"K\xffK\x01\x86")

    return rezipped(saved({"S*": torch.ones(2, 8)}), change)


def no_zip(old, new):
    """The one tensor of 2 x 8 numbers in the form before PyTorch 1.6, with one part of its description changed."""
    content = saved({"S*": torch.ones(2, 8)}, _use_new_zipfile_serialization=False)
    assert content.count(old) == 1
    return content.replace(old, new)


def safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def png(picture, **text):
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key.replace("_", "-"), value, zip=isinstance(value, str) and len(value) > 10**6)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def webp(picture):
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return file.getvalue()


def png_of_size(width, height):
    """A header that promises many pixels, and a few bytes of them."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(10**5)))]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def in_text(payload):
    return png(photograph(), sd_ti_embedding=base64.b64encode(payload))


def endless_list():
    content = []
    content.append(content)
    return content


HARMFUL = {
    "os.system": (lambda: saved({"S*": EVIL}), "names posix.system"),
    "os.system alone": (lambda: saved(EVIL), "names posix.system"),
    "os.system, no zip": (lambda: saved({"S*": EVIL}, _use_new_zipfile_serialization=False), "names posix.system"),
    "os.system, plain pickle": (lambda: pickle.dumps(EVIL, 2), "names posix.system"),
    "os.system, new pickle": (lambda: pickle.dumps(EVIL, 5), "names posix.system"),
    "os.system, old pickle": (lambda: pickle.dumps(EVIL, 0), "neither"),
    "os.system as a name": (lambda: saved(a1111(rows(1), EVIL)), "names posix.system"),
    "os.system in a parameter dict": (
        lambda: saved({"string_to_param": Call(nn.ParameterDict, Call(eval, "1"))}),
        "names __builtin__.eval",
    ),
    "nested reduce": (
        lambda: saved({"S*": Call(Call(getattr, Call(__import__, "os"), "system"), "touch evil")}),
        "names",
    ),
    "nested reduce of harmless names": (
        lambda: saved({"S*": Call(collections.OrderedDict, Call(torch._utils._rebuild_parameter, EVIL, True, None))}),
        "names posix.system",
    ),
    "a hundred GB of nothing": (lambda: saved({"S*": Call(bytearray, 10**11)}), "names __builtin__.bytearray"),
    "sparse": (lambda: saved({"S*": torch.eye(8).to_sparse()}), "names torch._utils._rebuild_sparse_tensor"),
    "meta": (lambda: saved({"S*": torch.ones(1, 8, device="meta")}), "names torch._utils._rebuild_meta_tensor"),
    "a long pickle": (lambda: saved([{}] * 600_000), "pickle of more than"),
    "an endless list": (lambda: saved(endless_list()), "no embedding"),
    "zip bomb": (
        lambda: rezipped(saved({"S*": torch.zeros(75, 200_000)}), compression=zipfile.ZIP_DEFLATED),
        "is a compressed archive",
    ),
    "zip of too long a storage": (claiming_more_numbers_than_its_record, "can't be read"),
    "no zip, too long a storage": (lambda: no_zip(b"K\x10Nt", b"J\xff\xff\xff\x1fNt"), "can't be read"),
    "no zip, a tensor larger than its storage": (
        lambda: no_zip(b"K\x02K\x08\x86", b"K\x02J\xff\xff\xff\x1f\x86"),
        "can't be read",
    ),
    "a number seen a million times": (lambda: saved({"S*": torch.ones(1).expand(75, 10**6)}), "claims"),
    "a table seen a hundred times": (
        lambda: saved({f"<{i}>": table for table in [torch.ones(75, 8)] for i in range(100)}),
        "claims",
    ),
    "more than any embedding": (lambda: saved({f"<{i}>": torch.ones(75, 10**5) for i in range(2)}), "claims"),
    "truncated zip": (lambda: saved({"S*": rows(2)})[:-100], "cut off"),
    "safetensors past its end": (
        lambda: safetensors({"S*": entry([1, 8], 0, 320)}, bytes(32)),
        "is no readable safetensors",
    ),
    "safetensors of another shape": (
        lambda: safetensors({"S*": entry([1, 80], 0, 32)}, bytes(32)),
        "is no readable safetensors",
    ),
    "safetensors overlapping": (
        lambda: safetensors({"S*": entry([1, 8], 0, 32), "T*": entry([1, 8], 16, 48)}, bytes(48)),
        "is no readable safetensors",
    ),
    "safetensors with a hole": (
        lambda: safetensors({"S*": entry([1, 8], 0, 32), "T*": entry([1, 8], 64, 96)}, bytes(96)),
        "is no readable safetensors",
    ),
    "safetensors of 100 MB header": (
        lambda: safetensors(b'{"a": "' + b" " * 10**8 + b'"}'),
        "claims a header of 100000009",
    ),
    "safetensors of any header": (lambda: safetensors(b"{}", length=2**63), "claims a header of"),
    "safetensors of a dtype that PyTorch lacks": (
        lambda: safetensors({"S*": entry([4, 8], 0, 24, "F6_E2M3")}, bytes(24)),
        "is no readable safetensors",
    ),
    "safetensors of a dtype that PyTorch can't convert": (
        lambda: safetensors({"S*": entry([4, 8], 0, 16, "F4")}, bytes(16)),
        "holds torch.float4",
    ),
    "safetensors of int8": (lambda: safetensors({"S*": entry([4, 8], 0, 32, "I8")}, bytes(32)), "torch.int8"),
    "safetensors of NaN": (lambda: safetensors({"S*": entry([1, 128], 0, 512)}, b"\xff" * 512), "NaN"),
    "safetensors of inf": (
        lambda: safetensors({"S*": entry([1, 128], 0, 512)}, b"\x00\x00\x80\x7f" * 128),
        "infinite",
    ),
    "WEBP of 9 million pixels": (lambda: webp(Image.new("RGB", (3000, 3000))), "has 3000 x 3000 pixels"),
    "WEBP of long hidden bytes": (lambda: webp(hide(photograph(), zlib.compress(bytes(10**7)))), "hides more than"),
    "WEBP of a picture": (lambda: webp(photograph()), "no embedding in it"),
    "PNG of a billion pixels": (lambda: png_of_size(60_000, 60_000), "can't be read"),
    "PNG of 100 million pixels": (lambda: png_of_size(10_000, 10_000), "has 10000 x 10000 pixels"),
    "PNG of 9 million pixels": (lambda: png(Image.new("RGB", (3000, 3000))), "has 3000 x 3000 pixels"),
    "PNG of a long text": (lambda: png(photograph(), sd_ti_embedding="A" * 10**7), "can't be read"),
    "PNG of long hidden bytes": (lambda: hidden(zlib.compress(bytes(10**7))), "hides more than"),
    "PNG of long JSON": (lambda: in_text(b"[" + b"0," * 3 * 10**6 + b"0]"), "hides more than"),
    "PNG of deep JSON": (lambda: in_text(b"[" * 10**6), "can't be read"),
    "PNG of no JSON": (lambda: in_text(b"\xff\xfe"), "can't be read"),
    "PNG of ragged vectors": (lambda: in_text(b'{"S*": {"TORCHTENSOR": [[1, 2], [3]]}}'), "can't be read"),
    "PNG of NaN": (lambda: in_text(b'{"S*": {"TORCHTENSOR": [[%s NaN]]}}' % (b"1," * 127)), "NaN"),
    "PNG of a picture": (lambda: png(photograph()), "no embedding in it"),
    "PNG of a picture with black columns": (lambda: png(Image.new("RGB", (64, 64))), "no embedding in it"),
}


def hidden(payload):
    return png(hide(photograph(), payload))


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_file_is_one_line_and_does_nothing(run, tmp_path, name):
    make, complaint = HARMFUL[name]
    Path("e.pt").write_bytes(make())  # run has changed into an empty folder
    size = Path("e.pt").stat().st_size
    with memory_peak() as used:
        message = refusal("e.pt")
    assert complaint in message
    assert used.bytes <= max(1.5 * size, 30 * 2**20), f"{used.bytes / 2**20:.0f} MiB for a file of {size / 2**20:.2f}"
    assert message in run("sample.py", "--prompt", "x", "--embedding", "e.pt").error
    assert os.listdir() == ["e.pt"]
