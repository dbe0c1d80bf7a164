"""The command: tune on the development seed, check the gates, run the fresh seeds, write the tables. Everything done is found again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from smae_utils.errors import UserError
from smae_utils.evidence import gates, probes, tables
from smae_utils.evidence.arms import CNN_GRID, CONTROLS, DEV_SEED, GRID, MAIN, PRESET, SEEDS, TASKS, Arm, sweep
from smae_utils.evidence.study import Setup, Unit
from smae_utils.phantoms import SIZES
from smae_utils.settings import resolve
from smae_utils.tasks import get_task

SWEEPS = ("finetune4x", "masking", "longer", "context", "scans")
WITH_ARMS = ("main", "controls", *SWEEPS)
PARTS = ("tune", "gates", "main", "controls", "budget", *SWEEPS)
Tuned = dict[str, dict[str, tuple[float, float]]]


def evidence(
    out: Path, results: Path, tasks: Iterable[str] = (), parts: Iterable[str] = (), seeds: Iterable[int] = (), data: str | None = None,
    jobs: int = 1, quick: int = 1, arms: Iterable[str] = (), preset: str = PRESET, size: str = "demo",
) -> None:  # fmt: skip
    """Run the study, or parts of it, and write its tables.

    Args:
        out: folder of phantoms and runs; what is finished there is not done again.
        results: folder of the CSV files.
        data: folder of a real download instead of phantoms; needs one task. Seeds are then seeds of the training alone.
        jobs: processes at a time, which share the cores.
        quick: divides steps and cases; such figures mean nothing.
        arms: only these arms of the parts that have arms; all when empty.
        preset, size: other networks, or phantoms of the real data's matrix sizes ("full"): for a GPU. Their figures have folders of their own.

    Raises:
        UserError: for an unknown task, part or arm, or a part named that real data cannot have.
    """
    parts = list(parts)
    named = bool(parts)
    tasks, parts, seeds = list(tasks) or list(TASKS), parts or list(PARTS), list(seeds) or list(SEEDS)
    for name, known, given in (("task", TASKS, tasks), ("part", PARTS, parts)):
        for wrong in set(given) - set(known):
            raise UserError(f"the evidence study has no {name} {wrong!r}: expected some of {', '.join(known)}")
    if size not in SIZES:
        raise UserError(f"the size of phantoms must be {' or '.join(SIZES)}, got {size!r}")
    for name, value in (("jobs", jobs), ("quick", quick)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if data and len(tasks) != 1:
        raise UserError("--data is the folder of one task's download: name it with --task")
    if data and (none := [part for part in SWEEPS if part in parts and not arms_of(part, tasks[0], real=True)]):
        if named:
            raise UserError(f"the part {none[0]} draws phantoms of its own: it has no meaning with --data; leave it out")
        parts = [part for part in parts if part not in none]
    arms = list(arms)
    there = {arm.name for task in tasks for part in WITH_ARMS if part in parts for arm in arms_of(part, task, bool(data))}
    if wrong := sorted(set(arms) - there):
        raise UserError(f"no arm {wrong[0]!r} in these parts: expected some of {', '.join(sorted(there)) or '(none)'}")
    setup = Setup(out, data, quick, max(1, (os.cpu_count() or 1) // jobs), preset, size)
    results = Path(results) / setup.folder(tasks[0])
    for task in tasks:  # an unknown preset is told before anything is drawn
        resolve(get_task(task), "finetune", preset)
    command = f"--task {' '.join(tasks)} --part {' '.join(parts)} --seeds {' '.join(map(str, seeds))} --jobs {jobs}" + (
        f" --data {data}" if data else ""
    )
    command += f" --arm {' '.join(arms)}" if arms else ""
    command += f" --preset {preset} --size {size}" if (preset, size) != (PRESET, "demo") else ""
    tables_to = tables.Writer(results, command, quick)
    units = [(task, seed) for seed in seeds for task in tasks]
    if "tune" in parts:
        for task in tasks:  # before the arms, which would draw the same phantoms side by side
            make_unit(setup, task, DEV_SEED).list_file()
        jobs_of(jobs, _tune, [(setup, task, arm) for task in tasks for arm in ("scratch", "self", "cnn")], tables_to.tuning)
    tuned = tables.read_tuned(results)
    for task in tasks:
        if set(tuned.get(task, {})) < {"scratch", "self", "cnn"}:
            raise UserError(f"{results / 'tuning.csv'} has no learning rates for {task}: run the part tune first")
    if "gates" in parts:
        jobs_of(jobs, gates.run_gates, [(setup, task, tuned[task]) for task in tasks], tables_to.gates)
    for part in WITH_ARMS:
        if part in parts:
            wanted = {task: tuple(a for a in arms_of(part, task, bool(data)) if not arms or a.name in arms) for task in tasks}
            arguments = [(setup, task, seed, wanted[task], tuned[task]) for task, seed in units if wanted[task]]
            jobs_of(jobs, _arms, arguments, tables_to.part("sweeps" if part in SWEEPS else part))
    if "controls" in parts and not arms:  # a probe is no arm
        jobs_of(jobs, probes.probe, [(setup, task, seed) for task, seed in units], tables_to.part("controls"))
    if "budget" in parts:
        jobs_of(jobs, gates.budget, [(setup, task, tuned[task]) for task in tasks], tables_to.gates)
    tables_to.finish()


def arms_of(part: str, task: str, real: bool = False) -> tuple[Arm, ...]:
    """The arms of a part; on real data only those that need no phantoms drawn another way, which may be none."""
    arms = {"main": MAIN, "controls": CONTROLS}.get(part) or sweep(part, task)
    return tuple(arm for arm in arms if not real or not arm.condition.draws)


def jobs_of(jobs: int, function: Callable, arguments: list[tuple], receive: Callable[[pd.DataFrame], None]) -> None:
    """Call `function` for each tuple, `jobs` at a time in processes of their own; `receive` gets each table when it is there."""
    if jobs == 1:
        for values in arguments:
            receive(function(*values))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *values) for values in arguments]
        try:
            for future in futures:
                receive(future.result())
        except BaseException:  # said at once, not after hours of the others
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_unit(setup: Setup, task: str, seed: int) -> Unit:
    """A unit in this process, with its share of the cores."""
    torch.set_num_threads(setup.threads)
    return Unit(setup, task, seed)


def _tune(setup: Setup, task: str, arm: str) -> pd.DataFrame:
    """Scores of the learning-rate grid of one arm on the development seed."""
    unit = make_unit(setup, task, DEV_SEED)
    base = {a.name: a for a in MAIN}[arm]
    rows = []
    for factor, decay in CNN_GRID if arm == "cnn" else GRID:
        scores = unit.run_arm(base, {arm: (factor, decay)}, name=f"tune-{arm}-lr{factor}-decay{decay}")
        rows.append({"task": task, "arm": arm, "lr_factor": factor, "layer_decay": decay, "score": scores.get("mauc", scores.get("dsc"))})
    return unit.table(rows)


def _arms(setup: Setup, task: str, seed: int, arms: tuple[Arm, ...], tuned: dict[str, tuple[float, float]]) -> pd.DataFrame:
    unit = make_unit(setup, task, seed)
    rows = []
    for arm in arms:
        scores = unit.run_arm(arm, tuned)
        rows += [{"task": task, "condition": arm.condition.name, "arm": arm.name, "seed": seed, "metric": k, "value": v} for k, v in scores.items()]
    return unit.table(rows)
