"""tinyldm: a latent diffusion model, and how to teach it a new word."""

import os
import signal
import sys


def begin_command() -> None:
    """What a command does before it imports PyTorch."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    # How often a waiting thread of GNU OpenMP asks for work before it sleeps. By itself it asks 300,000 times. That
    # takes milliseconds on x86-64, where asking is slow, and meanwhile the thread that it waits for may have no core:
    # another program has the others.
    if sys.platform == "linux" and os.uname().machine == "x86_64" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


if sys.argv[0] == "-m":  # Python is on its way to a command of this package
    begin_command()


class InputError(ValueError):
    """Something the user gave that cannot work; the message says what was found, what was expected, what to do.

    The scripts print it as one line and exit with status 2. Any other exception is a bug and keeps its traceback.
    """
