"""Files from strangers as named tensors: safetensors, PyTorch's pickles, or several of either as one.

It serves checkpoints, CLIP and embeddings alike; `Limits` says what each of them may hold. Opening a file reads what
is in it, its names, shapes and dtypes. A tensor's numbers stay on disk, mapped into memory, until `read` asks for them.
Nothing in a file is ever executed, and no size is believed that the file has no bytes for.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyldm import InputError
from tinyldm.files import check_is_file, read_bytes
from tinyldm.formats import pickles
from tinyldm.formats.recognise import what_else

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # and PyTorch's names
COPY_AGAIN = "if it is cut off, copy it again"
# What downloads leave in place of a file: how it begins; what it is, and what to do.
DOWNLOADS = {
    rb"\Z": "empty; copy it again",
    rb"version https://git-lfs": "a pointer of git-lfs and not yet the file; fetch that with: git lfs pull",
    rb"\s*(<!doctype|<html|<\?xml|<head)": "a web page; the download went wrong, perhaps it needs a login",
    rb'\s*[{\[]\s*["{\[\]}][^\0]{6}': "JSON, perhaps a server's error message; look what it says, download again",
    rb"(invalid username|entry not found|access to model|unauthorized|forbidden|not found)": (
        "a server's error message; the download went wrong, perhaps it needs a login"
    ),
    rb"GGUF": "a GGUF file, which is quantised; get the .safetensors of this model",
}
# What a pickle of tensors names: as names, for pickles.py calls none of them.
TENSOR_NAMES = (
    r"collections OrderedDict|(__builtin__|builtins) set|torch (\w+Storage|b?float\d+)|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state|device_tensor_from_numpy)"
    r"|numpy\._?core\.multiarray (scalar|_reconstruct)|numpy (dtype|ndarray)|_codecs encode"
)
# And beside them the rest of a training run: the settings and counters of its optimiser.
TRAINING_NAMES = (
    r"torch (Size|device|bool|u?int\d+)|collections (defaultdict|Counter)|(__builtin__|builtins) dict"
    r"|pytorch_lightning\.callbacks\.model_checkpoint ModelCheckpoint"
)


class Limits(NamedTuple):
    """What a kind of file may hold."""

    max_description: int  # bytes of a safetensors header or a pickle. Parsed, they take many times more
    allowed_names: re.Pattern[str]  # the functions and classes that a pickle may name, "module name"
    advice: str  # to someone whose pickle names more


WEIGHTS = Limits(
    max_description=3_000_000,  # Stable Diffusion's names and shapes take 150 kB, training tools add notes
    allowed_names=re.compile(f"{TENSOR_NAMES}|{TRAINING_NAMES}"),
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
    neither = f"neither a safetensors nor a PyTorch file; expected a file of weights, {COPY_AGAIN}"
    raise InputError(f"{path} is {what_instead(path) or neither}")


def container(path: Path) -> str:
    """What a file is, told by its content: "safetensors", "PyTorch", "image" or "unknown".

    Files get renamed, and a pickle that is called .safetensors must not be mistaken for a safe one.
    """
    start = beginning(path)
    if start[8:9] == b"{" and not what_instead(path):  # a length in 8 bytes, then JSON
        return "safetensors"
    if start.startswith((b"PK", b"\x80")):  # torch.save: a zip; before PyTorch 1.6 a bare pickle
        return "PyTorch"
    if start.startswith(b"\x89PNG") or (start[:4], start[8:12]) == (b"RIFF", b"WEBP"):
        return "image"
    return "unknown"


def beginning(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); expected a file of weights") from error


def what_instead(path: Path) -> str | None:
    """What a file is that is none of the containers, and what to do; None if nobody knows."""
    start = beginning(path)
    return next((what for pattern, what in DOWNLOADS.items() if re.match(pattern, start, re.IGNORECASE)), None)


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
        if isinstance(content, dict) and (found := what_else(content)):
            raise InputError(f"{path} is {found[0].what}; {found[0].for_weights}")
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
        return pickles.load(path, limits.allowed_names, limits.max_description)
    except pickles.UnknownName as error:
        raise InputError(f"{path} {why_not_named(str(error).replace(' ', '.'), limits)}") from error
    except Exception as error:  # the parsers have a dozen types for a broken file; a KeyError's text is only the key
        why = first_sentence(error) if isinstance(error, (ValueError, OSError)) else "it is broken"
        raise InputError(f"{path} can't be read as a PyTorch file ({why}); {COPY_AGAIN}") from error


def why_not_named(name: str, limits: Limits) -> str:
    if name.endswith(".ParameterDict"):
        return "holds a ParameterDict, as the paper's embeddings.pt does; give a learned embedding as --embedding"
    if name.endswith("_rebuild_tensor_v3"):
        return "holds numbers of a kind that only new versions of PyTorch have, such as fp8; get the fp16 of it"
    printable = re.sub(r"[^\w.]", "?", name)[:100]
    why = "no part of plain tensors: loading it could run code, so it was not loaded"
    return f"names {printable}, {why}; {limits.advice}"


def first_sentence(error: Exception) -> str:
    """What a parser says of a broken file, which can be whole paragraphs."""
    message = str(error).strip() or "it is broken"
    printable = "".join(character if character.isprintable() else " " for character in message)
    return textwrap.shorten(printable.split(". ")[0], 150, placeholder="…")


# ---- Several files


def open_shards(index: Path) -> WeightsFile:
    """The files that a diffusers or transformers `*.index.json` lists, as one."""
    try:
        names = sorted(set(json.loads(read_bytes(index, WEIGHTS.max_description))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is no list of shards ({str(error)[:100]!r}); copy it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(".json"):  # "../../elsewhere", itself
            raise InputError(f"{index} lists {str(name)[:100]!r}, expected files of weights beside it; copy it again")
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
