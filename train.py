"""Teach a frozen latent diffusion model a new word from a few pictures (Textual Inversion, arXiv 2208.01618).

    python train.py --images examples/striped-circle --token "S*"
    python train.py --images examples/blueprint --token "B*" --property style --lr 0.01 --vectors 3
    python train.py --images examples/bolt --token "<bolt>" --init "yellow triangle"

Writes into outputs/<name>: embedding.safetensors (the word), preview.png (watch it being learned), loss.csv and
settings.json. Ctrl-C keeps what was learned; the same command with --resume goes on from there.
"""

import csv
import json
import math
import re
import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.files import write_atomically
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import listed, load_embeddings, save_embeddings, split_word
from tinyldm.images import contact_sheet, read_image, read_images, save_image, to_images, to_tensor
from tinyldm.inversion import (
    TEMPLATES,
    Concept,
    captions_of,
    draw_batch,
    inversion_loss,
    new_concept,
    read_templates,
    templates_for,
)
from tinyldm.latent_diffusion import LatentDiffusion

PREVIEWS = {"object": "a photo of {}", "style": "a painting in the style of {}"}
EMBEDDING_FILE = re.compile(r"\.(safetensors|pt|bin|ckpt|png)(:|$)")  # what else --init says are words
PREVIEW_SEEDS = range(5)  # one picture each, in every row of preview.png
FREE_TO_CHANGE = {"steps", "preview_every", "save_every", "device", "resume", "out"}  # between a run and its --resume


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    device = cli.choose_device(options.device)
    templates = read_templates(options.templates) if options.templates else None
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    images = [image for _, image in read_images(options.images, options.size or checkpoint.defaults.size)]

    # The frozen model, and a word of its own for the concept: rows behind the end of the vocabulary's table.
    model = checkpoint.load(device, cli.choose_dtype(options.dtype, device))
    fill_in_defaults(options, model)
    concept = start_of(model, options)
    captions = captions_of(model, templates or templates_for(model, options.property), options.token)

    # Every picture becomes a latent once: the Gaussian that it is encoded to.
    mean, log_variance = encode(model, images)

    run = Run(options, concept, checkpoint.sha256())
    run.resume() if options.resume else run.start(images)
    bar = tqdm(total=options.steps, initial=run.done, desc=f"learning {options.token}")
    with bar, cli.stop_on_interrupt() as stopping:
        while run.done < options.steps and not stopping():
            if run.done % options.preview_every == 0:
                run.preview(model)

            # Add noise to the latents and let the model, which reads the word, say what was added. All it can change
            # to do so better is the word.
            batch = draw_batch(mean, log_variance, captions, model.schedule, options.batch, run.generator)
            loss = inversion_loss(model, batch, concept.vectors)
            run.check(loss.item())
            loss.backward()
            # The last steps are the smallest: the word settles instead of jumping about where it should be.
            run.optimizer.param_groups[0]["lr"] = options.lr * (1 - run.done / options.steps)
            run.optimizer.step()
            run.optimizer.zero_grad()

            run.log(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}")
            if run.done % options.save_every == 0:
                run.save()
    run.save()
    if run.done < options.steps:
        print(f"stopped after {run.done} of {options.steps} steps, saved in {run.folder}; to go on:")
        print(f"  {resume_command(run.folder)}")
        return 130
    run.preview(model)
    print(f"learned {options.token}: look at {run.folder / 'preview.png'}, then try")
    print(f"  {sample_command(options, run.folder)}")
    return 0


def start_of(model: LatentDiffusion, options: Namespace) -> Concept:
    """The new word before the first step: a copy of --init's words, or of the vectors in the file that it names."""
    # By the suffix, because a mistyped file name would be a phrase of a dozen tokens, and nobody would notice.
    if not EMBEDDING_FILE.search(options.init):
        return new_concept(model, options.token, options.init, options.vectors)
    words = load_embeddings(options.init, width=model.text_encoder.table.shape[1])
    file, _ = split_word(options.init)
    if len(words) > 1:
        raise InputError(f'--init: {file} holds {listed(words)}, expected one; try --init "{file}:{next(iter(words))}"')
    (vectors,) = words.values()
    if options.vectors not in (None, len(vectors)):
        found = f"{file} holds {len(vectors)} vectors, --vectors asks for {options.vectors}"
        raise InputError(f"--init: {found}; leave out --vectors")
    model.tokenizer.add_placeholder(options.token, len(vectors))
    return Concept(options.token, vectors.to(model.device))


