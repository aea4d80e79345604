"""What all commands share: the door with its one-line errors, signals, text that is safe to print, values, devices."""

import argparse
import ctypes
import io
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from tinyldm import InputError, begin_command, cli
from tinyldm.formats.embeddings import save_embeddings


@pytest.mark.parametrize("has_bfloat16, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_on_cuda_the_default_is_bfloat16_where_the_card_has_it_and_else_float16(monkeypatch, has_bfloat16, expected):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return has_bfloat16 or including_emulation  # older cards emulate it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert cli.choose_dtype("auto", "cuda") == expected
    assert asked == [False]


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_the_default_is_float32(device):
    assert cli.choose_dtype("auto", device) == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name, dtype", cli.DTYPES.items())
def test_a_dtype_that_is_asked_for_is_taken(name, dtype, device):
    assert cli.choose_dtype(name, device) == dtype


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda is not available here; found .*cpu; try --device auto"):
        cli.choose_device("cuda")
    assert cli.choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1b[2Jb\nc\r\u202ed", r"a\x1b[2Jb\nc\r\u202ed"),
        ("\udcff", r"\udcff"),  # a byte of the command line that is no UTF-8
        ("Bär 熊", "Bär 熊"),
    ],
)
def test_what_a_stranger_wrote_is_shown_and_never_obeyed_by_the_terminal(text, shown):
    assert cli.printable(text) == shown
    assert cli.printable(InputError(text)) == shown


def test_a_long_text_is_cut():
    assert cli.printable("x" * 5000, most=10) == "xxxxxxxxx…"


@pytest.mark.parametrize(
    "word", ["", " ", "$HOME", "`id`", "a'b", 'a"b', "a\\", "a\nb", "!!", "*", "~", "a b", "熊", "a=b"]
)
def test_a_shell_passes_on_the_words_of_a_command(shell_words, word):
    assert shell_words([cli.command("python", word, "end", word)]) == [[word, "end", word]]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"outputs\S\embedding.safetensors", r"outputs\S\embedding.safetensors"),
        (r"my words\S", r'"my words\S"'),
        ("<bolt>", '"<bolt>"'),
        ("S*", '"S*"'),
        ('a "big" S*', r'"a \"big\" S*"'),
        ("my words\\", r'"my words\\"'),
        (r'a \"b"', r'"a \\\"b\""'),
        ("", '""'),
    ],
)
def test_on_windows_only_double_quotes_are_used_and_a_backslash_means_itself(monkeypatch, word, expected):
    monkeypatch.setattr(cli, "WINDOWS", True)
    assert cli.command("python", word) == f"python {expected}"


# ---- The door


def door(monkeypatch, main, *arguments, script="train.py"):
    """The status with which cli.run ends."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code


def on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**48),
        lambda: torch.empty(2**40, 2**30),
        lambda: np.empty(2**60, np.uint8),
        lambda: bytes(2**60),
        lambda: Image.new("RGB", (2**30, 2**30)),
        on_a_gpu,
    ],
    ids=["torch", "overflow", "numpy", "python", "pillow", "cuda"],
)
def test_no_memory_is_one_line_that_says_what_to_make_smaller(monkeypatch, capsys, allocate):
    assert door(monkeypatch, lambda arguments: allocate()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: not enough memory")
    assert line.endswith("make the pictures smaller, or fewer at once, or add --low-memory")


def test_an_option_is_not_advised_where_it_is_given_or_unknown(monkeypatch, capsys):
    for typed in ({"script": "sample.py"}, {"script": "train.py"}):
        assert door(monkeypatch, lambda _: bytes(2**60), "--low-memory", **typed) == 2
        assert capsys.readouterr().err.endswith("or fewer at once\n")


def test_another_error_of_torch_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="must match"):
        cli.run(lambda arguments: torch.zeros(2) + torch.zeros(3))


def test_bytes_that_are_no_text_are_refused_before_anything_is_done():
    command = [os.fsencode(sys.executable), b"sample.py", b"--prompt", b"a caf\xe9"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 2
    assert outcome.stderr == "sample.py: error: a caf\\udce9 is not UTF-8; type it as UTF-8, or rename the file\n"


def test_an_option_without_its_value_is_refused(monkeypatch, capsys):
    assert door(monkeypatch, lambda arguments: 0, "--token=--") == 2
    assert "--token=-- gives no value" in capsys.readouterr().err


def test_a_reader_that_is_gone_is_left_in_peace(tmp_path):
    """As `… | head -1` is once it has read its line."""
    save_embeddings(tmp_path / "a.safetensors", {"S*": torch.ones(1, 8)})
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tinyldm.formats.embeddings", tmp_path / "a.safetensors"]
    outcome = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (outcome.returncode, outcome.stderr) == (128 + 13, "")


def test_a_terminal_that_lacks_a_letter_shows_its_number(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", output)
    assert door(monkeypatch, lambda arguments: print("learned 熊")) is None
    assert output.buffer.getvalue() == b"learned \\u718a\n"


# ---- Values


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        (
            cli.whole_number(1, 2**64),
            {"1": 1, "007": 7, "٣": 3, str(2**64): 2**64},
            ["", " ", "0", "-1", "1.0", "1e3", "nan", "²", "0x10", str(2**64 + 1), "9" * 5000],
        ),
        (
            cli.positive,
            {"1": 1.0, "1e37": 1e37, "1e-320": 1e-320},
            ["", "0", "-1", "nan", "inf", "-inf", "1e38", "1e999", "one", "9" * 5000],
        ),
        (cli.path, {"a b": cli.Path("a b"), ".": cli.Path(".")}, [""]),
    ],
    ids=["whole_number", "positive", "path"],
)
def test_values_are_taken_or_refused_in_few_words(kind, right, wrong):
    assert {text: kind(text) for text in right} == right
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="expected") as error:
            kind(text)
        assert len(str(error.value)) < 200


# ---- Memory


FAULTS = """
import resource, sys, torch
from tinyldm import cli

