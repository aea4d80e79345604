"""The tiny CLIP: a text tower and an image tower that agree on which caption goes with which picture of the world.

    python -m tinyldm.lab.pretraining.contrastive   how good weights/tiny/clip.safetensors is on pictures it never saw

It is trained as OpenAI's was (arXiv 2103.00020, section 2 and figure 3), before the diffusion model and with the same
tokenizer, and used to measure: do pictures obey their prompts, and does a learned word look like its pictures?
"""

import argparse
import contextlib
import json
import math
from dataclasses import asdict, replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.clip import CLIPTextConfig
from tinyldm.clip_image import CLIP, CLIPConfig, CLIPVisionConfig, normalize
from tinyldm.files import write_atomically
from tinyldm.formats.checkpoint import load_clip
from tinyldm.formats.merges import read_merges, write_merges
from tinyldm.lab.pretraining.loop import Recipe, Training, autocast, batch_of, load_section, save_sheet
from tinyldm.lab.world.captions import (
    SHEET_PROMPTS,
    TEXT_LENGTH,
    WITHOUT_BACKGROUND,
    caption,
    make_tokenizer,
    medium,
    with_articles,
)
from tinyldm.lab.world.distribution import HELD_OUT_SEED, make_pictures
from tinyldm.lab.world.drawing import STYLES
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.things import COLOURS, NOUNS, PATTERNS, SHAPES, VIEWS, Picture, choice
from tinyldm.tokenizer import Tokenizer

VISION = CLIPVisionConfig(size=64, patch=4, width=128, layers=4, heads=4)
PROJECTION = 64
RECIPES = {  # a stage each: first with patches twice as large, which is a quarter of them and much faster
    "clip": Recipe(steps=5000, batch=128, lr=2e-3),
    "fine-clip": Recipe(steps=2800, batch=128, lr=1.5e-3, pictures=120_000),
}
HALF_SEEN = 0.9  # of the steps of the second stage: in these it sees a random half of every picture's patches
GROUP = 16  # pictures of a batch that are of one colour and background
NEAR_MISSES = 2  # captions a picture, besides all those of the batch's other pictures, that are not true of it
WAYS_TO_MISS = ("shape", "shape", "pattern", "pattern", "background", "style")  # the harder to see, the oftener
SHIFT = 4  # pixels, at most, by which a batch is moved, so that pictures are not learned by heart
MAX_LOGIT_SCALE = math.log(100)  # a temperature below 0.01 makes training unstable (section 2.5)


# ---- Training


def tiny_clip(vocabulary_size: int, patch: int = VISION.patch) -> CLIP:
    """Both towers as they are before training; the text tower has the sizes of the diffusion model's text encoder."""
    text = CLIPTextConfig(vocabulary_size, TEXT_LENGTH, width=128, layers=3, heads=4)
    model = CLIP(CLIPConfig(text, replace(VISION, patch=patch), PROJECTION))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.01)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=VISION.width**-0.5)
    return model


def with_patches_halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP's tensors for patches of half the side: a patch is read as if it were twice as large."""
    tensors, embeddings = {name: tensor.float() for name, tensor in tensors.items()}, "vision_model.embeddings"
    kernel, positions = (tensors[f"{embeddings}.{name}_embedding.weight"] for name in ("patch", "position"))
    tensors[f"{embeddings}.patch_embedding.weight"] = reduce(kernel, "o c (h 2) (w 2) -> o c h w", "sum")
    of_class, of_patches = positions[:1], positions[1:]  # new positions lie between the old ones
    grid = rearrange(of_patches, "(h w) width -> 1 width h w", h=math.isqrt(len(of_patches)))
    grid = rearrange(F.interpolate(grid, scale_factor=2, mode="bilinear"), "1 width h w -> (h w) width")
    tensors[f"{embeddings}.position_embedding.weight"] = torch.cat([of_class, grid])
    return tensors


