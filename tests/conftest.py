"""Fixtures that several test files share: the tiny checkpoint, and running a script as a user would."""

import contextlib
import copy
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported, here and in the processes that tests start
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

import torch

import sample
import train
from tinyldm import cli
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.native import save_checkpoint
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights" / "tiny"
EXAMPLES = ROOT / "examples"
SCRIPTS = {"train.py": train.main, "sample.py": sample.main}


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error line; fails the test if there is not exactly one line, or if it is a traceback."""
        lines = [line for line in self.err.splitlines() if line and ": warning:" not in line]
        assert self.status == 2, self
        assert len(lines) == 1 and ": error: " in lines[0], self.err
        return lines[0]


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> Path:
    """The tiny checkpoint's words and settings with a UNet and an autoencoder that are small and know nothing, and two
    sampler's steps by default: a step of train.py takes 10 ms. For all that does not ask what is learned."""
    folder, model = tmp_path_factory.mktemp("quick"), load_checkpoint(WEIGHTS)
    torch.manual_seed(0)
    width, levels = model.text_encoder.config.width, (8, 8, 16, 16)  # 8 pixels to a latent's one, as the checkpoint's
    small = replace(
        model,
        unet=UNet(UNetConfig(12, (16,), attention=(True,), blocks=1, context_width=width, norm_groups=8)),
        autoencoder=AutoencoderKL(AutoencoderConfig(channels=levels, blocks=1, latent_channels=12, norm_groups=4)),
        defaults=replace(model.defaults, sampler_steps=2),
    )
    save_checkpoint(folder, small)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, quick) -> Callable[..., Outcome]:
    """run("train.py", "--images", …) or run("tinyldm.lab.world", …): the command's own main in this process, in an
    empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run_script(script: str, *arguments: object) -> Outcome:
        words = [str(argument) for argument in arguments]
        if script in SCRIPTS and "--weights" not in words:
            words += ["--weights", str(quick)]
        monkeypatch.setattr(sys, "argv", [script, *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(SCRIPTS.get(script) or main_of(script))
        captured = capsys.readouterr()
        progress_free = "\n".join(
            line for line in captured.err.splitlines() if "it/s]" not in line and "%|" not in line
        )
        return Outcome(int(stop.value.code or 0), captured.out, progress_free)

    return run_script


@pytest.fixture
def shell_words(tmp_path) -> Callable[[list[str]], list[list[str]]]:
    """shell_words(commands): what `sh` hands to the `python` of each, a stand-in that writes down its words."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@" "end of the command"\n')
    python.chmod(0o755)

    def words(commands: list[str]) -> list[list[str]]:
        path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
        before = sorted(tmp_path.rglob("*"))
        shell = subprocess.run(
            ["sh", "-c", "\n".join(commands)], cwd=tmp_path, env=path, capture_output=True, timeout=10
        )
        assert shell.returncode == 0 and not shell.stderr and sorted(tmp_path.rglob("*")) == before, shell
        return [line.split("\0")[:-1] for line in shell.stdout.decode().split("end of the command\0")[:-1]]

    return words


@pytest.fixture
def no_hang() -> Iterator[None]:
    """What waits for ever is an error after ten seconds."""

    def ring(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def main_of(module: str) -> Callable[[list[str]], object]:
    """What `python -m module` runs."""
    imported = importlib.import_module(module)
    return (importlib.import_module(f"{module}.__main__") if hasattr(imported, "__path__") else imported).main


@pytest.fixture
def run_process() -> Callable[..., subprocess.CompletedProcess]:
    """The script in a process of its own, from the project's folder, as README says."""

    def run_script(*words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    return run_script


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """`with largest_file(1000): …`: the system refuses to write more bytes into a file, as a full disk does."""
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def locked_elsewhere(folder: Path) -> Iterator[subprocess.Popen]:
    """`with locked_elsewhere(folder) as process: …`: another process holds the folder, as a run that goes on does."""
    pytest.importorskip("fcntl")
    code = "import sys, tinyldm.files as f; f.lock_folder(f.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.resolve())], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def memory_peak() -> Iterator[SimpleNamespace]:
    """`with memory_peak() as used: …`; then used.bytes is how much more memory the process had at most. Linux only:
    elsewhere it stays 0."""
    used = SimpleNamespace(bytes=0)
    measured = os.access("/proc/self/clear_refs", os.W_OK)
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        before = highest_memory()
    yield used
    if measured:
        used.bytes = highest_memory() - before


def highest_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.fixture(scope="session", autouse=True)
def no_cache_in_the_real_home(tmp_path_factory) -> None:
    """For every test, and the processes that it starts: SHA-256 is remembered in a folder of pytest's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def loaded() -> LatentDiffusion:
    """The tiny checkpoint, which no test may change."""
    return load_checkpoint(WEIGHTS)


@pytest.fixture
def tiny(loaded) -> LatentDiffusion:
    """A fresh copy of the tiny checkpoint, so that a test may add placeholders to it."""
    return copy.deepcopy(loaded)
