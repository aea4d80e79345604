"""The workshop beside the house: how the tiny checkpoint was made and measured. The method never imports it."""

import argparse
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]  # the project's folder, with train.py, examples/ and weights/
TINY = ROOT / "weights" / "tiny"


def file_to_write(text: str) -> Path:
    """An argparse type: a file that can be written once it is made, which may be hours later."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, expected the name of a file to write")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is a device or the like, expected the name of a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}, there is no folder {str(path.parent)!r}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}, the folder {str(path.parent)!r} can't be written; choose another")
    return path
