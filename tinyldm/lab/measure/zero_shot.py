"""What the tiny CLIP knows about pictures that it never saw: their captions and, with no training for it, classes.

    python -m tinyldm.lab.measure.zero_shot

It prints how often a picture's own caption ranks first, and how often its colour, shape, pattern, scene and style are
found by prompts alone.
"""

import math
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.clip_image import CLIP, normalize, preprocess
from tinyldm.formats.checkpoint import load_clip
from tinyldm.formats.merges import GET_MERGES, find_merges, read_merges
from tinyldm.images import from_pixels
from tinyldm.lab import TINY
from tinyldm.lab.world.captions import caption, has_background, medium, place_phrase, trimmed, vaguely, with_articles
from tinyldm.lab.world.distribution import HELD_OUT_SEED, make_pictures
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import INVENTED_STYLES, STYLES
from tinyldm.lab.world.things import COLOURS, PATTERNS, PLACES, SHAPES, VIEWS, Picture
from tinyldm.tokenizer import Tokenizer


def read_clip(path: Path, device: str = "cpu") -> tuple[CLIP, Tokenizer]:
    """A CLIP of the tiny world or of OpenAI, and the tokenizer of its prompts, from the merges beside it or in weights.

    Raises InputError as load_clip does, and if there are no merges, or those of another CLIP.
    """
    model = load_clip(path, device)
    if (merges := find_merges(path)) is None:
        raise InputError(f"no merges.txt beside {path}, expected its tokenizer's; get OpenAI's with: {GET_MERGES}")
    tokenizer = Tokenizer(read_merges(merges), length=model.config.text.length)
    if tokenizer.vocabulary_size != (expected := model.config.text.vocabulary_size):
        found = f"{merges} makes a vocabulary of {tokenizer.vocabulary_size}"
        raise InputError(f"{found}, expected {expected} for {path}; copy both again, from one place")
    return model, tokenizer


@torch.no_grad()
def features_of_images(model: CLIP, images: Sequence[Image.Image]) -> Tensor:
    """n images of any size, made as large as the model reads them -> (n, projection)"""
    batches = preprocess(list(images), model.config.vision.size).split(50)
    return torch.cat([model.image_features(batch.to(model.logit_scale.device)) for batch in batches])


