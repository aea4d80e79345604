"""What the pictures are about: one learned word, with what it was on its way."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyldm.files import write_atomically
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
KEPT = "way.safetensors"


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
    def learned(cls, weights: Path, out: Path) -> "Subject":
        """By train.py's defaults; what is kept in `out` already is not learned again."""
        model, folder = load_checkpoint(weights), ROOT / "examples" / EXAMPLE
        out.mkdir(parents=True, exist_ok=True)
        if not (out / KEPT).exists():
            with tempfile.TemporaryDirectory() as run:
                learn(Training(weights), folder, Path(run), "--save-every", str(EVERY), *UNSEEN)
                files = {file.stem.split("-")[1]: file for file in Path(run).glob("embedding-*.safetensors")}
                learned = {int(done): load_embeddings(file)[TOKEN] for done, file in files.items()}
            start = vectors_of(model, model.defaults.object.init)
            way = {str(done): vectors for done, vectors in {0: start, **learned}.items()}
            with write_atomically(out / KEPT) as temporary:
                save_file(way, temporary)
        way = {
            int(done): vectors for done, vectors in sorted(load_file(out / KEPT).items(), key=lambda one: int(one[0]))
        }
        add_words(model, {TOKEN: way[max(way)]})
        images = [image for _, image in read_images(folder, model.defaults.size)]
        return cls(model, torch.cat([to_tensor(image) for image in images]), way)
