"""A strip of pictures for each recipe: the same prompts and the same noise, with the words that it learned."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.formats.hashes import file_sha256
from tinyldm.images import contact_sheet, fitted, save_image
from tinyldm.inversion import add_words
from tinyldm.lab.measure.questions import STYLE_NOUNS
from tinyldm.lab.measure.sampling import samples
from tinyldm.lab.paper.cells import Cell, Place, word_file
from tinyldm.lab.paper.concepts import Concept
from tinyldm.lab.paper.digest import digest_of
from tinyldm.lab.paper.lessons import TOKEN
from tinyldm.lab.world.drawing import SIZE

PROMPTS = {  # of each concept as many
    "object": [f"a {what} of {TOKEN}" for what in ("photo", "sketch")]
    + [f"a photo of {TOKEN} on the grass", f"a photo of two {TOKEN}s"],
    "style": [f"a painting of a {noun} in the style of {TOKEN}" for noun in STYLE_NOUNS],
}
DRAWN_FROM = "drawn from"  # what the file says of itself


def one_of_each_kind(concepts: Sequence[Concept]) -> list[Concept]:
    """The first of each, in their order."""
    first = {concept.kind: concept for concept in reversed(concepts)}
    return [concept for concept in concepts if concept in first.values()]


def draw_strips(recipes: Sequence[str], concepts: Sequence[Concept], place: Place, file: Path) -> None:
    """Training pictures above, then a row for each recipe whose words are there.

    Nothing is drawn if the file shows these very words already.
    """
    shown = one_of_each_kind(concepts)
    words = {recipe: [word_file(place.out, Cell(recipe, concept.name)) for concept in shown] for recipe in recipes}
    words = {recipe: files for recipe, files in words.items() if all(file.is_file() for file in files)}
    source = digest_of([[recipe, *map(file_sha256, files)] for recipe, files in words.items()], PROMPTS)
    if not words or (file.exists() and Image.open(file).text.get(DRAWN_FROM) == source):
        return
    count = len(PROMPTS["object"])
    rows = {"training pictures": [fitted(image, SIZE, SIZE) for concept in shown for image in concept.images()[:count]]}
    for recipe, files in tqdm(words.items(), desc="strips"):
        rows[recipe] = [image for pair in zip(shown, files, strict=True) for image in pictures_of(*pair, place.weights)]
    save_image(contact_sheet([*rows.values()], labels=[*rows], tile=SIZE), file, {DRAWN_FROM: source})


def pictures_of(concept: Concept, word: Path, weights: Path) -> list[Image.Image]:
    model, words = load_checkpoint(weights), load_embeddings(word)
    add_words(model, words)
    prompts = PROMPTS[concept.subject]
    return list(samples(model, prompts, range(len(prompts)), words))
