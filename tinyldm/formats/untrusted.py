"""Weights on disk as named tensors, whatever holds them: safetensors, a PyTorch pickle, or either in several shards.

Opening a file reads what is in it, its names, shapes and dtypes; a tensor's numbers stay on disk, mapped into memory,
until `read` asks for them. Nothing in a file is ever executed: a pickle may name tensors and plain containers only.
"""

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from tinyldm import InputError

# Stable Diffusion's names and shapes take 150 kB, training tools add notes. Parsed, a header takes many times more.
MAX_HEADER_BYTES = 10_000_000
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and PyTorch's
LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
ZIP = b"PK\x03\x04"
COPY_AGAIN = "if it is cut off, copy it again"
# What a pickle of tensors names. weights_only=True passes more, such as bytearray(10**11), which fills the memory.
PLAIN = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) set|torch \w+Storage|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
)
# And beside them the rest of a training run: the settings and counters of its optimizer.
TRAINING = re.compile(
    rf"torch (Size|device|bool|b?float\d+|u?int\d+)|collections (defaultdict|Counter)|(__builtin__|builtins) dict"
    rf"|{re.escape(LIGHTNING_CALLBACK.replace('.ModelCheckpoint', ' ModelCheckpoint'))}"
)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of one file, or of several that belong together."""

    paths: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # "float32", "bfloat16", …
    metadata: dict[str, str]  # what the file says of itself
    read: Callable[[str], torch.Tensor]  # name -> tensor, mapped from the file


class LightningCallback:
    """Stands in for the training tool's class that the original 1.4 file names; it holds nothing and does nothing."""


def open_weights(path: Path) -> WeightsFile:
    """Raises InputError if the file is missing, broken, or names anything but tensors and plain containers."""
    if path.suffix == ".json":
        return open_shards(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); expected a file of weights") from error
    # By content, not by name: files get renamed, and a pickle called .safetensors must not be mistaken for a safe one.
    if start[8:9] == b"{":
        return open_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return open_pickle(path)
    found = "neither a safetensors nor a PyTorch file" if start else "empty"
    raise InputError(f"{path} is {found}; expected a file of weights, {COPY_AGAIN}")


def open_safetensors(path: Path) -> WeightsFile:
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(MAX_HEADER_BYTES, path.stat().st_size):
        raise InputError(
            f"{path} claims a header of {header} bytes, expected at most {MAX_HEADER_BYTES} and no more than the file "
            f"has: this is no checkpoint, or {COPY_AGAIN}"
        )
    try:
        file = safe_open(path, "pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file ({error}); {COPY_AGAIN}") from error
    return WeightsFile(
        paths=(path,),
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        dtypes={name: DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()},
        metadata=file.metadata() or {},
        read=file.get_tensor,
    )


def open_pickle(path: Path) -> WeightsFile:
    content = load_pickle(path)
    content = content if isinstance(content, dict) else {}
    notes = {str(name): str(value) for name, value in content.items() if isinstance(value, (int, float, str))}
    content = content.get("state_dict", content)  # Lightning wraps the weights, beside its optimizer's
    tensors = plain_tensors(content)
    if not tensors and isinstance(content, dict):
        groups = {name: plain_tensors(items) for name, items in content.items()}
        tensors = {f"{group}.{name}": tensor for group, items in groups.items() for name, tensor in items.items()}
    if not tensors:
        advice = "expected a checkpoint: names and weights; if it is a learned embedding, give it as --embedding"
        raise InputError(f"{path} holds no named tensors; {advice}")
    # Tensors may be views of one another: a small file could unfold into any number of them.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > path.stat().st_size:
        raise InputError(f"{path} claims more numbers than it has; expected a checkpoint, get it from its source again")
    return WeightsFile(
        paths=(path,),
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        metadata=notes,
        read=lambda name: tensors[name].detach(),
    )


