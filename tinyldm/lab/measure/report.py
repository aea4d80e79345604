"""The figures of a checkpoint, printed as they are measured: its autoencoder, its prompts, its words, its variety."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.images import contact_sheet, from_pixels, save_image, to_images, to_tensor
from tinyldm.inversion import add_words
from tinyldm.lab import ROOT
from tinyldm.lab.measure.colours import colour_error, colours_of, colours_right, spread
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.questions import PROMPTS, Question, backgrounds_for, combined, enough, on_backgrounds
from tinyldm.lab.world.captions import SHEET_PROMPTS, name_of, with_articles
from tinyldm.lab.world.distribution import EXAMPLE_SIZE, EXAMPLES, HELD_OUT_SEED, make_pictures, pictures_of
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import COLOURS, Picture, Thing
from tinyldm.latent_diffusion import LatentDiffusion

PATTERNS_SEED = 4_000_037  # of pictures that neither pretraining nor the judge's training ever drew


def sampled(
    model: LatentDiffusion,
    prompts: Sequence[str],
    words: dict[str, Tensor] | None = None,
    guidance: float | None = None,
) -> list[Image.Image]:
    """One image for each prompt, the i-th from the seed i. guidance: None for the checkpoint's own."""
    images = []
    for rows in tqdm(torch.arange(len(prompts)).split(20), desc="sampling", leave=False):
        seeds = rows.tolist()
        *_, z_0 = model.generate([prompts[i] for i in seeds], seeds, words=words, guidance=guidance)
        images += to_images(model.decode(z_0))
    return images


@torch.no_grad()
def decoded(model: LatentDiffusion, pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1], encoded and decoded: as near as the UNet's own could come."""
    return torch.cat([model.decode(model.encode(batch)[0]).cpu() for batch in pictures.split(50)]).clamp(-1, 1)


def ask(
    model: LatentDiffusion,
    judge: Judge,
    questions: Sequence[Question],
    words: dict[str, Tensor] | None = None,
    guidance: float | None = None,
) -> tuple[dict[str, float], list[Image.Image]]:
    """The share of the pictures in which each check is passed, and the pictures."""
    images = sampled(model, [with_articles(question.prompt) for question in questions], words, guidance)
    passed: dict[str, list[bool]] = {}
    for question, image, said in zip(questions, images, judge.answers(to_tensor(images)), strict=True):
        for what, check in question.checks.items():
            passed.setdefault(what, []).append(bool(check(np.asarray(image), said)))
    return {what: float(np.mean(values)) for what, values in passed.items()}, images


def as_shares(figures: dict[str, float]) -> str:
    return ", ".join(f"{what} {value:.0%}" for what, value in figures.items())


def save_judged(folder: Path | None, file: str, rows: list[list[Image.Image]], labels: list[str] | None = None) -> None:
    """A sheet of what was judged, to look at; nothing if there is no folder."""
    if folder:
        save_image(contact_sheet(rows, labels=labels, tile=64), folder / file)


def in_rows(images: list[Image.Image], length: int) -> list[list[Image.Image]]:
    return [images[i : i + length] for i in range(0, len(images), length)]


# ---- The autoencoder


def psnr(model: LatentDiffusion, count: int) -> float:
    """Mean peak signal-to-noise ratio of decoded pictures that training never saw, in dB: 20 log10(255 / RMSE)."""
    pictures = from_pixels(torch.from_numpy(make_pictures(count, HELD_OUT_SEED, model.defaults.size)[0]))
    mse = (decoded(model, pictures) - pictures).square().mean(dim=(1, 2, 3))
    return (10 * (4 / mse).log10()).mean().item()


def flat_colour_error(model: LatentDiffusion) -> float:
    """The furthest that encoding and decoding moves a picture of one colour, in levels of 255: of the named colours,
    the worst channel's mean."""
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    flat = repeat(colours / 127.5 - 1, "n c -> n c h w", h=model.defaults.size, w=model.defaults.size)
    return (127.5 * (decoded(model, flat) - flat).mean(dim=(2, 3))).abs().max().item()


def patterns_read(model: LatentDiffusion, judge: Judge, count: int) -> tuple[float, int]:
    """In how many of the patterned photos among `count` pictures the judge still reads the pattern: the share, and how
    many there are."""
    pixels, pictures = make_pictures(count, PATTERNS_SEED)
    rows = [i for i, p in enumerate(pictures) if p.things[0].pattern and len(p.things) == 1 and p.style == "photo"]
    said = judge.answers(decoded(model, from_pixels(torch.from_numpy(pixels[rows]))))
    right = [answer["pattern"] == pictures[i].things[0].pattern for answer, i in zip(said, rows, strict=True)]
    return float(np.mean(right)), len(rows)


def colours_kept(model: LatentDiffusion, thing: Thing) -> float:
    """How many of 16 of the world's own pictures of a thing still have its colours after encoding and decoding: the
    most that any word for it can reach."""
    expected = colours_of(thing)
    drawn = [draw(Picture((thing,), background, seed=i)) for i, background in enumerate(backgrounds_for(expected))]
    images = to_images(decoded(model, to_tensor(drawn)))
    return float(np.mean([colours_right(np.asarray(image), expected) for image in images]))


def report_autoencoder(model: LatentDiffusion, judge: Judge, count: int) -> None:
    print(f"autoencoder: {psnr(model, count):.2f} dB PSNR on {count} pictures it never saw")
    print(f"autoencoder: flat colours within {flat_colour_error(model):.1f} of 255")
    share, photos = patterns_read(model, judge, 4 * count)
    print(f"autoencoder: the judge reads the pattern in {share:.0%} of {photos} decoded pictures")
    kept = {example: colours_kept(model, thing) for example, thing in EXAMPLES.items()}
    print(f"autoencoder: colours still right after decoding: {as_shares(kept)}")


