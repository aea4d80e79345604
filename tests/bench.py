"""Speed and memory beside diffusers, or beside another checkout of this project, both sides in turn.

    python tests/bench.py --beside ../old                 the tiny checkpoint here and there
    python tests/bench.py --model 1.5                     random weights of Stable Diffusion 1.5's size, and diffusers
    python tests/bench.py --model 1.5 --dtype bfloat16 --what step --json step.json
    python tests/bench.py --growth growth.png             a step here alone, with more vectors, pictures, pixels, …

Each side is a process of its own and works while the other waits; a machine that is slower for a while is so for both.
A ratio is the median over the rounds of the other side's seconds over ours. Where ours are told as a share of the peak,
that is of the rate of a product of large matrices in the same numbers; PyTorch counts the operations. Memory is the
most there was: of a CPU's the anonymous kind, which a mapped file is not; of a GPU's what PyTorch took.

A start is a new process in each round, from its begin until its first training step is done. Ours is train.py,
that of diffusers loads its pipeline. Of all models but the tiny checkpoint, both read random weights from a temporary
folder (4.3 GB for 1.5 in float32), which they have read before, and train.py makes no preview, as diffusers makes none.
"""

import ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

TESTS = Path(__file__).parent
for folder in map(str, (TESTS, TESTS.parent)):  # as pytest sets it; another checkout's own come before it
    if folder not in sys.path:
        sys.path.append(folder)

from helpers.memory import Anonymous
from helpers.works import TINY, TOKEN, ours, save_random, seconds_of, theirs

from tinyldm import InputError, cli

WORKS = {
    "start": "start, until a step is done",
    "step": "training step",
    "low-memory": "training step, --low-memory",
    "sample": "two steps of DDIM with guidance",
    "sheet": "a sheet of 24 pictures",
    "decode": "decoding",
    "encode": "encoding",
}
OURS, DIFFUSERS = "tinyldm", "diffusers"
MATRIX = {"cpu": 2048, "cuda": 8192}  # of a smaller one, a GPU is done before the next is asked for

