"""The figures that need a judge: how well the tiny checkpoint does what its prompts and its words say.

    python -m tinyldm.lab.measure.report                     all of it, every held-out word too
    python -m tinyldm.lab.measure.report --only prompts      one part: autoencoder, prompts, words or variety
    python -m tinyldm.lab.measure.report --sheet DIR       also write the pictures that were judged, a sheet a question

Colours and plain backgrounds are measured (evaluate.py); everything else is what the judge sees.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.images import contact_sheet, save_image, to_images
from tinyldm.inversion import add_words
from tinyldm.lab.measure.evaluate import (
    background_colour,
    backgrounds_for,
    colours_of,
    colours_right,
    flat_colour_error,
    generate,
    object_pixels,
    psnr,
)
from tinyldm.lab.measure.judge import Judge, load_judge, to_tensor
from tinyldm.lab.world.captions import medium, name, plural, with_articles
from tinyldm.lab.world.distribution import HELD_OUT_COMBINATIONS, make_pictures, pictures_of, stands_out
from tinyldm.lab.world.drawing import STYLES, draw
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.things import COLOURS, NOUNS, PATTERNS, PLACES, SHAPES, Picture, Thing, choice, noun_thing
from tinyldm.latent_diffusion import LatentDiffusion

ROOT = Path(__file__).parents[3]
WEIGHTS = ROOT / "weights" / "tiny"

Checks = dict[str, Callable[[np.ndarray, dict[str, str]], bool]]  # (pixels, the judge's answers) -> is it so?


@dataclass
class Question:
    """One prompt, and what has to be so in its picture."""

    prompt: str
    checks: Checks


# ---- What is asked. Every function yields as many questions as are taken from it.


def has_colours(thing: Thing) -> Callable[[np.ndarray, dict[str, str]], bool]:
    return lambda pixels, said: colours_right(pixels, colours_of(thing))


def behind(colour: str) -> Callable[[np.ndarray, dict[str, str]], bool]:
    return lambda pixels, said: background_colour(pixels) == colour


def sees(question: str, answer: str) -> Callable[[np.ndarray, dict[str, str]], bool]:
    return lambda pixels, said: said[question] == answer


def plain_thing(rng: np.random.Generator) -> Thing:
    return Thing(choice(rng, SHAPES), choice(rng, COLOURS))


def background_of(rng: np.random.Generator, thing: Thing) -> str:
    return choice(rng, [colour for colour in COLOURS if stands_out((thing,), colour)])


def plain(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        thing = plain_thing(rng)
        background = background_of(rng, thing)
        checks = {
            "colour": has_colours(thing),
            "background": behind(background),
            "shape": sees("shape", thing.shape),
        }
        yield Question(f"a photo of a {name(thing)} on a {background} background", checks)


def patterned(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        first = plain_thing(rng)
        thing = Thing(first.shape, first.colour, choice(rng, PATTERNS), choice(rng, COLOURS, [first.colour]))
        background = background_of(rng, thing)
        checks = {"colours": has_colours(thing), "pattern": sees("pattern", thing.pattern)}
        yield Question(f"a photo of a {name(thing)} on a {background} background", checks)


def nouns(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for noun in NOUNS:
            thing = noun_thing(noun)
            yield Question(f"a photo of a {noun}", {"colours": has_colours(thing), "shape": sees("shape", thing.shape)})


def recoloured(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for noun, look in NOUNS.items():
            thing = noun_thing(noun, colour=choice(rng, COLOURS, [look.colour, look.colour2]))
            checks = {"colours": has_colours(thing), "shape": sees("shape", thing.shape)}
            yield Question(f"a photo of a {name(thing)} on a {background_of(rng, thing)} background", checks)


def two(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        thing = plain_thing(rng)
        prompt = f"a photo of two {plural(name(thing))} on a {background_of(rng, thing)} background"
        yield Question(prompt, {"two": sees("count", "two")})


def places(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for place in PLACES:
            thing = plain_thing(rng)
            where = f"{'on' if place in ('left', 'right') else 'at'} the {place}"
            prompt = f"a photo of a {name(thing)} {where} on a {background_of(rng, thing)} background"
            yield Question(prompt, {"place": sees("place", place)})


def sizes(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for size in ("small", "large"):
            thing = plain_thing(rng)
            prompt = f"a photo of a {size} {name(thing)} on a {background_of(rng, thing)} background"
            yield Question(prompt, {"size": sees("size", size)})


def scenes(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for scene in SCENES:
            thing = plain_thing(rng)
            if stands_out((thing,), scene):
                yield Question(f"a photo of a {name(thing)} {SCENES[scene].words}", {"scene": sees("scene", scene)})


def styles(rng: np.random.Generator) -> Iterator[Question]:
    while True:
        for style in STYLES:
            if style != "photo":
                thing = plain_thing(rng)
                how = medium(Picture((thing,), "white", style))
                yield Question(f"{how} of a {name(thing)}", {style: sees("style", style)})


PROMPTS = {  # what is asked -> its questions, how many in all
    "a {colour} {shape} on a {colour} background": (plain, 200),
    "a {colour} and {colour} {pattern} {shape}": (patterned, 200),
    "a {noun}": (nouns, 5 * len(NOUNS)),
    "a {colour} {noun}": (recoloured, 5 * len(NOUNS)),
    "two {colour} {shape}s": (two, 100),
    "… on the left, at the top, …": (places, 100),
    "a small, a large …": (sizes, 100),
    "… on the grass, in the snow, …": (scenes, 120),
    "a sketch of …, pixel art of …, …": (styles, 120),
}


def first(questions: Iterator[Question], count: int, least: int = 6) -> list[Question]:
    """So many of them, or as many more as it takes until each of their checks has been asked for `least` times."""
    taken, asked = [], Counter()
    while len(taken) < count or min(asked.values(), default=0) < least:
        taken.append(next(questions))
        asked.update(taken[-1].checks.keys())
    return taken


def ask(
    model: LatentDiffusion, judge: Judge, questions: list[Question], words: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, float], list[Image.Image]]:
    """The share of the pictures in which each check is passed, and the pictures."""
    images = generate(model, [with_articles(question.prompt) for question in questions], words=words)
    pixels = np.stack([np.asarray(image) for image in images])
    passed: dict[str, list[bool]] = {}
    for question, picture, said in zip(questions, pixels, judge.answers(to_tensor(pixels)), strict=True):
        for what, check in question.checks.items():
            passed.setdefault(what, []).append(bool(check(picture, said)))
    return {what: float(np.mean(values)) for what, values in passed.items()}, images


# ---- One learned word: 8 objects of combinations that training never saw

OBJECTS = [Thing(*look) for look in HELD_OUT_COMBINATIONS[:8]]


def of_a_word(token: str, thing: Thing) -> dict[str, list[Question]]:
    """16 pictures over 4 backgrounds, and 8 of each sentence that asks the word to combine."""
    colours = [colour for colour in COLOURS if colour not in (thing.colour, thing.colour2)]
    asked = {
        "word": [
            Question(
                f"a photo of {token} on a {background} background",
                {"colours": has_colours(thing), "shape": sees("shape", thing.shape), "background": behind(background)},
            )
            for background in backgrounds_for(colours_of(thing))
        ],
        "sketch": [Question(f"a sketch of {token}", {"a sketch of S*": sees("style", "sketch")})] * 8,
        "two": [Question(f"a photo of two {plural(token)}", {"two S*s": sees("count", "two")})] * 8,
    }
    new = "blue" if "blue" in colours else "red"
    others = () if thing.colour2 is None else (thing.colour2,)
    takes = [lambda pixels, said, c=c: colours_right(pixels, c) for c in ((new,), (new, *others))]
    either = {"a blue S*": lambda pixels, said: any(check(pixels, said) for check in takes)}
    asked["blue"] = [Question(f"a photo of a {new} {token} on a white background", either)] * 8
    return asked


def learned(thing: Thing, weights: Path, folder: Path, *options: str) -> Path:
    """Five pictures of the thing, as in examples/, and the word that train.py learns from them. -> the file."""
    (folder / "pictures").mkdir(parents=True)
    for i, picture in enumerate(pictures_of(thing)):
        draw(picture, 256).save(folder / "pictures" / f"{i}.png")
    command = [sys.executable, ROOT / "train.py", "--images", folder / "pictures", "--token", "S*"]
    command += ["--weights", weights, "--out", folder / "word", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "word" / "embedding.safetensors"


# ---- The report


def report_autoencoder(model: LatentDiffusion, judge: Judge, count: int) -> None:
    print(f"autoencoder: {psnr(model, count):.2f} dB PSNR on {count} pictures it never saw")
    print(f"autoencoder: flat colours within {flat_colour_error(model):.1f} of 255")
    pixels, pictures = make_pictures(4 * count, 4_000_037)
    rows = [i for i, p in enumerate(pictures) if p.things[0].pattern and len(p.things) == 1 and p.style == "photo"]
    with torch.no_grad():
        decoded = torch.cat([model.decode(model.encode(x)[0]) for x in to_tensor(pixels[rows]).split(50)])
    said = judge.answers(decoded.clamp(-1, 1))
    share = np.mean([answer["pattern"] == pictures[i].things[0].pattern for answer, i in zip(said, rows, strict=True)])
    print(f"autoencoder: the judge reads the pattern in {share:.0%} of {len(rows)} decoded pictures")


def report_prompts(
    weights: Path, judge: Judge, share: float, sheets: Path | None, guidance: float | None = None
) -> dict[str, float]:
    """share: of the number of prompts. Returns {"what is asked: what is checked": share of the pictures}."""
    model, figures = load_checkpoint(weights), {}
    if guidance is not None:
        model.defaults = replace(model.defaults, guidance=guidance)
    for number, (what, (questions_of, count)) in enumerate(PROMPTS.items()):
        questions = first(questions_of(np.random.default_rng(number)), round(share * count))
        passed, images = ask(model, judge, questions)
        for check, value in passed.items():
            figures[f"{what}: {check}"] = value
        print(f'"{what}", {len(questions)} prompts: {as_shares(passed)}', flush=True)
        save_sheet(sheets, f"prompts-{number}.png", images)
    return figures


def report_words(weights: Path, judge: Judge, things: list[Thing], sheets: Path | None, *options: str) -> None:
    """Two lines a thing: what its learned word does, and what the same prompts do that say it in plain words."""
    for thing in things:
        with tempfile.TemporaryDirectory() as folder:
            words = load_embeddings(learned(thing, weights, Path(folder), *options))
        model = load_checkpoint(weights)
        figures, images = ask_of_a_word(model, judge, name(thing), thing)
        print(f"{name(thing)}, in plain words: {as_shares(figures)}", flush=True)
        add_words(model, words)
        figures, images = ask_of_a_word(model, judge, "S*", thing, words)
        print(f"{name(thing)}, learned: {as_shares(figures)}", flush=True)
        save_sheet(sheets, f"word-{name(thing).replace(' ', '-')}.png", images)


def ask_of_a_word(
    model: LatentDiffusion, judge: Judge, word: str, thing: Thing, words: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, float], list[Image.Image]]:
    questions = [question for questions in of_a_word(word, thing).values() for question in questions]
    return ask(model, judge, questions, words)


def as_shares(figures: dict[str, float]) -> str:
    return ", ".join(f"{what} {value:.0%}" for what, value in figures.items())


def report_variety(weights: Path, sheets: Path | None) -> None:
    """How far seeds of one prompt differ, beside the world's own pictures; and what guidance does to colours."""
    model = load_checkpoint(weights)
    thing, background = Thing("star", "red"), "gray"
    prompt = "a photo of a red star on a gray background"
    own = [np.asarray(draw(Picture((thing,), background, seed=seed))) for seed in range(64)]
    with torch.no_grad():
        decoded = to_images(model.decode(model.encode(to_tensor(np.stack(own)))[0]))
    samples = generate(model, [prompt] * 64)
    rows = {"the world's own": own, "decoded": [*map(np.asarray, decoded)], "samples": [*map(np.asarray, samples)]}
    for what, pictures in rows.items():
        print(f"variety, {what}: " + ", ".join(f"{k} {v:.3f}" for k, v in spread(pictures).items()))
    labels = list(rows)
    for scale in (1, 2, 3, 5, 8):
        samples = generate(model, [prompt] * 32, guidance=scale)
        pictures = [np.asarray(image) for image in samples]
        error = np.mean([colour_error(picture, thing.colour) for picture in pictures])
        clipped = np.mean([((picture == 0) | (picture == 255)).mean() for picture in pictures])
        right = np.mean([colours_right(picture, (thing.colour,)) for picture in pictures])
        print(f"guidance {scale}: colour right {right:.0%}, off by {error:.0f} of 255, {clipped:.1%} of values clipped")
        print(f"guidance {scale}: " + ", ".join(f"{k} {v:.3f}" for k, v in spread(pictures).items()))
        rows[f"guidance {scale}"] = pictures
        labels.append(f"guidance {scale}")
    if sheets:
        save_image(
            contact_sheet([[Image.fromarray(p) for p in row[:16]] for row in rows.values()], labels=labels, tile=64),
            sheets / "variety.png",
        )


