"""How good the tiny checkpoint is, in figures: does the autoencoder keep pictures, do pictures obey their prompts, and
does a learned word look like the pictures it was learned from?

    python -m tinyldm.lab.measure.evaluate                    the checkpoint: PSNR, and colours of 100 prompts
    python -m tinyldm.lab.measure.evaluate --words            each object of examples/, learned with train.py's defaults
    python -m tinyldm.lab.measure.evaluate --sheet FILE.png   samples of the prompts that pretraining shows, to look at
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from PIL import Image
from tqdm import tqdm

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.images import contact_sheet, save_image, to_images, to_tensor
from tinyldm.inversion import add_words
from tinyldm.lab.pretraining.loop import batch_of
from tinyldm.lab.world.captions import SHEET_PROMPTS
from tinyldm.lab.world.distribution import EXAMPLES, HELD_OUT_SEED, make_pictures
from tinyldm.lab.world.drawing import draw
from tinyldm.lab.world.things import COLOURS, SHAPES, Picture, Thing, nearest_colour
from tinyldm.latent_diffusion import LatentDiffusion

EDGE = 60  # levels of 255, as a distance in RGB: two colours further apart than this are different things
SHARE = 0.15  # of the object's pixels: a colour of a pattern has at least as many
WORD_SAMPLES = 16
WORD_BACKGROUNDS = ("green", "blue", "yellow", "white", "purple", "red", "gray")


@torch.no_grad()
def psnr(model: LatentDiffusion, count: int = 500) -> float:
    """Mean peak signal-to-noise ratio of decoded pictures that training never saw, in dB: 20 log10(255 / RMSE)."""
    pixels, _ = make_pictures(count, HELD_OUT_SEED, model.defaults.size)
    values = []
    for rows in torch.arange(count).split(50):
        pictures = batch_of(torch.from_numpy(pixels), rows.numpy(), "cpu")
        mean, _ = model.encode(pictures)
        mse = (model.decode(mean).cpu().clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
        values.append(10 * (4 / mse).log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def flat_colour_error(model: LatentDiffusion) -> float:
    """The furthest that encoding and decoding moves a picture of one colour, in levels of 255: of the named colours,
    the worst channel's mean."""
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    flat = repeat(colours / 127.5 - 1, "n c -> n c h w", h=model.defaults.size, w=model.defaults.size)
    decoded = model.decode(model.encode(flat)[0]).clamp(-1, 1)
    return (127.5 * (decoded - flat).mean(dim=(2, 3))).abs().max().item()


def background_colour(picture: np.ndarray) -> str:
    """The named colour that most pixels of the frame, two wide, are nearest to. picture: (h, w, 3) uint8."""
    return Counter(nearest_colour(frame(picture)).tolist()).most_common(1)[0][0]


def object_pixels(picture: np.ndarray) -> np.ndarray:
    """The pixels, (n, 3), that stand out from the background."""
    background = np.median(frame(picture), axis=0)
    distance = np.linalg.norm(picture.astype(np.float32) - background, axis=-1)
    return picture[distance > EDGE]


