"""How good one learned word is, as the paper measures it (arXiv 2208.01618, section 5.1).

    python -m tinyldm.lab.measure.score --embedding outputs/S/embedding.safetensors --images examples/striped-circle
    python -m tinyldm.lab.measure.score --embedding outputs/S/embedding.safetensors --images examples/striped-circle \\
        --thing "teal and white striped circle" --short "a teal circle with white stripes"

Reconstruction: the mean cosine of CLIP's features of pictures of "a photo of S*" and of the training pictures, over all
pairs. Editability: for each prompt, as "a photo of S* on the grass", the cosine of its pictures' mean feature and of
the prompt without the word, "a photo of on the grass"; then the mean over the prompts. Mean of cosines: the same of
single pictures, as the paper's code has it; it is smaller the more the pictures differ.

Beside the word stand references on the same scale. Image only: the training pictures themselves. Prompt only: the
prompts without the word. --thing, --short, --long: plain words in its place. With --thing or --style, what the pictures
of the word show is checked as well. The sampler is DDIM.
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.clip_image import CLIP
from tinyldm.files import write_atomically
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embeddings import listed, load_embeddings, split_word
from tinyldm.images import read_images
from tinyldm.inversion import add_words, captions_of, read_templates
from tinyldm.lab import TINY, file_to_write
from tinyldm.lab.measure.judge import Judge, load_judge
from tinyldm.lab.measure.prompts import (
    STABLE_DIFFUSION_PROMPTS,
    TINY_PROMPTS,
    TINY_STYLE_PROMPTS,
    Prompts,
    check_length,
    filled,
)
from tinyldm.lab.measure.questions import Question, Sees, combined, in_style, on_backgrounds
from tinyldm.lab.measure.sampling import as_shares, judged, samples
from tinyldm.lab.measure.zero_shot import features_of_captions, features_of_images, read_clip
from tinyldm.lab.world.captions import name_of, thing_named, with_articles
from tinyldm.lab.world.drawing import SIZE
from tinyldm.lab.world.styles import HELD_OUT_STYLES, STYLES
from tinyldm.lab.world.things import Thing
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.run import PREVIEWS
from tinyldm.tokenizer import Tokenizer

IMAGE_ONLY, NO_WORD = "image only", {"prompt only": ""}
SHORT, LONG = 12, 30  # words in the paper's human captions, at most
# What questions.combined calls its checks -> what they are called here.
CHECKS = {"a sketch of S*": "style", "two S*s": "count", "another colour": "new colour"}
CLIP_FILE = "weights/clip-b32/pytorch_model.bin"  # ViT-B/32, the paper's
GET_CLIP = "hf download openai/clip-vit-base-patch32 pytorch_model.bin merges.txt --local-dir weights/clip-b32"


# ---- What is scored


class Target(NamedTuple):
    """What the pictures of one prompt should come near."""

    kind: str
    prompt: str  # without the word
    feature: Tensor  # the prompt's, (width,)


class OfPrompt(NamedTuple):
    """How near the pictures of one prompt come to it."""

    kind: str
    prompt: str  # without the word
    editability: float
    mean_of_cosines: float


@dataclass(frozen=True)
class Figures:
    """Those of a word, or of a reference, which stands in its place."""

    reconstruction: float | None  # None: of a single training picture there are no pairs
    prompts: tuple[OfPrompt, ...]

    def editability(self, kind: str | None = None) -> float:
        """The mean over the prompts, or over those of a kind."""
        return fmean(one.editability for one in self.prompts if kind in (None, one.kind))

    def mean_of_cosines(self, kind: str | None = None) -> float:
        return fmean(one.mean_of_cosines for one in self.prompts if kind in (None, one.kind))

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(one.kind for one in self.prompts))

    def as_dict(self) -> dict[str, object]:
        return {
            "reconstruction": self.reconstruction,
            "editability": self.editability(),
            "mean_of_cosines": self.mean_of_cosines(),
            "kinds": {
                kind: {"editability": self.editability(kind), "mean_of_cosines": self.mean_of_cosines(kind)}
                for kind in self.kinds
            },
            "prompts": [one._asdict() for one in self.prompts],
        }


@dataclass(frozen=True)
class Score:
    """All that is known of a word."""

    word: str
    num: int  # pictures a prompt
    steps: int
    seed: int
    figures: Figures
    references: dict[str, Figures]
    truth: dict[str, float]  # what is checked -> share of the pictures

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "word": self.word,
            "num": self.num,
            "steps": self.steps,
            "seed": self.seed,
            **self.figures.as_dict(),
            "references": {name: figures.as_dict() for name, figures in self.references.items()},
            "truth": self.truth,
        }


# ---- Of features, each a row of length 1


def mean_pairwise_cosine(one: Tensor, other: Tensor) -> float:
    """(n, width), (m, width) -> the mean over all n m pairs."""
    return (one @ other.T).mean().item()


def mean_cosine_among(features: Tensor) -> float | None:
    """(n, width) -> the mean over all pairs of different rows; None if there are none."""
    is_pair = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    return (features @ features.T)[is_pair].mean().item() if len(features) > 1 else None


def cosine_of_mean(features: Tensor, text: Tensor) -> float:
    """(n, width), (width,) -> the cosine of the rows' mean and the text, as in the paper."""
    return F.cosine_similarity(features.mean(dim=0), text, dim=0).item()


