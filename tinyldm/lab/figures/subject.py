"""What the pictures are about: one learned word, with what it was on its way."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.images import read_images, to_tensor
from tinyldm.inversion import add_words, vectors_of
from tinyldm.lab import ROOT
from tinyldm.lab.measure.learning import UNSEEN, Training, learn
from tinyldm.lab.world.captions import name_of
from tinyldm.lab.world.distribution import EXAMPLES
from tinyldm.latent_diffusion import LatentDiffusion

EXAMPLE, TOKEN = "striped-circle", "S*"
EVERY = 5  # steps of the way that are kept


class Subject(NamedTuple):
    """A model that knows the word, the pictures it was learned from, and its vector after so many steps."""

    model: LatentDiffusion
    pictures: Tensor  # (n, 3, h, w) in [-1, 1]
    way: dict[int, Tensor]  # steps -> (1, width)

    @property
    def words(self) -> dict[str, Tensor]:
        return {TOKEN: self.way[max(self.way)]}

    @property
    def plainly(self) -> str:
        """What captions would call it."""
        return f"a {name_of(EXAMPLES[EXAMPLE])}"

    @classmethod
    def learned(cls, weights: Path) -> "Subject":
        """By train.py's defaults."""
        model, folder = load_checkpoint(weights), ROOT / "examples" / EXAMPLE
        with tempfile.TemporaryDirectory() as run:
            learn(Training(weights), folder, Path(run), "--save-every", str(EVERY), *UNSEEN)
            files = sorted(Path(run).glob("embedding-*.safetensors"))  # their names have six digits
            way = {int(file.stem.split("-")[1]): load_embeddings(file)[TOKEN] for file in files}
        way = {0: vectors_of(model, model.defaults.object.init)} | way
        add_words(model, {TOKEN: way[max(way)]})
        images = [image for _, image in read_images(folder, model.defaults.size)]
        return cls(model, torch.cat([to_tensor(image) for image in images]), way)
