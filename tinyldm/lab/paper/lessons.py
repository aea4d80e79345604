"""The recipes that are compared, and learning one word in one of them.

A recipe is what train.py's --recipe takes, with further options of train.py behind it if there are any: "falling", or
"falling,low-variance --steps 60". All have the options of PROTOCOL besides, but for "default", which is train.py
without any.
"""

import importlib
import shlex
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from tinyldm import InputError
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.inversion import TEMPLATES
from tinyldm.lab.measure.learning import UNSEEN, train_script
from tinyldm.lab.paper.concepts import Concept
from tinyldm.lab.paper.digest import code_of, definition
from tinyldm.latent_diffusion import Defaults
from tinyldm.recipes import RECIPES

TOKEN = "S*"
PROTOCOL = ("--steps", "150", "--batch", "16", "--lr", "0.01")
PAPER, DEFAULT = "paper", "default"
COMPOSITIONS = ("auto-start,low-variance,falling", "fixed-norm,falling,low-variance", "low-variance,falling")
COMPARED = (*RECIPES, DEFAULT, *COMPOSITIONS)
SEEDS = 3  # to learn each word with
SAVES = 10  # of the vectors while they are learned


@cache
def train() -> ModuleType:
    """train.py itself."""
    sys.path.append(str(train_script().parent))
    return importlib.import_module("train")


def names_of(recipe: str) -> str:
    """Those of its recipes, with commas between them. Raises InputError if the recipe is no words of a shell."""
    return split(recipe)[0]


def split(recipe: str) -> list[str]:
    try:
        words = shlex.split(recipe)
    except ValueError:
        words = []
    if not words:
        raise InputError(f'{recipe!r} is no recipe, expected such as "paper" or "falling,low-variance --steps 60"')
    return words


def options_of(recipe: str) -> list[str]:
    """All of train.py that a recipe says."""
    names, *more = split(recipe)
    return more if names == DEFAULT else ["--recipe", names, *PROTOCOL, *more]


def settings(recipe: str, subject: str, defaults: Defaults) -> dict[str, object]:
    """What a word is learned with, in full, with the code of its recipe; subject: "object" or "style".

    Raises InputError as train.py does, and for a recipe that there is not.
    """
    command = ["--images", ".", "--token", TOKEN, "--property", subject, *options_of(recipe)]
    options = train().parse_options(command)
    train().fill_in_defaults(options, defaults)
    names = ("recipe", "init", "vectors", "property", "steps", "batch", "lr", "size", "dtype")
    chosen = {name: getattr(options, name) for name in names}
    templates = {"templates": TEMPLATES[subject], "but those that say": defaults.taken_literally}
    loss = {"the loss": [code_of(train().inversion_loss), code_of(train().squared_error)]}
    return chosen | templates | loss | {"the recipe means": definition(options.recipe)}


class Learned(NamedTuple):
    steps: dict[int, Tensor]  # how many are done -> the vectors, (count, width); the last ones are the word
    times: dict[int, float]  # the same -> seconds of one core since train.py began
    seconds: float  # in all


def learn(recipe: str, concept: Concept, seed: int, weights: Path, scratch: Path, defaults: Defaults) -> Learned:
    """What train.py learns in this process, in a folder of its own in `scratch`.

    Raises KeyboardInterrupt if a signal stopped it.
    """
    steps = settings(recipe, concept.subject, defaults)["steps"]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        pictures, out = Path(folder) / "pictures", Path(folder) / "word"
        write_pictures(concept, pictures, with_captions="captions" in names_of(recipe).split(","))
        command = [*options_of(recipe), "--images", pictures, "--token", TOKEN, "--property", concept.subject, *UNSEEN]
        command += ["--weights", weights, "--device", "cpu", "--seed", seed, "--out", out]
        command += ["--save-every", max(1, steps // SAVES)]
        clock, computed = time.time(), time.process_time()
        if status := train().main([str(word) for word in command]):
            raise KeyboardInterrupt(status - 128)
        took, seconds = time.time() - clock, time.process_time() - computed
        files = {int(file.stem.split("-")[1]): file for file in sorted(out.glob("embedding-*.safetensors"))}
        return Learned(
            {done: load_embeddings(file)[TOKEN] for done, file in files.items()},
            {done: seconds * (file.stat().st_mtime - clock) / took for done, file in files.items()},
            seconds,
        )


def write_pictures(concept: Concept, folder: Path, with_captions: bool) -> None:
    folder.mkdir()
    for i, (image, caption) in enumerate(zip(concept.images(), concept.captions(TOKEN), strict=True)):
        image.save(folder / f"{i}.png")
        if with_captions:
            (folder / f"{i}.txt").write_text(caption)