def spread(pictures: list[np.ndarray]) -> dict[str, float]:
    """Standard deviations over pictures: of the object's centre and area, as shares of the picture, and its shade."""
    centres, areas, shades = [], [], []
    for picture in pictures:
        background = np.median(picture[[0, -1]].reshape(-1, 3), axis=0)
        mask = np.linalg.norm(picture.astype(float) - background, axis=-1) > 60
        if mask.any():
            centres.append(np.argwhere(mask).mean(axis=0) / len(picture))
            areas.append(mask.mean())
            shades.append(picture[mask].mean() / 255)
    centre = np.linalg.norm(np.std(centres, axis=0))
    return {"centre": float(centre), "area": float(np.std(areas)), "shade": float(np.std(shades))}


def colour_error(picture: np.ndarray, colour: str) -> float:
    """Mean distance per channel of the object's median colour from the named one, in levels of 255."""
    pixels = object_pixels(picture)
    return float(np.abs(np.median(pixels, axis=0) - COLOURS[colour]).mean()) if len(pixels) else 255.0


def save_sheet(folder: Path | None, file: str, images: list[Image.Image]) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        save_image(contact_sheet([images[i : i + 20] for i in range(0, len(images), 20)], tile=64), folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--only", choices=["autoencoder", "prompts", "words", "variety"])
    parser.add_argument("--share", type=float, default=1.0, help="of the number of prompts (%(default)s)")
    parser.add_argument("--guidance", type=float, help="of the prompts; default: the checkpoint's")
    parser.add_argument("--sheet", type=Path, metavar="DIR")
    options = parser.parse_args()
    judge = load_judge()
    if options.only in (None, "autoencoder"):
        report_autoencoder(load_checkpoint(options.weights), judge, round(500 * options.share))
    if options.only in (None, "prompts"):
        report_prompts(options.weights, judge, options.share, options.sheet, options.guidance)
    if options.only in (None, "variety"):
        report_variety(options.weights, options.sheet)
    if options.only in (None, "words"):
        report_words(options.weights, judge, OBJECTS, options.sheet)


if __name__ == "__main__":
    main()