def plain_tensors(items: object) -> dict[str, torch.Tensor]:
    """The tensors of a dictionary that have all their numbers; a pickle can describe others."""
    return {
        name: value
        for name, value in (items.items() if isinstance(items, dict) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
        if value.device.type == "cpu" and value.layout == torch.strided
    }


def load_pickle(path: Path) -> object:
    """What a file of torch.save holds, its tensors mapped; what would have to be executed is refused by name."""
    if path.suffix == ".safetensors":  # PyTorch goes by the name, and so would whoever gets the file next
        raise InputError(f"{path} is a PyTorch pickle, not what its name says; rename it to {path.stem}.ckpt")
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            check_zip(path)
        with open(path, "rb") as file:
            for name in pickled_names(file):
                if not (PLAIN.fullmatch(name) or TRAINING.fullmatch(name)):
                    raise InputError(f"{path} {why_not('GLOBAL ' + name.replace(' ', '.'))}")
        stand_ins = [(LightningCallback, LIGHTNING_CALLBACK)]
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    except Exception as error:  # the two parsers have a dozen types for a broken file
        raise InputError(f"{path} {why_not(str(error) or type(error).__name__)}") from error


def check_zip(path: Path) -> None:
    """Raises InputError for what can be a small file that fills the memory: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path} is a compressed archive, expected a file of torch.save; unpack it first")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path} claims more bytes than it has; {COPY_AGAIN}")


def pickled_names(file: BinaryIO, most: int = MAX_HEADER_BYTES) -> Iterator[str]:
    """The functions and classes that a file of torch.save names, as "module name", without executing any of it.

    most: bytes of a pickle; ValueError if one is longer.
    """
    file.seek(0)
    if file.read(4) == ZIP:  # as PyTorch tells them, for a file can be both
        archive = zipfile.ZipFile(file)
        for record in archive.namelist():
            if record.endswith("data.pkl"):
                with archive.open(record) as pickle:
                    yield from names_in(pickle, most)
    else:
        file.seek(0)
        for _ in range(5):  # a magic number, a version, the machine, the content, the storages' names; then numbers
            yield from names_in(file, most)


def names_in(pickle: BinaryIO, most: int) -> Iterator[str]:
    start, strings = pickle.tell(), ["", ""]
    for operation, argument, position in pickletools.genops(pickle):
        if position - start > most:
            raise ValueError(f"a pickle of more than {most} bytes")
        if isinstance(argument, str):
            strings = [strings[1], argument]
        # The three ways to name a function or class; the last takes the two strings before it.
        named = {"GLOBAL": argument, "INST": argument, "STACK_GLOBAL": " ".join(strings)}.get(operation.name)
        if named:
            yield named


def why_not(message: str) -> str:
    """PyTorch's paragraphs on a pickle that it did not load, as half a line."""
    if match := re.search(r"GLOBAL ([\w.]+)", message):
        if match[1].endswith(".ParameterDict"):
            return "holds a ParameterDict, as the paper's embeddings.pt does; give a learned embedding as --embedding"
        return (
            f"names {match[1]}, no part of plain tensors: loading it could run code, so it was not loaded; "
            "get the .safetensors of this checkpoint"
        )
    reason = message.rpartition("WeightsUnpickler error: ")[2].strip() or "its pickle is broken"
    return f"can't be read as a PyTorch file ({reason.splitlines()[0].split('. ')[0]}); {COPY_AGAIN}"


def open_shards(index: Path) -> WeightsFile:
    """The files that a diffusers or transformers `*.index.json` lists, as one."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no list of shards ({error!r}); copy it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(".json"):  # "../../elsewhere", itself
            raise InputError(f"{index} lists {name!r}, expected files of weights beside it; copy it again")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing, though {index.name} lists it; download it again")
    return joined(open_weights(index.parent / name) for name in names)


def joined(files: Iterable[WeightsFile]) -> WeightsFile:
    files = list(files)
    owner = {name: file for file in files for name in file.shapes}
    return WeightsFile(
        paths=tuple(path for file in files for path in file.paths),
        shapes={name: file.shapes[name] for name, file in owner.items()},
        dtypes={name: file.dtypes[name] for name, file in owner.items()},
        metadata={},
        read=lambda name: owner[name].read(name),
    )
