"""Cells in several processes at once, each with one thread."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.lab.paper.cells import Cell, Place, measured


def in_processes(cells: Sequence[Cell], place: Place, processes: int, what: str) -> Iterator[tuple[Cell, dict]]:
    """Each cell with its figures, as soon as it is done. what: the progress bar's name.

    Whatever ends this, an error or Ctrl-C, ends the processes too, with the cells that they are at.
    """
    with tqdm(total=len(cells), desc=what, unit="cell") as bar:
        for cell, figures in one_by_one(cells, place) if processes == 1 else in_pool(cells, place, processes):
            yield cell, figures
            bar.update()


def one_by_one(cells: Sequence[Cell], place: Place) -> Iterator[tuple[Cell, dict]]:
    """In this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in cells:
            yield cell, measured(cell, place)
    finally:
        torch.set_num_threads(threads)


def in_pool(cells: Sequence[Cell], place: Place, processes: int) -> Iterator[tuple[Cell, dict]]:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin)
    try:
        futures = {pool.submit(measured, cell, place): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise InputError(
            "a process was ended from outside, as when there is not enough memory; type the same again to go on, "
            "perhaps with fewer --processes"
        ) from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


def begin() -> None:
    """In each process: one thread; Ctrl-C is the parent's business, and its end is the end of all."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
