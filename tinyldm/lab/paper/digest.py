"""Which cells still hold: a digest of all that a cell's figures depend on, of its recipe's code above all."""

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from functools import cache, partial
from types import CodeType

from tinyldm.lab.paper.concepts import Concept
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.recipes import composed


def digest_of(*parts: object) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---- Of a recipe


def definition(names: str) -> dict[str, str]:
    """What a composed recipe does: its fields, and the code of their functions and classes.

    With all that these use of their own file, not of others: the model and its errors do not belong to a recipe.
    """
    found: dict[str, str] = {}
    recipe = composed(names)
    fields = {field: described(getattr(recipe, field), found) for field in recipe.__dataclass_fields__}
    return found | fields


def described(value: object, found: dict[str, str]) -> str:
    """The value in words that stay the same from run to run; the code behind it is added to `found`."""
    if isinstance(value, partial):
        return f"{described(value.func, found)} with {value.keywords}"
    if not inspect.isfunction(value) and not inspect.isclass(value):
        return repr(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if value.__module__.startswith("tinyldm.") and name not in found:
        found[name] = code_of(value)
        for used in names_in(value):
            needed = vars(sys.modules[value.__module__]).get(used)
            if isinstance(needed, str | int | float | tuple) and not used.startswith("_"):
                found[f"{value.__module__}.{used}"] = repr(needed)
            elif getattr(needed, "__module__", None) == value.__module__:
                described(needed, found)
    return name


@cache
def code_of(value: object) -> str:
    """Its source, whose comments and docstrings may change."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def names_in(value: object) -> Iterator[str]:
    """Of all that a function or a class uses."""
    if inspect.isclass(value):
        yield from (base.__name__ for base in value.__bases__)
        members = [inspect.unwrap(member) for member in vars(value).values() if inspect.isroutine(member)]
    else:
        members = [inspect.unwrap(value)]
    for member in members:
        yield from names_in_code(getattr(member, "__code__", None))


def names_in_code(code: CodeType | None) -> Iterator[str]:
    if code:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):  # a lambda's, a comprehension's
                yield from names_in_code(constant)


# ---- Of the rest


def weights_digest(model: LatentDiffusion) -> str:
    """Of all numbers of its networks and its merges. The defaults that a checkpoint's file holds may change."""
    digest = hashlib.sha256(json.dumps(model.tokenizer.merges).encode())
    for network in model.networks():
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def concept_digest(concept: Concept) -> str:
    """Of its pictures, and of what is asked about it and of it."""
    pixels = b"".join(image.tobytes() for image in concept.images())
    questions = [[question.prompt, *question.checks] for question in concept.questions("S*")]
    asked = [questions, concept.prompts, concept.reconstruction]
    return digest_of(hashlib.sha256(pixels).hexdigest(), asked, concept.plain, concept.captions("S*"))
