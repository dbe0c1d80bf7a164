"""Locks between processes, through files. The one place that knows filelock."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from smae_utils.errors import UserError

__all__ = ["Timeout", "alone", "held"]


@contextmanager
def held(file: Path, timeout: float = -1) -> Iterator[None]:
    """Within it this process alone holds the lock `file`, which is removed afterwards.

    The system frees the lock of a killed process; its file goes when the next one is through. On a file
    system without locks it has no effect.

    Args:
        timeout: seconds to wait for another process; -1: as long as it takes.

    Raises:
        Timeout: when another process held it all that time.
    """
    lock = FileLock(file, timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for this file finds that it is gone.
        if os.name != "nt":
            file.unlink(missing_ok=True)
        lock.release()
        # There an open file cannot be removed.
        if os.name == "nt":
            with suppress(OSError):
                file.unlink(missing_ok=True)


@contextmanager
def alone(file: Path, refusal: str) -> Iterator[None]:
    """As `held`, but a process that finds the lock taken does not wait.

    Raises:
        UserError: with the text `refusal`, while another process is within it.
    """
    with ExitStack() as stack:  # a Timeout of what is done within is none of this lock's
        try:
            stack.enter_context(held(file, timeout=0))
        except Timeout:
            raise UserError(refusal) from None
        yield
