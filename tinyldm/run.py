"""What a training run keeps in its folder: settings, losses, previews, the word, and all that --resume needs.

    embedding.safetensors, embedding-000100.safetensors, …    the word, now and after so many steps
    preview.png, previews/                                    pictures with the word as it is being learned
    loss.csv, settings.json                                   what happened, and with which options
    resume.safetensors                                        the vectors now and as they began, the optimiser's
                                                              moments, the generator

A file is replaced whole or not at all; loss.csv grows by a line a step.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli, ranks
from tinyldm.files import lock_folder, read_bytes, write_atomically
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.images import contact_sheet, read_image, save_image, to_images, to_tensor
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.recipes import Adam, AtTheEnd, OnSphere, Word

PREVIEWS = {"object": "a photo of {}", "style": "a painting in the style of {}"}
PREVIEW_SEEDS = range(5)  # one picture each, in every row of preview.png
# Options that may change between a run and its --resume: how far and where, not what is learned.
FREE_TO_CHANGE = {"steps", "preview_every", "save_every", "device", "resume", "out", "low_memory"}
OF_MANY_WORDS = {"concepts", "shard", "together"}  # options that say nothing of one word
MAX_SETTINGS_BYTES, MAX_STATE_BYTES, MAX_LOG_BYTES = 10**5, 10**8, 10**8  # of the files that --resume reads
START_ANEW = "to start anew, leave out --resume and choose a new --out"
LOG_LINE = "{},{:.6f},{:.4f}\n"  # of loss.csv: step, loss and mean norm of the vectors
NUMBER = r'"?(\d+(?:[.,]\d+)?(?:E[-+]\d+)?)"?'
LOGGED = re.compile(rf'"?(\d{{1,9}})"?([,;\t]){NUMBER}\2{NUMBER}$')  # and such a line from any spreadsheet


class Run:
    """How far the learning of one word has come, and the folder that keeps it."""

    def __init__(
        self,
        options: Namespace,  # train.py's, none of them left open
        weights_sha256: str,  # which weights the word belongs to
        images: list[Image.Image],  # the training pictures
        captions: list[list[str]],  # of each of them
        word: Word,  # that learns
        start: Tensor,  # its vectors as the recipe began them
        optimizer: Adam | OnSphere,  # of its vectors alone
        stop: AtTheEnd,
    ):
        self.options, self.word, self.optimizer, self.stop = options, word, optimizer, stop
        self.vectors, self.began = word.vectors, start
        self.folder: Path = options.out
        self.file = self.folder / "embedding.safetensors"
        self.settings = of_one_word(options) | {
            "weights_sha256": weights_sha256,
            "vectors": word.count,
            "pictures_sha256": hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest(),
            "templates_sha256": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
        }
        self.generator = torch.Generator().manual_seed(options.seed)
        self.done = 0  # steps
        self.status = 0  # to exit with; not 0 if a signal stopped the run before its last step
        self.before = self.good = self.learned  # before the step; the last known to give a finite loss
        self.prompt = PREVIEWS[options.property].format(options.token)
        self.previews: dict[str, Image.Image] = {}  # label -> row of preview.png

    @property
    def words(self) -> dict[str, Tensor]:
        """All that captions and prompts may hold by now: word -> (vectors, width)."""
        return self.word.now(self.done / self.options.steps)

    @property
    def learned(self) -> Tensor:
        """A copy of the new word's vectors, (vectors, width)."""
        return self.words[self.word.token].detach().clone()

    def start(self, images: list[Image.Image]) -> None:
        """Write what there is before the first step. images: the training pictures."""
        (self.folder / "previews").mkdir(parents=True, exist_ok=True)
        self.add_preview("training", strip(to_tensor(images)))
        with write_atomically(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        self.write_log({})
        self.save_state()  # first: a folder with a word in it can be resumed
        self.save_word()

    def resume(self) -> None:
        """Take everything up where the folder left it. Raises InputError if there is nothing, or another run."""
        state = ranks.from_first(self.saved_state)
        self.vectors.data.copy_(state["vectors"])
        self.done = int(state["done"])
        self.before = self.good = self.learned
        self.stop.history = state["watched"].tolist()
        self.generator.set_state(state["generator"])
        self.optimizer.steps = self.done
        for name, tensor in self.optimizer.state.items():
            tensor.copy_(state[name])
        self.take_up_folder()

    def take_up_folder(self) -> None:
        """Its log and previews as far as the last save; a run that was killed may have gone further, and does again."""
        rows = {step: row for step, row in self.logged().items() if step <= self.done}
        if len(rows) < self.done:
            warnings.warn(f"{self.folder}/loss.csv tells only {len(rows)} of {self.done} steps", stacklevel=3)
        self.write_log(rows)
        (self.folder / "previews").mkdir(exist_ok=True)
        steps = sorted(file.stem for file in (self.folder / "previews").glob("*.png") if file.stem.isdecimal())
        for name in ["training", *(step for step in steps if int(step) <= self.done)]:
            with suppress(InputError):  # preview.png does without one that is damaged
                self.previews[self.label(name)] = read_image(self.folder / "previews" / f"{name}.png")

    def saved_state(self) -> dict[str, Tensor]:
        """What save() left, in a folder that is this process's from now on.

        Raises InputError if anything of it is missing or damaged, if it is of another run, or if that still goes on.
        """
        if self.folder.exists():
            lock_folder(self.folder)
        file = self.folder / "settings.json"
        try:
            check_settings(self.folder, read_settings(self.folder), self.settings)
            file = self.folder / "resume.safetensors"
            saved = load(read_bytes(file, MAX_STATE_BYTES))
            for name, here in self.state().items():
                kind = (saved[name].dtype, saved[name].shape) if name in saved else None
                shape = saved[name].shape if name == "watched" and kind else here.shape
                if kind != (here.dtype, shape) or not saved[name].isfinite().all():
                    raise ValueError(f"{name} is missing or damaged")
            if not 0 <= saved["done"] <= 10**9:
                raise ValueError(f"done is {saved['done']}")
            torch.Generator().set_state(saved["generator"])  # raises RuntimeError if it is none
        except InputError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"can't resume from {file} ({error}); {START_ANEW}") from error
        return saved

    def logged(self) -> dict[int, tuple[float, float]]:
        """step -> loss and norm: all that can be read, even if the log was torn or a spreadsheet wrote it anew."""
        try:
            text = read_bytes(self.folder / "loss.csv", MAX_LOG_BYTES).replace(b"\0", b"").decode("latin-1")
        except (OSError, InputError):
            return {}
        rows = filter(None, map(LOGGED.search, text.splitlines()))
        return {int(row[1]): tuple(float(row[i].replace(",", ".")) for i in (3, 4)) for row in rows}

    def write_log(self, rows: dict[int, tuple[float, float]]) -> None:
        with write_atomically(self.folder / "loss.csv") as temporary:
            lines = "".join(LOG_LINE.format(step, *row) for step, row in sorted(rows.items()))
            temporary.write_text(f"step,loss,norm\n{lines}", newline="\n")

    def steps(self, model: LatentDiffusion) -> Iterator[int]:
        """The numbers of the steps that are left, a progress bar beside them, previews and saves between them.

        Ctrl-C or another signal to stop ends them after the step that it comes in.
        """
        bar = tqdm(total=self.options.steps, initial=self.done, desc=f"learning {self.options.token}")
        with bar, cli.stop_on_signal() as stopping:
            for step in self.steps_until(stopping, model):
                yield step
                bar.update()
                bar.set_postfix(loss=f"{self.loss:.4f}")
            stopped = ranks.highest(stopping())
            self.status = 0 if self.finished else stopped
        self.end(model)

    def steps_until(self, stopping: Callable[[], int], model: LatentDiffusion) -> Iterator[int]:
        """The same without a bar, until stopping() is true before a step."""
        while not ranks.highest(self.finished or stopping()):
            if self.is_to_be_seen:
                self.preview(model)
            self.before = self.learned
            yield self.done
            if self.done % self.options.save_every == 0:
                self.save()

    def end(self, model: LatentDiffusion) -> None:
        """After the last of these steps."""
        self.save()
        if self.finished:
            self.preview(model)

    @property
    def is_to_be_seen(self) -> bool:
        """Whether pictures are made between these steps; most is learned in the first ones."""
        if every := self.options.preview_every:
            return self.done % every == 0
        return self.done in (0, self.options.steps // 10, self.options.steps // 3)

    @property
    def enough(self) -> str:
        """Why the recipe stops it before its last step, if it does."""
        return self.stop.reason()

    @property
    def finished(self) -> bool:
        return self.done >= self.options.steps or bool(self.enough)

    def log(self, loss: Tensor) -> None:
        """One step is done. If its loss was not finite, keep the last vectors whose was, and raise InputError."""
        self.loss, norm = torch.stack([loss.detach(), self.learned.norm(dim=1).mean()]).tolist()
        if math.isfinite(self.loss):
            self.good = self.before
        if not math.isfinite(self.loss) or not math.isfinite(norm):
            self.keep_good()
            raise InputError(
                f"the loss became {self.loss} and the norm {norm} at step {self.done}, expected finite numbers; the "
                f"vectors from before are kept in {self.file}; try a smaller --lr than {self.options.lr:g}"
            )
        self.done += 1
        self.add_to_log(norm)
        self.stop.watch(self.words)

    def keep_good(self) -> None:
        save_embeddings(self.file, {self.options.token: self.good})

    def add_to_log(self, norm: float) -> None:
        with open(self.folder / "loss.csv", "a", newline="") as file:
            file.write(LOG_LINE.format(self.done, self.loss, norm))

    def save(self) -> None:
        """The word, for sample.py and everybody; and the optimiser and generator besides, for --resume."""
        self.save_word()
        self.save_state()

    def save_word(self) -> None:
        learned = {self.options.token: self.learned.cpu()}
        save_embeddings(self.file, learned)
        if self.done:
            save_embeddings(self.folder / f"embedding-{self.done:06d}.safetensors", learned)

    def save_state(self) -> None:
        with write_atomically(self.folder / "resume.safetensors") as temporary:
            enough_of = self.options.steps if self.enough else 0  # the steps that its recipe did not need all of
            save_file(self.state() | {"start": self.began, "enough_of": torch.tensor(enough_of)}, temporary)

    def state(self) -> dict[str, Tensor]:
        """What --resume needs."""
        vectors = self.vectors.detach().cpu()
        return {
            "vectors": vectors,
            **{name: tensor.cpu() for name, tensor in self.optimizer.state.items()},
            "generator": self.generator.get_state(),
            "done": torch.tensor(self.done),
            "watched": torch.tensor(self.stop.history, dtype=torch.float64),
        }

    def preview(self, model: LatentDiffusion) -> None:
        """One more row of preview.png: the same prompt and seeds, with the word as it is now.

        Half of the sampler's steps are enough: of the tiny checkpoint, pictures in 12 and in 25 of DDIM look the same.
        """
        how = {"words": self.words, "steps": math.ceil(model.defaults.sampler_steps / 2)}
        how |= {"height": self.options.size, "width": self.options.size}
        at_a_time, pictures = 1 if self.options.low_memory else len(PREVIEW_SEEDS), []
        for first in range(0, len(PREVIEW_SEEDS), at_a_time):
            seeds = PREVIEW_SEEDS[first : first + at_a_time]
            *_, z_0 = model.generate([self.prompt] * len(seeds), seeds, **how)
            pictures.append(model.decode(z_0))
        self.add_preview(f"{self.done:06d}", strip(torch.cat(pictures)))

    def add_preview(self, name: str, row: Image.Image) -> None:
        """name: "training", or the number of the step."""
        save_image(row, self.folder / "previews" / f"{name}.png")
        self.previews[self.label(name)] = row
        rows = [[row] for row in self.previews.values()]
        sheet = contact_sheet(rows, labels=list(self.previews), tile=128 * len(PREVIEW_SEEDS))
        save_image(sheet, self.folder / "preview.png")

    def label(self, name: str) -> str:
        return "training pictures" if name == "training" else f'"{self.prompt}" after {int(name)} steps'

    def what_next(self, arguments: list[str]) -> str:
        """What to type now, in two lines. arguments: what was typed after train.py."""
        if not self.finished:
            given = [word for word in arguments if word != "--resume"]
            out = [] if any(word.startswith("--out") for word in given) else ["--out", self.folder]
            command = cli.command(*ranks.command(), "train.py", *given, *out, "--resume")
            done = f"stopped after {self.done} of {self.options.steps} steps"
            return f"{done}, saved in {cli.printable(self.folder)}; to go on:\n  {command}"
        preview = cli.printable(self.folder / "preview.png")
        early = f"stopped after {self.done} of {self.options.steps} steps: {self.enough}\n" if self.enough else ""
        return f"{early}learned {self.options.token}: look at {preview}, then try\n  {self.sample_command()}"

    def sample_command(self) -> str:
        options = self.options
        prompt = self.prompt if options.property == "style" else f"{self.prompt} on a green background"
        words = ["python", "sample.py", "--prompt", prompt]
        weights = options.weights if options.weights != cli.TINY else None
        model = {"--weights": weights, "--vae": options.vae, "--prediction": options.prediction}
        for option, value in {"--embedding": self.file, **model}.items():
            # A path that begins with a dash would be an option, if it stood alone.
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, value] if value else []
        return cli.command(*words)