def faults(_):  # pages that the system had to clear
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (10, 5, 15, 2, 10):
            one, other = torch.ones(10**6 * size), torch.ones(10**6 * size // 2)
            del one, other
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults(None)
cli.run(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is asked")
def test_a_commands_tensors_get_the_memory_of_those_that_were_there_before():
    """In a process of its own: what an allocator does depends on all that it did before."""
    said = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    otherwise, kept = map(int, said.split())  # of some 60,000 pages
    assert kept < otherwise / 5


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_another_c_library_is_left_as_it_is(monkeypatch, system):
    opened = []
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name))  # None, which has no mallopt
    cli.keep_freed_memory()
    assert opened == [None] * (system == "linux")


# ---- Signals


@pytest.fixture
def handlers_put_back():
    before = {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_a_command_that_is_stopped_says_so_in_one_line_and_with_the_status_a_shell_expects(
    handlers_put_back, capsys, number
):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda _: send(number))
    assert stop.value.code == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stopped by {number.name}" in line


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_a_first_signal_waits_for_the_step_and_a_second_one_does_not(handlers_put_back, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), cli.stop_on_signal() as stopping:
        assert stopping() == 0
        send(number)
        assert stopping() == 128 + number
        send(number)
    assert signal.getsignal(number) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        started_so = runpy.run_path(cli.__file__)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        started_else = runpy.run_path(cli.__file__)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in started_else["STOP_SIGNALS"] and signal.SIGHUP not in started_so["STOP_SIGNALS"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="how far the imports are is seen in /proc")
@pytest.mark.parametrize("command", [["train.py"], ["sample.py"], ["-m", "tinyldm.lab.world"]], ids=" ".join)
def test_an_interrupt_during_the_imports_leaves_no_traceback(command):
    code = "import signal, sys, os; signal.signal(signal.SIGINT, signal.default_int_handler); os.execv(sys.executable, "
    code += f"[sys.executable, *{command!r}, '--help'])"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{started.pid}/maps")
    while maps.exists() and "libtorch" not in maps.read_text():  # in the middle of the imports
        time.sleep(0.005)
    started.send_signal(signal.SIGINT)
    said = started.communicate()
    assert (started.returncode, said) == (-signal.SIGINT, (b"", b""))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="others ask quickly, or not at all"
)
@pytest.mark.parametrize("command", [["train.py"], ["sample.py"], ["-m", "tinyldm.lab.world"]], ids=" ".join)
def test_how_often_threads_ask_for_work_is_settled_before_they_are_there(command):
    variables = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment["OMP_DISPLAY_ENV"] = "verbose"  # GNU OpenMP tells its settings where it is loaded
    words = [sys.executable, *command, "--help"]
    said = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60).stderr
    assert "GOMP_SPINCOUNT = '30000'" in said


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_who_says_how_threads_wait_is_obeyed(monkeypatch, given):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(given))
    begin_command()
    assert os.environ == given
