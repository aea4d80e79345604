"""Speed and memory beside diffusers, or beside another checkout of this project, both sides in turn.

    python tests/bench.py --beside ../old                 the tiny checkpoint here and there
    python tests/bench.py --model 1.5                     random weights of Stable Diffusion 1.5's size, and diffusers
    python tests/bench.py --model 1.5 --dtype bfloat16 --what step --json step.json

Each side is a process of its own and works while the other waits; a machine that is slower for a while is so for both.
A ratio is the median over the rounds of the other side's seconds over ours. Where ours are told as a share of the peak,
that is of the rate of a product of large matrices in the same numbers; PyTorch counts the operations. Memory is the
most there was: of a CPU's the anonymous kind, which a mapped file is not; of a GPU's what PyTorch took.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

TESTS = Path(__file__).parent
if str(TESTS) not in sys.path:  # as pytest sets it; another checkout's own come before it
    sys.path += [str(TESTS), str(TESTS.parent)]

from helpers.memory import Anonymous
from helpers.works import ours, seconds_of, theirs

from tinyldm import InputError, cli

WORKS = {
    "step": "training step",
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
    works = {OURS: ours, DIFFUSERS: theirs}[options.serve](options)
    for line in sys.stdin:
        if (what := line.strip()) == "peak":
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
        for name in ("model", "dtype", "device", "size"):
            command += [f"--{name}", str(getattr(options, name))]
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
    sides = [Side(OURS, TESTS.parent, options), Side(other, tree, options)]
    try:
        return [row(what, sides, options) for what in options.what]
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
        "share": operations / median(found["ours"]) / sides[0].ask("peak")["flops"],
        "memory": [max(answer["memory"] for answer in of_side) for of_side in zip(*answers, strict=True)],
    }


def timed(what: str, rounds: list[list[float]]) -> dict[str, object]:
    """rounds: seconds of our side and of the other."""
    seconds = {side: [*of_side] for side, of_side in zip(("ours", "theirs"), zip(*rounds, strict=True), strict=True)}
    return {"what": what, **seconds, "ratio": median(theirs / ours for ours, theirs in rounds)}


# ---- What is told


def as_table(rows: list[dict[str, object]], options: Namespace) -> Iterator[str]:
    yield f"| {options.model}, {options.dtype}, {options.device} | ours | {options.beside} | ratio | peak | GB |"
    yield "|---|---|---|---|---|---|"
    for found in rows:
        sides = " | ".join(
            f"{median(found[side]):.3g} s ({min(found[side]):.3g} to {max(found[side]):.3g})"
            for side in ("ours", "theirs")
        )
        memory = ", ".join(f"{value / 1e9:.2f}" for value in found["memory"])
        yield f"| {WORKS[found['what']]} | {sides} | {found['ratio']:.2f} | {found['share']:.0%} | {memory} |"


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    if options.serve:
        return serve(options)
    rows = compared(options)
    print("\n".join(as_table(rows, options)))
    if options.json:
        asked = {name: value for name, value in vars(options).items() if isinstance(value, str | int | list)}
        options.json.write_text(json.dumps(asked | {"rows": rows}, indent=1) + "\n")


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=["tiny", "1.5", "2.1", "1.x", "2.x"], default="tiny", help="1.x, 2.x: small ones (tiny)")
    add("--beside", metavar="DIR", help="a checkout of this project (default: diffusers)")
    add("--what", nargs="+", choices=list(WORKS), help="default: all")
    add("--dtype", choices=list(cli.DTYPES), default="float32")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--size", type=cli.whole_number(8), metavar="PIXELS", help="of pictures (default: the model's)")
    add("--rounds", type=cli.whole_number(1), default=5, metavar="N", help="%(default)s")
    add("--json", type=cli.path, metavar="FILE", help="every round's seconds besides")
    add("--serve", choices=[OURS, DIFFUSERS], help="be one side; the command itself starts both so")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda found no GPU, expected one; try --device cpu")
    options.size = options.size or {"tiny": 64, "1.5": 512, "2.1": 768}.get(options.model, 32)
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
    cli.run(main)