def folder_for(token: str) -> Path:
    """Where the run of a word goes, unless --out says otherwise: its letters and digits, dashes for all else."""
    return Path("outputs", re.sub(r"\W+", "-", token)[:60].strip("-") or "word")


def clear_unsaved(folder: Path) -> None:
    """Delete what a run wrote that was ended before its first save, so that it can begin again.

    Raises InputError if that run still goes on.
    """
    written = {"previews", "preview.png", "settings.json", "loss.csv"}  # by start(), before it saves
    if folder.is_dir() and {name for name in os.listdir(folder) if not name.startswith(".")} <= written:
        lock_folder(folder)
        shutil.rmtree(folder / "previews", ignore_errors=True)
        for name in written - {"previews"}:
            (folder / name).unlink(missing_ok=True)


def start_of(folder: Path, like: Tensor) -> Tensor | None:
    """The vectors that the run in the folder began with; None if it does not say, as of before they were kept.

    Not what its recipe would begin with now: the file of --init may be another one, and a search end elsewhere.
    """
    with suppress(OSError, InputError, SafetensorError, KeyError):
        start = load(read_bytes(folder / "resume.safetensors", MAX_STATE_BYTES))["start"]
        if (start.dtype, start.shape) == (like.dtype, like.shape) and start.isfinite().all():
            return start
    return None


