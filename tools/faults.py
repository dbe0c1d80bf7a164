"""Kill a work, or fill its disk, at a random moment; start it again; compare with an undisturbed one.

`python -m tools faults` writes `results/faults/faults.csv`. The moments are drawn from a work's whole time,
so a short work ends before its kill now and then: the table tells. Commands of one process start as a fork of
this one, which has imported everything: the time is spent on the work.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from smae_utils.atomic import write_text
from smae_utils.errors import UserError
from smae_utils.work.provenance import provenance
from tools.fault_works import Work, end, last_line, prepare, start

WORKS = ("pretrain", "finetune", "evaluate", "predict", "batch")
DISK_MB = 64
LEFT_BEHIND = ("*.part", ".part_*", "*.new", "*.old", ".lock", "*.lock", "*.tmp")


@dataclass
class Tried:
    """One trial; the columns of the table."""

    work: str
    fault: str
    moment: float  # share of the work's time, or of the disk it needs
    ended: str  # of the disturbed start: killed, or its exit code
    again: int  # exit code of the second start
    equal: bool
    left_behind: str = ""
    orphans: int = 0
    said: str = field(default="")

    @property
    def right(self) -> bool:
        return self.again == 0 and self.equal and not self.left_behind and not self.orphans


def try_faults(
    out: Path,
    results: Path | None,
    kills: int = 100,
    full_disks: int = 20,
    works: tuple[str, ...] = WORKS,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Disturb each work in turn, and write a row a trial.

    Args:
        out: folder for phantoms and runs, made anew.
        results: folder of the table; None: none is written.
        kills, full_disks: trials, shared out among the works.
        works: some of `WORKS`.
        seed: draws moments and victims.

    Raises:
        UserError: for an unknown work, and at the end when a trial went wrong.
    """
    if unknown := set(works) - set(WORKS):
        raise UserError(f"unknown work {min(unknown)!r}: expected some of {', '.join(WORKS)}")
    out = Path(out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    all_works, rng, rows = prepare(out), random.Random(seed), []
    undisturbed = {name: _undisturbed(all_works[name], out / f"plain-{name}") for name in works}
    for kind, trials in (("kill", kills), ("full disk", full_disks)):
        for number in range(trials):
            name = works[number % len(works)]
            work, (wanted, seconds, size) = all_works[name], undisturbed[name]
            place = out / f"{kind.replace(' ', '-')}-{number}"
            if kind == "kill":
                tried = _killed(name, work, place, wanted, seconds, rng)
            else:
                tried = _on_a_full_disk(name, work, place, wanted, size, rng)
            rows.append(tried)
            report(
                f"{number + 1}/{trials} {kind} of {name} at {tried.moment:.0%}: "
                f"{tried.ended}, then {_in_words(tried)}"
            )
            if tried.right:
                shutil.rmtree(place, ignore_errors=True)
    table = pd.DataFrame([vars(row) for row in rows])
    if results:
        _write(
            table, results, f"python -m tools faults --kills {kills} --full-disks {full_disks} --seed {seed}"
        )
    wrong = [
        f"{row.work}, {row.fault} at {row.moment:.0%}: {_in_words(row)}" for row in rows if not row.right
    ]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(rows)} trials went wrong: {'; '.join(wrong[:5])}")
    return table


def _in_words(tried: Tried) -> str:
    if tried.right:
        return "the same result"
    said = f"exit code {tried.again}" + ("" if tried.equal else ", another result")
    said += f", left behind {tried.left_behind}" if tried.left_behind else ""
    return (
        said
        + (f", {tried.orphans} orphans" if tried.orphans else "")
        + (f" ({tried.said})" if tried.said else "")
    )


def _write(table: pd.DataFrame, results: Path, command: str) -> None:
    made = provenance()
    Path(results).mkdir(parents=True, exist_ok=True)
    torch = made["packages"]["torch"]
    head = f"# {command}\n# {made['machine']}, commit {made['commit']}, torch {torch}, {made['date'][:10]}\n"
    write_text(
        Path(results) / "faults.csv",
        head + table.drop(columns="said").to_csv(index=False, float_format="%.3f"),
    )


