"""How the tiny checkpoint was made, in SD's own order: CLIP, autoencoder, text encoder and UNet, a better decoder.

    python -m tinyldm.lab.pretraining                       all stages, then weights/tiny; hours on two cores
    python -m tinyldm.lab.pretraining --stage autoencoder   one stage only
    python -m tinyldm.lab.pretraining --minutes 9           stop after 9 minutes; the same command goes on from there
    python -m tinyldm.lab.pretraining --losses losses.png   only draw the losses so far (needs matplotlib)

Everything a stage needs to go on lies in runs/tiny/<stage>/, in files of at most 16 MB, besides its losses (loss.csv)
and sample sheets. The same seed gives the same pictures, captions, timesteps and noise, step by step.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from tinyldm import InputError, cli
from tinyldm.lab.pretraining import contrastive
from tinyldm.lab.pretraining.loop import is_finished, plot_losses
from tinyldm.lab.pretraining.stages import RECIPES, export, train_autoencoder, train_decoder, train_diffusion
from tinyldm.lab.world.distribution import make_pictures


def draw_losses(out: Path, file: Path) -> None:
    folders = [out / stage for stage in RECIPES if (out / stage / "loss.csv").exists()]
    if not folders:
        raise InputError(f"{out}: found no stage's loss.csv, expected what pretraining writes; train first")
    try:
        plot_losses(folders, file)
    except ImportError:
        raise InputError('matplotlib is not installed, which draws the losses; type pip install -e ".[plot]"') from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="states, losses and sheets (%(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny"), help="the checkpoint (%(default)s)")
    parser.add_argument("--stage", choices=["all", *RECIPES, "export"], default="all")
    parser.add_argument("--pictures", type=int, help="training pictures to draw; default: the stage's recipe's")
    parser.add_argument("--steps", type=int, help="of the stage; default: the recipe's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then; run again to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="only draw the losses of all stages so far")
    args = parser.parse_args(argv)

    if args.losses:
        draw_losses(args.out, args.losses)
        return
    stop_at = time.monotonic() + 60 * args.minutes
    recipes = {
        stage: replace(recipe, steps=args.steps or recipe.steps, pictures=args.pictures or recipe.pictures)
        for stage, recipe in RECIPES.items()
        if args.stage in ("all", stage)
    }
    recipes = {stage: recipe for stage, recipe in recipes.items() if not is_finished(args.out / stage, recipe)}
    if recipes:
        most = max(recipe.pictures for recipe in recipes.values())
        array, all_pictures = make_pictures(most, args.seed, workers=torch.get_num_threads())
    for stage, recipe in recipes.items():
        pixels, pictures = torch.from_numpy(array[: recipe.pictures]), all_pictures[: recipe.pictures]
        if stage == "autoencoder":
            done = train_autoencoder(args.out, pixels, recipe, args.seed, args.device, stop_at)
        elif stage == "diffusion":
            done = train_diffusion(args.out, pixels, pictures, recipe, args.seed, args.device, stop_at)
        elif stage == "decoder":
            done = train_decoder(args.out, pixels, pictures, recipe, args.seed, args.device, stop_at)
        else:
            done = contrastive.train_clip(args.out, stage, pixels, pictures, recipe, args.seed, args.device, stop_at)
        if not done:
            print(f"stopped before the end of stage {stage}; the same command goes on from here")
            return
    if args.stage in ("all", "export"):
        export(args.out, args.weights)
        contrastive.export_clip(args.out, args.weights)


if __name__ == "__main__":
    cli.run(main)