@torch.no_grad()
def features_of_pictures(model: CLIP, pixels: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, projection)"""
    device = model.logit_scale.device
    batches = pixels.tensor_split(math.ceil(len(pixels) / 250))
    return torch.cat([model.image_features(normalize(from_pixels(batch.to(device)))) for batch in batches])


@torch.no_grad()
def features_of_captions(model: CLIP, tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """n captions -> (n, projection)"""
    ids = tokenizer(captions).to(model.logit_scale.device)
    return torch.cat([model.text_features(trimmed(batch, tokenizer)) for batch in ids.split(250)])


def ranked_first(model: CLIP, tokenizer: Tokenizer, features: Tensor, pictures: list[Picture]) -> float:
    """How often a picture's own caption ranks first among 50: against 49 of other pictures that are not true of it.

    features: of the pictures, (n, projection).
    "A photo of a star" may come from another picture and be true of this one as well, so what the world can say of a
    picture, as far as 300 draws show it, and 300 of each vague way to say it, is never among the 49.
    """
    rng = np.random.default_rng(0)
    captions = [caption(picture, rng) for picture in pictures]
    similarity = features @ features_of_captions(model, tokenizer, captions).T
    right = []
    for i, picture in enumerate(pictures):
        true = {caption(said, rng) for said in ways_to_say(picture) for _ in range(300)} | {captions[i]}
        wrong = rng.choice([j for j, other in enumerate(captions) if other not in true], 49, replace=False)
        right.append(bool(similarity[i, i] > similarity[i, wrong].max()))
    return float(np.mean(right))


def ways_to_say(picture: Picture) -> list[Picture]:
    """By its name and, but for two different things, as "a thing" and "a red thing", which few captions do."""
    vague = [vaguely(picture, says_colour) for says_colour in (True, False)]
    return [picture, *vague] if len(set(picture.things)) == 1 else [picture]


def classes_by_prompts(model: CLIP, tokenizer: Tokenizer, features: Tensor, prompts: dict[str, list[str]]) -> list[str]:
    """Which of the classes each picture goes with best (section 3.1.4). -> n of the prompts' keys.

    features: of the pictures, (n, projection).

    A class's prompts are not wordings of one thing, whose features could be averaged, but things of every colour, say,
    of which the picture shows one. So a class gets the mean probability of its prompts, out of those of all classes.
    """
    scores = []
    for texts in tqdm(prompts.values(), desc="classes", leave=False):
        caption_features = features_of_captions(model, tokenizer, [with_articles(text) for text in texts])
        scores.append(model.logits(features, caption_features).logsumexp(dim=1) - math.log(len(texts)))
    return [list(prompts)[i] for i in torch.stack(scores, dim=1).argmax(dim=1).tolist()]


# What there is to tell -> class -> its prompts: the class, said of all that a picture of it may show besides.

SIZES = ("", "small ", "large ")
WHERE = ("", *(f" {place_phrase(place)}" for place in PLACES))
PLAIN = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SURFACES = {"none": list(COLOURS)} | {
    pattern: [f"{one} and {other} {pattern}" for one, other in permutations(COLOURS, 2)] for pattern in PATTERNS
}
MEDIA = {style: [medium(Picture((), "white", style, view=view)) for view in (None, *VIEWS)] for style in STYLES}

CLASSES: dict[str, dict[str, list[str]]] = {
    "colour": {colour: [f"a photo of a {colour} {shape}" for shape in SHAPES] for colour in COLOURS},
    "shape": {
        shape: [
            f"a photo of a {size}{surface} {shape}{where}"
            for surfaces in SURFACES.values()
            for surface, size, where in product(surfaces, SIZES, WHERE)
        ]
        for shape in SHAPES
    },
    "pattern": {
        pattern: [f"a photo of a {size}{surface} {shape}" for surface, size, shape in product(surfaces, SIZES, SHAPES)]
        for pattern, surfaces in SURFACES.items()
    },
    "scene": {
        name: [
            f"{how} of a {thing} {scene.words}"
            for style in STYLES
            if has_background(style)
            for how, thing in product(MEDIA[style], PLAIN)
        ]
        for name, scene in SCENES.items()
    },
    "style": {style: [f"{how} of a {thing}" for how, thing in product(MEDIA[style], PLAIN)] for style in STYLES},
}


def class_of(picture: Picture, what: str) -> str | None:
    """The one of CLASSES[what] that is so; None where it can't be told.

    No prompt names an invented style. Colours, shapes and patterns are asked of photos of one shape in good light and
    full view: of anything else the captions do not say them (a lemon's), or the picture hides them (a sketch's).
    """
    thing = picture.things[0]
    if picture.style in INVENTED_STYLES:
        return None
    if what == "style":
        return picture.style
    if what == "scene":
        return picture.background if picture.background in SCENES and has_background(picture.style) else None
    if len(picture.things) == 2 or thing.noun or picture.view or picture.style != "photo":
        return None
    if what == "colour":
        return None if thing.pattern else thing.colour
    return thing.shape if what == "shape" else thing.pattern or "none"


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--weights", type=cli.path, default=TINY, metavar="DIR", help="of clip.safetensors, merges.txt (%(default)s)")
    add("--pictures", type=cli.whole_number(500, 1_000_000), default=2000, metavar="N", help="to draw (%(default)s)")
    options = parser.parse_args(arguments)

    model, tokenizer = read_clip(options.weights / "clip.safetensors")
    pixels, pictures = make_pictures(options.pictures, HELD_OUT_SEED, model.config.vision.size)
    features = features_of_pictures(model, torch.from_numpy(pixels))
    first_500 = pictures[:500]  # the 300 captions of each take their time
    share = ranked_first(model, tokenizer, features[: len(first_500)], first_500)
    print(f"the right caption ranks first among 50: {share:.1%} of {len(first_500)} pictures", flush=True)
    for what, prompts in CLASSES.items():
        expected = {i: name for i, picture in enumerate(pictures) if (name := class_of(picture, what))}
        found = classes_by_prompts(model, tokenizer, features[list(expected)], prompts)
        share = np.mean([one == other for one, other in zip(found, expected.values(), strict=True)])
        print(f"zero-shot {what}, one of {len(prompts)}: {share:.1%} of {len(found)} pictures", flush=True)


if __name__ == "__main__":
    cli.run(main)
