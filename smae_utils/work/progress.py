"""What long work says while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]
# Seconds between two lines of progress within one scan.
TELL_EVERY = 15.0


def say(line: str) -> None:
    """Print at once, so that a notebook or a pipe shows progress while it happens."""
    print(line, flush=True)


class Teller:
    """Says how far a long scan is, at most each `TELL_EVERY` seconds."""

    def __init__(self, name: str, report: Callable[[str], None]):
        self.name, self.report, self.last = name, report, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= TELL_EVERY:
            self.last = time.monotonic()
            self.report(f"  {self.name}: {done} of {total} windows")
