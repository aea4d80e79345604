"""The paper's applications, one function each: it makes the pictures, and says in how many of them all is right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from tinyldm.editing import Source
from tinyldm.heat_maps import HeatMaps, heated, watched, words_of
from tinyldm.images import save_image, to_images, to_tensor
from tinyldm.lab.gallery.words import BALLOON, BOLT, CIRCLE, CROSS, DIAMOND, HEART, STYLE, thing_of
from tinyldm.lab.measure.colours import EDGE, colours_of, contrast_of, object_pixels
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.outlines import HasOutline, true_silhouettes
from tinyldm.lab.measure.questions import Behind, Check, HasColours, Question, Sees, backgrounds_for, in_style
from tinyldm.lab.measure.sampling import ask, decoded, in_rows
from tinyldm.lab.world.captions import background_phrase, name_of, with_articles
from tinyldm.lab.world.distribution import BIASED
from tinyldm.lab.world.nouns import noun_thing
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import Picture, Thing, nearest_colour
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.masks import mask_of, pasted

FEW, MANY = 16, 64  # pictures behind a figure
PICTURE, MASK = "editing-picture.png", "editing-mask.png"  # the first of those that are edited


class Shown(NamedTuple):
    """What an application makes."""

    figures: dict[str, str]  # what was measured -> how much of it
    rows: list[list[Image.Image]]  # of its sheet
    labels: list[str]  # one a row
    best: int = 0  # the row that stands in the overview


class Studio(NamedTuple):
    """What an application has to work with."""

    model: LatentDiffusion  # which knows the words
    words: dict[str, Tensor]
    judge: Judge
    out: Path  # where the page is to lie

    def ask(self, questions: Sequence[Question]) -> tuple[dict[str, float], list[Image.Image]]:
        return ask(self.model, self.judge, questions, self.words)


@dataclass(frozen=True)
class All:
    """All of the checks are passed."""

    checks: tuple[Check, ...]

    def __call__(self, pixels: np.ndarray, said: dict[str, str]) -> bool:
        return all(check(pixels, said) for check in self.checks)


@dataclass(frozen=True)
class ShowsColours:
    """The things have all of these colours, each in so many of their pixels."""

    expected: tuple[str, ...]
    least: float = 0.05

    def __call__(self, pixels: np.ndarray, said: dict[str, str]) -> bool:
        names = nearest_colour(object_pixels(pixels)) if len(object_pixels(pixels)) else np.array([])
        return all((names == name).mean() >= self.least for name in self.expected) if len(names) else False


def share(value: float) -> str:
    return f"{value:.0%}"


def is_right(thing: Thing) -> All:
    return All((HasColours(colours_of(thing)), Sees("shape", thing.shape)))


# ---- 4.1


def variations(studio: Studio) -> Shown:
    thing = thing_of(HEART)
    said = with_articles(f"a photo of a {name_of(thing)}")
    check = {"right": is_right(thing)}
    of_word, by_word = studio.ask([Question(f"a photo of {HEART.token}", check)] * FEW)
    of_caption, by_caption = studio.ask([Question(said, check)] * FEW)
    given = [Image.open(file).resize((64, 64)) for file in sorted(HEART.pictures.glob("*.png"))]
    figures = {
        f"colours and shape right, a photo of {HEART.token}": share(of_word["right"]),
        f"the same of {said}": share(of_caption["right"]),
    }
    labels = ["the pictures it was learned from", f"a photo of {HEART.token}", "", f"{said} (no learned word)", ""]
    return Shown(figures, [given, *in_rows(by_word, 8), *in_rows(by_caption, 8)], labels, best=1)


# ---- 4.2


def synthesis(studio: Studio) -> Shown:
    word, thing = HEART.token, thing_of(HEART)
    shape, colours = Sees("shape", thing.shape), HasColours(colours_of(thing))
    blue = [HasColours(("blue", thing.colour2)), HasColours(("blue",))]
    asked: dict[str, tuple[Check, ...]] = {
        f"a photo of {word} in the snow": (Sees("scene", "snow"), colours),
        f"a sketch of {word}": (Sees("style", "sketch"), shape),
        f"pixel art of {word}": (Sees("style", "pixel art"), shape),
        f"a photo of a blue {word} on a white background": (
            lambda p, said: any(check(p, said) for check in blue),
            shape,
        ),
        f"a photo of two {word} on a green background": (Sees("count", "two"), colours, Behind("green")),
        f"a photo of a small {word} on a purple background": (Sees("size", "small"), colours, Behind("purple")),
    }
    figures, rows = {}, []
    for prompt, checks in asked.items():
        found, images = studio.ask([Question(prompt, {"right": All(checks)})] * FEW)
        figures[prompt] = share(found["right"])
        rows.append(images[:8])
    return Shown(figures, rows, [*asked])


# ---- 4.3


def style_transfer(studio: Studio) -> Shown:
    questions = in_style(STYLE.token, STYLE.pictures.name)
    found, images = studio.ask(questions)
    figures = {"in that style": share(found["style"]), "the noun's shape kept": share(found["shape"])}
    rows = [images[i : i + 8] for i in range(0, len(images), FEW)]
    return Shown(figures, rows, [questions[i].prompt for i in range(0, len(images), FEW)])


# ---- 4.4


def composition(studio: Studio) -> Shown:
    left, right = thing_of(HEART), thing_of(CIRCLE)
    both = All(
        (
            Sees("count", "two"),
            *(Sees(question, getattr(left, question)) for question in ("shape", "pattern")),
            *(Sees(f"right {question}", getattr(right, question)) for question in ("shape", "pattern")),
            ShowsColours((*colours_of(left), *colours_of(right))),
        )
    )
    styled = All((Sees("style", STYLE.pictures.name), Sees("shape", left.shape)))
    asked = {
        f"a photo of {HEART.token} next to {CIRCLE.token} on a purple background": both,
        f"a painting of {HEART.token} in the style of {STYLE.token}": styled,
    }
    figures, rows, labels = {}, [], []
    for prompt, check in asked.items():
        found, images = studio.ask([Question(prompt, {"right": check})] * MANY)
        figures[f"both words right, {prompt}"] = share(found["right"])
        rows += in_rows(images[:16], 8)
        labels += [prompt, ""]
    return Shown(figures, rows, labels)


# ---- 4.5


def entropy(images: Sequence[Image.Image]) -> float:
    """Of the things' colours, in bits: 0 if all have the same, 3.6 if all of the world's twelve are as frequent."""
    names = [Counter(nearest_colour(object_pixels(np.asarray(image))).tolist()).most_common(1) for image in images]
    counts = np.array([*Counter(name for [(name, _)] in filter(None, names)).values()])
    shares = counts / counts.sum()
    return float((shares * -np.log2(shares)).sum())


def bias_reduction(studio: Studio) -> Shown:
    noun = noun_thing(BIASED[0])
    prompts = f"a photo of a {BIASED[0]}", f"a photo of {BALLOON.token}"
    figures, rows = {}, []
    for prompt in prompts:
        found, images = studio.ask([Question(prompt, {"shape": Sees("shape", noun.shape)})] * MANY)
        figures[f"{prompt}: entropy of its colours, shape kept"] = f"{entropy(images):.2f} bits, {found['shape']:.0%}"
        rows += in_rows(images[:16], 8)
    return Shown(figures, rows, [prompts[0], "", prompts[1], ""], best=2)


# ---- 4.6


def local_editing(studio: Studio) -> Shown:
    """The things of four pictures are painted over with a mask, and a word is put there."""
    thing, model = thing_of(HEART), studio.model
    others = {"blue": Thing("ring", "white"), "grass": Thing("square", "red"), "purple": noun_thing("lemon")}
    others["white"] = Thing("star", "blue")
    originals = [draw(Picture((other,), ground, seed=i)) for i, (ground, other) in enumerate(others.items())]
    save_image(originals[0], studio.out / PICTURE)  # for the page's command
    save_image(Image.fromarray(box_around(originals[0])), studio.out / MASK)
    right, outside, round_trip, rows = [], [], [], []
    for original, ground in zip(originals, others, strict=True):
        picture = to_tensor(original)
        (kept,) = to_images(decoded(model, picture))
        mask = mask_of(box_around(original), model.autoencoder.config.factor)
        prompt = with_articles(f"a photo of {HEART.token} {background_phrase(ground)}")
        *_, z = model.generate([prompt] * FEW, range(FEW), words=studio.words, source=Source(picture, 1.0, mask))
        images = [pasted(image, kept, mask) for image in to_images(model.decode(z))]
        said = studio.judge.answers(to_tensor(images))
        right += [is_right(thing)(np.asarray(image), answer) for image, answer in zip(images, said, strict=True)]
        elsewhere = torch.from_numpy(~mask.pixels)
        outside += [error(to_tensor(image), picture, elsewhere) for image in images]
        round_trip.append(error(to_tensor(kept), picture, elsewhere))
        rows.append([original, with_mask(original, mask.pixels), *images[:6]])
    figures = {
        f"inside the mask, {HEART.token} with its colours and shape": share(np.mean(right)),
        "outside, from the original": f"{psnr(outside):.1f} dB",
        "the same of the original, encoded and decoded": f"{psnr(round_trip):.1f} dB",
    }
    return Shown(figures, rows, [f"a photo of {HEART.token} {background_phrase(ground)}" for ground in others])


def box_around(image: Image.Image, margin: int = 6) -> np.ndarray:
    """A box around what stands out from the background: (height, width) bool."""
    rows, columns = (np.flatnonzero((contrast_of(np.asarray(image)) > EDGE).any(axis=axis)) for axis in (1, 0))
    box = np.zeros(image.size[::-1], bool)
    box[max(rows[0] - margin, 0) : rows[-1] + margin + 1, max(columns[0] - margin, 0) : columns[-1] + margin + 1] = True
    return box


def with_mask(image: Image.Image, pixels: np.ndarray) -> Image.Image:
    """The picture with the mask's white over it."""
    return Image.fromarray(np.where(pixels[..., None], 255, np.asarray(image)).astype(np.uint8))


