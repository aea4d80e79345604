"""Prompts that ask a word for more than a picture of what it means: how well it can be edited, score.py measures."""

import re
from collections.abc import Iterable, Sequence

from tinyldm import InputError
from tinyldm.lab.world.captions import with_articles
from tinyldm.tokenizer import Tokenizer

Prompts = Sequence[tuple[str, str]]  # of (kind, template), {} where the word goes

TINY_PROMPTS = (
    ("background", "a photo of {} on the grass"),
    ("background", "a photo of {} in the snow"),
    ("background", "a photo of {} in the night sky"),
    ("background", "a photo of {} on a purple background"),
    ("style", "a sketch of {}"),
    ("style", "an oil painting of {}"),
    ("style", "pixel art of {}"),
    ("style", "a neon sign of {}"),
    ("composition", "a photo of {} next to a red star"),
    ("composition", "a photo of {} next to a lemon"),
    ("composition", "a photo of a blue square next to {}"),
    ("composition", "a photo of a ladybug next to {}"),
)
TINY_STYLE_PROMPTS = (  # for a word that is a style: many a style draws no background
    ("composition", "a painting of a lemon in the style of {}"),
    ("composition", "a painting of a yellow cross in the style of {}"),
    ("composition", "a painting of two pink hearts in the style of {}"),
    ("composition", "a painting of a red star next to a blue square in the style of {}"),
)
STABLE_DIFFUSION_PROMPTS = (
    ("background", "a photo of {} on a snowy mountain"),
    ("background", "a photo of {} at the bottom of the sea"),
    ("background", "a photo of {} in a busy street at night"),
    ("background", "a photo of {} on a wooden kitchen table"),
    ("style", "a watercolor of {}"),
    ("style", "a pencil sketch of {}"),
    ("style", "a stained glass window of {}"),
    ("style", "a low-poly 3D render of {}"),
    ("composition", "a cat sitting next to {}"),
    ("composition", "an astronaut holding {}"),
    ("composition", "a t-shirt with a print of {}"),
    ("composition", "a bookshelf with {} on it"),
)


def filled(template: str, text: str) -> str:
    """The prompt with the text in the word's place; an article before the place goes if the text has its own.

    So it does with no text at all, the prompt without the word: "a photo of on the grass".
    """
    if not text or re.match(r"(an?|the) ", text):
        template = re.sub(r"\b(an?|the) \{\}", "{}", template)
    return " ".join(with_articles(template.replace("{}", text)).split())


def check_length(prompts: Iterable[str], tokenizer: Tokenizer, who: str) -> None:
    """Raises InputError if one of the prompts would be cut off, or is empty."""
    room = tokenizer.length - 2
    for prompt in prompts:
        if not prompt:
            raise InputError('a prompt is empty without the word; expected words around its {}, as "a photo of {}"')
        if (count := len(tokenizer.encode(prompt))) > room:
            raise InputError(f'the prompt "{prompt}" has {count} tokens, {who} reads at most {room}; shorten it')
