"""A picture to begin with, from files: what of it a painted mask lets change, and pasting it together again."""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageFilter

from tinyldm import InputError
from tinyldm.editing import Mask, Source
from tinyldm.images import fitted, read_image, to_tensor


def read_source(
    file: Path,
    mask: Path | None,  # of the same size as the file
    strength: float,
    height: int,  # pixels, as the next: of the largest part in its middle
    width: int,
    factor: int,  # pixels a side of a cell of the latent
) -> Source:
    """Raises InputError as read_image does, and for a mask of another size or without white."""
    image = read_image(file)
    if mask:
        white = read_image(mask, background="black")  # of a layer that was painted on, only the paint is white
        if white.size != image.size:
            found, expected = (f"{each.width}x{each.height} pixels" for each in (white, image))
            raise InputError(
                f"{mask} has {found}, expected {expected} as {file} has; paint it on a copy of that picture"
            )
        pixels = np.asarray(fitted(white, height, width).convert("L")) >= 128
        if not pixels.any():
            raise InputError(f"{mask} is black all over, expected white where the picture is to change; paint it there")
    picture = to_tensor(fitted(image, height, width))
    return Source(picture, strength, mask_of(pixels, factor) if mask else None)


def mask_of(pixels: np.ndarray, factor: int) -> Mask:
    """A mask whose cells are those that are white in half of their pixels.

    pixels: (height, width) bool, the white ones; factor: a cell's side in pixels. What is too thin for that is widened
    to all the cells that it touches, and a warning says so.
    """
    white = rearrange(torch.from_numpy(pixels).float(), "h w -> 1 1 h w")
    cells = (F.avg_pool2d(white, factor) >= 0.5).float()
    near = F.max_pool2d(cells, 3, stride=1, padding=1)
    thin = (F.max_pool2d(white, factor) - near).clamp(min=0)  # touched, and no cell is near
    if thin.any():
        found = f"parts of the mask are thinner than the latent, which has a cell for {factor}x{factor} pixels"
        warnings.warn(f"{found}; they are widened", stacklevel=2)
    widened = repeat(thin[0, 0].bool().numpy(), "h w -> (h a) (w b)", a=factor, b=factor)
    return Mask(pixels | widened, torch.maximum(cells, thin))


def pasted(image: Image.Image, outside: Image.Image, mask: Mask) -> Image.Image:
    """The one image inside the mask, the other outside, with a soft edge on the inside.

    The decoder's convolutions and norms carry a little of what changed to where the latent did not. So what stands
    outside should be the original's own, decoded by itself or as it was.
    """
    white = mask.pixels.astype(np.uint8) * 255
    blurred = Image.fromarray(white).filter(ImageFilter.GaussianBlur(len(white) / mask.cells.shape[2] / 4))
    edge = (2 * np.asarray(blurred, int) - 255).clip(min=0).astype(np.uint8)  # none of it where less than half is white
    return Image.composite(image, outside, Image.fromarray(np.minimum(edge, white)))
