"""How well a learned word makes pictures in its style: those that training never saw."""

from itertools import product
from pathlib import Path

from PIL import Image

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.images import to_images, to_tensor
from tinyldm.lab.measure.judge import Judge
from tinyldm.lab.measure.learning import Training, in_parallel, model_with, tell, word_for
from tinyldm.lab.measure.questions import in_style, true_pictures_in_style
from tinyldm.lab.measure.sampling import as_shares, ask, decoded, in_rows, judged, save_judged
from tinyldm.lab.measure.words import means_of
from tinyldm.lab.world.distribution import pictures_in_style
from tinyldm.lab.world.styles import HELD_OUT_STYLES


def report_styles(training: Training, judge: Judge, sheets: Path | None) -> dict[str, dict[str, float]]:
    """Three lines a held-out style: in how many pictures of four nouns the judge sees the style and the noun's shape.

    First of the world's own pictures, then of those encoded and decoded, which is what can be reached, then of samples
    with the learned word. Returns {style: the last}.
    """

    def samples(task: tuple[str, int]) -> tuple[dict[str, float], list[Image.Image]]:
        style, seed = task
        words = word_for(training, pictures_in_style(style), seed, kind="style")
        return ask(model_with(training.weights, words), judge, in_style("S*", style), words)

    model = load_checkpoint(training.weights)
    results = in_parallel(samples, product(HELD_OUT_STYLES, range(training.seeds)), "styles")
    figures = {}
    for style in HELD_OUT_STYLES:
        drawn, questions = true_pictures_in_style(style), in_style("S*", style)
        tell(f"{style}, the world's own: {as_shares(judged(judge, questions, drawn))}")
        kept = to_images(decoded(model, to_tensor(drawn)))
        tell(f"{style}, decoded: {as_shares(judged(judge, questions, kept))}")
        learned = [next(results) for _ in range(training.seeds)]
        figures[style] = means_of([passed for passed, _ in learned])
        tell(f"{style}, learned: {as_shares(figures[style])}")
        images = [*drawn, *(image for _, of_seed in learned for image in of_seed)]
        save_judged(sheets, f"style-{style.replace(' ', '-')}.png", in_rows(images, 16))
    return figures
