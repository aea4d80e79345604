"""Where in a picture each word of its prompt went: cross-attention as heat maps (DAAM, arXiv 2210.04885).

Every pixel of the UNet's feature maps shares out its attention among the prompt's tokens. The mean of a token's share
over heads, layers and steps, all brought to the latent's size, is its heat map.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from tinyldm.images import contact_sheet, enlarged
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import CrossAttention, UNet

TILE, COLUMNS = 128, 6  # of a sheet: a picture's pixels, at least, and how many side by side
# Colours of no heat, a third, two thirds, and the most.
HEAT = np.array([(0, 0, 96), (0, 160, 200), (250, 220, 0), (220, 0, 0)])


class HeatMaps:
    """What the UNet's cross-attention looks at while it is watched."""

    def __init__(self, pictures: int, height: int, width: int):
        """pictures: how many there are in a batch, guidance's second half of it left out; then the latent's size."""
        self.pictures, self.size = pictures, (height, width)
        self.sum, self.count = torch.zeros(()), 0

    def add(self, module: CrossAttention, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        """A forward hook. The fused kernel keeps no shares, so they are computed once more."""
        x, context = (each[: self.pictures] for each in inputs)
        q, k = (
            rearrange(each, "b n (heads d) -> b heads n d", heads=module.heads).float()
            for each in (module.to_q(x), module.to_k(context))
        )
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        height = math.isqrt(x.shape[1] * self.size[0] // self.size[1])  # coarser levels have the latent's proportions
        maps = reduce(shares, "b heads (h w) tokens -> b tokens h w", "mean", h=height)
        self.sum = self.sum + F.interpolate(maps, self.size, mode="bicubic", align_corners=False).clamp(0, 1).cpu()
        self.count += 1

    def mean(self) -> Tensor:
        """(pictures, tokens, height, width), each in [0, 1]."""
        return self.sum / self.count


@contextmanager
def watched(unet: UNet, maps: HeatMaps) -> Iterator[HeatMaps]:
    """While this lasts, what the UNet attends to is added to the maps; without it nothing is computed or kept."""
    to_prompt = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    hooks = [module.register_forward_hook(maps.add) for module in to_prompt]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


# ---- Words and pictures


def words_of(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, slice]]:
    """The prompt's words, and where their tokens are among those that the text encoder reads."""
    words, first = [], 1  # behind the start
    for piece in tokenizer.split_placeholders(prompt):
        for word in [piece] if piece in tokenizer.placeholders else piece.split():
            words.append((word, slice(first, first := first + len(tokenizer.encode(word)))))
    # What lies behind them was cut off; of a word of invisible characters there are none.
    return [(word, tokens) for word, tokens in words if tokens.start < tokens.stop < tokenizer.length]


def heat_sheet(image: Image.Image, prompt: str, maps: Tensor, tokenizer: Tokenizer) -> Image.Image:
    """The picture, and for each word of its prompt the picture under its heat map. maps: (tokens, h, w)"""
    image = enlarged(image, TILE)
    tiles, labels = [image], [""]
    for word, tokens in words_of(tokenizer, prompt):
        tiles.append(heated(image, maps[tokens].mean(dim=0)))
        labels.append(word)
    rows = [slice(i, i + COLUMNS) for i in range(0, len(tiles), COLUMNS)]
    return contact_sheet([tiles[row] for row in rows], labels=[labels[row] for row in rows], tile=TILE)


def heated(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in grey under a heat map (h, w), which is scaled to reach from its least to its most."""
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    grid = F.interpolate(heat[None, None], (image.height, image.width), mode="bicubic").clamp(0, 1)[0, 0].numpy()
    colours = np.stack([np.interp(grid, np.linspace(0, 1, len(HEAT)), HEAT[:, i]) for i in range(3)], axis=-1)
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(colours.astype(np.uint8)), 0.6)
