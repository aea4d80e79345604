"""Files from strangers as named tensors: safetensors, PyTorch's pickles, or several of either as one.

It serves checkpoints, CLIP and embeddings alike; `Limits` says what each of them may hold. Opening a file reads what
is in it, its names, shapes and dtypes. A tensor's numbers stay on disk, mapped into memory, until `read` asks for them.
Nothing in a file is ever executed, and no size is believed that the file has no bytes for.
"""

import json
import pickletools
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyldm import InputError
from tinyldm.files import check_is_file

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # and PyTorch's names
ZIP = b"PK\x03\x04"
COPY_AGAIN = "if it is cut off, copy it again"
# What a pickle of tensors names. weights_only=True passes more, such as bytearray(10**11), which fills the memory.
TENSOR_NAMES = (
    r"collections OrderedDict|(__builtin__|builtins) set|torch \w+Storage|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
)
# And beside them the rest of a training run: the settings and counters of its optimiser.
TRAINING_NAMES = (
    r"torch (Size|device|bool|b?float\d+|u?int\d+)|collections (defaultdict|Counter)|(__builtin__|builtins) dict"
    r"|pytorch_lightning\.callbacks\.model_checkpoint ModelCheckpoint"
)


class LightningCallback:
    """Stands in for the training tool's class that the original 1.4 file names; it holds nothing and does nothing."""


class Limits(NamedTuple):
    """What a kind of file may hold."""

    max_description: int  # bytes of a safetensors header or a pickle. Parsed, they take many times more
    allowed_names: re.Pattern[str]  # the functions and classes that a pickle may name, "module name"
    classes: list  # what stands for them, as torch.serialization.safe_globals takes it, where PyTorch would refuse them
    advice: str  # to someone whose pickle names more


