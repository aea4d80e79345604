"""What torch.save writes is read as torch.load reads it, and nothing that a pickle names is called or takes memory."""

import contextlib
import io
import pickle
import pickletools
import random
import struct
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import memory_peak
from helpers.public import save_lightning
from torch import Tensor, nn

from tinyldm import InputError
from tinyldm.formats import pickles
from tinyldm.formats.embedding_layouts import EMBEDDING
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.formats.pickles import Inert
from tinyldm.formats.untrusted import WEIGHTS, load_pickle, open_weights

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
WHOLE = torch.arange(24.0).reshape(2, 3, 4)
LINEAR = nn.Linear(2, 3)
CONTENTS = {
    "tensors of every kind": {
        str(dtype): torch.tensor([[0, 1], [2, 3]]).to(dtype) for dtype in pickles.STORAGES.values()
    },
    "views of one storage": {
        "all": WHOLE,
        "turned": WHOLE.permute(2, 0, 1),
        "part": WHOLE[1, :, 1:3],
        "row": WHOLE.reshape(-1)[7:9],
    },
    "one number seen often": {"x": torch.ones(1).expand(5, 7)},
    "empty and single": {"none": torch.zeros(0, 3), "one": torch.tensor(2.5)},
    "a state_dict, with its note": LINEAR.state_dict(),
    "parameters": {"p": LINEAR.weight, "q": nn.Parameter(torch.ones(3), requires_grad=False)},
    "containers": {
        "list": [1, -1, 70_000, 2**40, True, None, 1.5],
        "tuple": (),
        "nested": [{"x": ((1, 2, 3, 4),)}],
        7: "Ä",
    },
    "a bare tensor": WHOLE,
    "a list": [{"a": WHOLE}, {"a": WHOLE}],
}


@FORMS
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_read_as_torch_reads_it(tmp_path, name, zipped):
    torch.save(CONTENTS[name], tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_same(pickles.load(tmp_path / "x.pt", WEIGHTS.allowed_names, 10**6), expected)


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"x": WHOLE}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(load_pickle(tmp_path / "x.pt", WEIGHTS), {"x": WHOLE})


@FORMS
def test_numbers_of_a_big_endian_computer_are_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr("sys.byteorder", "big")
    torch.save({"x": WHOLE}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="big-endian"):
        load_pickle(tmp_path / "x.pt", WEIGHTS)


def assert_same(found, expected):
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.stride() == expected.stride() and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected and type(found) is type(expected)


