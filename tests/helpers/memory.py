"""How much anonymous memory a process has: what is its own, not what is mapped from files. Linux tells it."""

import re
import threading
from pathlib import Path


class Anonymous:
    """`with Anonymous() as memory`: memory.before, .highest and .after are bytes, of the block."""

    def __enter__(self) -> "Anonymous":
        self.before = self.highest = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.after = anonymous()
        self.highest = max(self.highest, self.after)


def anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
