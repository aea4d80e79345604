"""From one learned word to another, in steps."""

from collections.abc import Sequence

from torch import Tensor

from tinyldm import InputError
from tinyldm.inversion import add_words
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.sampler import slerp


def prompts_between(
    model: LatentDiffusion,
    prompts: Sequence[str],
    words: dict[str, Tensor],  # of the model; those between are added, to it and to these
    start: str,
    end: str,
    count: int,  # of steps, start and end among them; at least 2
) -> list[str]:
    """Each prompt `count` times, with words that lead from the start, which stands in it, to the end, spherically.

    Raises InputError if one of the two is not there, or if they are of different numbers of vectors.
    """
    for word in (start, end):
        if word not in words:
            found, known = f"{word} is no learned word that was given", ", ".join(words) or "none"
            raise InputError(f"{found}, expected two of {known}, or two seeds; give the word's file, too")
    if len(words[start]) != len(words[end]):
        found = f"{start} has {len(words[start])} vectors, {end} {len(words[end])}"
        raise InputError(f"{found}, expected as many; learn them with the same --vectors")
    pieces = [model.tokenizer.split_placeholders(prompt) for prompt in prompts]
    for prompt, of_prompt in zip(prompts, pieces, strict=True):
        if start not in of_prompt:
            raise InputError(f'the prompt "{prompt}" is without {start}, expected it there; add it')
    last = count - 1
    ends = f"{start[:99]}-{end[:99]}"  # the tokenizer takes no names of more than 255 characters
    between = {f"<{ends} {i}/{last}>": slerp(words[start], words[end], i / last) for i in range(count)}
    add_words(model, between)
    words |= between
    return ["".join(new if piece == start else piece for piece in of_prompt) for of_prompt in pieces for new in between]
