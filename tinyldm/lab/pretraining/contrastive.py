"""Training the tiny CLIP: a text tower and an image tower that agree on which caption goes with which picture.

It is trained as OpenAI's was (arXiv 2103.00020, section 2 and figure 3), before the diffusion model and with the same
tokenizer. measure/zero_shot.py says how good it is.
"""

import contextlib
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyldm import InputError
from tinyldm.clip_image import CLIP, CLIPConfig, normalize
from tinyldm.files import write_atomically
from tinyldm.formats.merges import read_merges, write_merges
from tinyldm.formats.native import as_metadata
from tinyldm.images import from_pixels
from tinyldm.lab.measure.zero_shot import features_of_captions, features_of_pictures
from tinyldm.lab.pretraining.loop import STATE, Batch, Job, Training, autocast, load_average
from tinyldm.lab.pretraining.sizes import PROJECTION, VISION, text_config
from tinyldm.lab.world.captions import SHEET_PROMPTS, TEXT_LENGTH, caption, make_tokenizer, trimmed
from tinyldm.lab.world.nouns import INVENTED_NOUNS, NOUNS
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import INVENTED_STYLES, STYLES
from tinyldm.lab.world.things import COLOURS, PATTERNS, SHAPES, Picture, choice
from tinyldm.tokenizer import Tokenizer

HALF_SEEN = 0.9  # of the steps of the second stage: in these it sees a random half of every picture's patches
GROUP = 16  # pictures of a batch that are of one colour and background
NEAR_MISSES = 2  # captions a picture, besides all those of the batch's other pictures, that are not true of it
WAYS_TO_MISS = ("shape", "shape", "pattern", "pattern", "background", "style")  # the harder to see, the oftener
SHIFT = 4  # pixels, at most, by which a batch is moved, its edge repeated: pictures are not to be learned by heart
MAX_LOGIT_SCALE = math.log(100)  # a temperature below 0.01 makes training unstable (section 2.5)


def tiny_clip(vocabulary_size: int, patch: int = VISION.patch) -> CLIP:
    """Both towers as they are before training; the text tower has the sizes of the diffusion model's text encoder."""
    model = CLIP(CLIPConfig(text_config(vocabulary_size), replace(VISION, patch=patch), PROJECTION))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.01)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=VISION.width**-0.5)
    return model


def with_patches_halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's tensors for patches of half the side: a patch is read as if it were twice as large."""
    tensors, embeddings = {name: tensor.float() for name, tensor in tensors.items()}, "vision_model.embeddings"
    kernel, positions = (tensors[f"{embeddings}.{name}_embedding.weight"] for name in ("patch", "position"))
    tensors[f"{embeddings}.patch_embedding.weight"] = reduce(kernel, "o c (h 2) (w 2) -> o c h w", "sum")
    of_class, of_patches = positions[:1], positions[1:]  # new positions lie between the old ones
    grid = rearrange(of_patches, "(h w) width -> 1 width h w", h=math.isqrt(len(of_patches)))
    grid = rearrange(F.interpolate(grid, scale_factor=2, mode="bilinear"), "1 width h w -> (h w) width")
    tensors[f"{embeddings}.position_embedding.weight"] = torch.cat([of_class, grid])
    return tensors


