"""One run of a batch: its folder, its state, and the process that executes it.

OUT/NAME/run.json      key, state, start and end, host, why it failed
OUT/NAME/NAME.ipynb    the executed notebook, and NAME.html; of a function result.json
OUT/NAME/log.txt       what it printed
OUT/batch.json         the runs as they were planned; see `Batch`
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from smae_utils.atomic import write_text
from smae_utils.batch.plan import Planned
from smae_utils.errors import UserError
from smae_utils.locks import Timeout, held
from smae_utils.run_notebook import run_notebook
from smae_utils.work.provenance import now

RESULT = "result.json"  # what a function returned
SLURM_JOBS = "slurm/jobs.json"
# Of a run: waits, is executed, was killed or interrupted, failed, is done; or it waits for one that failed.
STATES = ("waiting", "running", "stopped", "failed", "done", "blocked")


@dataclass(frozen=True)
class Batch:
    """The runs of a batch and the folder they are in."""

    out: Path
    runs: tuple[Planned, ...]

    def save(self) -> None:
        """Write batch.json, which tells everything else that is in the folder."""
        rows = [
            {
                "name": r.name,
                "notebook": str(r.notebook or ""),
                "function": r.function,
                "parameters": r.parameters,
                "crossed": r.crossed,
                "after": r.after,
            }
            for r in self.runs
        ]
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "batch.json", json.dumps({"runs": rows}, indent=1, default=str))

    @classmethod
    def open(cls, out: str | Path) -> Batch:
        """The batch that was started in a folder.

        Raises:
            UserError: where there is none.
        """
        file = Path(out) / "batch.json"
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["runs"]
            runs = [_planned(row) for row in rows]
        except FileNotFoundError:
            raise UserError(f"{out} holds no batch: start one with `batch FILE.yaml --out {out}`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): start the batch anew from its YAML file") from None
        return cls(Path(out), tuple(runs))

    def of(self, name: str) -> Planned:
        """The run of that name."""
        for run in self.runs:
            if run.name == name:
                return run
        raise UserError(f"{self.out} has no run {name}: was the batch changed while it ran?")

    def slurm_jobs(self) -> dict[str, str]:
        """Number of the SLURM job of each run that was submitted last, by whichever runner."""
        file = self.out / SLURM_JOBS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def save_slurm_jobs(self, numbers: Mapping[str, str]) -> None:
        """Note them for the next runner, where this one is killed."""
        write_text(self.out / SLURM_JOBS, json.dumps(numbers))

    def states(self) -> dict[str, str]:
        """The state of each run, in the order of the batch."""
        out: dict[str, str] = {}
        for run in self.runs:
            state = state_of(self.out, run)
            if state in ("waiting", "stopped") and any(out[a] in ("failed", "blocked") for a in run.after):
                state = "blocked"
            out[run.name] = state
        return out


def _planned(row: dict[str, Any]) -> Planned:
    notebook = Path(row["notebook"]) if row["notebook"] else None
    after = tuple(row["after"])
    return Planned(row["name"], notebook, row["parameters"], row["crossed"], after, row["function"])


def read_record(out: Path, run: Planned) -> dict[str, Any]:
    """What run.json says; {} without one, or with one of another notebook, version or parameters."""
    try:
        record = json.loads((out / run.name / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if record.get("key") == run.key else {}


def state_of(out: Path, run: Planned) -> str:
    """One of `STATES`, of the run itself."""
    record = read_record(out, run)
    if record.get("end_time"):
        return end_of(out, run, record)
    if is_running(out, run):
        return "running"
    return "stopped" if record else "waiting"


def end_of(out: Path, run: Planned, record: dict[str, Any]) -> str:
    """ "done" or "failed", and "" of a run that did not come to its end as it is planned now."""
    if not record.get("end_time"):
        return ""
    made = out / run.name / (f"{run.name}.ipynb" if run.notebook else RESULT)
    whole = not record.get("exception") and made.is_file()
    return "done" if whole else "failed"


def is_running(out: Path, run: Planned) -> bool:
    """Whether a process executes it now, here or (on a file system that knows locks) on another machine."""
    file = out / run.name / ".lock"
    if not file.exists():
        return False
    try:
        with held(file, timeout=0):
            return False
    except Timeout:
        return True


def execute(out: str | Path, name: str) -> str:
    """Execute a run in this process, unless it is done or another process does it: its state afterwards.

    The system gives the lock back when this process dies, however it dies; what was trained by then is in the
    run folders of the notebook, which goes on from there.
    """
    batch = Batch.open(out)
    run = batch.of(name)
    folder = batch.out / name
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / ".lock"):
        if end_of(batch.out, run, read_record(batch.out, run)) == "done":
            return "done"
        record = {"key": run.key, "start_time": now(), "host": platform.node(), "pid": os.getpid()}
        write_text(folder / "run.json", json.dumps(record, indent=1))
        with _told_to_stop() as told:
            try:
                if run.notebook:
                    run_notebook(run.notebook, folder, run.parameters, name)
                else:
                    write_text(folder / RESULT, json.dumps(_call(run)))
            except Exception as error:
                # The kernel was told too, and its end is no failure of the notebook.
                if told():
                    raise KeyboardInterrupt from error
                if not isinstance(error, UserError):
                    traceback.print_exc()
                known = isinstance(error, (UserError, OSError))
                record["exception"] = str(error) if known else f"{type(error).__name__}: {error}"
        write_text(folder / "run.json", json.dumps({**record, "end_time": now()}, indent=1))
    return "failed" if "exception" in record else "done"


def _call(run: Planned) -> Any:
    """What the function of a run returns."""
    module, _, name = run.function.partition(":")
    return getattr(importlib.import_module(module), name)(**run.parameters)


def result_of(batch: Batch, name: str) -> Any:
    """What the function of a run that is done returned."""
    return json.loads((batch.out / name / RESULT).read_text(encoding="utf-8"))


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM (a cluster takes the job away) interrupts; yields whether it came."""
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def minutes(record: dict[str, Any]) -> float | None:
    """How long a run took, or takes by now."""
    if "start_time" not in record:
        return None
    end = datetime.fromisoformat(record.get("end_time") or now())
    return (end - datetime.fromisoformat(record["start_time"])).total_seconds() / 60


