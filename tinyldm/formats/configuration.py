"""Configurations from strangers: JSON that says how large a network is, every value checked where it is read.

What a value may be is said by the type hint of the argument that takes it, and for numbers and choices by the two
tables here. So nothing is built of a text where a number belongs, or of a number that fills the memory.
"""

from types import NoneType
from typing import TypeVar, get_args, get_origin, get_type_hints

from tinyldm import InputError
from tinyldm.clip import ACTIVATIONS
from tinyldm.sampler import SAMPLERS
from tinyldm.schedule import KINDS, PREDICTIONS

T = TypeVar("T")

LEAST_ENTRIES, MOST_ENTRIES = {str: 0, int: 1, bool: 1}, {str: 100, int: 10, bool: 10}  # of a list
USUAL = {int: (1, 1_000_000), float: (1e-12, 1e6)}  # least and most of a number
LIMITS = {  # of those that have limits of their own
    "layers": (1, 100),
    "num_hidden_layers": (1, 100),  # here and below, what diffusers and transformers call the same
    "skip_last": (0, 99),
    "blocks": (1, 10),
    "layers_per_block": (1, 10),
    "steps": (1, 100_000),
    "num_train_timesteps": (1, 100_000),
    "length": (3, 10_000),  # start, a token, end
    "max_position_embeddings": (3, 10_000),
    "size": (1, 10_000),  # pixels
    "sample_size": (1, 10_000),
}
CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "hidden_act": tuple(ACTIVATIONS),
    "sampler": tuple(SAMPLERS),
    "kind": KINDS,
    "prediction": PREDICTIONS,
    "pad": ("end", "zero"),
}


def build(make: type[T], values: object, where: str = "") -> T:
    """make(**values), for example a UNetConfig; values that are dictionaries are built too, where make says of what.

    where: what the values are called in the file, ending in a point. Raises InputError, which names the field, if one
    is missing, unknown, or not what make takes.
    """
    hints = {name: hint for name, hint in get_type_hints(make.__init__).items() if name != "return"}
    if not isinstance(values, dict):
        raise InputError(f"{where.rstrip('.') or 'it'} is {shown(values)}, expected names and values")
    if missing := [name for name in hints if name not in values]:
        raise InputError(f"{where}{missing[0]} is missing")
    if unknown := [name for name in values if name not in hints]:
        raise InputError(f"{where}{shown(unknown[0])} is unknown, expected {', '.join(hints)}")
    arguments = {}
    for name, hint in hints.items():
        is_plain = get_args(hint) or hint in (int, float, bool, str)
        if is_plain:
            arguments[name] = checked(hint, values[name], f"{where}{name}")
        else:
            arguments[name] = build(hint, values[name], f"{where}{name}.")
    try:
        return make(**arguments)
    except ValueError as error:  # of values that do not go together
        raise InputError(f"{where.rstrip('.')}: {error}") from error


def checked(hint: object, value: object, where: str) -> object:
    """The value as its type hint says, a list as a tuple; InputError if it is something else. where: its name."""
    name = where.rpartition(".")[2]
    if not fits(hint, value, name):
        raise InputError(f"{where} is {shown(value)}, expected {expected(hint, name)}")
    if isinstance(value, list):  # JSON knows no tuples,
        return tuple(value)
    return float(value) if hint is float else value  # and writes 1.0 as 1


def fits(hint: object, value: object, name: str) -> bool:
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        least = LEAST_ENTRIES[parts[0]]
        has_room = isinstance(value, list) and least <= len(value) <= MOST_ENTRIES[parts[0]]
        return has_room and all(fits(parts[0], v, name) for v in value)
    if parts:
        return any(fits(part, value, name) for part in parts)
    if hint in (int, float):
        least, most = LIMITS.get(name, USUAL[hint])
        # Not isinstance, for True is an int; and NaN is in no range.
        return type(value) in (int, hint) and least <= value <= most
    return type(value) is hint and (name not in CHOICES or value in CHOICES[name])


def expected(hint: object, name: str) -> str:
    """What fits, in words."""
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return f"a list of {LEAST_ENTRIES[parts[0]]} to {MOST_ENTRIES[parts[0]]}, each {expected(parts[0], name)}"
    if parts:
        return " or ".join(expected(part, name) for part in parts)
    if hint in (int, float):
        least, most = LIMITS.get(name, USUAL[hint])
        return f"a {'whole ' * (hint is int)}number from {least} to {most}"
    if name in CHOICES:
        return f"one of {', '.join(CHOICES[name])}"
    return {bool: "true or false", NoneType: "null", str: "a text"}[hint]


def shown(value: object) -> str:
    """A value of any size and depth in a few characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of a whole number of more digits than Python writes, of lists in lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:59]}…"
