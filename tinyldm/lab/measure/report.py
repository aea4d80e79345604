"""The figures of a checkpoint, printed as they are measured: its autoencoder, its prompts, its variety."""

from pathlib import Path

import numpy as np
import torch
from einops import repeat
from PIL import Image

from tinyldm.images import from_pixels, to_images, to_tensor
from tinyldm.lab.measure.colours import colour_error, colours_of, colours_right, spread
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.questions import PROMPTS, enough, true_pictures
from tinyldm.lab.measure.sampling import as_shares, ask, decoded, in_rows, sampled, save_judged
from tinyldm.lab.world.captions import SHEET_PROMPTS
from tinyldm.lab.world.distribution import EXAMPLES, HELD_OUT_SEED, make_pictures
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import COLOURS, Picture, Thing
from tinyldm.latent_diffusion import LatentDiffusion

PATTERNS_SEED = 4_000_037  # of pictures that neither pretraining nor the judge's training ever drew


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
    images = to_images(decoded(model, to_tensor(true_pictures(thing))))
    return float(np.mean([colours_right(np.asarray(image), colours_of(thing)) for image in images]))


def report_autoencoder(model: LatentDiffusion, judge: Judge, count: int) -> None:
    print(f"autoencoder: {psnr(model, count):.2f} dB PSNR on {count} pictures it never saw")
    print(f"autoencoder: flat colours within {flat_colour_error(model):.1f} of 255")
    share, photos = patterns_read(model, judge, 4 * count)
    print(f"autoencoder: the judge reads the pattern in {share:.0%} of {photos} decoded pictures")
    kept = {example: colours_kept(model, thing) for example, thing in EXAMPLES.items()}
    print(f"autoencoder: colours still right after decoding: {as_shares(kept)}")


# ---- Prompts


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
