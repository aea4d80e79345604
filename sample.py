"""Pictures from prompts, with a latent diffusion model and the words it has learned.

    python sample.py --prompt "a photo of a red star on a blue background"
    python sample.py --prompt "a photo of S* on a green background" --embedding outputs/S/embedding.safetensors --num 4
    python sample.py --prompt "two lemons" --prompt "a sketch of a heart" --sampler dpmpp_2m --steps 15

Writes 0000.png, 0001.png, … and sheet.png into outputs/samples. Each picture carries its prompt and settings in a text
chunk named "parameters". Picture i starts from the noise of seed + i, whatever the device or the batch.
"""

import warnings
from argparse import Namespace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.images import contact_sheet, save_image, to_images
from tinyldm.inversion import add_concepts
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.sampler import SAMPLERS

BATCH = 4  # pictures at a time: enough to keep the processor busy, few enough to fit


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    prompts = [prompt for prompt in read_prompts(options) for _ in range(options.num)]
    device = cli.choose_device(options.device)
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    embeddings = [load_embeddings(file, checkpoint.text_encoder.config.width) for file in options.embedding]

    model = checkpoint.load(device, cli.choose_dtype(options.dtype, device))
    try:
        vectors = add_concepts(model, embeddings)
    except InputError as error:
        raise InputError(f"{error}; --embedding FILE:WORD calls the word of a file WORD") from error
    fill_in_defaults(options, model)
    for token in model.tokenizer.placeholders:
        if not any(token in prompt for prompt in prompts):
            warnings.warn(f"no prompt uses {token}", stacklevel=1)

    model.tokenizer([*prompts, options.negative])  # a word that is cut off is an error now, not half-way

    images = []
    with tqdm(total=options.steps * -(-len(prompts) // BATCH), desc="sampling") as bar:
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            latents = model.generate(
                batch,
                range(options.seed + first, options.seed + first + len(batch)),
                vectors=vectors,
                negative=options.negative,
                sampler=options.sampler,
                steps=options.steps,
                guidance=options.guidance,
                height=options.height,
                width=options.width,
            )
            for z in latents:  # noqa: B007, the last one is wanted
                bar.update()
            with torch.no_grad():
                images += to_images(model.decode(z))

    write(images, prompts, checkpoint.sha256()[:10], options)
    print(f"{len(images)} pictures and sheet.png in {options.out}")
    return 0


def write(images: list[Image.Image], prompts: list[str], weights_hash: str, options: Namespace) -> None:
    """0000.png, 0001.png, … and sheet.png, one row a prompt."""
    options.out.mkdir(parents=True, exist_ok=True)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        save_image(
            image,
            options.out / f"{i:04d}.png",
            {"parameters": parameters(prompt, options.seed + i, weights_hash, options)},
        )
    rows = [images[i : i + options.num] for i in range(0, len(images), options.num)]
    save_image(contact_sheet(rows, labels=prompts[:: options.num]), options.out / "sheet.png")


def parameters(prompt: str, seed: int, weights_hash: str, options: Namespace) -> str:
    """The prompt and what else made a picture, in the form that other programs of the field read and write."""
    negative = f"Negative prompt: {options.negative}\n" if options.negative else ""
    vae = f", VAE: {options.vae.name}" if options.vae else ""
    return (
        f"{prompt}\n{negative}Steps: {options.steps}, Sampler: {options.sampler}, CFG scale: {options.guidance:g}, "
        f"Seed: {seed}, Size: {options.width}x{options.height}, "
        f"Model hash: {weights_hash}, Model: {options.weights.stem}{vae}"
    )


def read_prompts(options: Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts:
        try:
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompts {options.prompts} ({error}); expected a text file") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError('no prompt; give one or more: --prompt "a photo of a red star"')
    return prompts


def fill_in_defaults(options: Namespace, model: LatentDiffusion) -> None:
    """What was left open becomes what suits the checkpoint."""
    d = model.defaults
    options.sampler = options.sampler or d.sampler
    options.steps = options.steps or d.sampler_steps
    options.guidance = d.guidance if options.guidance is None else options.guidance
    options.height, options.width = options.height or d.size, options.width or d.size
    model.check_size(options.height, options.width)


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
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
    add("--sampler", choices=list(SAMPLERS), help="default, as for the next four: what suits the checkpoint")
    add("--steps", type=cli.whole(1, 1000), metavar="N")
    add("--guidance", type=cli.positive, metavar="SCALE", help="1: the plain model; more: closer to the prompt")
    add("--height", type=cli.whole(1), metavar="PIXELS")
    add("--width", type=cli.whole(1), metavar="PIXELS")
    add("--num", type=cli.whole(1), default=1, metavar="N", help="pictures of each prompt (%(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: outputs/samples, numbered if it exists")
    options = parser.parse_args(arguments)
    options.out = options.out or cli.free_folder(Path("outputs/samples"))
    return options


if __name__ == "__main__":
    cli.run(main)