def error(a: Tensor, b: Tensor, where: Tensor) -> float:
    """The mean square, of 1: pictures reach from -1 to 1, which is 2."""
    return float((a - b)[..., where].square().mean() / 4)


def psnr(errors: Sequence[float]) -> float:
    return float(-10 * np.log10(np.mean(errors)))


# ---- Where words go


def attention(studio: Studio) -> Shown:
    model, ratios, rows, labels = studio.model, [], [], []
    for lesson in (HEART, CIRCLE, CROSS, DIAMOND):
        background = backgrounds_for(colours_of(thing_of(lesson)))[0]
        prompt = f"a photo of {lesson.token} on a {background} background"
        maps = HeatMaps(8, *model.latent_shape(64, 64)[1:])
        with watched(model.unet, maps):
            *_, z = model.generate([prompt] * 8, range(8), words=studio.words)
        tokens = dict(words_of(model.tokenizer, prompt))[lesson.token]
        heats, images = maps.mean()[:, tokens].mean(dim=1), to_images(model.decode(z))
        ratios += [inside_over_outside(heat, image) for heat, image in zip(heats, images, strict=True)]
        pairs = zip(images[:4], heats, strict=False)
        rows.append([tile for image, heat in pairs for tile in (image, heated(image, heat))])
        labels.append(prompt)
    figures = {
        "a word's map inside its thing over outside, mean": f"{np.mean(ratios):.1f}",
        "pictures in which it is at least 2": share(np.mean(np.array(ratios) >= 2)),
    }
    return Shown(figures, rows, labels)


