"""Random weights beside diffusers, from a single file and from a folder: pictures, memory, seconds.

By default the models are small, and only their pictures count: their files are smaller than the libraries' own needs.
With TINYLDM_FULL_SIZE=DIR they are Stable Diffusion 1.5 and 2.1 at their full size:

    TINYLDM_FULL_SIZE=/tmp/full-size pytest -n 0 -s tests/test_full_size.py

Per model it writes a single file and a diffusers folder (9 to 11 GB, deleted again) into DIR, and compares in float32
at 256x256 pixels, with 4 steps of DDIM and guidance 7.5. It takes about 12 GB of memory and some minutes, and prints a
table.
"""

import importlib.util
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.memory import Anonymous
from helpers.public import (
    PROMPT,
    SHAPES,
    our_picture,
    pipeline,
    save_folder,
    single_file,
    their_picture,
    with_word,
    write_merges,
)
from safetensors.torch import save_file

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings, save_embeddings

FULL_SIZE = os.environ.get("TINYLDM_FULL_SIZE")
WORD_PROMPT = PROMPT.replace("red star", "<word>")
LIMIT = 2.0  # of 255, the largest difference of any pixel
MEMORY = 1.3  # times what the weights take once they are loaded
SINGLE, FOLDER = "model.safetensors", "folder"


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A process that has the libraries imported and has computed nothing: it can be forked, as pytest's can't."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("kind", ["1.5", "2.1"] if FULL_SIZE else ["1.x", "2.x"])
def test_pictures_memory_and_seconds_beside_diffusers(tmp_path, fresh_process, kind):
    not_kept = fresh_process.submit(compared, Path(FULL_SIZE or tmp_path) / kind, kind).result()
    assert [what for what in not_kept if FULL_SIZE or "pixel" in what] == []


def compared(folder: Path, kind: str) -> list[str]:
    """Print the table of a model's measurements; returns those that are above their limits."""
    folder.mkdir(parents=True)
    print("\n| what | model | measured | limit |\n|---|---|---|---|")
    not_kept = []
    try:
        for what, measured, limit in measurements(folder, kind, 256 if FULL_SIZE else 32):
            print(f"| {what} | {kind} | {measured:.2f} | {'' if limit is None else f'{limit:.2f}'} |", flush=True)
            if limit is not None and not measured <= limit:
                not_kept.append(what)
    finally:
        shutil.rmtree(folder)
    return not_kept


def measurements(folder: Path, kind: str, size: int) -> Iterator[tuple[str, float, float | None]]:
    """Yields (what, measured, limit or None), each measured in a process of its own, so that its memory is its own."""
    apart(write, folder, kind, size)
    for name in (SINGLE, FOLDER):
        plain, word = apart(compare, folder, name, size)
        yield f"largest pixel difference of 255, {name}", plain, LIMIT
        yield f"largest pixel difference of 255 with our embedding, {name}", word, LIMIT
    gigabytes = (folder / SINGLE).stat().st_size / 1e9
    yield "GB on disk, single file in float32", gigabytes, None
    ours, theirs = [], []
    for _ in range(
        3 if FULL_SIZE else 1
    ):  # in turn, so that neither finds more of the file in the page cache; the first round fills it
        ours.append(apart(load_ours, folder / SINGLE))
        theirs.append(apart(load_theirs, folder / FOLDER))
    peak, after, weights, _ = ours[-1]
    yield "GB of weights in bfloat16", weights, None
    yield "GB of anonymous memory after loading to bfloat16", after, MEMORY * weights
    yield "GB of anonymous memory at the peak of it", peak, MEMORY * weights
    fastest = min(seconds for *_, seconds in theirs)
    accelerate = "with" if importlib.util.find_spec("accelerate") else "without"
    yield f"seconds of diffusers' from_pretrained to bfloat16, {accelerate} accelerate", fastest, None
    yield "GB of anonymous memory at its peak", theirs[-1][0], None
    yield "seconds to load the single file to bfloat16", min(seconds for *_, seconds in ours), fastest


def apart(function, *arguments):
    # Forked, so that each finds the libraries imported; the parent itself computes nothing and holds no model.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def write(folder: Path, kind: str, size: int) -> None:
    """The files, and the pictures of diffusers."""
    pipe = pipeline(kind)
    save_folder(folder / FOLDER, kind)
    prediction = "v" if SHAPES[kind].is_2x else "epsilon"
    save_file(single_file(kind), folder / SINGLE, metadata={"modelspec.prediction_type": prediction})
    write_merges(folder, kind)
    width = SHAPES[kind].text.width
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(7)) / width**0.5
    save_embeddings(folder / "word.safetensors", {"<word>": vectors})
    np.save(folder / "plain.npy", their_picture(pipe, size=size))
    pipe.load_textual_inversion(folder / "word.safetensors", token="<word>")
    np.save(folder / "word.npy", their_picture(pipe, WORD_PROMPT, size=size))


def compare(folder: Path, name: str, size: int) -> tuple[float, float]:
    """The largest difference of our picture from that of diffusers: of PROMPT, and of one with a learned word."""
    model = load_checkpoint(folder / name)
    plain, word = np.load(folder / "plain.npy"), np.load(folder / "word.npy")
    if plain.std() < 5 or np.abs(plain - word).max() < 5:
        raise RuntimeError("the random weights make pictures that show nothing; choose other weights")
    plain_difference = np.abs(our_picture(model, size=size) - plain).max()
    vectors = with_word(model, load_embeddings(folder / "word.safetensors"))
    return float(plain_difference), float(np.abs(our_picture(model, WORD_PROMPT, vectors, size=size) - word).max())


def load_ours(path: Path) -> tuple[float, float, float, float]:
    """GB of anonymous memory at the peak and afterwards, both above what it was before; GB of weights; seconds."""
    with Anonymous() as memory:
        start = time.perf_counter()
        model = load_checkpoint(path, dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for module in model.networks() for p in module.parameters())
    return (memory.highest - memory.before) / 1e9, (memory.after - memory.before) / 1e9, weights / 1e9, seconds


def load_theirs(path: Path) -> tuple[float, float]:
    """GB of anonymous memory at the peak, above what it was before; seconds."""
    with Anonymous() as memory:
        start = time.perf_counter()
        StableDiffusionPipeline.from_pretrained(
            path, torch_dtype=torch.bfloat16, safety_checker=None, requires_safety_checker=False
        )
        seconds = time.perf_counter() - start
    return (memory.highest - memory.before) / 1e9, seconds
