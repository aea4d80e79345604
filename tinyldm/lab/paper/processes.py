"""Work on many cells in several processes at once, each with one thread."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch
from tqdm import tqdm

from tinyldm import InputError

Task, Result = TypeVar("Task"), TypeVar("Result")


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], processes: int, what: str
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, as soon as it is done. what: the progress bar's name.

    work: a function of a module, since other processes have to find it. Whatever ends this, an error or Ctrl-C, ends
    the processes too, with the tasks that they are at.
    """
    done = one_by_one(work, tasks) if min(processes, len(tasks)) < 2 else in_pool(work, tasks, processes)
    yield from tqdm(done, total=len(tasks), desc=what)


def one_by_one(work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """In this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task in tasks:
            yield task, work(task)
    finally:
        torch.set_num_threads(threads)


def in_pool(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[tuple[Task, Result]]:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin)
    try:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        again = "type the same again to go on, perhaps with fewer --processes"
        raise InputError(f"a process was ended from outside, as when memory is out; {again}") from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


def begin() -> None:
    """In each process: one thread; Ctrl-C is its parent's business, whose end is its own."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is between processes, and Python would tell of it when this one is killed
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