WEIGHTS = Limits(
    max_description=10_000_000,  # Stable Diffusion's names and shapes take 150 kB, training tools add notes
    allowed_names=re.compile(f"{TENSOR_NAMES}|{TRAINING_NAMES}"),
    classes=[(LightningCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")],
    advice="get the .safetensors of this checkpoint",
)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of one file, or of several that belong together."""

    paths: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # "float32", "bfloat16", …
    metadata: dict[str, str]  # what the file says of itself
    read: Callable[[str], Tensor]  # name -> tensor, mapped from the file


def open_weights(path: Path) -> WeightsFile:
    """Raises InputError if the file is missing, broken, or names anything but tensors and plain containers."""
    check_is_file(path)
    if path.suffix == ".json":
        return open_shards(path)
    found = container(path)
    if found == "safetensors":
        return open_safetensors(path, WEIGHTS)
    if found == "PyTorch":
        return open_pickle(path)
    what = "empty" if found == "empty" else "neither a safetensors nor a PyTorch file"
    raise InputError(f"{path} is {what}; expected a file of weights, {COPY_AGAIN}")


def container(path: Path) -> str:
    """What a file is, told by its content: "safetensors", "PyTorch", "PNG", "empty" or "unknown".

    Files get renamed, and a pickle that is called .safetensors must not be mistaken for a safe one.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); expected a file of weights") from error
    if start[8:9] == b"{":  # a length in 8 bytes, then JSON
        return "safetensors"
    if start.startswith((b"PK", b"\x80")):  # torch.save: a zip; before PyTorch 1.6 a bare pickle
        return "PyTorch"
    if start.startswith(b"\x89PNG"):
        return "PNG"
    return "unknown" if start else "empty"


# ---- safetensors


def open_safetensors(path: Path, limits: Limits) -> WeightsFile:
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(limits.max_description, path.stat().st_size):
        expected = f"expected at most {limits.max_description} and no more than the file has"
        raise InputError(f"{path} claims a header of {header} bytes, {expected}: it is another kind of file, or broken")
    with naming(path):
        file = safe_open(path, "pt")  # its parser checks that the tensors cover the file's bytes, each byte once
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary

    def read(name: str) -> Tensor:
        with naming(path):
            return file.get_tensor(name)

    return WeightsFile(
        paths=(path,),
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        dtypes={name: SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()},
        metadata=file.metadata() or {},
        read=read,
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the parser of safetensors can't read is an error that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file ({first_sentence(error)}); {COPY_AGAIN}") from error


# ---- Pickles


def open_pickle(path: Path) -> WeightsFile:
    if path.suffix == ".safetensors":  # PyTorch goes by the name, and so would whoever gets the file next
        raise InputError(f"{path} is a PyTorch pickle, not what its name says; rename it to {path.stem}.ckpt")
    content = load_pickle(path, WEIGHTS)
    content = content if isinstance(content, dict) else {}
    notes = {str(name): str(value) for name, value in content.items() if isinstance(value, (int, float, str))}
    content = content.get("state_dict", content)  # Lightning wraps the weights, beside its optimiser's
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


def plain_tensors(items: object) -> dict[str, Tensor]:
    """The tensors of a dictionary that have all their numbers; a pickle can describe others."""
    return {
        name: value
        for name, value in (items.items() if isinstance(items, dict) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
        if value.device.type == "cpu" and value.layout == torch.strided
    }


def load_pickle(path: Path, limits: Limits) -> object:
    """What a file of torch.save holds, its tensors mapped; what would have to be executed is refused by name."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == ZIP  # as PyTorch tells them, for a file can be both
            if is_zip:
                check_zip(path)
            for name in pickled_names(file, is_zip, limits.max_description):
                if not limits.allowed_names.fullmatch(name):
                    raise InputError(f"{path} {why_not_named(name.replace(' ', '.'), limits)}")
            file.seek(0)
            mapped = is_zip and path.suffix != ".safetensors"  # by its name PyTorch would take it for one
            with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(limits.classes):
                return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError:
        raise
    except Exception as error:  # the two parsers have a dozen types for a broken file
        # PyTorch's paragraphs on a pickle that it did not load, as half a line.
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{path} {why_not_named(match[1], limits)}") from error
        raise InputError(f"{path} can't be read as a PyTorch file ({first_sentence(error)}); {COPY_AGAIN}") from error


def check_zip(path: Path) -> None:
    """Raises InputError for what can be a small file that fills the memory: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path} is a compressed archive, expected a file of torch.save; unpack it first")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path} claims more bytes than it has; {COPY_AGAIN}")


def pickled_names(file: BinaryIO, is_zip: bool, most: int) -> Iterator[str]:
    """The functions and classes that a file of torch.save names, as "module name", without executing any of it.

    most: bytes of a pickle; ValueError if one is longer.
    """
    file.seek(0)
    if is_zip:
        archive = zipfile.ZipFile(file)
        for record in archive.infolist():  # not by name: two records can have one
            if record.filename.lower().endswith("data.pkl"):
                with archive.open(record) as pickle:
                    yield from names_in(pickle, most)
    else:
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


def why_not_named(name: str, limits: Limits) -> str:
    if name.endswith(".ParameterDict"):
        return "holds a ParameterDict, as the paper's embeddings.pt does; give a learned embedding as --embedding"
    printable = re.sub(r"[^\w.]", "?", name)[:100]
    why = "no part of plain tensors: loading it could run code, so it was not loaded"
    return f"names {printable}, {why}; {limits.advice}"


def first_sentence(error: Exception) -> str:
    """What a parser says of a broken file, which can be whole paragraphs."""
    message = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or "it is broken"
    printable = "".join(character if character.isprintable() else " " for character in message)
    return textwrap.shorten(printable.split(". ")[0], 150, placeholder="…")


# ---- Several files


def open_shards(index: Path) -> WeightsFile:
    """The files that a diffusers or transformers `*.index.json` lists, as one."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


# ---- Configurations

# Larger numbers than anybody's model has, in a file that was made to keep the computer busy.
LARGEST = {
    "layers": 100,
    "blocks": 100,
    "layers_per_block": 100,
    "num_hidden_layers": 100,
    "steps": 100_000,
    "num_train_timesteps": 100_000,
}


def check_sizes(path: Path, config: dict[str, object]) -> None:
    """Raises InputError if a number or a list of the configuration is too large to build a network of."""
    for name, value in config.items():
        most = LARGEST.get(name)
        if most and not (isinstance(value, int) and 0 < value <= most):
            raise InputError(f"{path}: {name} is {str(value)[:40]}, expected 1 to {most}; copy it again")
        if isinstance(value, list) and len(value) > 100:
            raise InputError(f"{path}: {name} has {len(value)} entries, expected at most 100; copy it again")
