"""Words that train.py learns, to be measured: of things and styles, with several seeds, several words at a time."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.inversion import add_words
from tinyldm.lab import ROOT
from tinyldm.lab.world.distribution import EXAMPLE_SIZE
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import Picture
from tinyldm.latent_diffusion import LatentDiffusion

UNSEEN = ["--preview-every", "1000000"]  # nobody looks at the previews, which take their time

Task, Result = TypeVar("Task"), TypeVar("Result")


class Training(NamedTuple):
    """How words are learned: by train.py's defaults, but for `options`."""

    weights: Path
    seeds: int = 1  # each word is learned with the seeds 0, 1, …
    options: tuple[str, ...] = ()  # of train.py


def learn(training: Training, folder: Path, out: Path, *more: str) -> Path:
    """The word S*, which train.py learns from a folder of pictures. -> its file.

    more: further options of train.py, which override the training's. Raises InputError if train.py is not there, or
    refuses to learn.
    """
    command = [sys.executable, train_script(), *training.options, *more, "--images", folder, "--token", "S*"]
    command += ["--weights", training.weights, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode == 2:
        raise InputError(run.stderr.splitlines()[-1])
    if run.returncode:
        raise RuntimeError(f"train.py ended with status {run.returncode}:\n{run.stderr}")
    return out / "embedding.safetensors"


def train_script() -> Path:
    """train.py, which lies beside the package and not in it. Raises InputError if it is not there."""
    if not (ROOT / "train.py").is_file():
        raise InputError(f"no train.py in {ROOT}, expected the whole project there; clone it and pip install -e .")
    return ROOT / "train.py"


def word_for(training: Training, pictures: Sequence[Picture], seed: int, kind: str = "object") -> dict[str, Tensor]:
    """{"S*": its vectors (count, width)}, learned from the pictures, drawn as large as those of examples/.

    kind: what the pictures share, "object" or "style".
    """
    with tempfile.TemporaryDirectory() as folder:
        for i, picture in enumerate(pictures):
            draw(picture, EXAMPLE_SIZE).save(Path(folder) / f"{i}.png")
        options = ["--property", kind, "--seed", str(seed), *UNSEEN]
        return load_embeddings(learn(training, Path(folder), Path(folder) / "word", *options))


def model_with(weights: Path, words: dict[str, Tensor]) -> LatentDiffusion:
    """The checkpoint, which lets prompts hold the words."""
    model = load_checkpoint(weights)
    add_words(model, words)
    return model


def in_parallel(function: Callable[[Task], Result], tasks: Iterable[Task], what: str) -> Iterator[Result]:
    """The function's results in the order of the tasks, as many of which run at once as there are threads to compute.

    Each computes in one thread: two words on two cores are learned sooner than one after the other, and what is learned
    does not depend on the number of cores. what: the progress bar's name.
    """
    threads, tasks = torch.get_num_threads(), list(tasks)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from tqdm(pool.map(function, tasks), total=len(tasks), desc=what, leave=False)
    finally:  # of an error or Ctrl-C too: what has not begun never does
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def tell(line: str) -> None:
    """Print a line above the progress bar of `in_parallel`."""
    with tqdm.external_write_mode():
        print(line, flush=True)
