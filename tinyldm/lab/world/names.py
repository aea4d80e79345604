"""Names for what only this world has: two syllables that can be said."""

from collections.abc import Container

import numpy as np

ONSETS = ("b", "bl", "br", "d", "dr", "f", "fl", "g", "gl", "gr", "j", "k", "kl", "kr", "l", "m", "n", "p", "pl", "pr",
          "r", "sk", "sl", "sn", "sp", "st", "t", "tr", "v", "w", "z")  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u")
MIDDLES = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "t", "v", "z", "lb", "ld", "lk", "mb", "nd", "rb", "rk")
CODAS = ("b", "d", "g", "k", "l", "m", "n", "p", "r", "t")


def invented_names(count: int, seed: int, avoid: Container[str] = ()) -> list[str]:
    """So many different ones, the same for the same seed: "plodut", "skandod". A longer list begins with a shorter."""
    rng = np.random.default_rng([seed, 0])
    names: dict[str, None] = {}
    while len(names) < count:
        onset, vowel, middle, vowel2, coda = (
            str(rng.choice(part)) for part in (ONSETS, VOWELS, MIDDLES, VOWELS, CODAS)
        )
        name = onset + vowel + middle + vowel2 + coda
        if name not in avoid:
            names[name] = None
    return list(names)
