"""What a training run keeps in its folder: settings, losses, previews, the word, and all that --resume needs.

    embedding.safetensors, embedding-000100.safetensors, …    the word, now and after so many steps
    preview.png, previews/                                    pictures with the word as it is being learned
    loss.csv, settings.json                                   what happened, and with which options
    resume.safetensors                                        the vectors, the optimiser's moments, the generator

A file is replaced whole or not at all; loss.csv grows by a line a step.
"""

import csv
import json
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.files import write_atomically
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.images import contact_sheet, read_image, save_image, to_images, to_tensor
from tinyldm.latent_diffusion import LatentDiffusion

PREVIEWS = {"object": "a photo of {}", "style": "a painting in the style of {}"}
PREVIEW_SEEDS = range(5)  # one picture each, in every row of preview.png
FREE_TO_CHANGE = {"steps", "preview_every", "save_every", "device", "resume", "out"}  # between a run and its --resume


class Run:
    """How far the learning of one word has come, and the folder that keeps it."""

    def __init__(
        self,
        options: Namespace,  # train.py's, none of them left open
        weights_sha256: str,  # which weights the word belongs to
        vectors: Tensor,  # (vectors, width), that learn
        optimizer: torch.optim.Optimizer,  # of these vectors alone
    ):
        self.options, self.vectors, self.optimizer = options, vectors, optimizer
        self.folder: Path = options.out
        named = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        self.settings = named | {"weights_sha256": weights_sha256}  # as JSON takes them
        self.generator = torch.Generator().manual_seed(options.seed)
        self.done = 0  # steps
        self.before = self.good = vectors.detach().clone()  # before the step; the last known to give a finite loss
        self.prompt = PREVIEWS[options.property].format(options.token)
        self.previews: dict[str, Image.Image] = {}  # label -> row of preview.png

    def start(self, images: list[Image.Image]) -> None:
        """Write what there is before the first step. images: the training pictures."""
        (self.folder / "previews").mkdir(parents=True, exist_ok=True)
        self.add_preview("training", strip(to_tensor(images)))
        with write_atomically(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        (self.folder / "loss.csv").write_text("step,loss,norm\n")
        self.save()

    def resume(self) -> None:
        """Take everything up where the folder left it. Raises InputError if there is nothing, or another run."""
        try:
            saved = json.loads((self.folder / "settings.json").read_text())
            state = load_file(self.folder / "resume.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise InputError(f"nothing to resume in {self.folder} ({error}); leave out --resume to start") from error
        for name, value in self.settings.items():
            if name not in FREE_TO_CHANGE and saved.get(name) != value:
                raise InputError(
                    f"the run in {self.folder} has {name} {saved.get(name)}, not {value}; give the same options again"
                )
        if len(state["vectors"]) != len(self.vectors):  # --init's file is another by now
            found = f"{self.options.init} has {len(self.vectors)} vectors"
            raise InputError(
                f"--init: {found}, but this run started with {len(state['vectors'])}; put the file back as it was"
            )
        self.vectors.data.copy_(state["vectors"])
        self.done = int(state["done"])
        self.generator.set_state(state["generator"])
        self.optimizer.state[self.vectors] = {
            "step": torch.tensor(float(self.done)),
            "exp_avg": state["exp_avg"].to(self.vectors.device),
            "exp_avg_sq": state["exp_avg_sq"].to(self.vectors.device),
        }
        # A run that was killed may have logged and shown steps after its last save; they are taken again.
        with open(self.folder / "loss.csv", newline="") as file:
            header, *rows = csv.reader(file)
        with write_atomically(self.folder / "loss.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= self.done)])
        steps = sorted(file.stem for file in (self.folder / "previews").glob("[0-9]*.png"))
        for name in ["training", *(step for step in steps if int(step) <= self.done)]:
            self.previews[self.label(name)] = read_image(self.folder / "previews" / f"{name}.png")

    def steps(self, model: LatentDiffusion) -> Iterator[int]:
        """The numbers of the steps that are left, a progress bar beside them, previews and saves between them.

        Ctrl-C ends them after the step that it comes in.
        """
        options = self.options
        bar = tqdm(total=options.steps, initial=self.done, desc=f"learning {options.token}")
        with bar, cli.stop_on_interrupt() as stopping:
            while self.done < options.steps and not stopping():
                if self.done % options.preview_every == 0:
                    self.preview(model)
                self.before = self.vectors.detach().clone()
                yield self.done
                bar.update()
                bar.set_postfix(loss=f"{self.loss:.4f}")
                if self.done % options.save_every == 0:
                    self.save()
        self.save()
        if self.done == options.steps:
            self.preview(model)

    def log(self, loss: Tensor) -> None:
        """One step is done. If its loss was not finite, keep the last vectors whose was, and raise InputError."""
        self.loss, norm = torch.stack([loss.detach(), self.vectors.detach().norm(dim=1).mean()]).tolist()
        if not math.isfinite(self.loss):
            file = self.folder / "embedding.safetensors"
            save_embeddings(file, {self.options.token: self.good})
            raise InputError(
                f"the loss became {self.loss} at step {self.done}, expected a finite number; the vectors from before "
                f"are kept in {file}; try a smaller --lr than {self.options.lr:g}"
            )
        self.good = self.before
        self.done += 1
        with open(self.folder / "loss.csv", "a", newline="") as file:
            csv.writer(file).writerow([self.done, f"{self.loss:.6f}", f"{norm:.4f}"])

    def save(self) -> None:
        """The word, for sample.py and everybody; and the optimiser and generator besides, for --resume."""
        vectors = self.vectors.detach().cpu()
        save_embeddings(self.folder / "embedding.safetensors", {self.options.token: vectors})
        if self.done:
            save_embeddings(self.folder / f"embedding-{self.done:06d}.safetensors", {self.options.token: vectors})
        moments = self.optimizer.state.get(self.vectors, {})
        state = {
            "vectors": vectors,
            "exp_avg": moments.get("exp_avg", torch.zeros_like(vectors)).cpu(),
            "exp_avg_sq": moments.get("exp_avg_sq", torch.zeros_like(vectors)).cpu(),
            "generator": self.generator.get_state(),
            "done": torch.tensor(self.done),
        }
        with write_atomically(self.folder / "resume.safetensors") as temporary:
            save_file(state, temporary)

    def preview(self, model: LatentDiffusion) -> None:
        """One more row of preview.png: the same prompt and seeds, with the word as it is now."""
        words, size = {self.options.token: self.vectors}, self.options.size
        prompts = [self.prompt] * len(PREVIEW_SEEDS)
        *_, z_0 = model.generate(prompts, PREVIEW_SEEDS, words=words, height=size, width=size)
        self.add_preview(f"{self.done:06d}", strip(model.decode(z_0)))

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
        if self.done < self.options.steps:
            given = [word for word in arguments if word != "--resume"]
            out = [] if any(word.startswith("--out") for word in given) else ["--out", self.folder]
            command = cli.command("python", "train.py", *given, *out, "--resume")
            done = f"stopped after {self.done} of {self.options.steps} steps"
            return f"{done}, saved in {cli.printable(self.folder)}; to go on:\n  {command}"
        preview = cli.printable(self.folder / "preview.png")
        return f"learned {self.options.token}: look at {preview}, then try\n  {self.sample_command()}"

    def sample_command(self) -> str:
        options = self.options
        prompt = self.prompt if options.property == "style" else f"{self.prompt} on a green background"
        words = ["python", "sample.py", "--prompt", prompt]
        weights = options.weights if options.weights != cli.TINY else None
        model = {"--weights": weights, "--vae": options.vae, "--prediction": options.prediction}
        for option, value in {"--embedding": self.folder / "embedding.safetensors", **model}.items():
            # A path that begins with a dash would be an option, if it stood alone.
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, value] if value else []
        return cli.command(*words)


def strip(pictures: Tensor) -> Image.Image:
    """(n, 3, h, w) -> one image of at most as many pictures side by side as a preview has."""
    return to_images(rearrange(pictures[: len(PREVIEW_SEEDS)], "n c h w -> 1 c h (n w)"))[0]
