"""What torch.save wrote, read as the data that it is: nothing that a pickle names is imported, made or called.

A pickle is a program for a small machine with a stack. Two of its instructions call functions, and so pickle and
torch.load run what a stranger wrote, or trust a list of functions not to do harm. The machine here has no functions: it
collects numbers, texts, lists and dictionaries, and of a call it keeps the name and the arguments. The few calls by
which torch.save describes a tensor are understood, and become tensors mapped from the file. So what a file
takes of the memory is bounded by the bytes that it has.

torch.save writes a zip: NAME/data.pkl, the pickle, beside one record of numbers a storage, NAME/data/0, …. Before
PyTorch 1.6 it wrote pickles one after the other, then all the numbers.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

ZIP = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save's first pickle was before it wrote zips
MAX_INSTRUCTIONS = 400_000  # of a pickle; a tensor takes 40, an instruction up to 200 bytes of memory
STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
NUMPY_TYPES = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16}  # of embeddings


class UnknownName(ValueError):
    """A pickle names a function or class that is none of those allowed: "module name"."""


@dataclass(slots=True, eq=False)
class Inert:
    """What a pickle names, or makes by calling what it names: never more than this note of it."""

    name: str  # "module name"
    arguments: tuple | None = None  # None: it is not called
    state: object = None


class Storage(NamedTuple):
    """Numbers that tensors are views of."""

    dtype: torch.dtype
    bytes: UntypedStorage | None  # mapped from the file; None: where they lie is not known yet


def load(path: Path, allowed: re.Pattern[str], most: int) -> object:
    """What a file of torch.save holds: tensors, numbers, texts, lists, tuples, dictionaries and `Inert`s.

    allowed: the names that it may have, "module name", UnknownName otherwise. most: bytes of its pickle. Many types of
    error if it is broken.
    """
    with Sips(path) as file:
        file.most = most
        read = load_zip if file.read(4) == ZIP else load_old
        return read(file, UntypedStorage.from_file(str(path), False, path.stat().st_size), allowed, most)


class Sips(io.FileIO):
    """A file of which nobody reads much at once, whatever lengths it claims."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self.most:
            raise ValueError(f"it claims {size} bytes where at most {self.most} are expected")
        return super().read(size)


# ---- The two forms of a file


def load_zip(file: Sips, mapped: UntypedStorage, allowed: re.Pattern[str], most: int) -> object:
    with zipfile.ZipFile(file) as archive:
        check_records(archive.infolist(), len(mapped))
        records = {record.filename: record for record in archive.infolist()}
    (name,) = (name for name in records if name.endswith("/data.pkl"))
    folder = name.removesuffix("data.pkl")

    # Where a record's first bytes are. zipfile would compare checksums, and PyTorch can be told to write none.
    def place(name: str, size: int) -> int:
        if not 0 <= size <= records[name].file_size:
            raise ValueError("more numbers than it has")
        file.seek(records[name].header_offset)
        header = file.read(30)  # a name and extra bytes of these lengths follow it
        return records[name].header_offset + len(header) + sum(struct.unpack("<HH", header[26:]))

    def content(name: str, size: int) -> bytes:
        file.seek(place(name, size))
        return file.read(size)

    def stored(kind: Inert, key: str, _: str, count: int) -> Storage:
        dtype = STORAGES[kind.name]
        size = count * dtype.itemsize
        return Storage(dtype, part_of(mapped, place(f"{folder}data/{key}", size), size))

    if f"{folder}byteorder" in records and content(f"{folder}byteorder", 3) == b"big":
        raise ValueError("its numbers are big-endian")
    if records[name].file_size > most:
        raise ValueError(f"a pickle of more than {most} bytes")
    return run(io.BytesIO(content(name, records[name].file_size)), allowed, stored)


