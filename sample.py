"""Pictures from prompts, with a latent diffusion model and the words it has learned.

    python sample.py --prompt "a photo of a red star on a blue background"
    python sample.py --prompt "a photo of S* on a green background" --embedding outputs/S/embedding.safetensors --num 4
    python sample.py --prompt "two lemons" --prompt "a sketch of a heart" --sampler dpmpp_2m --steps 15
    python sample.py --prompt "a photo of a red star on the grass" --init-image picture.png --mask mask.png

Writes 0000.png, 0001.png, … and sheet.png into outputs/samples, numbered if it exists. Each picture carries its prompt
and settings in a text chunk named "parameters". Picture i starts from the noise of seed + i, whatever the device or the
batch. In a batch of another size it stays within 1 of 255 (in float32).

--init-image changes a picture, all of it or what --mask has white. --attention shows where the words of a prompt went,
--show-steps how each picture comes out of the noise.
"""

import math
import os
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

if __name__ == "__main__":
    from tinyldm import begin_command

    begin_command()

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli, ranks
from tinyldm.editing import Source
from tinyldm.files import check_unused, read_lines, take_folder
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.heat_maps import HeatMaps, heat_sheet, watched
from tinyldm.images import contact_sheet, save_image, to_images
from tinyldm.interpolation import prompts_between
from tinyldm.inversion import add_words
from tinyldm.latent_diffusion import LatentDiffusion, Sampling
from tinyldm.masks import pasted, read_source
from tinyldm.sampler import SAMPLERS, Between, Seed

LEAST, MOST = 4, 12  # pictures at a time: of latents 64x64 (512x512 pixels), and of much smaller ones
ON_THE_WAY = 8  # pictures of an interpolation, its ends among them
STEPS_SHOWN = 8  # of a picture, its last among them
ROW, SHEET_PIXELS = 16, 60_000_000  # pictures in a row of the sheet, and what programs open without complaint


class Wanted(NamedTuple):
    """One picture."""

    prompt: str
    seed: Seed


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    device = cli.choose_device(options.device)
    ranks.join(device)
    prompts = ranks.from_first(lambda: read_prompts(options))
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    sampling = checkpoint.defaults.sampling(
        options.sampler, options.steps, options.guidance, options.height, options.width
    )
    learned = [load_embeddings(file, checkpoint.text_encoder.config.width) for file in options.embedding]

    model, model_hash = checkpoint.load(device, cli.choose_dtype(options.dtype, device)), checkpoint.sha256()[:10]
    del checkpoint  # it would keep its file mapped into memory
    words: dict[str, Tensor] = {}
    for words_of_file in learned:
        try:
            add_words(model, words_of_file)
        except InputError as error:
            raise InputError(f"{error}; --embedding FILE:WORD calls the word of a file WORD") from error
        words |= words_of_file
    given = [*words]
    wanted = wanted_pictures(model, prompts, words, options)
    model.check_size(sampling.height, sampling.width)
    side = max(8, int(math.sqrt(SHEET_PIXELS / len(wanted))) - 24)  # of a picture on the sheet, at most
    smaller = math.ceil(max(sampling.height, sampling.width, side) / side)
    tile = min(128, side - math.ceil(max(sampling.height, sampling.width) / smaller) + 1)  # else it is enlarged too far
    texts = {*(picture.prompt for picture in wanted), options.negative}
    used = {piece for text in texts for piece in model.tokenizer.split_placeholders(text)}
    for word in given:
        if word not in used and word not in (options.interpolate or ()):
            warnings.warn(f"no prompt uses {word}", stacklevel=1)
    if options.negative and sampling.guidance == 1:
        warnings.warn("--guidance 1 leaves --negative out", stacklevel=1)
    model.tokenizer([*texts])  # a word that is cut off is an error now, not half-way
    source = None
    if options.init_image:
        size = sampling.height, sampling.width, model.autoencoder.config.factor
        source = read_source(options.init_image, options.mask, options.strength, *size)
        source.skipped(sampling.steps)

    # Every picture is written as soon as its batch is done.
    options.out = ranks.from_first(lambda: take_folder(options.out, Path("outputs/samples")))
    images: dict[int, Image.Image] = {}
    with cli.stop_on_signal() as stopping:
        for number, image, heat in sampled(model, wanted, words, sampling, source, options, stopping):
            picture, name = wanted[number], f"{number:04d}"
            text = parameters(picture, sampling, model_hash, options)
            save_image(image, options.out / f"{name}.png", {"parameters": text})
            if heat is not None:
                sheet = heat_sheet(image, picture.prompt, heat, model.tokenizer)
                save_image(sheet, options.out / f"{name}-attention.png")
            images[number] = image.reduce(smaller)
        images, stopped = ranks.gathered(images), ranks.highest(stopping())
    status = ranks.from_first(lambda: 0 if len(images) == len(wanted) else stopped)
    if ranks.rank():
        return status
    if images:
        save_image(sheet_of(images, prompts, options.num, tile), options.out / "sheet.png")
    if len(images) < len(wanted):
        print(f"stopped: {len(images)} of {len(wanted)} pictures are in {options.out}")
        return status
    print(f"{len(images)} pictures and sheet.png in {options.out}")
    return 0


