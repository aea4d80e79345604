"""Should the UNet read CLIP's frozen text tower, or a text encoder trained with it? Both, on the same batches.

    python -m tinyldm.lab.pretraining.text_tower --out runs/tiny   after pretraining there; 20 minutes a way

Stable Diffusion's text encoder is CLIP's and frozen, that of the first latent diffusion model is trained with the UNet
(arXiv 2112.10752, 4.3.1). Prints the mean loss of every hundred steps of both ways.
"""

import argparse
import csv
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyldm.lab.pretraining import stages as pretrain
from tinyldm.lab.pretraining.loop import Recipe, load_section
from tinyldm.lab.world.distribution import make_pictures


@dataclass(frozen=True)
class Beginning(Recipe):
    """The first steps of a longer recipe."""

    of: int = 0

    def lr_at(self, step: int) -> float:
        return Recipe(self.of, self.batch, self.lr, restart=self.restart).lr_at(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="of a finished pretraining (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="of the recipe's, to train (%(default)s)")
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures to draw (%(default)s)")
    options = parser.parse_args()

    tower = {
        name: tensor.float()
        for name, tensor in load_section(options.out / "clip", "average").items()
        if name.startswith("text_model.")
    }

    class FrozenTower(pretrain.Denoiser):
        def __init__(self, vocabulary_size: int):
            super().__init__(vocabulary_size)
            self.text_encoder.load_state_dict(tower)
            self.text_encoder.requires_grad_(False)

    recipe = pretrain.RECIPES["diffusion"]
    beginning = Beginning(options.steps, recipe.batch, recipe.lr, restart=recipe.restart, of=recipe.steps)
    array, pictures = make_pictures(options.pictures, seed=0, workers=torch.get_num_threads())
    ways = {"joint": pretrain.Denoiser, "frozen": FrozenTower}
    for way, denoiser in ways.items():
        folder = options.out / f"text-{way}"
        (folder / "diffusion").mkdir(parents=True, exist_ok=True)
        for file in ("autoencoder.safetensors", "merges.txt"):
            shutil.copy(options.out / "diffusion" / file, folder / "diffusion")
        pretrain.Denoiser = denoiser
        pretrain.train_diffusion(folder, torch.from_numpy(array), pictures, beginning, 0, "cpu", math.inf)
    losses = {way: losses_of(options.out / f"text-{way}" / "diffusion" / "loss.csv") for way in ways}
    for step in losses["joint"]:
        print(f"{step} steps: " + ", ".join(f"{way} {losses[way][step]:.4f}" for way in ways))


def losses_of(file: Path) -> dict[int, float]:
    """Step -> the mean loss of the hundred steps before it."""
    with open(file, newline="") as rows:
        losses = [float(row["loss"]) for row in csv.DictReader(rows)]  # a row is the mean of 50
    return {100 * (i + 1): (losses[2 * i] + losses[2 * i + 1]) / 2 for i in range(len(losses) // 2)}


if __name__ == "__main__":
    main()