def random_half(b: int, n: int, generator: torch.Generator) -> Tensor:
    """Of a class token and n patches: the positions that are kept, (b, 1 + n / 2), the class token's first.

    Halving the patches makes a step more than twice as fast, and no two steps see the same picture (FLIP, arXiv
    2212.00794).
    """
    kept = 1 + torch.rand(b, n, generator=generator).argsort(dim=1)[:, : n // 2]
    return F.pad(kept, (1, 0))


def only(x: Tensor, positions: Tensor) -> Tensor:
    """(b, n, width) at positions (b, k) -> (b, k, width)"""
    return x.gather(1, repeat(positions, "b k -> b k width", width=x.shape[2]))


def contrastive_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Symmetric cross-entropy (figure 3): a picture is to pick its caption out of all, a caption its picture.

    logits: (b, m), pictures down and captions across, first the pictures' own, then near misses, which are no
    picture's; ids: (m, n), the captions. Where one reads like another, it is as right for that picture: such pairs are
    left out of both softmaxes, neither right nor wrong.
    """
    b, m = logits.shape
    pairs = torch.eye(b, m, dtype=torch.bool, device=ids.device)
    same = (ids[:b].unsqueeze(1) == ids.unsqueeze(0)).all(dim=-1)
    logits = logits.masked_fill(same & ~pairs, -math.inf)
    target = torch.arange(b, device=ids.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :b].T, target)) / 2


# Colours and backgrounds alone tell nearly any two pictures of a randomly drawn batch apart, and then nothing else is
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
        styles = INVENTED_STYLES if picture.style in INVENTED_STYLES else STYLES
        return replace(picture, style=choice(rng, styles, [picture.style]))
    if thing.noun:
        nouns = INVENTED_NOUNS if thing.noun in INVENTED_NOUNS else NOUNS
        other = replace(thing, noun=choice(rng, nouns, [thing.noun]))
    elif what == "shape":
        other = replace(thing, shape=choice(rng, SHAPES, [thing.shape]))
    else:
        pattern = choice(rng, [None, *PATTERNS], [thing.pattern])
        other = replace(thing, pattern=pattern, colour2=thing.colour2 or choice(rng, COLOURS, [thing.colour]))
    return replace(picture, things=tuple(other if one == thing else one for one in picture.things))


def captions_and_near_misses(pictures: list[Picture], rng: np.random.Generator) -> list[str]:
    """One caption each; then, NEAR_MISSES times, that of a near miss each, in the same words as far as it goes."""
    seeds = rng.integers(2**32, size=len(pictures))
    misses = [near_miss(picture, rng) for _ in range(NEAR_MISSES) for picture in pictures]
    said = zip([*pictures, *misses], np.tile(seeds, 1 + NEAR_MISSES), strict=True)
    return [caption(picture, np.random.default_rng(seed)) for picture, seed in said]


def train_clip(job: Job) -> bool:
    """The stages "clip" and "fine-clip", which begins with the former's weights. Done (True), or stopped by the clock
    (False); everything to go on from lies in the stage's folder."""
    folder, recipe, device = job.stage_folder, job.recipe, job.device
    if not (folder / "merges.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_merges(folder / "merges.txt", make_tokenizer(job.pictures, job.seed).merges)
    tokenizer = Tokenizer(read_merges(folder / "merges.txt"), length=TEXT_LENGTH)
    torch.manual_seed(job.seed)
    is_fine = job.stage == "fine-clip"
    model = tiny_clip(tokenizer.vocabulary_size, VISION.patch if is_fine else 2 * VISION.patch)
    if is_fine and not (folder / STATE).exists():
        coarse = tiny_clip(tokenizer.vocabulary_size, 2 * VISION.patch)
        load_average(coarse, job.out / "clip")
        model.load_state_dict(with_patches_halved(coarse.state_dict()))
    training = Training(folder, model, recipe, job.seed, device)
    groups, embeddings = groups_alike(job.pictures), model.vision_model.embeddings

    def draw(step: int, rng: np.random.Generator, generator: torch.Generator) -> Batch:
        rows = rows_alike(groups, recipe.batch, rng)
        ids = tokenizer(captions_and_near_misses([job.pictures[i] for i in rows], rng))
        x, y = (np.arange(VISION.size) + rng.integers(-SHIFT, SHIFT + 1, size=(2, 1))).clip(0, VISION.size - 1)
        batch = {
            "pictures": normalize(from_pixels(job.pixels[rows][:, y][:, :, x])),
            "ids": trimmed(ids, tokenizer) if device == "cpu" else ids,
        }
        if is_fine and step < HALF_SEEN * recipe.steps:
            batch["kept"] = random_half(len(rows), (VISION.size // VISION.patch) ** 2, generator)
        return batch

    def loss_of(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():  # here, since the last step may have brought it above
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        ids, kept = batch["ids"], batch.get("kept")
        with autocast(device):
            # Between embeddings and encoder half of the patches go; clip_image.py need not know.
            hook = embeddings.register_forward_hook(lambda _, inputs, x: x if kept is None else only(x, kept))
            # Training takes the plain kernel on a CPU; with 257 positions the fused one is twice as fast.
            many = device == "cpu" and is_fine and kept is None
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if many else contextlib.nullcontext():
                image_features = model.image_features(batch["pictures"])
            hook.remove()
            text_features = model.text_features(ids)
        logits = model.logits(image_features.float(), text_features.float())
        accuracy = (logits.argmax(dim=1) == torch.arange(len(logits), device=device)).float().mean()
        return {"loss": contrastive_loss(logits, ids), "accuracy": accuracy}

    def sheet() -> None:
        with training.averaged() as averaged:
            rows = retrieved(averaged, tokenizer, job.pixels[:1000], SHEET_PROMPTS)
        training.save_sheet(rows, SHEET_PROMPTS)

    return training.run(draw, loss_of, sheet, job.stop_at)


def retrieved(model: CLIP, tokenizer: Tokenizer, pixels: Tensor, prompts: list[str]) -> list[list[Image.Image]]:
    """For each prompt the eight of the pictures that go with it best."""
    similarity = features_of_captions(model, tokenizer, prompts) @ features_of_pictures(model, pixels).T
    return [[Image.fromarray(pixels[i].numpy()) for i in row] for row in similarity.topk(8).indices.cpu()]


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
    model = tiny_clip(tokenizer.vocabulary_size)
    load_average(model, out / "fine-clip")
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with write_atomically(folder / "clip.safetensors") as temporary:
        save_file(tensors, temporary, metadata=as_metadata(asdict(model.config)))
    write_merges(there, tokenizer.merges)
