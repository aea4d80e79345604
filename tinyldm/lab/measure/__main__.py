"""How good the tiny checkpoint is, in figures.

    python -m tinyldm.lab.measure                        all of it; it learns thirteen words, which takes its time
    python -m tinyldm.lab.measure --only prompts         one part: do pictures show what their prompts say?
    python -m tinyldm.lab.measure --sheets DIR           also write the pictures that were judged
    python -m tinyldm.lab.measure --samples FILE.png     only draw samples of sixteen prompts, to look at

The parts: autoencoder (does it keep pictures?), prompts, variety (do seeds differ?), words (of eight objects that
training never saw, each beside plain words for it) and examples (the words of the five objects of examples/). Colours
are measured on the pixels; everything else is what a small network sees, the judge. The words are learned by train.py
with its defaults.
"""

import argparse

from tinyldm import InputError, cli
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.images import contact_sheet, save_image
from tinyldm.lab import TINY, file_to_write
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.measure.questions import OBJECTS
from tinyldm.lab.measure.report import (
    report_autoencoder,
    report_examples,
    report_prompts,
    report_variety,
    report_words,
    rows_of_samples,
)
from tinyldm.lab.world.captions import SHEET_PROMPTS
from tinyldm.lab.world.drawing import SIZE

PARTS = ("autoencoder", "prompts", "variety", "words", "examples")


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--weights", type=cli.path, default=TINY, metavar="PATH", help="checkpoint (%(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument(
        "--share", type=share, default=1.0, help="of the pictures of autoencoder and prompts (%(default)s)"
    )
    parser.add_argument("--guidance", type=cli.positive, metavar="SCALE", help="of prompts (default: the checkpoint's)")
    parser.add_argument("--sheets", type=cli.path, metavar="DIR", help="write what was judged here")
    parser.add_argument("--samples", type=file_to_write, metavar="FILE", help="only draw samples")
    options = parser.parse_args(arguments)

    model, judge = load_checkpoint(options.weights), load_judge()
    if model.defaults.size != SIZE:
        found = f"{options.weights} makes pictures of {model.defaults.size} pixels"
        raise InputError(f"{found}, expected {SIZE}, those of the tiny world; leave out --weights")
    if options.samples:
        save_image(contact_sheet(rows_of_samples(model), labels=SHEET_PROMPTS, tile=64), options.samples)
        return
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
    parts = {
        "autoencoder": lambda: report_autoencoder(model, judge, max(10, round(500 * options.share))),
        "prompts": lambda: report_prompts(model, judge, options.share, options.sheets, options.guidance),
        "variety": lambda: report_variety(model, options.sheets),
        "words": lambda: report_words(options.weights, judge, OBJECTS, options.sheets),
        "examples": lambda: report_examples(options.weights, judge, options.sheets),
    }
    for part in [options.only] if options.only else PARTS:
        parts[part]()


def share(text: str) -> float:
    """An argparse type: a number above 0 and at most 10."""
    if (value := cli.positive(text)) > 10:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and at most 10")
    return value


if __name__ == "__main__":
    cli.run(main)
