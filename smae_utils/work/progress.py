"""What long work says while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]
# Seconds between two lines of progress within one scan.
TELL_EVERY = 15.0
# Earlier lines that stay in an executed notebook.
KEPT_LINES = 8


class ProgressLine(str):
    """A line that the next one of its kind may write over, as a step of a training."""


class _MovingLine:
    """The newest line of progress of a notebook's cell, below a few of the earlier ones; a new one for each
    cell and each training.
    """

    def __init__(self) -> None:
        self.handle: Any = None
        self.cell: int | None = None
        self.lines: list[str] = []

    def show(self, line: str, cell: int) -> None:
        from IPython.display import display

        if self.handle is None or cell != self.cell:
            self.lines = []
            self.handle, self.cell = display({"text/plain": line}, raw=True, display_id=True), cell
        self.lines.append(line)
        every = -(-len(self.lines) // KEPT_LINES)
        few = [*self.lines[:-1][::every], line]
        self.handle.update({"text/plain": "\n".join(few)}, raw=True)


_moving = _MovingLine()


def say(line: str) -> None:
    """Print at once, so that a pipe shows progress while it happens; in a notebook, progress moves on in one
    place.
    """
    kernel = _kernel()
    if kernel is not None and isinstance(line, ProgressLine):
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
            self.report(ProgressLine(f"  {self.name}: {done} of {total} windows"))
