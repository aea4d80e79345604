"""Commands in processes of their own that start in milliseconds: each is forked from one that has imported everything.

    with Children() as children:
        outcome = children.run(["sample.py", "--prompt", "a"], folder)

A fault can be made in one: {"kill": 3} is SIGKILL before its third change of a file, {"signal_at": [3, "SIGTERM"]}
another signal there, {"full": 3} a disk that is full from there on, {"remove": [3, "out"]} a folder that somebody
deletes then, {"file_size": 5000} a limit of the operating system. A change is what Python does to a file or folder
below the folder: open it for writing, make or rename it. Linux only.

{"everywhere": "kill"} leaves, for each change, a copy of the folder as SIGKILL before it would: folder-kill-1, … The
command itself runs through. {"everywhere": "full"} goes on in such copies with a full disk, each in one more process.

Run as a script, this file is the process that forks: a line of JSON in, a line of JSON out.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEMORY = 4 * 2**30  # bytes that a child may ask for beyond what it starts with; more is refused, as by a full machine


@dataclass(frozen=True)
class Outcome:
    status: int | None  # minus the signal that ended it; None if it took too long
    out: str
    err: str
    memory: int  # bytes that it took at most, beyond what it started with; 0 if it was killed
    seconds: float


class Children:
    """The process that forks."""

    def __enter__(self) -> "Children":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def start(self, words: list[str], folder: Path, fault: dict | None = None, seconds: float = 60) -> None:
        """Run a command, its arguments behind it, in the folder. words may hold surrogates for bytes of no UTF-8."""
        request = {"words": words, "folder": str(folder.absolute()), "fault": fault or {}, "seconds": seconds}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> Outcome:
        """The outcome of the command that was started last."""
        return Outcome(**json.loads(self.process.stdout.readline()))

    def run(self, words: list[str], folder: Path, fault: dict | None = None, seconds: float = 60) -> Outcome:
        self.start(words, folder, fault, seconds)
        return self.wait()


# ---- In the process that forks


def serve() -> None:
    import importlib

    import torch

    import sample
    import train
    from tinyldm import cli

    torch.set_num_threads(1)  # before anything is computed: a fork inherits no threads
    for line in sys.stdin:
        request = json.loads(line)
        name = request["words"][0]
        if name in ("train.py", "sample.py"):
            main = {"train.py": train.main, "sample.py": sample.main}[name]
        else:
            module = importlib.import_module(name)
            main = (importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module).main
        answer = fork(lambda main=main: cli.run(main), **request)
        print(json.dumps(answer), flush=True)


def fork(command, words: list[str], folder: str, fault: dict, seconds: float) -> dict:
    """Run the command in a child, its output in files beside the folder, until it ends or the seconds are over."""
    out, err, memory = (f"{folder}.{os.getpid()}.{name}" for name in ("out", "err", "memory"))
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        Path(memory).write_text("0")
        os.chdir(folder)
        sys.argv = words
        Path("/proc/self/clear_refs").write_text("5")  # what was the highest before is forgotten
        before, status = highest_memory(), 1
        limit_memory()
        make_fault(Path(folder), **fault)
        try:
            command()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()  # as the interpreter does
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            Path(memory).write_text(str(highest_memory() - before))
        os._exit(status)
    ended = 0
    while not ended and time.monotonic() < start + seconds:
        ended, state = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if ended else 0.002)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answer = {
        "status": os.waitstatus_to_exitcode(state) if ended else None,
        "out": Path(out).read_text(errors="backslashreplace"),
        "err": Path(err).read_text(errors="backslashreplace"),
        "memory": int(Path(memory).read_text() or 0),
        "seconds": time.monotonic() - start,
    }
    for file in (out, err, memory):
        Path(file).unlink()
    return answer


def highest_memory() -> int:
    """Bytes that this process took at most so far."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def limit_memory() -> None:
    now = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def make_fault(
    folder: Path,
    kill: int = 0,
    signal_at: tuple[int, str] = (0, ""),
    full: int = 0,
    remove: tuple[int, str] = (0, ""),
    file_size: int = 0,
    everywhere: str = "",
) -> None:
    """Arrange for one fault in this process; the numbers count its changes of files below the folder, from 1."""
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    seen, copying = 0, False

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen, copying
        if copying or not changes(event, arguments, folder):
            return
        seen += 1
        if everywhere:
            copying = True
            split_off(folder.with_name(f"{folder.name}-{everywhere}-{seen}"))
            copying = False
        if seen == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == signal_at[0]:
            os.kill(os.getpid(), signal.Signals[signal_at[1]])
        if seen == remove[0]:
            shutil.rmtree(folder / remove[1])
        if full and seen >= full and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def split_off(copy: Path) -> None:
        """Copy the folder as it is. For a full disk this process goes on there, too, and is waited for."""
        nonlocal folder, everywhere, full
        shutil.copytree(folder, copy)
        if everywhere != "full":
            return
        if child := os.fork():
            _, state = os.waitpid(child, 0)
            Path(f"{copy}.status").write_text(str(os.waitstatus_to_exitcode(state)))
            return
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{copy}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(copy)
        folder, everywhere, full = copy, "", seen

    if kill or full or signal_at[0] or remove[0] or everywhere:
        sys.addaudithook(watch)


def changes(event: str, arguments: tuple, folder: Path) -> bool:
    """Whether this event of Python's is a change of a file below the folder."""
    if event == "open":
        path, _, flags = arguments
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, written = arguments[:1], event in ("os.rename", "os.mkdir")
        path = path[0] if path else None
    if not written or not isinstance(path, (str, os.PathLike)):
        return False
    return (folder / path).is_relative_to(folder) and not Path(path).is_relative_to("/dev")


if __name__ == "__main__":
    serve()