# ---- Prompts and words


def report_prompts(
    model: LatentDiffusion, judge: Judge, share: float, sheets: Path | None, guidance: float | None = None
) -> dict[str, float]:
    """share: of the number of prompts. Returns {"what is asked: what is checked": share of the pictures}."""
    figures = {}
    for number, (what, (questions_of, count)) in enumerate(PROMPTS.items()):
        questions = enough(questions_of(np.random.default_rng(number)), round(share * count))
        passed, images = ask(model, judge, questions, guidance=guidance)
        for check, value in passed.items():
            figures[f"{what}: {check}"] = value
        print(f'"{what}", {len(questions)} prompts: {as_shares(passed)}', flush=True)
        save_judged(sheets, f"prompts-{number}.png", in_rows(images, 20))
    return figures


def learn(folder: Path, weights: Path, out: Path) -> Path:
    """The word S*, which train.py learns from a folder of pictures. -> its file.

    Raises InputError if train.py is not there, or refuses to learn.
    """
    if not (ROOT / "train.py").is_file():
        raise InputError(f"no train.py in {ROOT}, expected the whole project there; clone it and pip install -e .")
    command = [sys.executable, ROOT / "train.py", "--images", folder, "--token", "S*"]
    command += ["--weights", weights, "--out", out]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode == 2:
        raise InputError(run.stderr.splitlines()[-1])
    if run.returncode:
        raise RuntimeError(f"train.py ended with status {run.returncode}:\n{run.stderr}")
    return out / "embedding.safetensors"


def learn_thing(thing: Thing, weights: Path, folder: Path) -> Path:
    """`learn` from five pictures of the thing, drawn as those of examples/ are."""
    (folder / "pictures").mkdir(parents=True)
    for i, picture in enumerate(pictures_of(thing)):
        draw(picture, EXAMPLE_SIZE).save(folder / "pictures" / f"{i}.png")
    return learn(folder / "pictures", weights, folder / "word")


def report_words(weights: Path, judge: Judge, things: list[Thing], sheets: Path | None) -> None:
    """Two lines a thing: how right its pictures are when plain words ask for it, and when its learned word does."""
    for thing in things:
        model, said = load_checkpoint(weights), name_of(thing)
        figures, _ = ask(model, judge, [*on_backgrounds(said, thing), *combined(said, thing)])
        print(f"{said}, in plain words: {as_shares(figures)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            words = load_embeddings(learn_thing(thing, weights, Path(folder)))
        add_words(model, words)
        figures, images = ask(model, judge, [*on_backgrounds("S*", thing), *combined("S*", thing)], words)
        print(f"{said}, learned: {as_shares(figures)}", flush=True)
        save_judged(sheets, f"word-{said.replace(' ', '-')}.png", in_rows(images, 20))


def ask_word(weights: Path, judge: Judge, embedding: Path, thing: Thing) -> tuple[dict[str, float], list[Image.Image]]:
    """16 samples of the file's word over 4 backgrounds: the share with the thing's colours, its shape if the judge
    knows it, and the background that was asked for; and the samples."""
    model, words = load_checkpoint(weights), load_embeddings(embedding)
    add_words(model, words)
    return ask(model, judge, on_backgrounds(next(iter(words)), thing), words)


def report_examples(weights: Path, judge: Judge, sheets: Path | None) -> None:
    """A line for each object of examples/: what its word does, and how long train.py learned it."""
    rows = []
    for example, thing in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            embedding = learn(ROOT / "examples" / example, weights, Path(folder) / "word")
            seconds = time.monotonic() - started
            figures, images = ask_word(weights, judge, embedding, thing)
        print(f"{example}: {as_shares(figures)}, learned in {seconds:.0f} s", flush=True)
        rows.append(images)
    save_judged(sheets, "examples.png", rows, list(EXAMPLES))


# ---- Variety, and samples to look at


def report_variety(model: LatentDiffusion, sheets: Path | None) -> None:
    """How far seeds of one prompt differ, beside the world's own pictures; and what guidance does to colours."""
    thing, background = Thing("star", "red"), "gray"
    prompt = "a photo of a red star on a gray background"
    drawn = [draw(Picture((thing,), background, seed=seed)) for seed in range(64)]
    rows = {
        "the world's own": drawn,
        "decoded": to_images(decoded(model, to_tensor(drawn))),
        "samples": sampled(model, [prompt] * 64),
    }
    for what, images in rows.items():
        print(f"variety, {what}: {as_deviations(images)}")
    for scale in (1, 2, 3, 5, 8):
        images = sampled(model, [prompt] * 32, guidance=scale)
        pixels = np.stack([np.asarray(image) for image in images])
        error = np.mean([colour_error(one, thing.colour) for one in pixels])
        clipped = ((pixels == 0) | (pixels == 255)).mean()
        right = np.mean([colours_right(one, (thing.colour,)) for one in pixels])
        print(f"guidance {scale}: colour right {right:.0%}, off by {error:.0f} of 255, {clipped:.1%} of values clipped")
        print(f"guidance {scale}: {as_deviations(images)}", flush=True)
        rows[f"guidance {scale}"] = images
    save_judged(sheets, "variety.png", [images[:16] for images in rows.values()], list(rows))


def as_deviations(images: list[Image.Image]) -> str:
    return ", ".join(f"{what} {value:.3f}" for what, value in spread([*map(np.asarray, images)]).items())


def rows_of_samples(model: LatentDiffusion) -> list[list[Image.Image]]:
    """Eight samples of each of SHEET_PROMPTS."""
    return in_rows(sampled(model, [prompt for prompt in SHEET_PROMPTS for _ in range(8)]), 8)