def wanted_pictures(
    model: LatentDiffusion, prompts: list[str], words: dict[str, Tensor], options: Namespace
) -> list[Wanted]:
    """--num of each prompt. With --interpolate they lead from one seed to another, or from one word to another, and
    the words between are added to the words."""
    if not options.interpolate:
        each = [prompt for prompt in prompts for _ in range(options.num)]
        return [Wanted(prompt, options.seed + i) for i, prompt in enumerate(each)]
    start, end = options.interpolate
    if all(seed.isdecimal() and len(seed) < 20 and seed not in words for seed in (start, end)):
        seeds = [Between(int(start), int(end), i / (options.num - 1)) for i in range(options.num)]
        return [Wanted(prompt, seed) for prompt in prompts for seed in seeds]
    each = prompts_between(model, prompts, words, start, end, options.num)
    return [Wanted(prompt, options.seed) for prompt in each]


def sampled(
    model: LatentDiffusion,
    wanted: list[Wanted],
    words: dict[str, Tensor],
    sampling: Sampling,
    source: Source | None,
    options: Namespace,
    stopping: Callable[[], int],  # asked after every step of the sampler; if it is true, no more pictures come
) -> Iterator[tuple[int, Image.Image, Tensor | None]]:
    """This rank's pictures, a batch at a time, a progress bar beside them, each after its number; with --attention its
    heat maps behind it, else None. With --show-steps a file beside each picture gets longer as it comes about."""
    _, h, w = model.latent_shape(sampling.height, sampling.width)
    steps = sampling.steps - (source.skipped(sampling.steps) if source else 0)
    shown = {math.ceil(steps * i / STEPS_SHOWN) for i in range(1, STEPS_SHOWN + 1)} if options.show_steps else set()
    outside = None
    if source and source.mask:
        original = source.picture if options.keep_pixels else model.decode(model.encode(source.picture)[0])
        (outside,) = to_images(original)

    def pictures(z: Tensor) -> list[Image.Image]:
        images = to_images(model.decode(z))
        return [pasted(image, outside, source.mask) for image in images] if outside else images

    at_once = at_a_time(h, w)
    batches = range(0, len(wanted), at_once)[ranks.rank() :: ranks.count()]
    with tqdm(total=steps * len(batches), desc="sampling") as bar:
        for first in batches:
            prompts, seeds = zip(*wanted[first : first + at_once], strict=True)
            maps, so_far = HeatMaps(len(prompts), h, w), [[] for _ in prompts]
            with watched(model.unet, maps) if options.attention else nullcontext():
                made = model.generate(
                    prompts, seeds, words=words, negative=options.negative, source=source, **sampling._asdict()
                )
                for step, z in enumerate(made, 1):
                    if stopping():
                        return
                    bar.update()
                    if step in shown:
                        for i, image in enumerate(pictures(z)):
                            so_far[i].append(image)
                            save_image(contact_sheet([so_far[i]]), options.out / f"{first + i:04d}-steps.png")
            images = pictures(z)
            heat = maps.mean() if options.attention else [None] * len(images)
            yield from zip(range(first, first + len(images)), images, heat, strict=True)


