"""Weights on disk: every container gives the same tensors, and what is broken or would run code is refused."""

import contextlib
import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import pytest
import torch
from conftest import memory_peak
from helpers.public import save_lightning
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.formats import untrusted
from tinyldm.formats.pickles import Inert
from tinyldm.formats.untrusted import WEIGHTS, load_pickle, open_weights

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.5, -2.0]).half(),
    "b": torch.tensor([3.0, 4.0]).bfloat16(),
    "ids": torch.arange(3),
}


def save_sharded(path, tensors):
    names = sorted(tensors)
    shards = {"shard-1-of-2.safetensors": names[:2], "shard-2-of-2.safetensors": names[2:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, path.parent / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


CONTAINERS = {
    "x.safetensors": lambda path, tensors: save_file(tensors, path),
    "safe-by-content.ckpt": lambda path, tensors: save_file(tensors, path),
    "x.ckpt": lambda path, tensors: torch.save(tensors, path),
    "pickle-by-content.bin": lambda path, tensors: torch.save(tensors, path),
    "wrapped.ckpt": lambda path, tensors: torch.save({"state_dict": tensors, "global_step": 7, "epoch": 0}, path),
    "old.pt": lambda path, tensors: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "lightning.ckpt": lambda path, tensors: save_lightning(path, tensors),
    "model.safetensors.index.json": save_sharded,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_tensors(tmp_path, name):
    CONTAINERS[name](tmp_path / name, TENSORS)
    weights = open_weights(tmp_path / name)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert [weights.dtypes[name] for name in ("a.weight", "a.bias", "b")] == ["float32", "float16", "bfloat16"]
    for name, tensor in TENSORS.items():
        found = weights.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_a_file_says_of_itself_what_its_metadata_or_its_numbers_beside_the_weights_say(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert open_weights(tmp_path / "x.safetensors").metadata == {"modelspec.prediction_type": "v"}
    save_lightning(tmp_path / "x.ckpt", TENSORS, steps=875_000)
    assert open_weights(tmp_path / "x.ckpt").metadata["global_step"] == "875000"


def test_the_lightning_callback_of_the_original_file_is_a_name_and_no_more(tmp_path):
    save_lightning(tmp_path / "x.ckpt", TENSORS)
    callbacks = load_pickle(tmp_path / "x.ckpt", WEIGHTS)["callbacks"]
    assert isinstance(callbacks["instance"], Inert)
    assert callbacks["instance"].name == "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint"


def test_opening_a_file_reads_no_weights(tmp_path, monkeypatch):
    """4 GiB of weights that are a hole in the file: reading them would show in this process's memory."""
    path = tmp_path / "x.safetensors"
    size = 4 * 2**30
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    before = resident()
    weights = open_weights(path)
    assert weights.shapes == {"w": (size // 4,)}
    assert float(weights.read("w")[-1]) == 0
    assert resident() - before < 200 * 2**20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- Shards


def test_a_shard_that_is_missing_is_named(tmp_path):
    save_sharded(tmp_path / "i.json", TENSORS)
    (tmp_path / "shard-2-of-2.safetensors").unlink()
    refused(tmp_path / "i.json", r"shard-2-of-2\.safetensors is missing, though i\.json lists it")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "i.json", 7])
def test_an_index_may_only_list_files_of_weights_beside_it(tmp_path, name):
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(tmp_path / "i.json", "expected files of weights beside it")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "i.json").write_text(content)
    refused(tmp_path / "i.json", "is no list of shards")


# ---- What would run code


class Runs:
    """Unpickled by pickle itself, it calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


COMMAND, CODE = "touch executed", "open('executed', 'w')"
BOMBS = {  # by the name that gives it away
    "posix.system": {"state_dict": TENSORS, "x": Runs(os.system, COMMAND)},
    "__builtin__.eval": {**TENSORS, "x": [{"nested": (Runs(eval, CODE), Runs(Runs, Runs(eval, CODE)))}]},
    "__builtin__.exec": Runs(exec, CODE),
    "test_untrusted.Runs": {"x": Runs} | TENSORS,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_names_anything_else_is_refused_by_that_name_and_not_executed(
    tmp_path, monkeypatch, name, zipped
):
    monkeypatch.chdir(tmp_path)
    torch.save(BOMBS[name], "x.ckpt", _use_new_zipfile_serialization=zipped)
    refused(
        tmp_path / "x.ckpt", f"names {name}, no part of plain tensors: loading it could run code, so it was not loaded"
    )
    assert not (tmp_path / "executed").exists()
    with contextlib.suppress(Exception):
        torch.load("x.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists() or name == "test_untrusted.Runs"  # it was a bomb indeed


@pytest.mark.parametrize("tensor", [torch.zeros(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_all_their_numbers_are_refused(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", r"names torch\._utils\._rebuild_\w+, no part of plain tensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch, zipped):
    """PyTorch's own check would let this name through."""
    torch.save({"x": Runs(bytearray, 10**11)} | TENSORS, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(torch, "load", None)
    refused(tmp_path / "x.ckpt", "names __builtin__.bytearray, no part of plain tensors")


def test_a_pickle_with_a_zip_at_its_end_is_looked_through_as_the_pickle_that_it_is(tmp_path):
    torch.save({"x": Runs(bytearray, 10**11)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    torch.save(TENSORS, tmp_path / "harmless.ckpt")
    with open(tmp_path / "x.ckpt", "ab") as file:
        file.write((tmp_path / "harmless.ckpt").read_bytes())
    refused(tmp_path / "x.ckpt", "names __builtin__.bytearray")


@pytest.mark.parametrize("names", [["x/data.pkl", "x/data.pkl"], ["x/DATA.PKL"]], ids=["two of one name", "capitals"])
def test_a_zip_with_another_record_that_can_be_taken_for_the_pickle_is_refused(tmp_path, monkeypatch, names):
    file = io.BytesIO()
    torch.save({"x": Runs(bytearray, 10**11)}, file)
    harmful = zipfile.ZipFile(file).read("archive/data.pkl")
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        for name, content in zip(names, [harmful, pickle.dumps({}, 2)], strict=False):
            archive.writestr(name, content)
        archive.writestr("x/version", "3\n")
    monkeypatch.setattr(torch, "load", None)
    refused(tmp_path / "x.ckpt", "its pickles are .*, expected one of the name NAME/data.pkl")


def test_a_name_that_is_let_through_cannot_be_made_to_run_anything(tmp_path):
    name = b"pytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint"
    called = b"\x80\x02}X\x01\x00\x00\x00xc%s\n(X\x02\x00\x00\x00lstRs." % name
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", called)
        archive.writestr("x/version", "3\n")
    assert load_pickle(tmp_path / "x.ckpt", WEIGHTS)["x"].arguments == ("ls",)
    refused(tmp_path / "x.ckpt", "holds no named tensors")


# ---- Broken, or made to break


def safetensors_bytes(header, data=b"\0" * 24):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = safetensors_bytes({"a": entry(0, 24, [2, 3])})
BROKEN_SAFETENSORS = {
    "cut off": GOOD[:-8],
    "cut off in its header": GOOD[:20],
    "offsets past the end": safetensors_bytes({"a": entry(0, 4000, [1000])}),
    "offsets that do not fit the shape": safetensors_bytes({"a": entry(0, 24, [2, 2])}),
    "a huge shape": safetensors_bytes({"a": entry(0, 24, [2**40, 2**40])}),
    "tensors that overlap": safetensors_bytes({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}),
    "a hole": safetensors_bytes({"a": entry(0, 8, [2]), "b": entry(16, 24, [2])}),
    "a header that is a list": safetensors_bytes(b"{" + b" " * 20),
    "an unknown dtype": safetensors_bytes({"a": entry(0, 24, [6], "F99")}),
}


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_a_broken_safetensors_file_is_refused(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(BROKEN_SAFETENSORS[name])
    refused(tmp_path / "x.safetensors", "is no readable safetensors file|claims a header")


def test_a_header_of_a_hundred_megabytes_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**8) + b"{" + b" " * (10**8))
    monkeypatch.setattr(untrusted, "safe_open", None)
    refused(tmp_path / "x.safetensors", "claims a header of 100000000 bytes, expected at most 3000000")


ENTRY = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
LONG = {
    "x.safetensors of many names": lambda: safetensors_bytes(b"{%s}" % many(ENTRY, 50_000), b""),
    "x.safetensors of many notes": lambda: safetensors_bytes(b'{"__metadata__":{%s}}' % many('"%x":""', 280_000), b""),
    "x.safetensors of a long shape": lambda: safetensors_bytes(
        b'{"w":{"dtype":"F32","shape":[%s]}}' % many("%d", 400_000)
    ),
    "x.json of many things": lambda: b'{"weight_map":{"a":[%s]}}' % many("{}", 980_000),
    "x.json that is too long": lambda: b'{"weight_map":{"a":[%s]}}' % many("{}", 5_000_000),
}


def many(entry: str, count: int) -> bytes:
    return ",".join(entry % i if "%" in entry else entry for i in range(count)).encode()


@pytest.mark.parametrize("name", LONG)
def test_no_description_takes_much_more_memory_than_it_is_long(tmp_path, name):
    path = tmp_path / name.partition(" ")[0]
    path.write_bytes(LONG[name]())
    with memory_peak() as used, contextlib.suppress(InputError):
        open_weights(path)
    assert used.bytes < 1.5 * path.stat().st_size + 100e6, f"{used.bytes / 1e6:.0f} MB"


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    save, bomb = tmp_path / "x.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1_000_000)}, save)
    with zipfile.ZipFile(save) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert bomb.stat().st_size < 10_000
    monkeypatch.setattr(torch, "load", None)
    refused(bomb, "is a compressed archive")


def test_a_zip_with_a_broken_directory_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    for broken in (whole.replace(b"PK\1\2", b"PK\7\7"), whole.replace(b"PK\3\4", b"PK\7\7")):
        path.write_bytes(broken)
        refused(path, "can't be read as a PyTorch file")


def test_a_small_file_whose_views_unfold_into_many_numbers_is_refused(tmp_path):
    torch.save({f"w{i}": torch.zeros(1).expand(2**30) for i in range(8)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "claims more numbers than it has")


def test_a_pickle_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    for zipped in (True, False):
        torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for size in range(1, len(whole) - 1, len(whole) // 17):
            path.write_bytes(whole[:size])
            refused(path, "can't be read as a PyTorch file|neither a safetensors nor|names torch")  # half a name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"no weights at all", "neither a safetensors nor a PyTorch file"),
        (b"PK\x03\x04" + bytes(40), "can't be read as a PyTorch file"),
        (pickle.dumps([1, 2]), "can't be read as a PyTorch file|holds no named tensors"),
        (b"\x80\x02.", "can't be read as a PyTorch file"),
        (b"\x80\x02K\x01", "can't be read as a PyTorch file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    refused(tmp_path / "x.ckpt", message)


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(3)],
        torch.zeros(3),
        {"state_dict": [torch.zeros(3)]},
        {"state_dict": {3: torch.zeros(3)}},
        {},
    ],
)
def test_a_pickle_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "holds no named tensors")


def test_a_pickle_that_is_called_safetensors_is_refused(tmp_path):
    """Other programs would open it for safe, by its name, and PyTorch takes it for what it is called."""
    torch.save(TENSORS, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", r"is a PyTorch pickle.*rename it to x\.ckpt")


def test_the_papers_embedding_is_told_from_a_checkpoint(tmp_path):
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(1, 768))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "e.pt")
    refused(tmp_path / "e.pt", "holds a ParameterDict.*give a learned embedding as --embedding")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(tmp_path / "none.ckpt", "can't be read .No such file or directory.")
    refused(tmp_path, "can't be read .Is a directory.")


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        open_weights(path)
    assert "\n" not in str(error.value) and str(path.parent) in str(error.value)
