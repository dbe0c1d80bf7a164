"""Runs of a batch as processes of this machine, with the cores and GPUs shared out among them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from smae_utils.batch.runs import Batch

# Seconds that a run has to save its training and stop.
GRACE = 60.0


class LocalProcesses:
    """Starts each run as a process.

    Args:
        jobs: runs at a time. Each gets its share of the cores: two that take all of them stall each other.
        gpus: numbers of GPUs; each run gets one for itself, and no more runs are started than there are.
    """

    def __init__(self, batch: Batch, jobs: int = 1, gpus: Sequence[str] = ()):
        self.batch, self.gpus = batch, list(gpus)
        self.slots = min(jobs, len(gpus)) if gpus else jobs
        self.processes: dict[str, tuple[subprocess.Popen, IO, str]] = {}

    def taken_over(self) -> list[str]:
        """Runs that an earlier runner left: none, for they end with it."""
        return []

    def start(self, names: Sequence[str]) -> list[str]:
        """Start as many of these as there is room for: their names."""
        started = []
        for name in names[: self.slots - len(self.processes)]:
            folder = self.batch.out / name
            folder.mkdir(parents=True, exist_ok=True)
            log = open(folder / "log.txt", "ab")  # noqa: SIM115 (closed when the process ends)
            gpu = self.gpus.pop(0) if self.gpus else ""
            command = [sys.executable, "-m", "smae_utils.batch", str(self.batch.out), name]
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(gpu),
                start_new_session=True,  # the terminal's Ctrl-C comes to us alone: we pass it on
                preexec_fn=_die_with_parent,
            )
            self.processes[name] = (process, log, gpu)
            started.append(name)
        return started

    def _environment(self, gpu: str) -> dict[str, str]:
        threads = (
            max(1, len(os.sched_getaffinity(0)) // self.slots) if hasattr(os, "sched_getaffinity") else 1
        )
        own = (
            {"OMP_NUM_THREADS": str(threads)}
            if self.slots > 1 and "OMP_NUM_THREADS" not in os.environ
            else {}
        )
        return {**os.environ, **own, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}

    def ended(self) -> list[str]:
        """Runs whose process has ended since the last call."""
        names = [name for name, (process, _, _) in self.processes.items() if process.poll() is not None]
        for name in names:
            _, log, gpu = self.processes.pop(name)
            log.close()
            if gpu:
                self.gpus.append(gpu)
        return names

    def stop(self) -> None:
        """Interrupt all: trainings save their state, what does not end in time is killed."""
        for process, _, _ in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for process, log, _ in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.close()
        self.processes.clear()


def _die_with_parent() -> None:
    """In the new process, on Linux: SIGTERM when the runner dies, even by SIGKILL: no orphan stays."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
