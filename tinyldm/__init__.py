"""tinyldm: a latent diffusion model, and how to teach it a new word."""

import signal
import sys

if sys.argv[0] == "-m":  # Python is on its way to a command of this package
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during its imports: no traceback


class InputError(ValueError):
    """Something the user gave that cannot work; the message says what was found, what was expected, what to do.

    The scripts print it as one line and exit with status 2. Any other exception is a bug and keeps its traceback.
    """