ATTENTION = {  # on a CPU, which the counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


# ---- A side's process: the name of a work in, a line of JSON out


def serve(options: Namespace) -> None:
    """Do what stdin asks for, each work once without counting it before it counts."""
    works, before = {OURS: ours, DIFFUSERS: theirs}[options.serve](options), None
    for line in sys.stdin:
        if (what := line.strip()) in works and what != before:
            give_back_freed_memory()
            before = what
        if what == "peak":
            answer = {"flops": peak(options)}
        elif what.startswith("count "):
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                works[what.removeprefix("count ")]()
            answer = {"operations": counter.get_total_flops()}
        elif options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            answer = {"seconds": seconds_of(works[what], "cuda"), "memory": torch.cuda.max_memory_allocated()}
        else:
            with Anonymous() as memory:
                answer = {"seconds": seconds_of(works[what], options.device)}
            answer["memory"] = memory.highest
        print(json.dumps(answer), flush=True)


def give_back_freed_memory() -> None:
    """So that of a work's memory what made the model, or was another's, does not count. Of C libraries glibc has it."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak(options: Namespace) -> float:
    """Operations a second of a product of matrices."""
    side = MATRIX[options.device]
    a = torch.rand(side, side).to(options.device, cli.DTYPES[options.dtype])
    return 2 * side**3 / min(seconds_of(lambda: a @ a, options.device) for _ in range(3))


# ---- Both sides


class Side:
    """One of the two processes."""

    def __init__(self, kind: str, tree: Path, options: Namespace):
        command = [sys.executable, __file__, "--serve", kind]
        for name in ("model", "dtype", "device", "size", "batch", "weights"):
            if value := getattr(options, name):
                command += [f"--{name}", str(value)]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, what: str) -> dict[str, float]:
        with suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            if answer := self.process.stdout.readline():
                return json.loads(answer)
        raise InputError("a side ended before its work was done; what it says above tells why")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def compared(options: Namespace) -> list[dict[str, object]]:
    """A row for each work: seconds of each round of both sides, and what comes of them."""
    other = DIFFUSERS if options.beside == DIFFUSERS else OURS
    tree = TESTS.parent if options.beside == DIFFUSERS else Path(options.beside).absolute()
    kinds, works = [(OURS, TESTS.parent), (other, tree)], [what for what in options.what if what != "start"]
    rows = [start_row(kinds, options)] if "start" in options.what else []  # while no side keeps its memory
    sides = [Side(*kind, options) for kind in kinds if works]
    try:
        return rows + [row(what, sides, options) for what in works]
    finally:
        for side in sides:
            side.end()


def row(what: str, sides: list[Side], options: Namespace) -> dict[str, object]:
    for side in sides:
        side.ask(what)
    answers = [[side.ask(what) for side in sides] for _ in tqdm(range(options.rounds), desc=WORKS[what])]
    found = timed(what, [[answer["seconds"] for answer in of_round] for of_round in answers])
    operations = sides[0].ask(f"count {what}")["operations"]
    return found | {
        "operations": operations,
        "share": operations / median(found["ours"]) / sides[0].ask("peak")["flops"],
        "memory": [max(answer["memory"] for answer in of_side) for of_side in zip(*answers, strict=True)],
    }


def timed(what: str, rounds: list[list[float]]) -> dict[str, object]:
    """rounds: seconds of our side and of the other."""
    seconds = {side: [*of_side] for side, of_side in zip(("ours", "theirs"), zip(*rounds, strict=True), strict=True)}
    return {"what": what, **seconds, "ratio": median(theirs / ours for ours, theirs in rounds)}


# ---- From a process's begin to its first training step

IMAGES = TESTS.parent / "examples" / "striped-circle"
WITHOUT_PREVIEWS = """
import train
from tinyldm import cli
from tinyldm.run import Run
Run.preview = lambda *_: None
cli.run(train.main)
"""


def start_row(kinds: list[tuple[str, Path]], options: Namespace) -> dict[str, object]:
    """kinds: of each side, and the checkout that it is of. The first round is left out: it fills the page cache."""
    with TemporaryDirectory() as name:
        folder, weights = Path(name), TINY
        if options.model != "tiny":
            weights = folder / "weights"
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # its memory goes with it
                process.submit(save_random, weights, options.model, options.dtype).result()
        options = Namespace(**vars(options) | {"weights": weights})

        def begin(kind: str, tree: Path) -> float:
            return start_of_diffusers(options) if kind == DIFFUSERS else start_of_train(tree, folder, options)

        rounds = [[begin(*kind) for kind in kinds] for _ in tqdm(range(1 + options.rounds), desc=WORKS["start"])]
    return timed("start", rounds[1:])


def start_of_diffusers(options: Namespace) -> float:
    start = time.perf_counter()
    side = Side(DIFFUSERS, TESTS.parent, options)
    try:
        side.ask("step")
        return time.perf_counter() - start
    finally:
        side.end()


def start_of_train(tree: Path, folder: Path, options: Namespace) -> float:
    """folder: where its run may be kept for a while, and what it remembers of weights."""
    if options.model == "tiny":
        program, more = ["train.py"], ["--images", IMAGES]
    else:  # one picture to learn from, as on the other side
        (folder / "images").mkdir(exist_ok=True)
        shutil.copy(min(IMAGES.iterdir()), folder / "images")
        program, more = ["-c", WITHOUT_PREVIEWS], ["--images", folder / "images", "--init", "a"]
    for name in ("weights", "dtype", "device", "size", "batch"):
        if value := getattr(options, name):
            more += [f"--{name}", value]
    words = [*program, "--token", TOKEN, *more]
    environment = os.environ | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(folder)}
    return seconds_to_first_step([sys.executable, *map(str, words)], tree, folder / "run", environment)


def seconds_to_first_step(command: list[str], tree: Path, out: Path, environment: dict[str, str]) -> float:
    """Until the run in `out` has logged a step; then it is ended, and its folder goes."""
    with TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--out", str(out)], cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            while not is_logged(out / "loss.csv"):
                if process.poll() is not None:
                    said.seek(0)
                    why = said.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise InputError(f"train.py ended before its first step: {' '.join(why)}")
                time.sleep(0.002)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(out, ignore_errors=True)


def is_logged(log: Path) -> bool:
    """Whether a line of a step follows the names of the columns."""
    return log.exists() and log.read_bytes().count(b"\n") > 1


# ---- What is told


def as_table(rows: list[dict[str, object]], options: Namespace) -> Iterator[str]:
    yield f"| {options.model}, {options.dtype}, {options.device} | ours | {options.beside} | ratio | peak | GB |"
    yield "|---|---|---|---|---|---|"
    for found in rows:
        sides = " | ".join(
            f"{median(found[side]):.3g} s ({min(found[side]):.3g} to {max(found[side]):.3g})"
            for side in ("ours", "theirs")
        )
        share = f"{found['share']:.0%}" if "share" in found else ""  # of a start neither is measured
        memory = ", ".join(f"{value / 1e9:.2f}" for value in found.get("memory", []))
        yield f"| {WORKS[found['what']]} | {sides} | {found['ratio']:.2f} | {share} | {memory} |"


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    if options.serve:
        return serve(options)
    if options.growth:
        from helpers.growth import draw_growth, growth, growth_table, new_figure

        new_figure(1, 1)  # without matplotlib it ends now
        found = growth(options)
        print("\n".join(growth_table(found)))
        draw_growth(found, options)
        kept = {"growth": found}
    else:
        kept = {"rows": compared(options)}
        print("\n".join(as_table(kept["rows"], options)))
    if options.json:
        asked = {name: value for name, value in vars(options).items() if isinstance(value, str | int | list)}
        options.json.write_text(json.dumps(asked | kept, indent=1) + "\n")


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=["tiny", "1.5", "2.1", "1.x", "2.x"], default="tiny", help="1.x, 2.x: small ones (tiny)")
    add("--beside", metavar="DIR", help="a checkout of this project (default: diffusers)")
    add("--what", nargs="+", choices=list(WORKS), help="default: all")
    add("--growth", type=cli.path, metavar="FILE", help="a plot: a step, here alone, with more vectors, pixels, …")
    add("--dtype", choices=list(cli.DTYPES), default="float32")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--size", type=cli.whole_number(8), metavar="PIXELS", help="of pictures (default: the model's)")
    add("--batch", type=cli.whole_number(1), metavar="N", help="pictures a training step (default: 1; of tiny 16)")
    add("--rounds", type=cli.whole_number(1), default=5, metavar="N", help="%(default)s")
    add("--json", type=cli.path, metavar="FILE", help="every round's seconds besides")
    add("--serve", choices=[OURS, DIFFUSERS], help="be one side; the command itself starts both so")
    add("--weights", type=cli.path, metavar="DIR", help="what diffusers' side loads; the command itself says so")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda found no GPU, expected one; try --device cpu")
    options.batch = options.batch or (None if options.model == "tiny" else 1)  # None: the checkpoint's
    options.size = options.size or {"tiny": 64, "1.5": 512, "2.1": 768}.get(options.model, 32)
    if options.growth:
        if options.beside or options.what:
            raise InputError("--growth is of this checkout's step alone; leave out --beside and --what")
        return options
    if options.model == "tiny" and not options.beside and not options.serve:
        raise InputError("diffusers has no tiny checkpoint, expected --beside DIR or --model; try --model 1.5")
    options.beside = options.beside or DIFFUSERS
    if options.beside != DIFFUSERS and not (Path(options.beside) / "tinyldm" / "recipes.py").is_file():
        raise InputError(f"--beside {options.beside} is no checkout of this project; give the folder of one")
    there = [what for what in WORKS if what != "sheet" or options.model == "tiny"]
    if missing := {*(options.what or there)} - {*there}:
        raise InputError(f"--what {' '.join(missing)} is of the tiny checkpoint; try --model tiny --beside DIR")
    options.what = options.what or there
    return options


if __name__ == "__main__":
    if sys.argv[1:3] == ["--serve", DIFFUSERS]:
        main(sys.argv[1:])  # without what cli.run does for memory: it is ours
    else:
        cli.run(main)
