"""A batch from its file to its end: what is ready is started, what is done is left alone."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from smae_utils.batch.local import LocalProcesses
from smae_utils.batch.plan import Planned, read_batch
from smae_utils.batch.runs import Batch, line_of, reason
from smae_utils.errors import UserError
from smae_utils.locks import alone

POLL = 0.5  # seconds
BACKENDS = ("local", "slurm")
# A run whose process ended without saying why (killed, time limit, machine lost) is started so often.
ATTEMPTS = 3


class Backend(Protocol):
    """Where runs are executed."""

    def taken_over(self) -> list[str]: ...

    def start(self, names: Sequence[str]) -> list[str]: ...

    def ended(self) -> list[str]: ...

    def stop(self) -> None: ...


def run_batch(
    file: str | Path,
    out: str | Path,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    backend: str = "local",
    slurm: dict[str, Any] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """Execute what of a batch is not done yet.

    Args:
        file: YAML file, see `smae_utils.batch.plan`.
        out: folder of the batch; each run has one below it.
        jobs: runs at a time.
        gpus: numbers of GPUs to share out, one a run.
        backend: "local", or "slurm" for jobs of a SLURM cluster.
        slurm: parameters of a job, as submitit names them (`slurm_partition`, `timeout_min`, ...).
        report: gets a line for each change; with a terminal, each running run has a moving one.

    Returns:
        The state of each run.

    Raises:
        UserError: for a batch that cannot run, before anything starts; and at the end when runs failed.
    """
    check_place(jobs, backend, gpus, slurm)
    return run_planned(read_batch(file), out, jobs, gpus, backend, slurm, report)


def run_planned(
    runs: Sequence[Planned],
    out: str | Path,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    backend: str = "local",
    slurm: dict[str, Any] | None = None,
    report: Callable[[str], None] = print,
    done: Callable[[Batch, str], None] | None = None,
) -> dict[str, str]:
    """As `run_batch`, with runs that need no file; `done` gets each as it is done, with its name."""
    batch = Batch(Path(out).absolute(), tuple(runs))
    batch.out.mkdir(parents=True, exist_ok=True)
    # A second runner that plans otherwise would change the runs of the first.
    refusal = f"{out} is being run by another process: wait for it, or choose another --out"
    with alone(batch.out / ".lock", refusal):
        batch.save()
        if backend == "slurm":
            from smae_utils.batch.slurm import SlurmJobs

            place: Backend = SlurmJobs(batch, slurm or {}, report)
        else:
            place = LocalProcesses(batch, jobs, gpus)
        states = _loop(batch, place, report, done or (lambda batch, name: None))
        wrong = [name for name, state in states.items() if state != "done"]
        if wrong:
            reasons = [f"{name} {states[name]}: {reason(batch, name)}" for name in wrong]
            raise UserError(f"{len(wrong)} of {len(states)} runs are not done. " + "; ".join(reasons[:5]))
        return states


def check_place(jobs: int, backend: str, gpus: Sequence[str] = (), slurm: Any = None) -> None:
    """Refuse what no batch can be executed by."""
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if wrong := next((g for g in gpus if not re.fullmatch(r"\d+|(GPU|MIG)-[\w-]+", g)), ""):
        raise UserError(
            f"--gpus {wrong!r} is no GPU: expected numbers as 0 1, or names as nvidia-smi -L has them"
        )
    if len(set(gpus)) < len(gpus):
        raise UserError(f"--gpus {' '.join(gpus)} names a GPU twice: two runs on one stall each other")
    if (gpus and backend != "local") or (slurm and backend != "slurm"):
        raise UserError(f"--gpus is for --backend local, --slurm for --backend slurm; this is {backend}")


def _loop(
    batch: Batch, place: Backend, report: Callable[[str], None], done: Callable[[Batch, str], None]
) -> dict[str, str]:
    told: set[str] = set()
    shown = Shown(batch, report)
    attempts = dict.fromkeys((run.name for run in batch.runs), 0)
    alive = set(place.taken_over())
    try:
        while True:
            alive.difference_update(place.ended())
            states = batch.states()
            for name, state in states.items():
                if name in alive:
                    states[name] = "running"
                elif state == "failed" and not attempts[name]:  # of an earlier sitting
                    states[name] = "waiting"
            shown.update(states)
            finished = [name for name, state in states.items() if state == "done"]
            for name in finished:
                if name not in told:
                    told.add(name)
                    done(batch, name)
            ready = [
                run.name
                for run in batch.runs
                if states[run.name] in ("waiting", "stopped")
                and attempts[run.name] < ATTEMPTS
                and set(run.after) <= set(finished)
            ]
            started = place.start(ready)
            alive.update(started)
            for name in started:
                attempts[name] += 1
            if not alive and not any(s == "running" for s in states.values()):
                return states
            time.sleep(POLL)
    except KeyboardInterrupt:
        report("stopping: trainings save their state; start the same command again to go on")
        raise
    finally:
        place.stop()
        shown.close()


class Shown:
    """One moving line a run and one for the whole on a terminal; elsewhere a line for each change."""

    def __init__(self, batch: Batch, report: Callable[[str], None]):
        self.batch, self.report = batch, report
        self.said: dict[str, str] = {}
        self.bars: dict[str, Any] = {}
        self.live = sys.stderr.isatty()

    def update(self, states: dict[str, str]) -> None:
        for name, state in states.items():
            if self.said.get(name) != state and not (state == "waiting" and name not in self.said):
                self.report(f"{name}: {state}")
            self.said[name] = state
        if self.live:
            self._draw(states)

    def _draw(self, states: dict[str, str]) -> None:
        from tqdm import tqdm

        done = sum(state == "done" for state in states.values())
        if "" not in self.bars:
            self.bars[""] = tqdm(total=len(states), position=0, desc="batch", unit="run")
        self.bars[""].n = done
        self.bars[""].refresh()
        for name, state in states.items():
            if state != "running" and name in self.bars:
                self.bars.pop(name).close()
            if state == "running":
                if name not in self.bars:
                    taken = {-bar.pos for bar in self.bars.values()}
                    place = next(i for i in itertools.count(1) if i not in taken)
                    self.bars[name] = tqdm(bar_format="{desc}", position=place, leave=False)
                self.bars[name].set_description_str(f"{name}: {line_of(self.batch, name)}")

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()
