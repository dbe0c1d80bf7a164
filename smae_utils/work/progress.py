"""What long work says while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]
# Seconds between two lines of progress within one scan.
TELL_EVERY = 15.0


class _MovingLine:
    """One line of a notebook's cell that is written over; a new one for each cell and each training."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.cell: int | None = None

    def show(self, line: str, cell: int) -> None:
        from IPython.display import display

        text = {"text/plain": line}
        if self.handle is None or cell != self.cell:
            self.handle, self.cell = display(text, raw=True, display_id=True), cell
        else:
            self.handle.update(text, raw=True)


_moving = _MovingLine()


def say(line: str) -> None:
    """Print at once, so that a pipe shows progress while it happens; in a notebook, steps share one line that
    moves on.
    """
    kernel = _kernel()
    if kernel is not None and line.startswith(("step ", "  ")):
        _moving.show(line, kernel.execution_count)
        return
    _moving.handle = None
    print(line, flush=True)


def _kernel() -> Any:
    """The shell of the notebook that this process runs, None anywhere else."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if type(shell).__name__ == "ZMQInteractiveShell" else None


class WindowProgress:
    """Says how far a long scan is, at most each `TELL_EVERY` seconds."""

    def __init__(self, name: str, report: Callable[[str], None]):
        self.name, self.report, self.last = name, report, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= TELL_EVERY:
            self.last = time.monotonic()
            self.report(f"  {self.name}: {done} of {total} windows")
