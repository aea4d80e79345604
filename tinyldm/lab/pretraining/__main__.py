"""How the tiny checkpoint was made, in SD's own order: CLIP, autoencoder, text encoder and UNet, a better decoder.

    python -m tinyldm.lab.pretraining                       all stages, then weights/tiny; hours on two cores
    python -m tinyldm.lab.pretraining --stage autoencoder   one stage only
    python -m tinyldm.lab.pretraining --minutes 9           stop after 9 minutes; the same command goes on from there
    python -m tinyldm.lab.pretraining --losses losses.png   only draw the losses so far (needs matplotlib)

Everything a stage needs to go on lies in runs/tiny/<stage>/, besides its losses (loss.csv) and sample sheets. The same
seed gives the same pictures, captions, timesteps and noise, step by step.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from tinyldm import InputError, cli
from tinyldm.lab import ROOT, TINY, file_to_write
from tinyldm.lab.pretraining.contrastive import export_clip
from tinyldm.lab.pretraining.loop import Job, plot_losses, saved_step
from tinyldm.lab.pretraining.stages import STAGES, export
from tinyldm.lab.world.distribution import make_pictures


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=cli.path, default=ROOT / "runs" / "tiny", metavar="DIR", help="states, losses (%(default)s)")
    add("--weights", type=cli.path, default=TINY, metavar="DIR", help="the checkpoint to write (%(default)s)")
    add(
        "--stage",
        choices=["all", *STAGES, "export"],
        default="all",
        help="one stage, or export: write the checkpoint as far as it has come (%(default)s)",
    )
    # Eight, because so many are on the sheets.
    add(
        "--pictures",
        type=cli.whole_number(8, 1_000_000),
        metavar="N",
        help="to draw (default: as many as the recipe says)",
    )
    add("--steps", type=cli.whole_number(1), metavar="N", help="of the stage (default: the recipe's)")
    add("--minutes", type=cli.positive, default=math.inf, metavar="N", help="stop by then; run again to go on")
    add(
        "--seed",
        type=cli.whole_number(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="same seed, same training (%(default)s)",
    )
    add("--device", choices=["cpu", "cuda", "mps"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--losses", type=file_to_write, metavar="FILE", help="only draw the losses of all stages so far")
    options = parser.parse_args(arguments)
    stop_at = time.monotonic() + 60 * options.minutes
    device = cli.choose_device(options.device)

    if options.losses:
        draw_losses(options.out, options.losses)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage in ("all", "export"):
        options.weights.mkdir(parents=True, exist_ok=True)  # before the hours of training, not after them
    recipes = {}
    for stage, (recipe, _) in STAGES.items():
        recipe = replace(recipe, steps=options.steps or recipe.steps, pictures=options.pictures or recipe.pictures)
        if options.stage in ("all", stage) and saved_step(options.out / stage) < recipe.steps:
            recipes[stage] = recipe
    if recipes:
        most = max(recipe.pictures for recipe in recipes.values())
        pixels, pictures = make_pictures(most, options.seed, workers=torch.get_num_threads())
    for stage, recipe in recipes.items():
        n = recipe.pictures
        job = Job(options.out, stage, recipe, torch.from_numpy(pixels[:n]), pictures[:n], options.seed, device, stop_at)
        _, train = STAGES[stage]
        if not train(job):
            print(f"stopped before the end of stage {stage}; the same command goes on from here")
            return
    if options.stage in ("all", "export"):
        export(options.out, options.weights)
        export_clip(options.out, options.weights)


def draw_losses(out: Path, file: Path) -> None:
    folders = [out / stage for stage in STAGES if (out / stage / "loss.csv").exists()]
    if not folders:
        raise InputError(f"{out}: found no stage's loss.csv, expected what pretraining writes; train first")
    plot_losses(folders, file)


if __name__ == "__main__":
    cli.run(main)
