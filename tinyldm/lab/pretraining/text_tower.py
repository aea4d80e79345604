"""Should the UNet read CLIP's frozen text tower, or a text encoder trained with it? Both, on the same batches.

    python -m tinyldm.lab.pretraining.text_tower     after pretraining; half an hour a way

Stable Diffusion's text encoder is CLIP's and frozen, that of the first latent diffusion model is trained with the UNet
(arXiv 2112.10752, 4.3.1). Prints the mean loss of every hundred steps of both ways.
"""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from tinyldm import InputError, cli
from tinyldm.lab import ROOT
from tinyldm.lab.pretraining.loop import Job, load_section
from tinyldm.lab.pretraining.stages import STAGES, train_diffusion
from tinyldm.lab.world.distribution import make_pictures


def main(arguments: list[str]) -> None:
    recipe, _ = STAGES["diffusion"]
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=cli.path, default=ROOT / "runs" / "tiny", metavar="DIR", help="a pretraining (%(default)s)")
    add(
        "--steps",
        type=cli.whole_number(100, recipe.steps),
        default=1500,
        metavar="N",
        help="of the recipe's (%(default)s)",
    )
    add(
        "--pictures",
        type=cli.whole_number(8, 1_000_000),
        default=recipe.pictures,
        metavar="N",
        help="to draw (%(default)s)",
    )
    options = parser.parse_args(arguments)

    clip = load_section(options.out / "clip", "average")
    tower = {name: tensor.float() for name, tensor in clip.items() if name.startswith("text_model.")}
    beginning = replace(recipe, steps=options.steps, beginning_of=recipe.steps)
    needed = [options.out / "diffusion" / file for file in ("autoencoder.safetensors", "merges.txt")]
    if missing := [file for file in needed if not file.is_file()]:
        found = f"no such file: {missing[0]}"
        raise InputError(f"{found}; run its stage first: python -m tinyldm.lab.pretraining --stage diffusion")
    pixels, pictures = make_pictures(options.pictures, seed=0, workers=torch.get_num_threads())
    ways = {"joint": None, "frozen": tower}
    for way, text_encoder in ways.items():
        job = Job(options.out, f"text-{way}", beginning, torch.from_numpy(pixels), pictures, seed=0, device="cpu")
        job.stage_folder.mkdir(exist_ok=True)
        for file in needed:
            shutil.copy(file, job.stage_folder)
        train_diffusion(job, text_encoder)
    losses = {way: losses_of(options.out / f"text-{way}" / "loss.csv") for way in ways}
    for step in losses["joint"]:
        print(f"{step} steps: " + ", ".join(f"{way} {losses[way][step]:.4f}" for way in ways))


def losses_of(file: Path) -> dict[int, float]:
    """Step -> the mean loss of the hundred steps before it."""
    with open(file, newline="") as rows:
        losses = [float(row["loss"]) for row in csv.DictReader(rows)]  # a row is the mean of 50
    return {100 * (i + 1): (losses[2 * i] + losses[2 * i + 1]) / 2 for i in range(len(losses) // 2)}


if __name__ == "__main__":
    cli.run(main)