def progress_of(run: Planned, since: str) -> dict[str, Any]:
    """Of a run's current training: its folder's name, step, steps, loss, seconds left; {} before it."""
    from smae_utils.work.run_folder import Run  # torch comes with it

    folder = run.trains_in
    begun = datetime.fromisoformat(since).timestamp() if since else 0.0
    logs = [log for log in folder.glob("*/log.jsonl") if log.stat().st_mtime >= begun] if folder else []
    if not logs:
        return {}
    training = Run(max(logs, key=lambda log: log.stat().st_mtime).parent)
    lines = [line for line in training.read_log() if "loss" in line]
    if not lines:
        return {}
    last, steps = lines[-1], training.config.get("steps")
    out = {"training": training.path.name, "step": last["step"], "loss": last["loss"], "steps": steps}
    if steps and last.get("seconds"):
        out["left_s"] = (steps - last["step"]) * last["seconds"] / last["step"]
    return out


def line_of(batch: Batch, name: str) -> str:
    """Where the training of a running run is, in words."""
    run = batch.of(name)
    at = progress_of(run, read_record(batch.out, run).get("start_time", ""))
    if not at:
        return "running"
    left = f", {at['left_s'] / 60:.1f} min left" if "left_s" in at else ""
    return f"{at['training']} step {at['step']}/{at['steps']}, loss {at['loss']:.3f}{left}"


def _log_of(batch: Batch, name: str) -> Path:
    """What a run printed last: its own log, or that of its SLURM job."""
    number = batch.slurm_jobs().get(name)
    found = sorted((batch.out / "slurm").glob(f"{number}_*log.err")) if number else []
    return found[-1] if found else batch.out / name / "log.txt"


def reason(batch: Batch, name: str) -> str:
    """Why a run is not done, in words."""
    run = batch.of(name)
    if said := read_record(batch.out, run).get("exception"):
        return said
    states = batch.states()
    if waits := [a for a in run.after if states[a] != "done"]:
        return f"waits for {', '.join(waits)}"
    log = _log_of(batch, name)
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    return f"it ended without a word (killed, or out of memory?); its log {log} ends with: {last[:200]}"
