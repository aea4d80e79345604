"""Teach a frozen latent diffusion model a new word from a few pictures (Textual Inversion, arXiv 2208.01618).

    python train.py --images examples/striped-circle --token "S*"
    python train.py --images examples/blueprint --token "B*" --property style
    python train.py --images examples/bolt --token "<bolt>" --init "yellow triangle"
    python train.py --concepts examples

Writes into outputs/<name>, numbered if it exists: embedding.safetensors (the word), preview.png (watch it being
learned), loss.csv and settings.json. Ctrl-C keeps what was learned, and says how to go on from there. --concepts writes
such a folder for each word into outputs/<name of the folder>.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

if __name__ == "__main__":
    from tinyldm import begin_command

    begin_command()

import torch
from PIL import Image
from torch import Tensor

from tinyldm import InputError, cli, ranks
from tinyldm.concepts import TOGETHER, Learner, check_new, learn_together, parse_shard
from tinyldm.files import take_folder
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import advice_for_diffusers, listed, load_embeddings, split_word
from tinyldm.images import find_images, read_images, to_tensor
from tinyldm.inversion import TEMPLATES, Batch, Pictures, known_norm, read_templates, templates_for, vectors_of
from tinyldm.latent_diffusion import Defaults, LatentDiffusion, Learning
from tinyldm.recipes import RECIPES, Lesson, composed
from tinyldm.run import PREVIEWS, Follower, Run, folder_for, start_of

# Between the loss and the vectors, gradients of float16 weights are this many times too large: a mean over 65,536
# latents has gradients of 1e-5 each, and float16 keeps few digits below 6e-5, none below 6e-8.
LOSS_SCALE = 4096.0


def inversion_loss(model: LatentDiffusion, batch: Batch, words: dict[str, Tensor]) -> Tensor:
    """Equation 2's expectation on one batch: the frozen model's squared error when it reads the words' vectors."""
    return squared_error(model, batch, model.context(batch.captions, words)).mean()


def squared_error(model: LatentDiffusion, batch: Batch, context: Tensor) -> Tensor:
    """Of what the model says was added, (b, c, h, w); context: what it reads, (b, tokens, width)."""
    z_0, eps, t = (x.to(model.device) for x in (batch.z_0, batch.eps, batch.t))
    z_t = model.schedule.add_noise(z_0, eps, t)
    return (model.predict(z_t, t, context) - model.schedule.target(z_0, eps, t)).square()


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    device = cli.choose_device(options.device)
    ranks.join(device)
    templates = ranks.from_first(lambda: read_templates(options.templates) if options.templates else None)
    if options.images:
        find_images(options.images)  # raises an error before the weights are read
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    fill_in_defaults(options, checkpoint.defaults)
    ranks.check_batch(options.batch)
    model, weights_sha256 = checkpoint.load(device, cli.choose_dtype(options.dtype, device)), checkpoint.sha256()
    del checkpoint  # it would keep its file mapped into memory
    model.unet.low_memory = options.low_memory
    model.check_size(options.size, options.size, None if options.low_memory else options.batch * options.together)
    loss_scale = LOSS_SCALE if model.dtype == torch.float16 else 1.0
    begin = partial(begin_word, templates=templates, weights_sha256=weights_sha256, loss_scale=loss_scale)
    if options.concepts:
        first_vectors(model, options)  # a wrong --init is one error, not one for each word
        return learn_together(model, options, begin, squared_error, loss_scale)

    _, recipe, word, first, pictures, optimizer, lr, run = begin(model, options)
    for step in run.steps(model):
        # Add noise to the latents and let the model, which reads the word, say what was added.
        done = step / options.steps
        batch = ranks.part(recipe.draw(pictures, model.schedule, options.batch, run.generator))
        loss = inversion_loss(model, batch, word.now(done))
        # All it can change to do so better is the word.
        (loss_scale * (loss + recipe.penalty(word.vectors, first))).backward()
        word.vectors.grad = ranks.mean(word.vectors.grad) / loss_scale
        optimizer.lr = lr * recipe.rate(done)
        optimizer.step()
        run.log(ranks.mean(loss))
    print(run.what_next(arguments))
    if advice := advice_for_diffusers(options.token, run.learned):
        print(advice)
    return run.status