def test_the_numbers_stay_in_the_file(tmp_path):
    torch.save({"x": torch.zeros(10_000_000)}, tmp_path / "x.pt")
    for zipped in (True, False):
        torch.save({"x": torch.zeros(10_000_000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with memory_peak() as used:
            content = pickles.load(tmp_path / "x.pt", WEIGHTS.allowed_names, 10**6)
        assert used.bytes < 10_000_000
        assert content["x"][-1] == 0


# ---- The training run beside the weights


@FORMS
@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])
def test_a_checkpoint_with_a_training_run_in_it_opens(tmp_path, zipped, numpy):
    """sd-v1-4.ckpt and its like: LDM's LambdaLinearScheduler makes the learning rates NumPy's."""
    save_lightning(tmp_path / "x.ckpt", {"w": torch.ones(2)}, zipped=zipped, numpy=numpy)
    content = load_pickle(tmp_path / "x.ckpt", WEIGHTS)
    assert open_weights(tmp_path / "x.ckpt").read("w").tolist() == [1, 1]
    rate = content["lr_schedulers"][0]["_last_lr"][0]
    assert isinstance(rate, Inert) and rate.name == f"{numpy}.multiarray scalar"  # a note, no number
    assert isinstance(content["callbacks"], dict) and content["epoch"] == 7


class Runs:
    """Unpickled by pickle itself, it calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


SCALAR = np.float64(1).__reduce__()[0]
HIDDEN = {  # behind NumPy's names: a file that holds nothing else opens, and none of it is done
    "a scalar of objects, itself a pickle": Runs(
        SCALAR, np.dtype("O"), pickle.dumps(Runs(exec, "open('executed', 'w')"))
    ),
    "an encode of a long text": [Runs(__import__("_codecs").encode, "ä" * 10**6, "unicode_escape")] * 1000,
    "an array of a thousand billion numbers": Runs(np.ndarray, (10**12,), np.dtype("f8")),
    "a type of a thousand billion bytes": Runs(np.dtype, f"V{10**12}"),
}
REFUSED = {
    "a type that is a class": (Runs(np.dtype, Runs), "names test_pickles.Runs"),
    "a scalar that calls": (Runs(SCALAR, Runs(eval, "1"), b""), "names __builtin__.eval"),
    "an array from a file": (Runs(np.memmap, "/etc/passwd"), "names numpy.memmap"),
    "an encode that is a decode": (Runs(__import__("_codecs").decode, b"", "zip"), "names _codecs.decode"),
}


@FORMS
@pytest.mark.parametrize("name", HIDDEN)
def test_what_hides_behind_numpys_names_stays_undone(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": HIDDEN[name]}, "x.ckpt", _use_new_zipfile_serialization=zipped)
    with memory_peak() as used:
        assert open_weights(tmp_path / "x.ckpt").read("w").tolist() == [1, 1]
    assert used.bytes < 30 * 2**20
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


@FORMS
@pytest.mark.parametrize("name", REFUSED)
def test_what_hides_behind_numpys_names_and_has_another_name_is_refused(tmp_path, name, zipped):
    content, message = REFUSED[name]
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "x": content}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped
    )
    for limits in (WEIGHTS, EMBEDDING):
        with pytest.raises(InputError, match=message):
            load_pickle(tmp_path / "x.ckpt", limits)


# ---- Tensors of a Mac


@pytest.mark.filterwarnings("ignore:.*calls it something else")
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_embedding_trained_on_a_mac_is_read(tmp_path, zipped, dtype):
    """Tensor.__reduce_ex__ of PyTorch 1.12 to 2.0 on device mps: a NumPy array in the pickle."""
    vectors = torch.randn(3, 768).to(dtype)
    on_mac = Runs(torch._utils._rebuild_device_tensor_from_numpy, vectors.numpy(), dtype, "mps:0", False)
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": on_mac}, "name": "cat", "step": 9}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    (found,) = load_embeddings(tmp_path / "x.pt").values()
    assert found.equal(vectors.float())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), object),
        np.zeros((2, 3), "S9"),
        np.asfortranarray(np.ones((2, 3), "f4")),
        np.zeros((2, 3), "i4"),
    ],
)
def test_an_array_that_is_no_embedding_is_refused(tmp_path, array):
    torch.save(
        {"w": Runs(torch._utils._rebuild_device_tensor_from_numpy, array, torch.float32, "mps:0", False)},
        tmp_path / "x.pt",
    )
    with pytest.raises(InputError, match="can't be read as a PyTorch file"):
        load_embeddings(tmp_path / "x.pt")


# ---- Made to fill the memory


def zipped(content, name="x/data.pkl", records=(("x/data/0", bytes(4)),)):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:
        for record, data in [(name, content), ("x/version", b"3\n"), *records]:
            archive.writestr(record, data)
    return file.getvalue()


BIG = b"cbuiltins\nbytearray\nJ\x00\x94\x35\x77\x85R"  # of 2 GB
BIGS = b"\x80\x02(" + 3 * BIG + b"t."
NAME = b"ccollections\nOrderedDict\nq\x00"
STORAGE = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
TENSOR = b"ctorch._utils\n_rebuild_tensor\nq\x00((%sK\x01tQK\x00K\x01\x85K\x01\x85tq\x01" % STORAGE


TWICE = b"]" + b"q\x01]h\x01ah\x01a" * 60  # a list of the list before, twice: to print it takes for ever
DECODE = b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n"


def array(shape, kind, size):
    """An array as NumPy pickles it by protocol 2."""
    numbers = b"c_codecs\nencode\nX%s%sX\x06\x00\x00\x00latin1\x86R" % (struct.pack("<I", size), b"a" * size)
    dtype = b"cnumpy\ndtype\n%s\x85R" % kind
    return b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01%s%s\x89%stb" % (shape, dtype, numbers)


def with_two_directories():
    """zipfile finds the last list of records; who goes by the offset finds the first, and in it another pickle."""
    one, two = zipped(BIGS), zipped(b"\x80\x02}.")
    end = two.rindex(b"PK\5\6")
    offset = one.index(b"PK\1\2")
    return one + two[:end] + two[end:].replace(two[end + 16 : end + 20], struct.pack("<I", offset), 1)


def with_a_second_name():
    """Newer versions of zipfile take the Unicode name in a record's extra bytes for its name."""
    name = zipfile.ZipInfo("x/data.pkl")
    name.extra = struct.pack("<HHBI", 0x7075, 10, 1, 0) + b"other"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, BIGS)
    return file.getvalue()


