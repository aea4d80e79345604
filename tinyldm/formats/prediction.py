"""Does the UNet say eps or v? Shapes can't tell: those of 2.1-base and 2.1 are the same. The wrong one makes noise."""

from pathlib import Path
from typing import NamedTuple

from tinyldm import InputError

STATED = {  # diffusers' and ModelSpec's words for what the UNet's output means
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v-prediction": "v",
    "v_prediction": "v",
}


class Prediction(NamedTuple):
    """What the UNet was trained to say, and how we know."""

    target: str  # "eps" or "v"
    known_from: str


THE_DEFAULT = Prediction("eps", "the default")


def known_prediction(
    path: Path,
    stated: str | None,  # by the checkpoint: "eps", "v" or nothing,
    where: str,  # there
    flag: str | None,  # --prediction
    default: Prediction = THE_DEFAULT,
) -> Prediction:
    """What the checkpoint states, else what the user says, else the default. InputError if the first two differ."""
    if stated and flag not in (None, stated):
        raise InputError(f"--prediction {flag} contradicts {path}, of which {where} states {stated}; leave it out")
    if stated:
        return Prediction(stated, where)
    return Prediction(flag, "--prediction") if flag else default