def mean_of_cosines(features: Tensor, text: Tensor) -> float:
    """(n, width), (width,) -> the mean of the rows' cosines with the text, as in the paper's code. It is the paper's
    times the length of the rows' mean."""
    return (features @ text).mean().item()


def compared(reconstruction: float | None, targets: Sequence[Target], features: Iterable[Tensor]) -> Figures:
    """features: of each target's pictures, (n, width)."""
    rows = [
        OfPrompt(kind, prompt, cosine_of_mean(pictures, text), mean_of_cosines(pictures, text))
        for (kind, prompt, text), pictures in zip(targets, features, strict=True)
    ]
    return Figures(reconstruction, tuple(rows))


# ---- The score


def questions_of_thing(word: str, thing: Thing) -> list[Question]:
    """Whether pictures of the word show the thing, and a sketch of it, two, or one in a new colour if asked to."""
    pattern = {"pattern": Sees("pattern", thing.pattern or "plain")}
    alone = [replace(question, checks=question.checks | pattern) for question in on_backgrounds(word, thing)]
    for question in combined(word, thing):
        alone.append(replace(question, checks={CHECKS[what]: check for what, check in question.checks.items()}))
    return alone


def score(
    model: LatentDiffusion,  # whose prompts may hold the words, see add_words
    clip: CLIP,
    tokenizer: Tokenizer,  # of CLIP's prompts
    words: dict[str, Tensor],  # all that were added to the model: word -> (vectors, width)
    word: str,  # the one to score
    training: Sequence[Image.Image],  # the pictures that it was learned from
    prompts: Prompts,
    *,
    reconstruction: str = PREVIEWS["object"],  # the template whose pictures are to be like the training pictures
    references: Mapping[str, str] = NO_WORD,  # name -> what stands in the word's place
    questions: Sequence[Question] = (),  # about pictures of the word,
    judge: Judge | None = None,  # which the tiny world's judge answers
    num: int = 64,  # pictures a prompt
    steps: int = 50,  # of DDIM
    seed: int = 0,  # of a prompt's first picture; the next one has the next
) -> Score:
    """Draw pictures of the word and of each reference, and compare them with the training pictures and the prompts.

    Raises InputError, before anything is drawn, if the model or CLIP can't read a prompt to its end.
    """
    model = replace(model, defaults=replace(model.defaults, sampler="ddim", sampler_steps=steps))
    texts = [word, *references.values()]
    templates = [reconstruction, *(template for _, template in prompts)]
    without = [filled(template, "") for template in templates]
    asked = [filled(template, text) for text in texts for template in templates]
    check_length(asked, model.tokenizer, "the model")
    check_length(without, tokenizer, "CLIP")
    captions_of(model, templates, word)  # raises if one hides it
    meant = features_of_captions(clip, tokenizer, without[1:])
    targets = [Target(kind, *rest) for (kind, _), *rest in zip(prompts, without[1:], meant, strict=True)]
    trained = features_of_images(clip, training)

    rows = []
    with tqdm(total=num * len(asked) + len(questions), desc="scoring") as bar:
        draw = partial(drawn, model, words, seed, bar)
        for text in texts:
            photos, *others = (features_of_images(clip, draw([filled(one, text)] * num)) for one in templates)
            rows.append(compared(mean_pairwise_cosine(photos, trained), targets, others))
        images = draw([with_articles(question.prompt) for question in questions])
    itself = compared(mean_cosine_among(trained), targets, [trained] * len(targets))
    return Score(
        word,
        num,
        steps,
        seed,
        figures=rows[0],
        references={IMAGE_ONLY: itself, **dict(zip(references, rows[1:], strict=True))},
        truth=judged(judge, questions, images) if questions else {},
    )


def drawn(
    model: LatentDiffusion, words: dict[str, Tensor], seed: int, bar: tqdm, prompts: Sequence[str]
) -> list[Image.Image]:
    """One picture a prompt, the first from the seed, the next from the next; the bar counts them."""
    seeds, images = range(seed, seed + len(prompts)), []
    for image in samples(model, prompts, seeds, words, batch=20 if model.defaults.size <= SIZE else 4):
        images.append(image)
        bar.update()
    return images


