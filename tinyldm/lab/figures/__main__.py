"""The pictures of docs/method.md: what each part of the method does, drawn by the parts themselves.

    python -m tinyldm.lab.figures                          all of them: about a minute on two cores
    python -m tinyldm.lab.figures --only guidance loss     these

It learns a word with train.py first. The plots need matplotlib, the extra `plot`.
"""

from argparse import Namespace

from tqdm import tqdm

from tinyldm import cli
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.lab import ROOT, TINY
from tinyldm.lab.figures.drawn import attention, guidance, latents, noise, samplers
from tinyldm.lab.figures.plotted import loss, path, tokens
from tinyldm.lab.figures.subject import Subject
from tinyldm.lab.paper.plots import new_figure

FIGURES = {figure.__name__: figure for figure in (tokens, latents, noise, loss, path, attention, guidance, samplers)}


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    new_figure(1, 1)  # without matplotlib it ends now
    load_checkpoint(options.weights)  # if it is not there, nothing is made
    options.out.mkdir(parents=True, exist_ok=True)
    subject = Subject.learned(options.weights)
    for name in tqdm(options.only, desc="figures"):
        FIGURES[name](subject, options.out / f"{name}.png")
    print(f"written: {cli.printable(options.out)}")


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    names = ", ".join(FIGURES)
    add("--only", nargs="+", choices=[*FIGURES], default=[*FIGURES], metavar="NAME", help=f"of {names}")
    add("--weights", type=cli.path, default=TINY, metavar="PATH", help="checkpoint (%(default)s)")
    add("--out", type=cli.path, default=ROOT / "docs" / "figures", metavar="DIR", help="default: docs/figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
