"""tinyldm: a latent diffusion model, and how to teach it a new word."""


class InputError(ValueError):
    """Something the user gave that cannot work; the message says what was found, what was expected, what to do.

    The scripts print it as one line and exit with status 2. Any other exception is a bug and keeps its traceback.
    """