def check_records(records: list[zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError for what torch.save does not write, and what another program may read otherwise than we."""
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it is a compressed archive; unpack it first")
    if sum(record.file_size for record in records) > size:
        raise ValueError("it claims more bytes than it has")
    names = {record.filename.lower() for record in records}  # PyTorch finds DATA.PKL too
    pickles = [record.filename for record in records if record.filename.lower().endswith("data.pkl")]
    if len(names) < len(records) or len(pickles) != 1 or not pickles[0].endswith("/data.pkl"):
        raise ValueError(f"its pickles are {str(pickles)[:80]}, expected one of the name NAME/data.pkl")


def load_old(file: Sips, mapped: UntypedStorage, allowed: re.Pattern[str], most: int) -> object:
    file.seek(0)
    pickles = io.BytesIO(file.read(most))
    magic, _, machine = (run(pickles, allowed) for _ in range(3))
    if magic != MAGIC or not machine["little_endian"]:
        raise ValueError("it is no file of torch.save, or big-endian")
    content, found = pickles.tell(), {}

    def seen(kind: Inert, key: str, _: str, count: int, view: tuple | None = None) -> Storage:
        found[key] = STORAGES[kind.name], count
        return Storage(STORAGES[kind.name], None)

    # The pickle is run twice: what stands behind it, a list of the storages' keys and then their numbers in this order,
    # has no lengths, and the first time tells them.
    run(pickles, allowed, seen)
    places, start = {}, 0
    for key in run(pickles, allowed):
        dtype, count = found[key]
        places[key] = start + 8, count * dtype.itemsize  # behind the count, which is written once more
        start += 8 + count * dtype.itemsize
    end = pickles.tell()

    def stored(kind: Inert, key: str, _: str, count: int, view: tuple | None = None) -> Storage:
        dtype, (start, size) = STORAGES[kind.name], places[key]
        if view is not None:
            _, offset, count = view
            start, size = start + offset * dtype.itemsize, count * dtype.itemsize
        return Storage(dtype, part_of(mapped, end + start, size))

    pickles.seek(content)
    return run(pickles, allowed, stored)


def part_of(mapped: UntypedStorage, start: int, size: int) -> UntypedStorage:
    if not 0 <= start <= start + size <= len(mapped):
        raise ValueError("more numbers than it has")
    return mapped[start : start + size]


# ---- The machine

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = {  # the instructions that push what stands behind them
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}


def run(pickle: io.BytesIO, allowed: re.Pattern[str], stored: Callable[..., Storage] | None = None) -> object:
    """The value that a pickle describes, and the file is behind it then.

    stored: what a storage's description stands for, as torch.save gives it: kind, key, device, count of numbers, ….
    """
    stack, outer, memo = [], [], {}  # outer: the stacks that are put aside while a tuple or list is filled
    decoded = 0  # bytes of numbers in the pickle itself
    for count, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if count > MAX_INSTRUCTIONS:
            raise ValueError(f"a pickle of more than {MAX_INSTRUCTIONS} instructions")
        name, items = operation.name, ()
        if name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, outer.pop()
        elif name in ("APPEND", "SETITEM", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(1 if name == "APPEND" else 2 if name == "SETITEM" else int(name[-1]))]
            items.reverse()
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                if isinstance(stack[-1], list):  # else it is an Inert, which keeps nothing
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                if isinstance(stack[-1], dict):
                    pairs = zip(items[::2], items[1::2], strict=True)
                    stack[-1].update((key, value) for key, value in pairs if is_key(key))
            case "GLOBAL":
                stack.append(named(argument, allowed))
            case "STACK_GLOBAL":
                module, function = stack.pop(-2), stack.pop()
                stack.append(named(" ".join([module, function]), allowed))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(called(function, arguments))
                decoded += stack[-1].nbytes if function.name.endswith("_from_numpy") else 0
                if decoded > len(pickle.getbuffer()):  # the same numbers, decoded again and again
                    raise ValueError("more numbers than it has")
            case "BUILD":
                state = stack.pop()
                stack[-1] = built(stack[-1], state)
            case "BINPERSID":
                word, kind, key, *more = stack.pop()
                if word != "storage" or not isinstance(key, str) or stored is None:
                    raise ValueError("it refers to what is not in it")
                stack.append(stored(kind, key, *more))
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case _ if name in VALUES:
                stack.append(argument)
            case _:
                raise ValueError(f"its pickle has the instruction {name}, which torch.save does not write")
    raise ValueError("its pickle has no end")


def named(name: str, allowed: re.Pattern[str]) -> Inert:
    if not allowed.fullmatch(name):
        raise UnknownName(name)
    return Inert(name)


def is_key(key: object) -> bool:
    """Texts and small numbers. Others are not asked for, and could be made to take long: deep tuples, equal hashes."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**31)


def called(function: object, arguments: tuple) -> object:
    """The tensor or container that a call of torch.save's stands for; what anything else would do is not done."""
    name = function.name if isinstance(function, Inert) and function.arguments is None else None
    match name:
        case "torch._utils _rebuild_tensor" | "torch._utils _rebuild_tensor_v2":
            return view(*arguments[:4])
        case "torch._utils _rebuild_parameter" | "torch._utils _rebuild_parameter_with_state":
            return arguments[0]
        case "torch._utils _rebuild_device_tensor_from_numpy":
            return from_array(arguments[0])
        case "collections OrderedDict" if not arguments:
            return {}
        case None:
            raise ValueError("it calls what is no function")
    return Inert(name, arguments)


def built(target: object, state: object) -> object:
    """BUILD gives an object its attributes. Of torch.save's only a ParameterDict keeps tensors there."""
    if isinstance(target, Inert):
        target.state = state
        if target.name.endswith(" ParameterDict"):
            return state["_parameters"]
    return target


def view(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor | None:
    if storage.bytes is None:
        return None
    check_whole(offset, *size, *stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage.bytes) // storage.dtype.itemsize:
        raise ValueError("a tensor of more numbers than are there")
    return torch.empty(0, dtype=storage.dtype).set_(storage.bytes, offset, size, stride)


def from_array(array: Inert) -> Tensor:
    """A NumPy array in the pickle itself, as PyTorch 1 wrote tensors of a Mac's GPU."""
    _, shape, dtype, is_fortran, numbers = array.state
    check_whole(*shape)
    if isinstance(numbers, Inert):  # _codecs.encode(text, "latin1"): before protocol 3, pickles had no bytes
        numbers = numbers.arguments[0].encode("latin1")
    kind = dtype.arguments[0]
    if not isinstance(kind, str) or kind not in NUMPY_TYPES:
        raise ValueError("an array of other than numbers")
    dtype = NUMPY_TYPES[kind]
    if is_fortran or 0 in shape or math.prod(shape) * dtype.itemsize != len(numbers):
        raise ValueError("an array of other than its numbers")
    return torch.frombuffer(bytearray(numbers), dtype=dtype).reshape(shape)


def check_whole(*numbers: object) -> None:
    """Numbers, for a list times a number is a long list."""
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError("sizes that are none")