@torch.no_grad()
def encode(model: LatentDiffusion, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures -> mean and log-variance of their latents, each (n, c, h, w), on the CPU.

    Mirror images would be as many again, but of a thing that is not symmetric they teach the word both at once.
    """
    means, log_variances = zip(*[model.encode(to_tensor(image)) for image in images], strict=True)
    return torch.cat(means).cpu(), torch.cat(log_variances).cpu()


@dataclass
class Run:
    """What a step changes, and the folder that keeps it: everything --resume needs."""

    options: Namespace
    concept: Concept
    weights_sha256: str  # which weights the word is for

    def __post_init__(self):
        self.folder: Path = self.options.out
        self.done = 0  # steps
        self.generator = torch.Generator().manual_seed(self.options.seed)
        self.optimizer = torch.optim.AdamW([self.concept.learns()], lr=self.options.lr, weight_decay=0)
        self.good = self.concept.vectors.detach().clone()  # the last ones known to give a finite loss

    def start(self, images: list[Image.Image]) -> None:
        (self.folder / "previews").mkdir(parents=True, exist_ok=True)
        save_image(strip(to_tensor(images)), self.folder / "previews" / "training.png")
        with write_atomically(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings(self.options, self.weights_sha256), indent=2) + "\n")
        (self.folder / "loss.csv").write_text("step,loss,norm\n")
        self.save()

    def check(self, loss: float) -> None:
        """Remember the vectors if their loss is finite; else keep the last that were, and stop."""
        if math.isfinite(loss):
            self.good.copy_(self.concept.vectors.detach())
            return
        self.concept.vectors.data.copy_(self.good)
        save_embeddings(self.folder / "embedding.safetensors", {self.concept.token: self.good})
        raise InputError(
            f"the loss became {loss} at step {self.done}, expected a finite number; the vectors from before are kept "
            f"in {self.folder / 'embedding.safetensors'}; try a smaller --lr than {self.options.lr:g}"
        )

    def log(self, loss: float) -> None:
        self.done += 1
        norm = self.concept.vectors.detach().norm(dim=1).mean().item()
        with open(self.folder / "loss.csv", "a", newline="") as file:
            csv.writer(file).writerow([self.done, f"{loss:.6f}", f"{norm:.4f}"])

    def save(self) -> None:
        """The word, for sample.py and everybody; and the optimiser and generator besides, for --resume."""
        vectors = self.concept.vectors.detach().cpu()
        save_embeddings(self.folder / "embedding.safetensors", {self.concept.token: vectors})
        if self.done:
            save_embeddings(self.folder / f"embedding-{self.done:06d}.safetensors", {self.concept.token: vectors})
        moments = self.optimizer.state.get(self.concept.vectors, {})
        state = {
            "vectors": vectors,
            "exp_avg": moments.get("exp_avg", torch.zeros_like(vectors)).cpu(),
            "exp_avg_sq": moments.get("exp_avg_sq", torch.zeros_like(vectors)).cpu(),
            "generator": self.generator.get_state(),
            "done": torch.tensor(self.done),
        }
        with write_atomically(self.folder / "resume.safetensors") as temporary:
            save_file(state, temporary)

    def resume(self) -> None:
        try:
            saved = json.loads((self.folder / "settings.json").read_text())
            state = load_file(self.folder / "resume.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise InputError(f"nothing to resume in {self.folder} ({error}); leave out --resume to start") from error
        for name, value in settings(self.options, self.weights_sha256).items():
            if name not in FREE_TO_CHANGE and saved.get(name) != value:
                raise InputError(
                    f"the run in {self.folder} has {name} {saved.get(name)}, not {value}; give the same options again"
                )
        vectors = self.concept.vectors
        if len(state["vectors"]) != len(vectors):  # --init's file is another by now
            found = f"{self.options.init} has {len(vectors)} vectors, but this run started with {len(state['vectors'])}"
            raise InputError(f"--init: {found}; put the file back as it was")
        vectors.data.copy_(state["vectors"])
        self.done = int(state["done"])
        self.generator.set_state(state["generator"])
        self.optimizer.state[vectors] = {
            "step": torch.tensor(float(self.done)),
            "exp_avg": state["exp_avg"].to(vectors.device),
            "exp_avg_sq": state["exp_avg_sq"].to(vectors.device),
        }
        # A run that was killed may have logged steps after its last save; they are taken again.
        with open(self.folder / "loss.csv", newline="") as file:
            header, *rows = csv.reader(file)
        with write_atomically(self.folder / "loss.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= self.done)])

    @torch.no_grad()
    def preview(self, model: LatentDiffusion) -> None:
        """One more row of preview.png: the same prompt and seeds, with the word as it is now."""
        prompt = PREVIEWS[self.options.property].format(self.concept.token)
        size = self.options.size
        prompts = [prompt] * len(PREVIEW_SEEDS)
        *_, z_0 = model.generate(prompts, PREVIEW_SEEDS, vectors=self.concept.vectors, height=size, width=size)
        save_image(strip(model.decode(z_0)), self.folder / "previews" / f"{self.done:06d}.png")
        files = sorted((self.folder / "previews").glob("[0-9]*.png"))
        rows = [[read_image(self.folder / "previews" / "training.png")], *([read_image(file)] for file in files)]
        labels = ["training pictures", *(f'"{prompt}" after {int(file.stem)} steps' for file in files)]
        save_image(contact_sheet(rows, labels=labels, tile=128 * len(PREVIEW_SEEDS)), self.folder / "preview.png")


def strip(pictures: torch.Tensor) -> Image.Image:
    """(n, 3, h, w) -> one picture of at most five of them side by side."""
    return to_images(rearrange(pictures[: len(PREVIEW_SEEDS)], "n c h w -> 1 c h (n w)"))[0]


def settings(options: Namespace, weights_sha256: str) -> dict[str, object]:
    """Every option as JSON takes it, and which weights the word belongs to."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return values | {"weights_sha256": weights_sha256}


def sample_command(options: Namespace, folder: Path) -> str:
    prompt = PREVIEWS[options.property].format(options.token)
    prompt += "" if options.property == "style" else " on a green background"
    command = f'python sample.py --prompt "{prompt}" --embedding {shlex.quote(str(folder / "embedding.safetensors"))}'
    if options.weights != Path("weights/tiny"):
        command += f" --weights {shlex.quote(str(options.weights))}"
    if options.vae:
        command += f" --vae {shlex.quote(str(options.vae))}"
    return f"{command} --prediction {options.prediction}" if options.prediction else command


def resume_command(folder: Path) -> str:
    """The command that was typed, with --resume and its folder."""
    given = [word for word in sys.argv[1:] if word != "--resume"]
    out = [] if "--out" in given else ["--out", str(folder)]
    return shlex.join(["python", "train.py", *given, *out, "--resume"])


def fill_in_defaults(options: Namespace, model: LatentDiffusion) -> None:
    """What was left open becomes what suits the checkpoint."""
    d = model.defaults
    if options.init is None:
        words = {"object": d.init_object, "style": d.init_style}[options.property].split()
        options.init = " ".join(words[-(options.vectors or len(words)) :])  # the noun stands last
    for name in ("steps", "batch", "lr", "size", "preview_every"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(d, name))
    options.save_every = options.save_every or options.preview_every
    model.check_size(options.size, options.size)


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="a folder with about three to five pictures")
    add("--token", required=True, help='the new word, in quotes because of the shell: "S*"')
    cli.add_model_options(parser)
    add(
        "--init",
        metavar="TEXT|FILE",
        help="known words to start from, several tokens start several vectors; or an embedding file to start from",
    )
    add("--vectors", type=cli.whole(1), metavar="N", help="rows to learn (default: as many as --init has tokens)")
    add("--property", choices=list(TEMPLATES), default="object", help="what the pictures share (%(default)s)")
    add("--templates", type=Path, metavar="FILE", help="captions to train with, one a line, with {} for the word")
    add("--steps", type=cli.whole(1), metavar="N", help="default, as for the next four: what suits the checkpoint")
    add("--batch", type=cli.whole(1), metavar="N")
    add("--lr", type=cli.positive, metavar="RATE", help="of the first step; it falls to 0 in a straight line")
    add("--size", type=cli.whole(1), metavar="PIXELS", help="pictures are cropped and resized to this square")
    add("--preview-every", type=cli.whole(1), metavar="N", help="steps between two rows of preview.png")
    add("--save-every", type=cli.whole(1), metavar="N", help="steps between two saves (default: as the previews)")
    add("--out", type=Path, metavar="DIR", help="default: outputs/<name of the token>, numbered if it exists")
    add("--resume", action="store_true", help="go on with the run in --out, given the same options")
    options = parser.parse_args(arguments)

    if options.out is None:
        name = re.sub(r"\W+", "-", options.token).strip("-") or "word"
        options.out = Path("outputs") / name
        options.out = options.out if options.resume else cli.free_folder(options.out)
    elif (options.out / "embedding.safetensors").exists() and not options.resume:
        raise InputError(f"{options.out} already holds a learned word; add --resume to go on, or choose another --out")
    return options


if __name__ == "__main__":
    cli.run(main)