def table(result: Score) -> list[str]:
    """Lines to read: the word, beneath it its references; and what its pictures show."""
    kinds = result.figures.kinds if len(result.figures.kinds) > 1 else []
    columns = ["reconstruction", "editability", *kinds, "mean of cosines"]
    rows = [(result.word, result.figures), *result.references.items()]
    first = max(len(name) for name, _ in rows)
    lines = ["  ".join([" " * first, *columns])]
    for name, figures in rows:
        values = [figures.reconstruction, figures.editability(), *map(figures.editability, kinds)]
        cells = ["-" if value is None else f"{value:.3f}" for value in [*values, figures.mean_of_cosines()]]
        lines.append(
            "  ".join([name.ljust(first), *(cell.rjust(len(what)) for cell, what in zip(cells, columns, strict=True))])
        )
    return [*lines, f"{result.word}: {as_shares(result.truth)}"] if result.truth else lines


# ---- python -m tinyldm.lab.measure.score


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    thing = thing_named(options.thing) if options.thing else None
    device = cli.choose_device(options.device)
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    size, is_tiny = checkpoint.defaults.size, checkpoint.defaults.size == SIZE
    if (thing or options.style) and not is_tiny:
        found = f"{options.weights} makes pictures of {size} pixels"
        raise InputError(f"{found}; --thing and --style are for the tiny world, whose have {SIZE}: leave them out")
    if not options.clip and not is_tiny:
        found = f"the tiny CLIP knows the tiny world alone, not what {options.weights} draws"
        raise InputError(f"{found}; expected another: {GET_CLIP}, then {cli.command('--clip', CLIP_FILE)}")
    words = one_word(options.embedding, checkpoint.text_encoder.config.width)
    (word,) = words
    training = [image for _, image in read_images(options.images, size)]
    prompts = prompts_for(options, is_tiny)
    clip, tokenizer = read_clip(options.clip or TINY / "clip.safetensors", device)
    model = checkpoint.load(device, cli.choose_dtype(options.dtype, device))
    try:
        add_words(model, words)
    except InputError as error:
        raise InputError(f"{error}; --embedding FILE:WORD calls the word of a file WORD") from error

    plain = f"a {name_of(thing)}" if thing else None
    captions = {"plain words": plain, "short caption": options.short, "long caption": options.long}
    questions = questions_of_thing(word, thing) if thing else in_style(word, options.style) if options.style else []
    result = score(
        model,
        clip,
        tokenizer,
        words,
        word,
        training,
        prompts,
        reconstruction=PREVIEWS["style" if options.style else "object"],
        references=NO_WORD | {name: text for name, text in captions.items() if text},
        questions=questions,
        judge=load_judge() if questions else None,
        num=options.num,
        steps=options.steps,
        seed=options.seed,
    )
    print("\n".join(map(cli.printable, table(result))))
    if options.json:
        with write_atomically(options.json) as temporary:
            temporary.write_text(json.dumps(result.as_dict(), ensure_ascii=False) + "\n", encoding="utf-8")


def one_word(file: str, width: int) -> dict[str, Tensor]:
    """The word of an embedding file. Raises InputError if it holds several."""
    words = load_embeddings(file, width)
    if len(words) > 1:
        path, _ = split_word(file)
        one = cli.command("--embedding", f"{path}:{next(iter(words))}")
        raise InputError(f"{path} holds {listed(words)}, expected one; try {one}")
    return words


def prompts_for(options: Namespace, is_tiny: bool) -> Prompts:
    if options.prompts:
        return [("own", template) for template in read_templates(options.prompts)]
    if options.style:
        return TINY_STYLE_PROMPTS
    return TINY_PROMPTS if is_tiny else STABLE_DIFFUSION_PROMPTS


def text_of(most: int) -> Callable[[str], str]:
    """An argparse type: a text of at most so many words."""

    def parse(text: str) -> str:
        if not 1 <= (count := len(text.split())) <= most:
            raise ArgumentTypeError(f"{text[:40]!r} has {count} words, expected 1 to {most}")
        return text

    return parse


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--embedding", required=True, metavar="FILE[:WORD]", help="the learned word, of any tool's format")
    add("--images", type=cli.path, required=True, metavar="DIR", help="the pictures that it was learned from")
    cli.add_model_options(parser)
    parser.set_defaults(weights=TINY)
    add("--clip", type=cli.path, metavar="FILE", help="both towers, the merges beside it (default: the tiny one)")
    add("--prompts", type=cli.path, metavar="FILE", help="others for editability, one a line, with {} for the word")
    add(
        "--num",
        type=cli.whole_number(1, cli.MOST_PICTURES),
        default=64,
        metavar="N",
        help="pictures a prompt (%(default)s)",
    )
    add("--steps", type=cli.whole_number(1, 1000), default=50, metavar="N", help="of DDIM (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--thing", metavar="TEXT", help="what the word means, in words of the tiny world")
    what.add_argument("--style", choices=[*STYLES, *HELD_OUT_STYLES], help="or the style that it means")
    add("--short", type=text_of(SHORT), metavar="TEXT", help=f"a caption of the thing, of at most {SHORT} words")
    add("--long", type=text_of(LONG), metavar="TEXT", help=f"another of at most {LONG}")
    add("--json", type=file_to_write, metavar="FILE", help="all figures, one line of JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
