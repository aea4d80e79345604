"""What a learned word is good for: section 4 of the paper (arXiv 2208.01618) and its limits, each with its picture.

    python -m tinyldm.lab.gallery                                     all of it: less than ten minutes on two cores
    python -m tinyldm.lab.gallery --only editing --out outputs/gallery

Learns the words from examples/ with train.py, and writes a page with its sheets.
"""

from argparse import Namespace
from pathlib import Path

from tinyldm import cli
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.inversion import add_words
from tinyldm.lab import TINY
from tinyldm.lab.gallery.applications import Studio
from tinyldm.lab.gallery.page import APPLICATIONS, write_page
from tinyldm.lab.gallery.words import CIRCLE, HEART, LESSONS, learn_words, merge
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.measure.learning import Training

NAMES = [application.name for application in APPLICATIONS]


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    model, judge = load_checkpoint(options.weights), load_judge()
    options.out.mkdir(parents=True, exist_ok=True)
    words = learn_words(Training(options.weights), LESSONS, options.out)
    words |= merge((HEART, CIRCLE), options.out)
    add_words(model, words)
    studio = Studio(model, words, judge, options.out)
    shown = {}
    for application in APPLICATIONS:
        if application.name in options.only:
            shown[application.name] = application.show(studio)
            for what, figure in shown[application.name].figures.items():
                print(f"{application.name}: {what}: {figure}", flush=True)
    write_page(shown, options.out)
    print(f"written: {cli.printable(options.out / 'README.md')}")


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--weights", type=cli.path, default=TINY, metavar="PATH", help="checkpoint (%(default)s)")
    add("--out", type=cli.path, default=Path("docs/gallery"), metavar="DIR", help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