def begin_word(
    model: LatentDiffusion,  # that will know the word
    options: Namespace,
    templates: Sequence[str] | None,
    weights_sha256: str,
    loss_scale: float,
) -> Learner:
    """All there is before the first step, or before the one that --resume goes on with."""
    paths, images = zip(*read_images(options.images, options.size), strict=True)
    # The model is frozen. All that learns is the vectors that its text encoder reads for the new word.
    recipe = composed(options.recipe)
    word = recipe.word(model, options.token, first_vectors(model, options), len(images))
    if (most := len(word.now(1)[word.token])) < word.count:
        found = f"{word.count} vectors, of which the recipe {options.recipe} learns {most}"
        raise InputError(f"{found}; try --vectors {most}, or another --recipe")
    captions = recipe.captions(model, options.token, paths, templates or templates_for(model, options.property))
    pictures = Pictures(*encode(model, images), word.captions(captions))
    for text in dict.fromkeys([*chain(*pictures.captions), PREVIEWS[options.property].format(options.token)]):
        model.tokenizer(text)  # a word that is cut off is an error now
    if not options.resume:
        options.out = ranks.from_first(lambda: take_folder(options.out, folder_for(options.token)))

    lesson = Lesson(model, word, pictures, options.batch, partial(inversion_loss, model), loss_scale)
    kept = start_of(options.out, word.vectors) if options.resume else None
    start = ranks.from_first(lambda: recipe.start(lesson).cpu() if kept is None else kept)
    word.vectors = start.to(model.device, copy=True).requires_grad_()
    lr = options.lr * recipe.lr
    optimizer = recipe.optimizer(word.vectors, known_norm(model), lr)  # which may bring them to another length
    first = word.vectors.detach().clone()
    stop, run_class = recipe.stop(lesson, options.steps), Follower if ranks.rank() else Run
    run = run_class(options, weights_sha256, images, pictures.captions, word, start, optimizer, stop)
    run.resume() if options.resume else run.start(images)
    return Learner(model, recipe, word, first, pictures, optimizer, lr, run)


def first_vectors(model: LatentDiffusion, options: Namespace) -> Tensor:
    """The word before the first step, (vectors, width): a copy of --init's words, or of the vectors in its file."""
    if not is_file(options.init):
        return vectors_of(model, options.init, options.vectors)
    words = load_embeddings(options.init, width=model.text_encoder.table.shape[1])
    file, _ = split_word(options.init)
    if len(words) > 1:
        one = cli.command("--init", f"{file}:{next(iter(words))}")
        raise InputError(f"--init: {file} holds {listed(words)}, expected one; try {one}")
    (vectors,) = words.values()
    if options.vectors not in (None, len(vectors)):
        found = f"{file} holds {len(vectors)} vectors, --vectors or the recipe asks for {options.vectors}"
        raise InputError(f"--init: {found}; leave that out")
    return vectors.to(model.device)