def inside_over_outside(heat: Tensor, image: Image.Image) -> float:
    """Of a heat map (h, w), brought to the picture's size, where the thing is and where it is not."""
    there = torch.from_numpy(contrast_of(np.asarray(image)) > EDGE)
    heat = F.interpolate(rearrange(heat, "h w -> 1 1 h w"), there.shape, mode="bicubic")[0, 0]
    return float(heat[there].mean() / heat[~there].mean())


# ---- 6


def limits(studio: Studio) -> Shown:
    figures, rows, labels = {}, [], []
    for lesson, known in ((BOLT, "never seen"), (HEART, "known")):
        thing = thing_of(lesson)
        check = {"IoU": HasOutline(lambda shape=thing.shape: true_silhouettes(shape))}
        prompts = [
            f"a photo of {lesson.token} on a {ground} background" for ground in backgrounds_for(colours_of(thing))
        ]
        found, images = studio.ask([Question(prompt, check) for prompt in prompts])
        figures[f"IoU with the true outline, {thing.shape} ({known})"] = f"{found['IoU']:.2f}"
        given = Image.open(min(lesson.pictures.glob("*.png"))).resize((64, 64))
        rows.append([given, *images[:14:2]])
        labels.append(f"{lesson.token}, a shape that is {known}: a picture it was learned from, and samples")
    return Shown(figures, rows, labels)
