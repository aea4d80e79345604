"""A pretend device: its tensors say that they lie elsewhere, on "meta", and hold their numbers on the CPU.

    with PretendDevice() as device:
        model.to("meta")
        ...
    assert device.waits == 0

No operation may take tensors from both sides, but for copies and for CPU tensors of a single number that are not
changed or put beside others. A GPU is as strict, but that it takes indices from the CPU, for the price of a copy.
Counted is how often numbers come back to the host, for which a GPU would be waited for; copies the other way are not.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
THERE = torch.device("meta")
COPIES = (aten._to_copy.default, aten.copy_.default)
SIDE_BY_SIDE = (aten.cat.default, aten.stack.default)
# What comes of these is told to the host, or how large it is.
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.allclose.default, aten.nonzero.default)


def is_in_place(function: torch._ops.OpOverload) -> bool:
    """Whether its first tensor is changed."""
    return function._overloadpacket.__name__.endswith("_")


def is_by_mask(function: torch._ops.OpOverload, tensors: list[Tensor]) -> bool:
    """Whether it takes those numbers out that a mask has."""
    return function in (aten.index.Tensor, aten.masked_select.default) and any(x.dtype == torch.bool for x in tensors)


def each(change: Callable[[Tensor], object], x: object) -> object:
    """x with its tensors changed, those in lists too. PyTorch's tree_map does as much, five times slower."""
    if isinstance(x, list | tuple):
        return type(x)(each(change, part) for part in x)
    return change(x) if isinstance(x, Tensor) else x


class PretendTensor(Tensor):
    held: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=THERE, **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise RuntimeError(f"{function}: a tensor of the pretend device is used outside of it")

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"


class OfNumbers(TorchFunctionMode):
    """Lists of numbers become tensors here, which are copied there, and the other way round; for "meta" and tensors of
    strange classes PyTorch leaves that out."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        device = keywords.pop("device", None) if function is torch.tensor else None
        if function is Tensor.tolist:
            return arguments[0].cpu().tolist()
        result = function(*arguments, **keywords)
        return result if device is None else result.to(device)


class PretendDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.of_numbers = OfNumbers()
        self.waits = 0  # how often numbers were brought to the host

    def __enter__(self) -> "PretendDevice":
        self.of_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.of_numbers.__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, tensors = dict(keywords or {}), []
        each(tensors.append, [*arguments, *keywords.values()])
        there = [x for x in tensors if isinstance(x, PretendTensor)]
        here = [x for x in tensors if not isinstance(x, PretendTensor) and (x.dim() or function in SIDE_BY_SIDE)]
        if is_in_place(function) and not isinstance(tensors[0], PretendTensor):
            here.append(tensors[0])
        if there and here and function not in COPIES:
            raise RuntimeError(f"{function}: tensors of {[*here[0].shape]} on the CPU, {[*there[0].shape]} elsewhere")
        goes_there = keywords.get("device", THERE if there else None) == THERE
        if function is aten.copy_.default:
            goes_there = isinstance(arguments[0], PretendTensor)
        if there and (not goes_there or function in READS or is_by_mask(function, there)):
            self.waits += 1
        if goes_there and "device" in keywords:
            keywords["device"] = "cpu"
        arguments = each(lambda x: getattr(x, "held", x), arguments)
        keywords = {name: each(lambda x: getattr(x, "held", x), value) for name, value in keywords.items()}
        result = function(*arguments, **keywords)
        if not goes_there:
            return result
        changed = {id(x.held): x for x in there}  # in place: the same tensor comes back
        return each(lambda x: changed[id(x)] if id(x) in changed else PretendTensor(x), result)
