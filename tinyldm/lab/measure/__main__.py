"""How good the tiny checkpoint is, in figures.

    python -m tinyldm.lab.measure                        all of it; it learns some fifty words, which takes its time
    python -m tinyldm.lab.measure --only prompts         one part: do pictures show what their prompts say?
    python -m tinyldm.lab.measure --sheets DIR           also write the pictures that were judged
    python -m tinyldm.lab.measure --samples FILE.png     only draw samples of sixteen prompts, to look at
    python -m tinyldm.lab.measure --only words --tuning --train "--steps 300 --lr 0.01"    try settings of train.py

The parts: autoencoder (does it keep pictures?), prompts, variety (do seeds differ?), words (of eight objects that
training never saw, beside plain words for them), outlines (of words for three shapes that training never saw and three
that it knows), styles (words for two that training never saw) and examples (the words of the five objects of
examples/). Colours and outlines are measured on the pixels; everything else is what a small network sees, the judge.
The words are learned by train.py with its defaults; those of words, outlines and styles as many at once as there are
threads to compute with, each in one.
"""

import argparse
import shlex

from tinyldm import InputError, cli
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.images import contact_sheet, save_image
from tinyldm.lab import TINY, file_to_write
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.measure.learned_styles import report_styles
from tinyldm.lab.measure.learning import Training
from tinyldm.lab.measure.outlines import report_outlines
from tinyldm.lab.measure.questions import OBJECTS, TUNING_OBJECTS
from tinyldm.lab.measure.report import report_autoencoder, report_prompts, report_variety, rows_of_samples
from tinyldm.lab.measure.words import report_examples, report_words
from tinyldm.lab.world.captions import SHEET_PROMPTS
from tinyldm.lab.world.drawing import SIZE

PARTS = ("autoencoder", "prompts", "variety", "words", "outlines", "styles", "examples")


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--weights", type=cli.path, default=TINY, metavar="PATH", help="checkpoint (%(default)s)")
    add("--only", choices=PARTS, help="one part (default: all)")
    add("--share", type=share, default=1.0, help="of the pictures of autoencoder and prompts (%(default)s)")
    add("--guidance", type=cli.positive, metavar="SCALE", help="of prompts (default: the checkpoint's)")
    add("--seeds", type=cli.whole_number(1, 1000), default=3, metavar="N", help="to learn a word with (%(default)s)")
    add("--tuning", action="store_true", help="words: of four other objects, to choose settings by, not to report")
    add("--train", type=words_of_a_shell, default=(), metavar="OPTIONS", help='of train.py, in quotes: "--steps 300"')
    add("--sheets", type=cli.path, metavar="DIR", help="write what was judged here")
    add("--samples", type=file_to_write, metavar="FILE", help="only draw samples")
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
    training = Training(options.weights, options.seeds, options.train)
    parts = {
        "autoencoder": lambda: report_autoencoder(model, judge, max(10, round(500 * options.share))),
        "prompts": lambda: report_prompts(model, judge, options.share, options.sheets, options.guidance),
        "variety": lambda: report_variety(model, options.sheets),
        "words": lambda: report_words(
            training, judge, TUNING_OBJECTS if options.tuning else OBJECTS, options.sheets, plain=not options.tuning
        ),
        "outlines": lambda: report_outlines(training, judge, options.sheets),
        "styles": lambda: report_styles(training, judge, options.sheets),
        "examples": lambda: report_examples(training, judge, options.sheets),
    }
    for part in [options.only] if options.only else PARTS:
        parts[part]()


def share(text: str) -> float:
    """An argparse type: a number above 0 and at most 10."""
    if (value := cli.positive(text)) > 10:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and at most 10")
    return value


def words_of_a_shell(text: str) -> tuple[str, ...]:
    """An argparse type: several words, split as a shell would."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, {str(error).lower()}; close every quote") from error


if __name__ == "__main__":
    cli.run(main)
