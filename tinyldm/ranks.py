"""One command on several devices, as torchrun starts it: a process for each.

    torchrun --standalone --nproc-per-node 4 -- train.py --images examples/bolt --token "<bolt>"

Such a process is called a rank, after its number. All of them do the same, each with its part of the pictures; they
meet where they average a gradient. The first one, 0, speaks and writes for all. In a command that is not started by
torchrun there is one rank, and nothing here costs anything.
"""

import atexit
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tinyldm import InputError

PATIENCE = timedelta(hours=2)  # of the others while the first one makes previews
T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if started_by_torchrun() and dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if started_by_torchrun() and dist.is_initialized() else 1


def join(device: str) -> None:
    """Wait for the other ranks, if torchrun started this one. device: of each, "cuda" is one GPU a rank."""
    if not started_by_torchrun():
        return
    if device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > (there := torch.cuda.device_count()):
            raise InputError(f"found {there} GPUs, expected one for each process; try --nproc-per-node {there}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with others_there():
        # What they tell each other is a few kilobytes: it goes over the CPU, where a rank that has ended is noticed.
        dist.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)


def command() -> list[str]:
    """The words in front of a script's name that start it again as it was started."""
    if count() == 1:
        return ["python"]
    return ["torchrun", "--standalone", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "--"]


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_batch(size: int) -> None:
    """Raises InputError unless all ranks can have as many of a step's pictures as the others."""
    if size % count():
        more = size + count() - size % count()
        raise InputError(f"--batch {size} can't be shared equally by {count()} processes; try --batch {more}")


def part(batch: T) -> T:
    """This rank's share of a step's pictures. All shares are as large, so the mean of their means is that of all.

    batch: an inversion.Batch.
    """
    return type(batch)(*(x[rank() :: count()] for x in batch))


def mean(x: Tensor) -> Tensor:
    """Over all ranks, of a tensor that each of them has; the same in all of them."""
    if count() == 1:
        return x
    total = x.detach().cpu().clone()
    with others_there():
        dist.all_reduce(total)
    return (total / count()).to(x.device)


def highest(number: int) -> int:
    """Of what each rank gives."""
    if count() == 1:
        return number
    with others_there():
        found = torch.tensor(int(number))
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, in all of them, tensors on the CPU. An InputError there is one everywhere."""
    if count() == 1:
        return make()
    made: list[object] = [None]
    if rank() == 0:
        try:
            made = [make()]
        except InputError as error:
            made = [error]
    with others_there():
        dist.broadcast_object_list(made)
    if isinstance(made[0], InputError):
        raise made[0]
    return made[0]


def gathered(own: dict[int, T]) -> dict[int, T]:
    """What all ranks have, in the first one; in another one, its own."""
    if count() == 1:
        return own
    parts = [None] * count() if rank() == 0 else None
    with others_there():
        dist.gather_object(own, parts)
    return {number: value for part in parts or [own] for number, value in part.items()}


@contextmanager
def only_the_first_speaks() -> Iterator[None]:
    """The others would print each line again. They do tell of what goes wrong in one of them alone."""
    if not started_by_torchrun() or os.environ["RANK"] == "0":
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except InputError:
        # The first one has most likely found the same. When it ends, torchrun ends this one; if not, this one tells.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        raise
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])


@contextmanager
def others_there() -> Iterator[None]:
    """If another rank has ended, this one says so and ends: whatever it did next could wait for that one for ever."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error)).split(". ")[0]  # without the line of PyTorch's source
        lost = f"another process of this run has ended ({reason}); type the same again, train.py with --resume"
        print(f"\n{Path(sys.argv[0]).name}: error: {lost}", file=sys.__stderr__, flush=True)  # not behind a bar
        os._exit(2)
