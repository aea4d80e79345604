"""One page in the browser to learn words, to make and to edit pictures with them, and to look inside.

    python -m tinyldm.studio --weights weights/tiny

It runs train.py and sample.py, and all that it keeps is in outputs/. Only this computer sees it, unless --host says
otherwise; who sees it may use it. Ctrl-C ends it and what it runs, and keeps what was learned.
"""

import os
import threading
from contextlib import closing
from tempfile import TemporaryDirectory

from tinyldm import InputError, cli
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.studio.commands import Commands


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="who may see it (%(default)s: only you)")
    parser.add_argument("--port", type=cli.whole_number(1, 65535), default=7860, metavar="N", help="%(default)s")
    options = parser.parse_args(arguments)
    usual = {name: getattr(options, name) for name in ("weights", "vae", "prediction", "device", "dtype", "seed")}
    checkpoint = open_checkpoint(options.weights, vae=options.vae, prediction=options.prediction)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read by the import
    try:
        from tinyldm.studio.page import Page, build, launch
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; type pip install -e ".[studio]"') from None
    with TemporaryDirectory() as os.environ["GRADIO_TEMP_DIR"], closing(Commands()) as commands:
        launch(build(Page(commands, checkpoint, usual)), options.host, options.port)
        print(f"the page is at http://{options.host}:{options.port}, Ctrl-C ends it", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    cli.run(main)