def at_a_time(h: int, w: int) -> int:
    """How many pictures, of latents h x w: enough to keep a processor busy, few enough to fit."""
    return min(MOST, max(LEAST, LEAST * 64 * 64 // (h * w)))


def sheet_of(images: dict[int, Image.Image], prompts: list[str], num: int, tile: int) -> Image.Image:
    """All pictures that there are, below their prompt, in rows of at most ROW. tile: as contact_sheet's."""
    rows, labels = [], []
    for number, prompt in enumerate(prompts):
        own = [images[i] for i in range(number * num, (number + 1) * num) if i in images]
        rows += [own[i : i + ROW] for i in range(0, len(own), ROW)]
        labels += [prompt if i == 0 else "" for i in range(0, len(own), ROW)]
    return contact_sheet(rows, labels=labels, tile=tile)


def parameters(picture: Wanted, sampling: Sampling, model_hash: str, options: Namespace) -> str:
    """The prompt and what else made a picture, in the form that other programs of the field read and write."""
    negative = f"Negative prompt: {options.negative}\n" if options.negative else ""
    vae = f", VAE: {options.vae.name}" if options.vae else ""
    seed = f"{picture.seed}"
    if isinstance(picture.seed, Between):
        first, other, share = picture.seed
        seed = f"{first}, Variation seed: {other}, Variation seed strength: {share:g}"
    weights = Path(os.path.abspath(options.weights))  # without following links: to Hugging Face's blobs, say
    name = weights.name if weights.is_dir() else weights.stem  # a folder's may have a point in it
    strength = f", Denoising strength: {options.strength:g}" if options.init_image else ""
    return (
        f"{picture.prompt}\n{negative}Steps: {sampling.steps}, Sampler: {sampling.sampler}, "
        f"CFG scale: {sampling.guidance:g}, Seed: {seed}, Size: {sampling.width}x{sampling.height}, "
        f"Model hash: {model_hash}, Model: {name}{vae}{strength}"
    )


def read_prompts(options: Namespace) -> list[str]:
    prompts = [*options.prompt, *(read_lines(options.prompts, "prompts") if options.prompts else [])]
    if not prompts:
        raise InputError('no prompt; give one or more: --prompt "a photo of a red star"')
    if (pictures := len(prompts) * options.num) > cli.MOST_PICTURES:
        raise InputError(f"{pictures} pictures, expected at most {cli.MOST_PICTURES}; give fewer prompts or --num")
    return prompts


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", type=cli.path, metavar="FILE", help="more prompts, one a line; /dev/stdin: from a pipe")
    add("--negative", default="", metavar="TEXT", help="what the pictures should not show")
    add(
        "--embedding",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:WORD]",
        help="learned words, of any tool's format; WORD is what to call a file's word here",
    )
    cli.add_model_options(parser)
    add(
        "--sampler",
        choices=list(SAMPLERS),
        help="default, as for the next four: the checkpoint's own. dpmpp_2m has diffusers' timesteps; A1111's plain "
        "DPM++ 2M takes others",
    )
    add("--steps", type=cli.whole_number(1, 1000), metavar="N")
    add(
        "--guidance",
        type=cli.zero_or_positive,
        metavar="SCALE",
        help="1: the plain model; more: closer to the prompt; 0 ignores it",
    )
    add("--height", type=cli.whole_number(1, 2**16), metavar="PIXELS")
    add("--width", type=cli.whole_number(1, 2**16), metavar="PIXELS")
    add(
        "--num",
        type=cli.whole_number(1, cli.MOST_PICTURES),
        metavar="N",
        help=f"pictures a prompt (default: 1; with --interpolate {ON_THE_WAY})",
    )
    add("--out", type=cli.path, metavar="DIR", help="new or empty (default: outputs/samples, numbered)")
    add("--init-image", type=cli.path, metavar="FILE", help="begin with this picture, not with noise alone")
    add("--strength", type=strength, metavar="S", help="of 0 to 1, how much of it may change (0.8; with --mask 1)")
    add("--mask", type=cli.path, metavar="FILE", help="change only what is white here; as large as --init-image")
    add(
        "--keep-pixels",
        action="store_true",
        help="outside the mask keep the picture's own pixels, not encoded and decoded ones",
    )
    add("--attention", action="store_true", help="for each picture a sheet: where each word of its prompt went")
    add("--show-steps", action="store_true", help="for each picture a strip: how it came out of the noise")
    add(
        "--interpolate",
        type=partial(normalize, "NFC"),  # as the words of files are
        nargs=2,
        metavar=("A", "B"),
        help="from A, a learned word in the prompt, to B, another; or from a seed A to a seed B",
    )
    options = parser.parse_args(arguments)
    for option, needed in (("strength", "init_image"), ("mask", "init_image"), ("keep_pixels", "mask")):
        if getattr(options, option) and not getattr(options, needed):
            raise InputError(f"{flag(option)} alone does nothing, expected {flag(needed)} with it; give that too")
    options.strength = options.strength or (1.0 if options.mask else 0.8)
    options.num = options.num or (ON_THE_WAY if options.interpolate else 1)
    if options.interpolate and options.num < 2:
        raise InputError("--interpolate makes 1 picture, expected at least 2; give a larger --num")
    if options.out:
        check_unused(options.out)
    return options


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def strength(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    if (value := cli.positive(text)) > 1:
        raise ArgumentTypeError(f"{text[:40]!r}, expected a number above 0 and at most 1")
    return value


if __name__ == "__main__":
    cli.run(main)
