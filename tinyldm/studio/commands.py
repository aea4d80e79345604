"""train.py and sample.py as the page runs them: each a process of its own, of either script one after another.

What there is to see of one is in its folder, and what it printed beside that: a tab that is closed ends nothing.
"""

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

from tinyldm import InputError
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.lab.measure.learning import train_script
from tinyldm.run import read_settings

OUTPUTS = Path("outputs")
BAR = re.compile(r"(\d+)/(\d+) \[[\d:]+<([\d:?]+)")  # tqdm's: done, of how many, and the time that is left


class Commands:
    """Those that this page began."""

    def __init__(self) -> None:
        self.processes: dict[Path, subprocess.Popen | None] = {}  # by their folders; None: it waits
        self.lock = Lock()  # between a command's start and its stop
        self.queues = {script: ThreadPoolExecutor(1) for script in ("train.py", "sample.py")}

    def begin(self, script: str, folder: Path, options: dict[str, object], *more: str) -> Path:
        """Queue a command -> its folder. options: what is None, "" or False is left out; more: as typed."""
        given = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in options.items() if v]
        self.processes[folder] = None
        command = [sys.executable, train_script().with_name(script), *given, *more, f"--out={folder}"]
        self.queues[script].submit(self.run, folder, command)
        return folder

    def go_on(self, folder: Path) -> None:
        """Put a run of train.py that was stopped into the queue again, with the options that it keeps."""
        settings = read_settings(folder)
        others = [name for name in settings if name in ("out", "resume") or name.endswith("_sha256")]
        self.begin("train.py", folder, settings | dict.fromkeys(others), "--resume")

    def run(self, folder: Path, command: list[str | Path]) -> None:
        """In a queue's thread: the command from its start to its end."""
        with self.lock, open(OUTPUTS / f".{folder.name}.log", "wb") as log:
            if folder in self.processes:  # nobody stopped it while it waited
                # In a session of its own a Ctrl-C in the page's terminal does not reach it; close() hands that on.
                self.processes[folder] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if process := self.processes.get(folder):
            process.wait()
        with suppress(OSError):
            folder.rmdir()  # if it did not come to write anything

    def stop(self, folder: Path) -> None:
        """As Ctrl-C does: what there is by then is kept. A command that waits never begins."""
        with self.lock:
            if process := self.processes.get(folder) or self.processes.pop(folder, None):
                process.send_signal(signal.SIGINT)  # nothing, if it has ended

    def close(self) -> None:
        """Stop all, and wait until they have saved."""
        for folder in [*self.processes]:
            self.stop(folder)
        for queue in self.queues.values():
            queue.shutdown()

    def alive(self, folder: Path) -> bool:
        """Whether it waits or goes on."""
        process = self.processes.get(folder)
        return process.poll() is None if process else folder in self.processes

    def told(self, folder: Path) -> str:
        """How far it is; of one that has ended its last words, errors and warnings among them."""
        if folder in self.processes and self.processes[folder] is None:
            return "waits for the one before it"
        log = OUTPUTS / f".{folder.name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        bars = [bar.groups() for line in lines if (bar := BAR.search(line))]
        if self.alive(folder):
            return "step {} of {}, {} left".format(*bars[-1]) if bars else "begins"
        return "\n".join(line for line in lines if line and not BAR.search(line))

    def folders(self) -> dict[str, Path]:
        """Name -> folder, of all with a learned word or pictures and those that wait; the newest first."""
        found = {file.parent for name in ("embedding.safetensors", "0000.png") for file in OUTPUTS.glob(f"*/{name}")}
        found |= {folder for folder in self.processes if folder.exists()}
        return {each.name: each for each in sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)}

    def words(self) -> dict[str, Path]:
        """word -> its file, of all learned words; of several with one name the newest."""
        found: dict[str, Path] = {}
        for folder in self.folders().values():
            with suppress(InputError):  # there is no word in it, or it is damaged
                file = folder / "embedding.safetensors"
                found = dict.fromkeys(load_embeddings(file), file) | found
        return found