# Starting, killing, waiting.


def _undisturbed(work: Work, place: Path) -> tuple[str, float, int]:
    """Result, seconds, and bytes on the disk."""
    begin = time.monotonic()
    if code := end(start(work, place)):
        raise UserError(
            f"{' '.join(work.words[:1])} fails undisturbed (exit code {code}): {last_line(place)}"
        )
    return (
        work.result(place),
        time.monotonic() - begin,
        sum(f.stat().st_size for f in place.rglob("*") if f.is_file()),
    )


def _killed(name: str, work: Work, place: Path, wanted: str, seconds: float, rng: random.Random) -> Tried:
    moment = rng.random()
    pid = start(work, place)
    deadline = time.monotonic() + moment * seconds
    code = None
    while code is None and time.monotonic() < deadline:
        time.sleep(0.005)
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
    if code is None:
        victims = [pid]
        # The runner, one of the processes that it started, or all at once, as a machine dies.
        if not work.forks:
            others = [p for p in _processes_of(place) if p != pid]
            victims = rng.choice([[pid], [rng.choice(others)] if others else [pid], [pid, *others]])
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        code = end(pid)  # the runner of a batch whose run was killed goes on
    ended = "killed" if code == -signal.SIGKILL else str(code)
    return _again(Tried(name, "kill", moment, ended, 0, False), work, place, wanted)


def _again(tried: Tried, work: Work, place: Path, wanted: str) -> Tried:
    """Start it again and look at what is there then."""
    _wait_until_alone(place)
    # Predict refuses to overwrite what is whole.
    if work.words[0] != "predict" or not (place / "out").exists():
        tried.again = end(start(work, place))
    tried.said = last_line(place) if tried.again else ""
    tried.orphans = len(_wait_until_alone(place))
    tried.equal = work.result(place) == wanted
    left = {str(f.relative_to(place)) for pattern in LEFT_BEHIND for f in place.rglob(pattern)}
    tried.left_behind = " ".join(sorted(left))
    return tried


def _processes_of(place: Path) -> list[int]:
    """Processes that work in a folder: it is in their command line, or they have a file of it open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(entry.name)
            if pid == os.getpid() or (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            opened = [os.readlink(f) for f in (entry / "fd").iterdir()]
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            # A log of another trial begins with the same letters: only its own and the folder's count.
            own = (f"{place}/", f"{place}.log", f"{place}.yaml")
            if any(text in words for text in own) or any(f.startswith(own) for f in opened):
                found.append(pid)
        except (OSError, ValueError):
            continue
    return found


def _wait_until_alone(place: Path, seconds: float = 30.0) -> list[int]:
    """Processes of a folder still there after a while; loading processes see their parent's death in 5 s."""
    deadline = time.monotonic() + seconds
    while (found := _processes_of(place)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


# A disk that is full.


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of `DISK_MB` at the folder `place`, in memory, while this lasts.

    Raises:
        UserError: where this user may mount none.
    """
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
        why = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as error:
        why = str(error)
    if why:
        raise UserError(
            f"no small disk can be mounted here ({why}): root may, or leave it out by --full-disks 0"
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


def _on_a_full_disk(name: str, work: Work, place: Path, wanted: str, size: int, rng: random.Random) -> Tried:
    """Let a work run on a disk with room for a part of what it writes; make room, and start it again."""
    moment = rng.random()
    with small_disk(place):
        if work.before:
            shutil.copytree(work.before, place / work.before.name)
        status = os.statvfs(place)
        already = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
        room = int(moment * max(size - already, 4096))
        ballast = place / "ballast"
        with ballast.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, max(4096, status.f_bavail * status.f_frsize - room))
        code = end(start(work, place))
        ballast.unlink()
        tried = Tried(name, "full disk", moment, str(code), 0, False)
        # A full disk is told in a line, and is no fault of the package.
        if code not in (0, 2):
            tried.left_behind = f"exit code {code}: {last_line(place)}"
            return tried
        return _again(tried, work, place, wanted)
