"""A small procedural world: captioned pictures for the tiny model to learn from.

    python -m tinyldm.lab.world --sheet world.png                      everything there is, on one sheet
    python -m tinyldm.lab.world --glossary glossary.png                some of its invented nouns and styles, named
    python -m tinyldm.lab.world --out pictures --count 100 --seed 0    pictures and captions.jsonl
    python -m tinyldm.lab.world --examples examples                    folders of things never seen in training

The same seed draws the same pictures.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.files import check_unused, write_atomically
from tinyldm.images import contact_sheet, save_image
from tinyldm.lab import file_to_write
from tinyldm.lab.world.captions import caption
from tinyldm.lab.world.distribution import (
    EXAMPLE_SIZE,
    EXAMPLES,
    make_picture,
    pictures_in_style,
    pictures_of,
    stands_out,
)
from tinyldm.lab.world.drawing import SIZE
from tinyldm.lab.world.nouns import INVENTED_NOUNS, NOUNS, noun_thing
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import HELD_OUT_STYLES, INVENTED_STYLES, STYLES, draw
from tinyldm.lab.world.things import COLOURS, HELD_OUT_SHAPES, PATTERNS, SHAPES, VIEWS, Picture, Thing


def everything() -> Image.Image:
    """All shapes in all patterns; all everyday nouns; a row for each of six things in all views, scenes and styles."""
    colours, images = list(COLOURS), []

    def add(thing: Thing, *backgrounds: str, **rest) -> None:
        images.append(draw(Picture((thing,), background_of(thing, *backgrounds), seed=len(images), **rest)))

    def fill_row() -> None:
        images.extend([Image.new("RGB", (SIZE, SIZE), "white")] * (-len(images) % 18))

    for i, shape in enumerate(SHAPES | HELD_OUT_SHAPES):
        for j, pattern in enumerate((None, *PATTERNS)):
            colour, colour2, background = (colours[(5 * i + j + step) % 12] for step in (0, 4, 8))
            add(Thing(shape, colour, pattern, pattern and colour2), background)
    fill_row()
    for noun in NOUNS:
        add(noun_thing(noun))
    fill_row()
    patterned = (
        Thing("star", "green", "striped", "white"),
        Thing("heart", "purple", "rimmed", "yellow"),
        Thing("square", "orange", "checkered", "black"),
    )
    for thing in (noun_thing("ladybug"), *patterned, Thing("circle", "brown"), noun_thing("kite")):
        for view in VIEWS:
            add(thing, view=view)
        for scene in SCENES:
            images.append(draw(Picture((thing,), scene, seed=len(images))))
        for i, style in enumerate(STYLES | HELD_OUT_STYLES):
            add(thing, *colours[i + 3 :], style=style)
    return contact_sheet([images[i : i + 18] for i in range(0, len(images), 18)], tile=SIZE, gap=2)


def background_of(thing: Thing, *first: str) -> str:
    """The first of the backgrounds, or else a plain one, that the thing can be told from."""
    return next(background for background in (*first, "gray", "white", "blue") if stands_out((thing,), background))


def glossary() -> Image.Image:
    """A hundred of the invented nouns and what each means; below them twenty of the invented styles, all of one kite.

    Every picture has its word above it.
    """
    kite, images = noun_thing("kite"), []

    def add(word: str, thing: Thing, style: str = "photo") -> None:
        image = draw(Picture((thing,), background_of(thing), style))
        images.append(contact_sheet([[image]], labels=[word], tile=SIZE, gap=0))

    for noun in list(INVENTED_NOUNS)[:100]:
        add(noun, noun_thing(noun))
    for style in list(INVENTED_STYLES)[:20]:
        add(style, kite, style)
    return contact_sheet([images[i : i + 10] for i in range(0, len(images), 10)], tile=SIZE)


def write_examples(folder: Path) -> None:
    """Five pictures each of unseen combinations, of an unseen shape, and of five things in an unseen style."""
    series = {name: pictures_of(thing) for name, thing in EXAMPLES.items()}
    series["blueprint"] = pictures_in_style("blueprint")
    for name, pictures in series.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            save_image(draw(picture, EXAMPLE_SIZE), folder / name / f"{i:02}.png")


def write_pictures(folder: Path, count: int, seed: int, size: int) -> None:
    """00000.png, 00001.png, … and captions.jsonl: file, caption and the whole truth about each."""
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "captions.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for i in tqdm(range(count), desc="drawing", disable=count < 1000):
            pixels, picture = make_picture(i, seed, size)
            file = f"{i:05}.png"
            save_image(Image.fromarray(pixels), folder / file)
            said = caption(picture, np.random.default_rng([seed, i, 1]))
            lines.write(json.dumps({"file": file, "caption": said, **dataclasses.asdict(picture)}) + "\n")


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=cli.path, metavar="DIR", help="write training pictures and captions.jsonl here")
    add("--count", type=cli.whole_number(1, 1_000_000), default=100, metavar="N", help="how many (%(default)s)")
    add("--seed", type=cli.whole_number(0), default=0, metavar="N", help="same seed, same pictures (%(default)s)")
    add("--size", type=cli.whole_number(1, 4096), default=SIZE, metavar="PIXELS", help="their side (%(default)s)")
    add("--examples", type=cli.path, metavar="DIR", help="write the example folders here")
    add("--sheet", type=file_to_write, metavar="FILE", help="draw everything there is on one sheet, a PNG")
    add("--glossary", type=file_to_write, metavar="FILE", help="draw a hundred invented nouns and twenty styles, a PNG")
    options = parser.parse_args(arguments)
    if not (options.out or options.examples or options.sheet or options.glossary):
        options_to_write = "--out, --examples, --sheet or --glossary"
        raise InputError(f"nothing to do, expected a folder or a file to write; give {options_to_write}")
    if options.out:
        check_unused(options.out)
        write_pictures(options.out, options.count, options.seed, options.size)
    if options.examples:
        write_examples(options.examples)
    if options.sheet:
        save_image(everything(), options.sheet)
    if options.glossary:
        save_image(glossary(), options.glossary)


if __name__ == "__main__":
    cli.run(main)
