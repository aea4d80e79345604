"""Pictures: from files to tensors and back, and contact sheets to look at.

In all of tinyldm an image is one of PIL's, of mode RGB; pictures are what the models take, tensors (n, 3, height,
width) in [-1, 1]; and pixels are arrays of uint8, (n, height, width, 3).
"""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from PIL.Image import Transpose
from torch import Tensor

from tinyldm import InputError
from tinyldm.files import check_is_file, write_atomically

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
SUFFIXES |= {".avif", ".heic", ".heif"}  # Pillow alone can't read .heic; read_image says what to do about it
# What is opened, whatever a file is called: pixels only. Pillow would run ghostscript on an EPS that is called .png.
RASTER_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]

# EXIF orientation -> what brings the picture upright.
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE}
TURNS |= {6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}


def find_images(folder: str | Path) -> list[Path]:
    """The picture files of a folder (not of the folders in it), sorted by name; picture or not is told by the suffix.

    Hidden files are ignored; any other file is named in a warning.
    Raises InputError if there is no such folder, if it is a file, or if no picture is in it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file, not a folder of pictures: give the folder it is in, {folder.parent}")
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; give a folder with a few pictures in it")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        found = f"{len(files)} other files" if files else "no files"
        raise InputError(f"no picture in {folder} ({found}): put a few .png or .jpg files there, not in subfolders")
    # Beside pictures lie their captions (inversion.caption_beside), and perhaps the word (concepts.TOKEN_FILE).
    known = {*images, *(path.with_suffix(".txt") for path in images), folder / "token.txt"}
    if others := [path.name for path in files if path not in known]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(f"skipped in {folder}, not pictures by their names: {', '.join(others[:3])}{more}", stacklevel=2)
    return images


def read_image(path: str | Path, background: str = "white") -> Image.Image:
    """One picture as RGB, the way it is meant to be seen: upright, on the background where it is transparent, its first
    frame.

    Raises InputError if the file is missing, empty, cut off, not a picture, or so large that unpacking it is a risk.
    """
    check_is_file(path)
    try:
        with Image.open(path, formats=RASTER_FORMATS) as image:
            image.load()
            return as_rgb(upright(image), background)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; give the path of a picture") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large to open safely ({error}): make it smaller first") from error
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a broken file
        why = "it is empty" if Path(path).is_file() and not Path(path).stat().st_size else " ".join(str(error).split())
        raise InputError(f"{path} can't be read as a picture ({why}): save it again as PNG or JPEG") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF orientation asks. (ImageOps.exif_transpose also writes the EXIF block anew, and
    fails on blocks that are broken elsewhere.)"""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any mode that a file can have, to RGB. ValueError if nobody knows what its numbers mean."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits a pixel, grey; Pillow's own conversion clips at 255
        pixels = np.asarray(image).astype(np.float64) / 257  # 65535 = 255 * 257
        if not 0 <= pixels.min() <= pixels.max() <= 255:
            raise ValueError("its pixels are whole numbers of 32 bits and of unknown range")
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def read_images(folder: str | Path, size: int | None = None) -> list[tuple[Path, Image.Image]]:
    """All pictures of a folder with their paths; one that can't be read is skipped with a warning that says why.

    With a size they come as squares of this many pixels, so that a folder of large photographs fits into memory.
    Raises InputError as find_images does, and if none of the pictures can be read.
    """
    images, failures = [], []
    for path in find_images(folder):
        try:
            image = read_image(path)
            images.append((path, fitted(image, size, size) if size else image))
        except InputError as error:
            failures.append(error)
    if not images:
        raise InputError(f"none of the {len(failures)} pictures in {folder} can be read; the first: {failures[0]}")
    for error in failures:
        warnings.warn(f"skipped: {error}", stacklevel=2)
    return images


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part in the middle of this shape, resized to width x height pixels (Lanczos, antialiased)."""
    scale = min(image.width / width, image.height / height)
    part = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    part = image.crop((left, top, left + part[0], top + part[1]))
    return part.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(images: Image.Image | list[Image.Image]) -> Tensor:
    """Images of one size -> (n, 3, h, w) float32 in [-1, 1]; a single image gives n = 1."""
    images = [images] if isinstance(images, Image.Image) else images
    return from_pixels(torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])))


def from_pixels(pixels: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [-1, 1]."""
    return rearrange(pixels, "n h w c -> n c h w").float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(n, 3, h, w) in [-1, 1] -> n images; values outside are clamped, each is rounded to the nearest of 256 levels.

    Raises InputError if it holds NaN, which would otherwise come out as innocent black.
    """
    pictures = pictures.detach().float().cpu()
    if pictures.isnan().any():
        raise InputError(
            "the model made NaN, not a picture: expected finite numbers; try --dtype float32, or a "
            "smaller --guidance or --lr"
        )
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(one) for one in rearrange(pixels, "n c h w -> n h w c").contiguous().numpy()]


def contact_sheet(
    rows: list[list[Image.Image]],
    *,
    labels: list[str] | list[list[str]] | None = None,  # one a row or one a picture, drawn above; None: no room is left
    tile: int = 128,  # pixels; a smaller image is enlarged by a whole factor, until its longer side is this or more
    gap: int = 4,  # pixels between pictures and around them
) -> Image.Image:
    """One white picture with rows of pictures, which may differ in length. Enlarged pixels stay sharp squares, so what
    is seen is what the model made. A label too long for the sheet ends in "…"."""
    rows = [[enlarged(image, tile) for image in row] for row in rows]
    columns = max(len(row) for row in rows)
    width = max(image.width for row in rows for image in row) + gap
    height = max(image.height for row in rows for image in row) + gap
    font = ImageFont.load_default(14)
    margin = 20 if labels else 0
    sheet = Image.new("RGB", (columns * width + gap, len(rows) * (margin + height) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        top = y * (margin + height) + gap
        texts = [] if not labels else [labels[y]] if isinstance(labels[y], str) else labels[y]
        room = width if len(texts) > 1 else sheet.width
        for x, text in enumerate(texts):
            draw.text((x * width + gap, top), shortened(text, room - 2 * gap, font), "black", font)
        for x, image in enumerate(row):
            sheet.paste(image, (x * width + gap, top + margin))
    return sheet


def enlarged(image: Image.Image, least: int) -> Image.Image:
    """Every pixel repeated so often that the longer side is at least this long."""
    factor = max(1, math.ceil(least / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text on one line of at most this many pixels."""
    text = " ".join(text[: 10 * width].split())
    if font.getlength(text) <= width:
        return text
    text = text[:width]  # no letter is narrower than a pixel
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def save_image(image: Image.Image, path: str | Path, text: dict[str, str] | None = None) -> None:
    """Write a PNG that carries the text (any Unicode) in its text chunks: Image.open(path).text gives it back."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        value = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", value)  # a PNG's text has line ends, else no controls
        chunks.add_text(key, value)  # Latin-1 as tEXt, anything else as iTXt
    with write_atomically(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)