def of_one_word(options: Namespace) -> dict[str, object]:
    """train.py's options as JSON takes them, but for those that say nothing of one word."""
    own = {name: value for name, value in vars(options).items() if name not in OF_MANY_WORDS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}


def check_settings(folder: Path, saved: dict[str, object], here: dict[str, object]) -> None:
    """Raises InputError if the run in the folder has others than here, ValueError if one is missing."""
    for name, value in here.items():
        if name in FREE_TO_CHANGE or saved.get(name) == value:
            continue
        if name not in saved:
            raise ValueError(f"{name} is missing")
        if name.endswith("_sha256"):
            found = f"the {name.removesuffix('_sha256')} are not those that the run in {folder} began with"
            raise InputError(f"{found}; put them back as they were; {START_ANEW}")
        found = f"the run in {folder} has {name} {saved[name]!s:.100}, not {value}"
        raise InputError(f"{found}; give the same options and files again")


def read_settings(folder: Path) -> dict[str, object]:
    """The options of the run in the folder. Raises OSError or ValueError if they are not there or damaged."""
    return dict(json.loads(read_bytes(folder / "settings.json", MAX_SETTINGS_BYTES).decode("utf-8-sig")))


def is_done(folder: Path, steps: int) -> bool:
    """Whether the run in the folder has taken so many steps, or as many as its recipe wants, and made its last preview,
    after which nothing is left to do. It has not if there is none, or if it can't be read."""
    with suppress(OSError, InputError, SafetensorError, KeyError, ValueError, RuntimeError):
        saved = load(read_bytes(folder / "resume.safetensors", MAX_STATE_BYTES))
        done = int(saved["done"])
        ended = done >= steps or int(saved.get("enough_of", 0)) == steps  # a run of before this was kept has none
        return ended and (folder / "previews" / f"{done:06d}.png").exists()
    return False


class Follower(Run):
    """The run as a rank sees it that is not the first: it learns the same word, and leaves the folder alone."""

    def start(self, images: list[Image.Image]) -> None: ...

    def take_up_folder(self) -> None: ...

    def keep_good(self) -> None: ...

    def add_to_log(self, norm: float) -> None: ...

    def save(self) -> None: ...

    def preview(self, model: LatentDiffusion) -> None: ...


def strip(pictures: Tensor) -> Image.Image:
    """(n, 3, h, w) -> one image of at most as many pictures side by side as a preview has."""
    return to_images(rearrange(pictures[: len(PREVIEW_SEEDS)], "n c h w -> 1 c h (n w)"))[0]
