"""One cell of the table: a recipe, a concept and a seed. The word is learned and scored."""

import contextlib
import io
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyldm import InputError
from tinyldm.clip_image import CLIP
from tinyldm.files import write_atomically
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.images import fitted
from tinyldm.inversion import add_words, vectors_of
from tinyldm.lab import TINY
from tinyldm.lab.measure.judge import Judge, load_judge
from tinyldm.lab.measure.questions import Question
from tinyldm.lab.measure.score import NO_WORD, Score, score
from tinyldm.lab.measure.words import relative_norm
from tinyldm.lab.measure.zero_shot import read_clip
from tinyldm.lab.paper.concepts import CONCEPTS, Concept, in_plain_words
from tinyldm.lab.paper.lessons import PAPER, TOKEN, Learned, learn, settings
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.tokenizer import Tokenizer

UNTRAINED, PLAIN = "untrained", "plain words"  # stand in a recipe's place: the word before it learns, and known words

# The paper has 64 pictures a prompt and 50 steps of DDIM. Here pictures are spread over many concepts and seeds, and of
# four things in plain words, 8 steps and 25 gave the same cosines to 0.003, the same shares but for one pattern of 32.
NUM, STEPS = 3, 8
CURVE = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the steps after which a word is scored, to see it learn


class Cell(NamedTuple):
    recipe: str
    concept: str
    seed: int = 0
    curve: bool = False  # the vectors that were saved while it was learned, with few pictures of each


class Place(NamedTuple):
    """Where a run's files are."""

    weights: Path  # the checkpoint
    fast: Path  # a copy of it whose previews, which nobody sees, take one step
    scratch: Path  # for what is gone after the run
    out: Path


def word_file(out: Path, cell: Cell, what: str = "") -> Path:
    """Of a cell's learned word; what: "-steps" for what it was on its way."""
    recipe, concept = (re.sub(r"[^\w,.]+", "-", text) for text in (cell.recipe, cell.concept))
    return out / "words" / recipe / f"{concept}-{cell.seed}{what}.safetensors"


def measured(cell: Cell, place: Place) -> dict[str, object]:
    """The figures of a cell, as JSON holds them. A learned word is kept in place.out.

    Raises InputError, which says of which cell, if it can't be learned.
    """
    try:
        # train.py and score.py tell of their progress, a thousand times.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model, concept = load_checkpoint(place.weights), CONCEPTS[cell.concept]
            if cell.curve:
                return measured_on_its_way(cell, place, model, concept)
            if cell.recipe in (UNTRAINED, PLAIN):
                return measured_reference(cell, model, concept)
            learned = learn(cell.recipe, concept, cell.seed, place.fast, place.scratch, model.defaults)
            last = max(learned.steps)
            figures = figures_of(scored(model, concept, learned.steps[last], cell.seed, concept.questions(TOKEN)))
    except InputError as error:
        raise InputError(f"{cell.recipe}, {cell.concept}, seed {cell.seed}: {error}") from error
    keep(learned, cell, place)
    return figures | {
        "norm": relative_norm(model, learned.steps[last]),
        "steps": last,
        "seconds": learned.seconds,
        "times": [[done, seconds] for done, seconds in learned.times.items()],
    }


def keep(learned: Learned, cell: Cell, place: Place) -> None:
    """The word; of the seed 0 also what it was on its way, which curves are made of."""
    file = word_file(place.out, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_embeddings(file, {TOKEN: learned.steps[max(learned.steps)]})
    if cell.seed == 0:
        with write_atomically(word_file(place.out, cell, "-steps")) as temporary:
            save_file({str(done): vectors for done, vectors in learned.steps.items()}, temporary)


def measured_on_its_way(cell: Cell, place: Place, model: LatentDiffusion, concept: Concept) -> dict[str, object]:
    steps = {int(done): vectors for done, vectors in load_file(word_file(place.out, cell, "-steps")).items()}
    chosen = {min(steps, key=lambda done: abs(done - share * max(steps))) for share in CURVE}
    questions, points = concept.questions(TOKEN), []
    for done in sorted(chosen):
        points.append({"steps": done} | figures_of(scored(model, concept, steps[done], cell.seed, questions, few=True)))
    return {"points": points}


def measured_reference(cell: Cell, model: LatentDiffusion, concept: Concept) -> dict[str, object]:
    """Of plain words; or of the word that others start from, beside it what needs no word."""
    if cell.recipe == PLAIN:
        questions, others = in_plain_words(concept.pictures[0].things[0]), {}
        vectors = vectors_of(model, concept.plain)
    else:
        questions, others = concept.questions(TOKEN), NO_WORD
        vectors = vectors_of(model, settings(PAPER, concept.subject, model.defaults)["init"])
    result = scored(model, concept, vectors, cell.seed, questions, references=others)
    references = {
        name: {"reconstruction": figures.reconstruction, "editability": figures.editability()}
        for name, figures in result.references.items()
    }
    return figures_of(result) | {"norm": relative_norm(model, vectors), "references": references}


# ---- Scores


@cache
def instruments() -> tuple[CLIP, Tokenizer, Judge]:
    return *read_clip(TINY / "clip.safetensors"), load_judge()


def scored(
    model: LatentDiffusion,
    concept: Concept,
    vectors: Tensor,  # the word's, (count, width)
    seed: int,
    questions: list[Question],
    *,
    few: bool = False,  # only one prompt of each kind
    references: dict[str, str] | None = None,
) -> Score:
    clip, tokenizer, judge = instruments()
    words = {TOKEN: vectors}
    model.tokenizer.placeholders.clear()
    add_words(model, words)
    of_each_kind = {kind: (kind, template) for kind, template in concept.prompts}
    return score(
        model,
        clip,
        tokenizer,
        words,
        TOKEN,
        [fitted(image, model.defaults.size, model.defaults.size) for image in concept.images()],
        list(of_each_kind.values()) if few else concept.prompts,
        reconstruction=concept.reconstruction,
        references=references or {},
        questions=questions,
        judge=judge,
        num=NUM,
        steps=STEPS,
        seed=1000 * seed,  # other noise for each seed, the same for each recipe
    )


def figures_of(result: Score) -> dict[str, object]:
    """What the page needs of a score."""
    figures = result.figures
    return {
        "reconstruction": figures.reconstruction,
        "editability": figures.editability(),
        "mean_of_cosines": figures.mean_of_cosines(),
        "kinds": {kind: figures.editability(kind) for kind in figures.kinds},
        "truth": result.truth,
    }
