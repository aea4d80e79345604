"""train.py and sample.py as the page runs them: each a process of its own, of either script one after another."""

import re
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from tinyldm import InputError
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.lab.measure.learning import train_script
from tinyldm.run import read_settings

OUTPUTS = Path("outputs")
BAR = re.compile(r"(\d+)/(\d+) \[[\d:]+<([\d:?]+)")  # tqdm's: done, of how many, and the time that is left


class Commands:
    """Those that the page began, by their folders, where all is that there is to see: a closed tab ends nothing."""

    def __init__(self) -> None:
        self.begun: dict[Path, Future] = {}
        self.processes: dict[Path, subprocess.Popen] = {}  # without those that were asked to stop
        self.unwanted: set[Path] = set()  # which may be asked before they are started
        self.queues = {script: ThreadPoolExecutor(1) for script in ("train.py", "sample.py")}

    def begin(self, script: str, folder: Path, options: dict[str, object], *more: str) -> Path:
        """Queue a command -> its folder. options: what is None, "" or False is left out; more: as typed."""
        typed = {k.replace("_", "-"): v for k, v in options.items() if v is not None and v is not False and v != ""}
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in typed.items()]
        command = [sys.executable, train_script().with_name(script), *given, *more, f"--out={folder}"]
        if not self.alive(folder):
            self.unwanted.discard(folder)
            self.begun[folder] = self.queues[script].submit(self.run, folder, command)
            self.begun[folder].add_done_callback(lambda _: any(folder.glob("*")) or folder.rmdir())  # it wrote nothing
        return folder

    def go_on(self, folder: Path) -> None:
        """Put a run of train.py that was stopped into the queue again, with the options that it keeps."""
        unset = dict.fromkeys(("out", "resume", "weights_sha256", "pictures_sha256", "templates_sha256"))
        self.begin("train.py", folder, read_settings(folder) | unset, "--resume")

    def run(self, folder: Path, command: list[str | Path]) -> None:
        """In a queue's thread: the command from its start to its end."""
        with open(OUTPUTS / f".{folder.name}.log", "wb") as log:
            # In a session of its own a Ctrl-C in the page's terminal does not reach it; close() hands that on.
            process = self.processes[folder] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if folder in self.unwanted:
            self.stop(folder)
        process.wait()

    def stop(self, folder: Path) -> None:
        """As Ctrl-C does, once: what there is by then is kept. A command that waits never begins."""
        self.unwanted.add(folder)
        if folder in self.begun and not self.begun[folder].cancel() and (process := self.processes.pop(folder, None)):
            process.send_signal(signal.SIGINT)  # nothing, if it has ended

    def close(self) -> None:
        """Stop all, and wait until they have saved."""
        for queue in self.queues.values():
            queue.shutdown(wait=False)
        for folder in [*self.begun]:
            self.stop(folder)
        wait(self.begun.values())

    def alive(self, folder: Path) -> bool:
        """Whether it waits or goes on."""
        return folder in self.begun and not self.begun[folder].done()

    def told(self, folder: Path) -> str:
        """How far it is; of one that has ended its last words, errors and warnings among them."""
        if self.alive(folder) and not self.begun[folder].running():
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
        found |= {folder for folder in [*self.begun] if folder.exists()}
        return {each.name: each for each in sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)}

    def words(self) -> dict[str, Path]:
        """word -> its file, of all learned words; of several with one name the newest."""
        found: dict[str, Path] = {}
        for folder in self.folders().values():
            with suppress(InputError):  # there is no word in it, or it is damaged
                found = dict.fromkeys(load_embeddings(file := folder / "embedding.safetensors"), file) | found
        return found