def half_of_patches(x: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """(b, 1 + n, width) -> (b, 1 + n / 2, width): the class token and, of each picture, a random half of the patches.

    Halving them makes a step more than twice as fast, and no two steps see the same picture (FLIP, arXiv 2212.00794).
    """
    b, n, width = x.shape
    kept = 1 + torch.rand(b, n - 1, generator=noise).argsort(dim=1)[:, : (n - 1) // 2].to(x.device)
    return torch.cat([x[:, :1], x.gather(1, repeat(kept, "b n -> b n width", width=width))], dim=1)


def contrastive_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy (figure 3): a picture is to pick its caption out of all, a caption its picture.

    logits: (b, m), pictures down and captions across, first the pictures' own, then near misses, which are no
    picture's; ids: (m, n), the captions. Where one reads like another, it is as right for that picture: such pairs are
    left out of both softmaxes, neither right nor wrong.
    """
    b, m = logits.shape
    own = torch.eye(b, m, dtype=torch.bool, device=ids.device)
    same = (ids[:b].unsqueeze(1) == ids.unsqueeze(0)).all(dim=-1)
    logits = logits.masked_fill(same & ~own, -math.inf)
    target = torch.arange(b, device=ids.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :b].T, target)) / 2


# Colours and backgrounds alone tell nearly any two pictures of a blindly drawn batch apart, and then nothing else is
# learned. So a batch is made of groups in which they do not, and every caption has near misses.


def groups_alike(pictures: list[Picture]) -> list[np.ndarray]:
    """For each picture the rows of all those of its colour and background, its own among them."""
    groups: dict[tuple[str, str], list[int]] = {}
    looks = [(picture.things[0].colour, picture.background) for picture in pictures]
    for i, look in enumerate(looks):
        groups.setdefault(look, []).append(i)
    return [np.array(groups[look]) for look in looks]


def rows_alike(groups: list[np.ndarray], batch: int, rng: np.random.Generator) -> np.ndarray:
    """The rows of a batch made of groups; none twice, for its two captions would count as wrong for each other."""
    rows: dict[int, None] = {}
    for i in rng.permutation(len(groups)):
        rows |= dict.fromkeys(rng.permutation(groups[i])[:GROUP].tolist())
        if len(rows) >= batch:
            break
    return np.array(list(rows)[:batch])


def near_miss(picture: Picture, rng: np.random.Generator) -> Picture:
    """The picture but for its shape or noun, its pattern, its background or its style (arXiv 2210.01936, section 4)."""
    what, thing = choice(rng, WAYS_TO_MISS), picture.things[0]
    if what == "background":
        return replace(picture, background=choice(rng, [*COLOURS, *SCENES], [picture.background]))
    if what == "style":
        return replace(picture, style=choice(rng, STYLES, [picture.style]))
    if thing.noun:
        other = replace(thing, noun=choice(rng, NOUNS, [thing.noun]))
    elif what == "shape":
        other = replace(thing, shape=choice(rng, SHAPES, [thing.shape]))
    else:
        pattern = choice(rng, [None, *PATTERNS], [thing.pattern])
        other = replace(thing, pattern=pattern, colour2=thing.colour2 or choice(rng, COLOURS, [thing.colour]))
    return replace(picture, things=tuple(other if one == thing else one for one in picture.things))


def captions_of(pictures: list[Picture], rng: np.random.Generator) -> list[str]:
    """One caption each; then, NEAR_MISSES times, that of a near miss each, in the same words as far as it goes."""
    seeds = rng.integers(2**32, size=len(pictures))
    misses = [near_miss(picture, rng) for _ in range(NEAR_MISSES) for picture in pictures]
    said = zip([*pictures, *misses], np.tile(seeds, 1 + NEAR_MISSES), strict=True)
    return [caption(picture, np.random.default_rng(seed)) for picture, seed in said]


def train_clip(
    out: Path,
    stage: str,
    pixels: torch.Tensor,
    pictures: list[Picture],
    recipe: Recipe,
    seed: int,
    device: str,
    stop_at: float,
) -> bool:
    """Train until done (True) or the clock says stop (False); everything to go on from lies in out/<stage>."""
    folder = out / stage
    if not (folder / "merges.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_merges(folder / "merges.txt", make_tokenizer(pictures, seed).merges)
    tokenizer = Tokenizer(read_merges(folder / "merges.txt"), length=TEXT_LENGTH)
    torch.manual_seed(seed)
    is_fine = stage == "fine-clip"
    model = tiny_clip(tokenizer.vocabulary_size, VISION.patch if is_fine else 2 * VISION.patch)
    if is_fine and not (folder / "state").exists():
        model.load_state_dict(with_patches_halved(load_section(out / "clip", "average")))
    training = Training(folder, model, recipe, seed, device)
    groups, embeddings = groups_alike(pictures), model.vision_model.embeddings

    def loss_of(rng: np.random.Generator, noise: torch.Generator) -> dict[str, torch.Tensor]:
        with torch.no_grad():  # here, since the last step may have brought it above
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        sees_half = is_fine and training.step < HALF_SEEN * recipe.steps
        rows = rows_alike(groups, recipe.batch, rng)
        ids = tokenizer(captions_of([pictures[i] for i in rows], rng)).to(device)
        x, y = rng.integers(2 * SHIFT + 1, size=2)
        batch = F.pad(batch_of(pixels, rows, device), [SHIFT] * 4, mode="replicate")
        batch = batch[:, :, y : y + VISION.size, x : x + VISION.size]
        with autocast(device):
            # Between embeddings and encoder half of the patches go; clip.py need not know.
            hook = embeddings.register_forward_hook(lambda _, inputs, x: half_of_patches(x, noise) if sees_half else x)
            # Training takes the plain kernel on a CPU; with 257 positions the fused one is twice as fast.
            many = device == "cpu" and is_fine and not sees_half
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if many else contextlib.nullcontext():
                images = model.image_features(normalize(batch))
            hook.remove()
            texts = model.text_features(trimmed(ids, tokenizer))
        logits = model.logits(images.float(), texts.float())
        accuracy = (logits.argmax(dim=1) == torch.arange(len(rows), device=device)).float().mean()
        return {"loss": contrastive_loss(logits, ids), "accuracy": accuracy}

    def sheet() -> None:
        with training.averaged() as averaged:
            save_sheet(training, retrieved(averaged, tokenizer, pixels[:1000], SHEET_PROMPTS), SHEET_PROMPTS)

    return training.run(loss_of, sheet, stop_at)


def trimmed(ids: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Without the padding that all have in common: a causal tower reads the ends just the same, and sooner."""
    return ids[:, : int((ids != tokenizer.end).sum(dim=1).max()) + 1]


def export_clip(out: Path, folder: Path) -> None:
    """The averaged weights, as far as they have come, as clip.safetensors, its sizes as JSON in the metadata.

    Raises InputError if the merges.txt already there, the diffusion model's, is of another vocabulary.
    """
    merges = out / "fine-clip" / "merges.txt"
    tokenizer = Tokenizer(read_merges(merges), length=TEXT_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    there = folder / "merges.txt"
    if there.exists() and read_merges(there) != tokenizer.merges:
        raise InputError(f"{there} differs from {merges}, expected one vocabulary; train both from the same pictures")
    config = tiny_clip(tokenizer.vocabulary_size).config
    tensors = {name: tensor.half().contiguous() for name, tensor in load_section(out / "fine-clip", "average").items()}
    with write_atomically(folder / "clip.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"tinyldm": json.dumps(asdict(config))})
    write_merges(there, tokenizer.merges)


# ---- What it knows about pictures it never saw


@torch.no_grad()
def features_of_pictures(model: CLIP, pixels: torch.Tensor) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> (n, projection)"""
    device = model.logit_scale.device
    batches = np.array_split(np.arange(len(pixels)), math.ceil(len(pixels) / 250))
    return torch.cat([model.image_features(normalize(batch_of(pixels, rows, device))) for rows in batches])


@torch.no_grad()
def features_of_captions(model: CLIP, tokenizer: Tokenizer, captions: list[str]) -> torch.Tensor:
    """n captions -> (n, projection)"""
    ids = tokenizer(captions).to(model.logit_scale.device)
    return torch.cat([model.text_features(trimmed(batch, tokenizer)) for batch in ids.split(250)])


def retrieved(model: CLIP, tokenizer: Tokenizer, pixels: torch.Tensor, prompts: list[str]) -> list[list[Image.Image]]:
    """For each prompt the eight of the pictures that go with it best."""
    similarity = features_of_captions(model, tokenizer, prompts) @ features_of_pictures(model, pixels).T
    return [[Image.fromarray(pixels[i].numpy()) for i in row] for row in similarity.topk(8).indices.cpu()]


def ranked_first(
    model: CLIP, tokenizer: Tokenizer, pixels: torch.Tensor, pictures: list[Picture], seed: int = 0
) -> float:
    """How often a picture's own caption ranks first among 50: against 49 of other pictures that are not true of it.

    "A photo of a star" may come from another picture and be true of this one as well, so what the world can say of a
    picture, as far as 300 draws show it, is never among the 49.
    """
    rng = np.random.default_rng(seed)
    own = [caption(picture, rng) for picture in pictures]
    similarity = features_of_pictures(model, pixels) @ features_of_captions(model, tokenizer, own).T
    right = []
    for i, picture in enumerate(pictures):
        true = {caption(picture, rng) for _ in range(300)} | {own[i]}
        wrong = rng.choice([j for j, other in enumerate(own) if other not in true], 49, replace=False)
        right.append(bool(similarity[i, i] > similarity[i, wrong].max()))
    return float(np.mean(right))


def zero_shot(model: CLIP, tokenizer: Tokenizer, pixels: torch.Tensor, prompts: dict[str, list[str]]) -> list[str]:
    """Which of the classes each picture goes with best (section 3.1.4). -> n of the prompts' keys.

    A class's prompts are not wordings of one thing, whose features could be averaged, but things of every colour, say,
    of which the picture shows one. So a class gets the mean probability of its prompts, out of those of all classes.
    """
    pictures, scores = features_of_pictures(model, pixels), []
    for texts in tqdm(prompts.values(), desc="classes", leave=False):
        captions = features_of_captions(model, tokenizer, [with_articles(text) for text in texts])
        scores.append(model.logits(pictures, captions).logsumexp(dim=1) - math.log(len(texts)))
    return [list(prompts)[i] for i in torch.stack(scores, dim=1).argmax(dim=1).tolist()]


# What there is to tell -> class -> its prompts: the class, said of all that a picture of it may show besides.

SIZES = ("", "small ", "large ")
WHERE = ("", " on the left", " on the right", " at the top", " at the bottom")
PLAIN = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SURFACES = {"none": list(COLOURS)} | {
    pattern: [f"{one} and {other} {pattern}" for one, other in permutations(COLOURS, 2)] for pattern in PATTERNS
}
MEDIA = {style: [medium(Picture((), "white", style, view=view)) for view in (None, *VIEWS)] for style in STYLES}

PROMPTS: dict[str, dict[str, list[str]]] = {
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
            if style not in WITHOUT_BACKGROUND
            for how, thing in product(MEDIA[style], PLAIN)
        ]
        for name, scene in SCENES.items()
    },
    "style": {style: [f"{how} of a {thing}" for how, thing in product(MEDIA[style], PLAIN)] for style in STYLES},
}


def class_of(picture: Picture, what: str) -> str | None:
    """The one of PROMPTS[what] that is so; None where it can't be told.

    Colours, shapes and patterns are asked of photos of one shape in good light and full view: of anything else the
    captions do not say them (a lemon's), or the picture hides them (a sketch's).
    """
    thing = picture.things[0]
    if what == "style":
        return picture.style
    if what == "scene":
        return picture.background if picture.background in SCENES and picture.style not in WITHOUT_BACKGROUND else None
    if len(picture.things) == 2 or thing.noun or picture.view or picture.style != "photo":
        return None
    if what == "colour":
        return None if thing.pattern else thing.colour
    return thing.shape if what == "shape" else thing.pattern or "none"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny"), help="the checkpoint (%(default)s)")
    parser.add_argument(
        "--pictures", type=cli.whole_number(500), default=2000, help="to draw for zero-shot (%(default)s)"
    )
    args = parser.parse_args(argv)

    model = load_clip(args.weights / "clip.safetensors")
    tokenizer = Tokenizer(read_merges(args.weights / "merges.txt"), length=model.config.text.length)
    array, pictures = make_pictures(args.pictures, HELD_OUT_SEED, model.config.vision.size)
    pixels = torch.from_numpy(array)
    some = pictures[:500]  # the 300 captions of each take their time
    share = ranked_first(model, tokenizer, pixels[: len(some)], some)
    print(f"the right caption ranks first among 50: {share:.1%} of {len(some)} pictures")
    for what, prompts in PROMPTS.items():
        expected = {i: name for i, picture in enumerate(pictures) if (name := class_of(picture, what))}
        found = zero_shot(model, tokenizer, pixels[list(expected)], prompts)
        share = np.mean([one == other for one, other in zip(found, expected.values(), strict=True)])
        print(f"zero-shot {what}, one of {len(prompts)}: {share:.1%} of {len(found)} pictures")


if __name__ == "__main__":
    cli.run(main)