def encode(model: LatentDiffusion, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """Every picture once -> mean and log-variance of its latent, each (n, c, h, w), on the CPU.

    Mirror images would be as many again, but of a thing that is not symmetric they teach the word both at once.
    """
    means, log_variances = zip(*[model.encode(to_tensor(image)) for image in images], strict=True)
    return torch.cat(means).cpu(), torch.cat(log_variances).cpu()


def fill_in_defaults(options: Namespace, defaults: Defaults) -> None:
    """What was left open becomes what suits the checkpoint."""
    usual: Learning = getattr(defaults, options.property)
    if options.recipe is None:
        # A start that was given need not be looked for.
        names = [name for name in usual.recipe.split(",") if options.init is None or name != "auto-start"]
        options.recipe = ",".join(names) or "paper"
    if options.captions and "captions" not in options.recipe.split(","):
        options.recipe += ",captions"
    recipe = composed(options.recipe)  # raises an error before the weights are read
    if options.concepts or not options.resume:  # else a run's own, and what a recipe brought stands among them
        check_alone(options)
    options.vectors = options.vectors or recipe.vectors
    if options.init is None:
        phrase = usual.init.split()
        options.init = " ".join(phrase[-(options.vectors or len(phrase)) :])  # the noun stands last
    for place, names in ((usual, ("steps", "lr")), (defaults, ("batch", "size", "save_every"))):
        for name in names:
            if getattr(options, name) is None:
                setattr(options, name, getattr(place, name))


def check_alone(options: Namespace) -> None:
    """Raises InputError if two options say the same thing, of which only one would count."""
    for name, said, what in (
        ("captions", options.templates and "--templates", "captions"),
        ("auto-start", options.init and is_file(options.init) and f"--init {options.init}", "start"),
    ):
        if said and name in options.recipe.split(","):
            raise InputError(f"{said} and the recipe {name} each say the {what}, expected one; leave one out")


def is_file(init: str) -> bool:
    """Whether --init is one. By its suffix: a mistyped name would be a phrase of a dozen tokens, unnoticed."""
    return bool(re.search(r"\.(safetensors|pt|bin|ckpt|png|webp)(:|$)", init, re.IGNORECASE))


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", type=cli.path, metavar="DIR", help="a folder with about three to five pictures")
    given.add_argument(
        "--concepts",
        type=cli.path,
        metavar="DIR",
        help="a folder of such folders: the word of each is the folder's name, or what token.txt in it says",
    )
    add("--token", help='the new word, in quotes because of the shell: "S*"')
    cli.add_model_options(parser)
    add(
        "--init",
        metavar="TEXT|FILE",
        help="known words to start from, several tokens start several vectors; or an embedding file to start from",
    )
    add("--vectors", type=cli.whole_number(1), metavar="N", help="vectors to learn (default: as many as --init gives)")
    add("--property", choices=list(TEMPLATES), default="object", help="what the pictures share (%(default)s)")
    said = parser.add_mutually_exclusive_group()
    said.add_argument(
        "--templates", type=cli.path, metavar="FILE", help="captions to train with, one a line, with {} for the word"
    )
    said.add_argument(
        "--captions",
        action="store_true",
        help="train with the text in the .txt beside each picture, or with its file name; the word has to be in it",
    )
    add(
        "--recipe",
        metavar="NAMES",
        help=f"how it is learned, names with commas between them: {', '.join(RECIPES)} (default: the checkpoint's own)",
    )
    add("--steps", type=cli.whole_number(1), metavar="N", help="default, as for the next four: the checkpoint's own")
    add("--batch", type=cli.whole_number(1, 10_000), metavar="N")
    add("--lr", type=cli.positive, metavar="RATE", help="of the first step")
    add("--size", type=cli.whole_number(1, 8192), metavar="PIXELS", help="pictures become squares of this side")
    add("--save-every", type=cli.whole_number(1), metavar="N", help="steps between two saves")
    add(
        "--preview-every",
        type=cli.whole_number(1),
        metavar="N",
        help="steps between two rows of preview.png (default: rows after none, a tenth, a third and all of the steps)",
    )
    add("--low-memory", action="store_true", help="parts of a step are computed twice, previews one by one")
    add(
        "--out",
        type=cli.path,
        metavar="DIR",
        help="new or empty (default: outputs/<name of the word, or of --concepts>)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, given the same options; bit for bit on a CPU, with as many threads",
    )
    add(
        "--together",
        type=cli.whole_number(1, 1000),
        metavar="N",
        help=f"of --concepts, words to learn at a time, each with --batch pictures a step ({TOGETHER})",
    )
    add(
        "--shard", type=parse_shard, metavar="I/N", help="of --concepts, the I-th of N parts, for N jobs with one --out"
    )
    options = parser.parse_args(arguments)
    if bool(options.token) == bool(options.concepts):
        expected = "--images with --token, or --concepts alone, whose folders are the words"
        raise InputError(f"{'both --concepts and --token' if options.token else 'no --token'}, expected {expected}")
    if options.concepts and ranks.started_by_torchrun():
        raise InputError("--concepts does not run under torchrun; start a command for each GPU, each with its --shard")
    if options.concepts and options.out and options.out.resolve() == options.concepts.resolve():
        raise InputError(f"--out and --concepts are both {options.out}, expected two folders; choose another --out")
    if options.images and (options.shard or options.together):
        raise InputError("--shard and --together are for many words; give --concepts instead of --images")
    options.together = (options.together or TOGETHER) if options.concepts else 1
    if options.concepts:
        options.out = options.out or Path("outputs", options.concepts.resolve().name)
    elif options.resume:
        options.out = options.out or folder_for(options.token)
    elif options.out:
        check_new(options.out)
    return options


if __name__ == "__main__":
    cli.run(main)
