"""Several processes: all is done, and none is left behind."""

import multiprocessing
import os
import time

import pytest
import torch

from tinyldm import InputError
from tinyldm.lab.paper.processes import in_processes


def work(task):
    if task == "die":
        time.sleep(1)  # until what came before is told
        os._exit(9)
    if task == "wait":
        time.sleep(60)
    return task, os.getpid(), torch.get_num_threads()


def test_all_is_done_in_other_processes_until_one_is_killed_which_ends_them_all():
    results, started = {}, time.monotonic()
    with pytest.raises(InputError, match="was ended from outside"):
        for task, result in in_processes(work, ["a", "b", "c", "die", "wait", "wait"], 2, "tasks"):
            results[task] = result
    assert time.monotonic() - started < 30 and multiprocessing.active_children() == []
    assert {task: done for task, (done, _, _) in results.items()} == {"a": "a", "b": "b", "c": "c"}
    assert os.getpid() not in {process for _, process, _ in results.values()}
    assert {threads for _, _, threads in results.values()} == {1}


def test_one_process_is_this_one_and_gets_its_threads_back():
    threads = torch.get_num_threads()
    assert list(in_processes(work, ["a"], 8, "tasks")) == [("a", ("a", os.getpid(), 1))]
    assert list(in_processes(work, [], 2, "tasks")) == []
    assert torch.get_num_threads() == threads
