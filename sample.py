"""Pictures from prompts, with a latent diffusion model and the words it has learned.

    python sample.py --prompt "a photo of a red star on a blue background"
    python sample.py --prompt "a photo of S* on a green background" --embedding outputs/S/embedding.safetensors --num 4
    python sample.py --prompt "two lemons" --prompt "a sketch of a heart" --sampler dpmpp_2m --steps 15

Writes 0000.png, 0001.png, … and sheet.png into outputs/samples, numbered if it exists. Each picture carries its prompt
and settings in a text chunk named "parameters". Picture i starts from the noise of seed + i, whatever the device or the
batch. In a batch of another size it stays within 1 of 255 (in float32).
"""

import signal
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.files import check_unused, read_lines, take_folder
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.images import contact_sheet, save_image, to_images
from tinyldm.inversion import add_words
from tinyldm.latent_diffusion import LatentDiffusion, Sampling
from tinyldm.sampler import SAMPLERS

BATCH = 4  # pictures at a time: enough to keep the processor busy, few enough to fit


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    prompts = [prompt for prompt in read_prompts(options) for _ in range(options.num)]
    device = cli.choose_device(options.device)
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    sampling = checkpoint.defaults.sampling(
        options.sampler, options.steps, options.guidance, options.height, options.width
    )
    learned = [load_embeddings(file, checkpoint.text_encoder.config.width) for file in options.embedding]

    model, model_hash = checkpoint.load(device, cli.choose_dtype(options.dtype, device)), checkpoint.sha256()[:10]
    del checkpoint  # it would keep its file mapped into memory
    model.check_size(sampling.height, sampling.width, min(BATCH, len(prompts)))
    words: dict[str, Tensor] = {}
    for words_of_file in learned:
        try:
            add_words(model, words_of_file)
        except InputError as error:
            raise InputError(f"{error}; --embedding FILE:WORD calls the word of a file WORD") from error
        words |= words_of_file
    texts = {*prompts, options.negative}
    used = {piece for text in texts for piece in model.tokenizer.split_placeholders(text)}
    for word in words:
        if word not in used:
            warnings.warn(f"no prompt uses {word}", stacklevel=1)
    model.tokenizer([*prompts, options.negative])  # a word that is cut off is an error now, not half-way

    # Every picture is written as soon as its batch is done.
    options.out = take_folder(options.out, Path("outputs/samples"))
    images: list[Image.Image] = []
    with cli.stop_on_signal() as stopping:
        for image in sampled(model, prompts, words, sampling, options, stopping):
            text = parameters(prompts[len(images)], options.seed + len(images), sampling, model_hash, options)
            save_image(image, options.out / f"{len(images):04d}.png", {"parameters": text})
            images.append(image)
    if images:
        rows = [images[i : i + options.num] for i in range(0, len(images), options.num)]
        save_image(contact_sheet(rows, labels=prompts[: len(images) : options.num]), options.out / "sheet.png")
    if len(images) < len(prompts):
        print(f"stopped: {len(images)} of {len(prompts)} pictures are in {options.out}")
        return stopping()
    print(f"{len(images)} pictures and sheet.png in {options.out}")
    return 0


def sampled(
    model: LatentDiffusion,
    prompts: list[str],
    words: dict[str, Tensor],
    sampling: Sampling,
    options: Namespace,
    stopping: Callable[[], int],  # asked after every step of the sampler; if it is true, no more pictures come
) -> Iterator[Image.Image]:
    """One picture for each prompt, a batch at a time, a progress bar beside them."""
    with tqdm(total=sampling.steps * -(-len(prompts) // BATCH), desc="sampling") as bar:
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            seeds = range(options.seed + first, options.seed + first + len(batch))
            for z in model.generate(  # noqa: B007, the last one is wanted
                batch, seeds, words=words, negative=options.negative, **sampling._asdict()
            ):
                if stopping():
                    return
                bar.update()
            yield from to_images(model.decode(z))


def parameters(prompt: str, seed: int, sampling: Sampling, model_hash: str, options: Namespace) -> str:
    """The prompt and what else made a picture, in the form that other programs of the field read and write."""
    negative = f"Negative prompt: {options.negative}\n" if options.negative else ""
    vae = f", VAE: {options.vae.name}" if options.vae else ""
    return (
        f"{prompt}\n{negative}Steps: {sampling.steps}, Sampler: {sampling.sampler}, CFG scale: {sampling.guidance:g}, "
        f"Seed: {seed}, Size: {sampling.width}x{sampling.height}, "
        f"Model hash: {model_hash}, Model: {options.weights.stem}{vae}"
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
    add("--guidance", type=cli.positive, metavar="SCALE", help="1: the plain model; more: closer to the prompt")
    add("--height", type=cli.whole_number(1, 2**16), metavar="PIXELS")
    add("--width", type=cli.whole_number(1, 2**16), metavar="PIXELS")
    add("--num", type=cli.whole_number(1, cli.MOST_PICTURES), default=1, metavar="N", help="pictures a prompt (1)")
    add("--out", type=cli.path, metavar="DIR", help="new or empty (default: outputs/samples, numbered)")
    options = parser.parse_args(arguments)
    if options.out:
        check_unused(options.out)
    return options


if __name__ == "__main__":
    cli.run(main)