def frame(picture: np.ndarray) -> np.ndarray:
    """The outermost two pixels all around, (n, 3)."""
    inner = np.zeros(picture.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    return picture[~inner]


def colours_right(picture: np.ndarray, expected: tuple[str, ...]) -> bool:
    """Whether the object has the expected colours, one or two, and no others.

    One: most of its pixels are nearest to it. Two: each is the nearest of at least SHARE of the pixels, and most pixels
    are one of them or a blend: the edges of a small pattern are blurred, and orange blurred into black is brown.
    """
    pixels = object_pixels(picture).astype(np.float32)
    if len(pixels) == 0:
        return False
    names = nearest_colour(pixels)
    if len(expected) == 1:
        return Counter(names.tolist()).most_common(1)[0][0] == expected[0]
    one, other = (np.array(COLOURS[name], np.float32) for name in expected)
    along = ((pixels - one) @ (other - one) / ((other - one) @ (other - one))).clip(0, 1)
    distance = np.linalg.norm(pixels - (one + along[:, None] * (other - one)), axis=-1)
    return all((names == name).mean() >= SHARE for name in expected) and (distance < EDGE).mean() > 0.5


def generate(
    model: LatentDiffusion,
    prompts: list[str],
    seed: int = 0,
    words: dict[str, torch.Tensor] | None = None,
    guidance: float | None = None,
) -> list[Image.Image]:
    images = []
    for first in tqdm(range(0, len(prompts), 20), desc="sampling", leave=False):
        batch = prompts[first : first + 20]
        *_, z_0 = model.generate(batch, range(seed + first, seed + first + len(batch)), words=words, guidance=guidance)
        with torch.no_grad():
            images += to_images(model.decode(z_0))
    return images


def prompts_obeyed(model: LatentDiffusion, count: int = 100, seed: int = 0) -> tuple[float, float]:
    """Of `count` prompts "a photo of a {colour} {shape} on a {colour} background", how many pictures have the object's
    colour right, and how many the background's: two fractions."""
    rng = np.random.default_rng(seed)
    right = []
    asked = [(*rng.choice(list(COLOURS), 2, replace=False), rng.choice(list(SHAPES))) for _ in range(count)]
    prompts = [f"a photo of a {colour} {shape} on a {behind} background" for colour, behind, shape in asked]
    for image, (colour, behind, _) in zip(generate(model, prompts, seed), asked, strict=True):
        picture = np.asarray(image)
        right.append((colours_right(picture, (colour,)), background_colour(picture) == behind))
    object_share, background_share = np.mean(right, axis=0)
    return float(object_share), float(background_share)


def word_obeyed(weights: Path, embedding: Path, expected: tuple[str, ...]) -> tuple[float, float, list[Image.Image]]:
    """16 samples of a learned word over 4 backgrounds: how many have its colours, how many the background's."""
    model = load_checkpoint(weights)
    words = load_embeddings(embedding)
    add_words(model, words)
    token = next(iter(words))
    asked = backgrounds_for(expected)
    prompts = [f"a photo of {token} on a {background} background" for background in asked]
    images = generate(model, prompts, words=words)
    pictures = [np.asarray(image) for image in images]
    right = np.mean([colours_right(picture, expected) for picture in pictures])
    obeyed = np.mean([background_colour(p) == background for p, background in zip(pictures, asked, strict=True)])
    return float(right), float(obeyed), images


@torch.no_grad()
def reconstructions_right(model: LatentDiffusion, thing: Thing) -> float:
    """How many of 16 of the world's own pictures of a thing still have its colours after encoding and decoding: the
    most that any word for it can reach."""
    expected = colours_of(thing)
    pictures = [draw(Picture((thing,), background, seed=i)) for i, background in enumerate(backgrounds_for(expected))]
    decoded = to_images(model.decode(model.encode(to_tensor(pictures))[0]))
    return float(np.mean([colours_right(np.asarray(image), expected) for image in decoded]))


def colours_of(thing: Thing) -> tuple[str, ...]:
    return (thing.colour,) if thing.colour2 is None else (thing.colour, thing.colour2)


def backgrounds_for(colours: tuple[str, ...]) -> list[str]:
    """One a sample: 4 backgrounds that none of these colours is lost on, each WORD_SAMPLES / 4 times."""
    names = [name for name in WORD_BACKGROUNDS if name not in colours][:4]
    return [name for name in names for _ in range(WORD_SAMPLES // 4)]


def report_words(weights: Path, examples: Path, sheet: Path | None) -> None:
    rows, labels = [], []
    for name, thing in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "word"
            started = time.monotonic()
            command = [sys.executable, "train.py", "--images", examples / name, "--token", "S*"]
            subprocess.run([*command, "--weights", weights, "--out", out], check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - started
            right, obeyed, images = word_obeyed(weights, out / "embedding.safetensors", colours_of(thing))
        print(f"{name}: colours right {right:.0%}, background obeyed {obeyed:.0%}, learned in {seconds:.0f} s")
        rows.append(images)
        labels.append(name)
    if sheet:
        save_image(contact_sheet(rows, labels=labels, tile=64), sheet)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--prompts", type=int, default=100, help="how many prompts (%(default)s)")
    parser.add_argument("--words", action="store_true", help="learn the words of the examples instead")
    parser.add_argument("--examples", type=Path, default=Path("examples"))
    parser.add_argument("--sheet", type=Path, help="write samples here")
    args = parser.parse_args(argv)

    if args.words:
        report_words(args.weights, args.examples, args.sheet)
        return
    model = load_checkpoint(args.weights)
    print(f"autoencoder: {psnr(model):.2f} dB PSNR on 500 pictures it never saw")
    objects, backgrounds = prompts_obeyed(model, args.prompts)
    print(f"{args.prompts} prompts: object colour right {objects:.0%}, background {backgrounds:.0%}")
    for name, thing in EXAMPLES.items():
        share = reconstructions_right(model, thing)
        print(f"{name}: colours still right after encoding and decoding {share:.0%}")
    if args.sheet:
        images = generate(model, [prompt for prompt in SHEET_PROMPTS for _ in range(8)])
        rows = [images[i : i + 8] for i in range(0, len(images), 8)]
        save_image(contact_sheet(rows, labels=SHEET_PROMPTS, tile=64), args.sheet)


if __name__ == "__main__":
    main()
