"""What all commands share: their options, one-line errors, and which device and dtype to compute with."""

import argparse
import ctypes
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch

from tinyldm import InputError, ranks
from tinyldm.schedule import PREDICTIONS

WINDOWS = os.name == "nt"
TINY = Path("weights/tiny")
MOST_PICTURES = 10_000  # of one command: their names have four digits
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C; what a cluster sends before it kills
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
    STOP_SIGNALS.append(signal.SIGHUP)  # the terminal was closed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# What PyTorch says, on each device, when there is not enough memory or a size is beyond counting.
NO_MEMORY = "out of memory|allocate memory|ALLOC_FAILED|bad_alloc|calculation overflowed"


class Parser(argparse.ArgumentParser):
    """An argument parser whose --help is the script's docstring and whose errors are one line."""

    def __init__(self, doc: str):
        super().__init__(
            prog=f"python {program()}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def program() -> str:
    """What was typed after `python`: "train.py", or "-m tinyldm.lab.world"."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.origin == sys.argv[0]:
        return f"-m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call main with what was typed and exit; what the user can put right becomes one line and status 2, without a
    traceback. So does a signal to stop, with the status that a shell expects, 130 for Ctrl-C."""
    keep_freed_memory()
    name = program().removeprefix("-m ")
    warnings.simplefilter("once", UserWarning)
    warnings.showwarning = lambda message, *_, **__: print(f"{name}: warning: {printable(message)}", file=sys.stderr)
    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may not know a word's letters
    try:
        for argument in sys.argv[1:]:
            if re.search("[\ud800-\udfff]", argument):  # how Python keeps bytes that are no text
                raise InputError(f"{argument} is not UTF-8; type it as UTF-8, or rename the file")
            if argument.endswith("=--"):  # of --out=-- argparse would make an empty list
                raise InputError(f"{argument} gives no value, expected one; see python {program()} --help")
        try:
            with ranks.only_the_first_speaks():
                status = main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # now, since Python itself complains aloud of a reader that is gone
        sys.exit(status)
    except KeyboardInterrupt as stop:
        end_on_signal()
        (number,) = stop.args or (signal.SIGINT,)
        print(f"{name}: stopped by {signal.Signals(number).name}; what was saved before is kept", file=sys.stderr)
        sys.exit(128 + number)
    except InputError as error:
        print(f"{name}: error: {printable(error)}", file=sys.stderr)
    except BrokenPipeError:  # `… | head -1` has read what it wants
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + 13)  # as a shell says of who was ended by SIGPIPE
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        less = ", or add --low-memory" if name == "train.py" and "--low-memory" not in sys.argv else ""
        print(f"{name}: error: not enough memory; make the pictures smaller, or fewer at once{less}", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that may not be written, …
        where = f": {error.filename}" if error.filename else ""
        print(f"{name}: error: {printable(f'{error.strerror or error}{where}')}", file=sys.stderr)
    sys.exit(2)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next. Else it gives large tensors back to the system, which clears
    each page of the next one: on a CPU, Stable Diffusion is slower by that."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library has no such function
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def printable(text: object, most: int = 1000) -> str:
    """One line that a terminal shows and never obeys: a stranger's file can hold line ends and escape codes.

    most: characters; what is longer ends in "…".
    """
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def command(*words: object) -> str:
    """A command to paste into a shell, which passes on exactly these words, whatever is in them.

    In double quotes where nothing inside means anything to a shell: they read best, and Windows knows no others.
    """
    if WINDOWS:  # where a backslash means itself, but for one before a quote
        plain = re.compile(r"[\w.:\\/=+-]+")
        escaped = ((word, re.sub(r'(\\*)"', r'\1\1\\"', word)) for word in map(str, words))
        doubled = ((word, re.sub(r"(\\+)$", r"\1\1", safe)) for word, safe in escaped)
        return " ".join(word if plain.fullmatch(word) else f'"{safe}"' for word, safe in doubled)
    quoted = [(word, shlex.quote(word)) for word in map(str, words)]
    return " ".join(safe if safe == word or re.search(r'["$`\\!]', word) else f'"{word}"' for word, safe in quoted)


def end_on_signal() -> None:
    """From now on a signal to stop ends the program where it is, without a word."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def interrupt(number: int, _: object) -> NoReturn:
    end_on_signal()
    raise KeyboardInterrupt(number)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], int]]:
    """`with stop_on_signal() as stopping`: Ctrl-C only makes stopping() true, so that no step is cut in half.

    stopping() is the status to exit with then, else 0. The other STOP_SIGNALS are as Ctrl-C. A second one interrupts.
    """
    status = 0

    def ask(number: int, _: object) -> None:
        nonlocal status
        status = 128 + number
        for each in STOP_SIGNALS:
            signal.signal(each, interrupt)

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield lambda: status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def whole_number(least: int, most: int = 10**9) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 100 or not least <= int(text) <= most:
            expected = f"expected a whole number of at least {least} and at most {most}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}, {expected}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argparse type: a number above 0. What AdamW computes with it must stay in float32, which ends at 3.4e38."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e37:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}, expected a number above 0 and at most 1e37")
    return value


def zero_or_positive(text: str) -> float:
    """An argparse type: 0, or a number as `positive` takes it."""
    return 0.0 if re.fullmatch(r"0+(\.0*)?", text) else positive(text)


def path(text: str) -> Path:
    """An argparse type: a path. An empty one, of a shell's variable that is not set, would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("'', expected a path")
    return Path(text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=path, default=TINY, metavar="PATH", help="checkpoint (%(default)s)")
    parser.add_argument("--vae", type=path, metavar="PATH", help="an autoencoder in place of the checkpoint's")
    parser.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the UNet was trained to say, if the checkpoint does not tell"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - MOST_PICTURES),  # 64 bits hold the last picture's seed too
        default=0,
        metavar="N",
        help="same seed, same result (%(default)s)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the frozen weights; auto: bfloat16 or float16 on CUDA, else float32",
    )


def choose_device(name: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device, there in available.items() if there)
        raise InputError(f"--device {name} is not available here; found {there}; try --device auto")
    return name


def choose_dtype(name: str, device: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device == "cuda":
        # Older cards compute in bfloat16 too, by detours that are slower than float16.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32