BOMBS = {
    "three times 2 GB, called DATA.pkl": lambda: zipped(BIGS, "x/DATA.pkl"),
    "behind a second list of records": with_two_directories,
    "behind a second name": with_a_second_name,
    "copies of a dictionary": lambda: zipped(
        b"\x80\x02(}q\x01(%su" % b"".join(b"J%sN" % struct.pack("<i", i) for i in range(20_000))
        + (NAME + b"h\x00h\x01\x85R" * 20_000 + b"t.")
    ),
    "many tensors": lambda: zipped(b"\x80\x02(" + TENSOR + b"h\x00h\x01R" * 40_000 + b"t."),
    "many lists": lambda: zipped(b"\x80\x04(" + b"]\x94" * 60_000 + b"t."),
    "more instructions than fit": lambda: zipped(b"\x80\x02(" + b"}" * 1_000_000 + b"t."),
    "many names": lambda: zipped(b"\x80\x02(" + NAME[:-2] * 80_000 + b"t."),
    "a long text of wide letters": lambda: zipped(
        b"\x80\x02X%s\xf0\x9f\x98\x80%s." % (struct.pack("<I", 2_900_000), b"a" * 2_899_996)
    ),
    "a long text that is not there": lambda: zipped(b"\x80\x02X\xff\xff\xff\x7f."),
    "a deep tuple for a key": lambda: zipped(b"\x80\x02})" + b"\x85" * 100_000 + b"Ns."),
    "equal hashes": lambda: zipped(
        b"\x80\x02}("
        + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(30_000))
        + b"u."
    ),
    "a storage that its tensor makes larger": lambda: zipped(
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n((%sK\x01tQK\x00J\x00\x00\x00\x70\x85K\x01\x85tRs."
        % STORAGE
    ),
    "a storage of more numbers than it has": lambda: zipped(
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n((%sJ\x00\x00\x00\x70tQK\x00K\x01\x85K\x01\x85tRs."
        % STORAGE
    ),
    "many empty records": lambda: zipped(b"\x80\x02}.", records=[(str(i), b"") for i in range(20_000)]),
    "lists in lists, each twice, for a storage's key": lambda: zipped(
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + TWICE + b"X\x03\x00\x00\x00cpuK\x01tQ."
    ),
    "tuples in tuples, each twice, for a storage's key before 1.6": lambda: old(
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)"
        + b"q\x01h\x01\x86" * 60
        + b"X\x03\x00\x00\x00cpuK\x01NtQ."
    ),
    "tuples in tuples for a type of numbers": lambda: zipped(
        b"\x80\x02" + DECODE + b"(" + array(b"K\x01\x85", b")" + b"q\x01h\x01\x86" * 60, 4) + b"tR."
    ),
    "lists in lists for a name": lambda: zipped(b"\x80\x04" + TWICE + TWICE + b"\x93."),
    "a list times a size": lambda: zipped(
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n((%sK\x01tQK\x00J\xff\xff\xff\x3f\x85]K\x00a\x85tR." % STORAGE
    ),
    "a list times a size of numbers": lambda: zipped(
        b"\x80\x02" + DECODE + b"(" + array(b"J\xff\xff\xff\x3f]K\x00a\x86", b"X\x02\x00\x00\x00f4", 4) + b"tR."
    ),
    "the same numbers decoded often": lambda: zipped(
        b"\x80\x02("
        + DECODE
        + b"q\x01("
        + array(b"J%s\x85" % struct.pack("<i", 200_000), b"X\x02\x00\x00\x00f4", 800_000)
        + b"NNNtq\x02"
        + b"h\x01h\x02R" * 30_000
        + b"t."
    ),
    "bytes before 1.6": lambda: old(b"\x80\x02B\xff\xff\xff\x7f" + bytes(20_000_000)),
}


def old(content):
    parts = [pickle.dumps(value, 2) for value in (pickles.MAGIC, 1001, {"little_endian": True})]
    return b"".join([*parts, content])


@pytest.mark.parametrize("limits", [WEIGHTS, EMBEDDING], ids=["checkpoint", "embedding"])
@pytest.mark.parametrize("name", BOMBS)
def test_no_file_takes_more_memory_or_time_than_it_is_long(tmp_path, name, limits):
    (tmp_path / "x.pt").write_bytes(BOMBS[name]())
    size, start = (tmp_path / "x.pt").stat().st_size, time.process_time()
    with memory_peak() as used:
        try:
            content = load_pickle(tmp_path / "x.pt", limits)
        except InputError as error:
            content = str(error)
    assert used.bytes < 1.5 * size + 100e6, f"{used.bytes / 1e6:.0f} MB for a file of {size / 1e6:.1f}"
    assert time.process_time() - start < 10
    assert content is not None


def test_a_file_with_any_instruction_changed_is_read_or_refused(tmp_path):
    """Half of the changes put an instruction of pickle's where none was."""
    codes = [operation.code.encode("latin1") for operation in pickletools.opcodes]
    save_lightning(tmp_path / "x.ckpt", {"w": torch.ones(2, 8)}, zipped=False)
    whole, chance = (tmp_path / "x.ckpt").read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(whole)
        for place in chance.sample(range(len(whole)), 2):
            changed[place : place + 1] = chance.choice([chance.choice(codes), chance.randbytes(1)])
        (tmp_path / "x.ckpt").write_bytes(changed)
        with contextlib.suppress(InputError):
            open_weights(tmp_path / "x.ckpt")


def test_the_bomb_of_449_bytes_is_one_in_torch(tmp_path):
    """What the first row of the table above is: PyTorch finds DATA.pkl, and its list of functions has bytearray."""
    (tmp_path / "x.pt").write_bytes(
        zipped(b"\x80\x02(" + 3 * BIG.replace(b"\x00\x94\x35\x77", b"\x00\x00\x00\x01") + b"t.", "x/DATA.pkl")
    )
    assert (tmp_path / "x.pt").stat().st_size < 449 + 200
    assert [len(value) for value in torch.load(tmp_path / "x.pt", weights_only=True)] == 3 * [2**24]
    for limits in (WEIGHTS, EMBEDDING):
        with pytest.raises(
            InputError, match=r"its pickles are \['x/DATA.pkl'\], expected one of the name NAME/data.pkl"
        ):
            load_pickle(tmp_path / "x.pt", limits)
