"""What all commands share: text that is safe to print, device and dtype, and how they stop."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from tinyldm import InputError, cli


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
    code = "import signal; from tinyldm import cli; print(signal.SIGHUP in cli.STOP_SIGNALS)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.stdout == "False\n", done.stderr
