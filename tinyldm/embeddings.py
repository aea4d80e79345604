"""Learned embeddings on disk: a token and its few vectors, some kilobytes that anyone can pass on.

What is written is what diffusers writes, a safetensors file {token: (vectors, width)}. When reading, the file's first
bytes tell its format, not its name, since files get renamed. A new container goes into _read, a new layout beside it.
"""

import io
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from . import InputError
from .files import write_atomically

# CLIP reads 77 tokens, two of them start and end: more vectors than this fit into no prompt.
MAX_VECTORS = 75
# A .bin that diffusers wrote after training on a CPU drags the whole table of words along, 202 MB in SD 2.x.
MAX_BYTES = 256 * 2**20
FAMILIES = {768: " (SD 1.x)", 1024: " (SD 2.x)"}


def save_embeddings(path: str | Path, embeddings: dict[str, Tensor]) -> None:
    """Write {token: (vectors, width)} in float32, all of it or nothing. Raises InputError as load_embeddings would."""
    if "__metadata__" in embeddings:
        raise InputError('the token "__metadata__" has a meaning of its own in safetensors files; choose another')
    content = safetensors.torch.save(_checked(path, embeddings, None), metadata={"format": "pt"})
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)


def load_embeddings(
    path: str | Path,
    width: int | None = None,  # of the text encoder that will take them; None: any
) -> dict[str, Tensor]:
    """Read {token: (vectors, width) float32} from safetensors or from diffusers' .bin; a vector (width,) counts as one.

    Raises InputError if the file is missing, broken, something else than an embedding, or of another width.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an embedding file: try {path / 'embedding.safetensors'}")
    if not path.is_file():
        raise InputError(f"no such file: {path}; give an embedding file, as train.py writes it")
    if (size := path.stat().st_size) > MAX_BYTES:
        found = f"has {size / 1e6:.0f} MB, an embedding only kilobytes"
        raise InputError(f"{path} {found}: if it is a checkpoint, give it as --weights")
    return _checked(path, _read(path), width)


def _read(path: Path) -> object:
    """What the file holds, whatever that is; of a pickle only plain tensors and containers, never code."""
    content = path.read_bytes()
    try:
        if content[8:9] == b"{":  # a length in 8 bytes, then JSON
            return dict(sorted(safetensors.torch.load(content).items()))  # its order changes from call to call
        if content.startswith((b"PK", b"\x80")):  # torch.save: a zip, before PyTorch 1.6 a bare pickle
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # each of the two parsers has a dozen types for a broken file
        # The parsers' messages can be whole paragraphs; their first sentence says it.
        why = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InputError(f"{path} can't be read as plain tensors ({why}): if it is cut off, copy it again") from error
    found = "neither a safetensors nor a PyTorch file" if content else "empty"
    raise InputError(f"{path} is {found}: expected an embedding file, as train.py or diffusers write it")


def _checked(path: str | Path, content: object, width: int | None) -> dict[str, Tensor]:
    """The same embeddings as (vectors, width) float32, each in memory of its own; InputError if they can't be ones."""
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no embedding: expected {{token: (vectors, width)}}, as train.py writes it")
    embeddings = {}
    for token, tensor in content.items():
        if not isinstance(token, str) or not isinstance(tensor, Tensor):
            found = f"{type(token).__name__} -> {type(tensor).__name__}"
            raise InputError(f"{path} is not an embedding: found {found}, expected token -> tensor (vectors, width)")
        rows = tensor[None] if tensor.ndim == 1 else tensor
        name, shape = f"{path}: {token!r}", tuple(tensor.shape)
        if rows.ndim != 2 or not 1 <= rows.shape[0] <= MAX_VECTORS or rows.shape[1] == 0:
            expected = f"expected (1 to {MAX_VECTORS} vectors, width)"
            raise InputError(f"{name} has shape {shape}, {expected}: if it is a checkpoint, give it as --weights")
        if not tensor.is_floating_point():
            raise InputError(f"{name} holds {tensor.dtype}, expected floating-point numbers: this is not an embedding")
        if width and rows.shape[1] != width:
            found, wanted = (f"{n}{FAMILIES.get(n, '')}" for n in (rows.shape[1], width))
            advice = "choose the --weights it was learned on, or learn it again on these with train.py"
            raise InputError(f"{name} has width {found}, this model's text encoder takes {wanted}: {advice}")
        # A copy, because a view would keep (and save) the whole table that it may be a row of.
        embeddings[token] = rows.detach().cpu().float().clone(memory_format=torch.contiguous_format)
        if not embeddings[token].isfinite().all():
            raise InputError(f"{name} holds NaN or infinite values: its training failed; train again, at a lower --lr")
    if len(widths := {vectors.shape[1] for vectors in embeddings.values()}) > 1:
        raise InputError(
            f"{path} holds vectors of widths {sorted(widths)}, expected one: it is for no single text encoder"
        )
    return embeddings
