"""The command: find a set-up and tune it on the development seed, then run the fresh seeds.

What the tables hold is not run again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smae_utils.batch.plan import Planned
from smae_utils.batch.run import check_place, run_planned
from smae_utils.batch.runs import Batch, result_of
from smae_utils.errors import UserError
from tools.study.figures import draw
from tools.study.plan import Row, Study, read_study, shortened
from tools.study.tables import Results, said
from tools.study.unit import Place, Unit

PARTS = ("room", "probe", "recipe", "tune", "main")


class Job(NamedTuple):
    """One run of a study: the key of its rows in the tables, and what `run_job` is called with."""

    key: dict[str, Any]
    call: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder in a batch."""
        words = [str(self.call["seed"]), *(str(v) for k, v in self.key.items() if k != "seed")]
        return "".join(c if c.isalnum() or c in "-." else "_" for c in "-".join(words))


def run_study(
    name: str,
    data: str | Path,
    out: Path,
    results: Path,
    parts: Iterable[str] = (),
    seeds: Iterable[int] = (),
    labelled: Iterable[Row] = (),
    arms: Iterable[str] = (),
    jobs: int = 1,
    quick: int = 1,
    backend: str = "local",
    slurm: dict[str, Any] | None = None,
) -> None:
    """Run a study, or parts of it, and write its tables and its figure.

    Args:
        name: the study, see `plan.read_study`.
        data: folder of the real scans.
        out: folder of the runs; what is finished there is not trained again.
        results: folder of the CSV files, one more folder a study; rows that are there are not run again.
        parts: "room" (designs, scratch alone), "probe" (what a linear model reads off tokens), "recipe"
            (kinds of pre-training), "tune" (rates), all on the development seed, and "main".
        seeds, labelled, arms: only these of the main table; all when empty.
        jobs: runs at a time, as runs of a batch, which share the threads that torch may take
            (`OMP_NUM_THREADS`); 1: in this process.
        backend, slurm: where batches run, see `smae_utils.batch.run.run_batch`.
        quick: divides steps; such figures mean nothing and are refused beside others.

    Raises:
        UserError: for an unknown study, part, row or arm, or for data that are not the study's.
    """
    study = read_study(name)
    parts, arms, labelled, seeds = list(parts) or ["main"], list(arms), list(labelled), tuple(seeds)
    for what, given, known in (
        ("part", parts, PARTS),
        ("arm", arms, study.arms),
        ("row of labelled cases", labelled, study.labelled),
    ):
        for wrong in given:
            if wrong not in known:
                raise UserError(
                    f"the study {study.name} has no {what} {wrong!r}: expected some of "
                    f"{', '.join(map(str, known))}"
                )
    check_place(jobs, backend)
    if quick < 1:
        raise UserError(f"--quick must be at least 1, got {quick}")
    words = {
        "--part": parts,
        "--seeds": seeds,
        "--labelled": labelled,
        "--arm": arms,
        "--jobs": [jobs] if jobs > 1 else [],
    }
    command = " ".join(
        [
            f"python -m tools study {study.name} --data DATA",
            *(" ".join([k, *map(str, v)]) for k, v in words.items() if v),
        ]
    )
    tables = Results(Path(results) / study.name, command, quick)
    tables.check()
    threads = max(1, torch.get_num_threads() // jobs)
    common = {
        "study": name,
        "quick": quick,
        "data": str(Path(data).resolve()),
        "out": str(Path(out).resolve()),
    }
    whole = _study(name, quick)
    # Wrong data are told before processes start.
    Unit(whole, Place(common["data"], Path(out)), study.dev_seed)
    for part in PARTS:
        if part not in parts:
            continue
        todo = {
            job.name: job
            for job in jobs_of(part, whole, tables, seeds, labelled, arms)
            if not tables.has(part, job.key)
        }
        if jobs == 1 and backend == "local":
            for job in todo.values():
                tables.add(part, job.key, run_job(**common, **job.call))
        elif todo:
            runs = [
                Planned(
                    job.name,
                    None,
                    {**common, "threads": threads, **job.call},
                    {},
                    function=f"{__name__}:run_job",
                )
                for job in todo.values()
            ]

            def add(batch: Batch, name: str, part: str = part, todo: dict[str, Job] = todo) -> None:
                tables.add(part, todo[name].key, result_of(batch, name))

            place = Path(out) / study.name / f"batch-{part}"
            run_planned(runs, place, jobs, (), backend, slurm, done=add)
    draw(tables.folder, whole)


def _study(name: str, quick: int) -> Study:
    return shortened(read_study(name), quick) if quick > 1 else read_study(name)


def jobs_of(
    part: str, study: Study, tables: Results, seeds: tuple[int, ...], labelled: list[Row], arms: list[str]
) -> list[Job]:
    """The runs of a part, in the order in which they are started."""
    main, dev = study.recipe_arm, {"seed": study.dev_seed}
    jobs = []
    if part == "room":
        first = study.grids["scratch"][0]
        for (name, design), row in itertools.product(study.designs.items(), study.design_rows):
            key = {"design": name, "labelled": row, "setup": study.setup("scratch", first, design)}
            call = {
                "arm": "scratch",
                "row": row,
                "tuned": first,
                "design": design,
                "folder": f"design-{name}",
            }
            jobs.append(Job(key, {**dev, **call}))
        return jobs
    if part == "probe":
        for (name, design), row in itertools.product(study.probes.items(), study.recipe_rows):
            for encoder, arm in (("random", "scratch"), ("pre-trained", main)):
                setup = study.setup(main, {}, design)
                key = {"design": name, "encoder": encoder, "labelled": row, "setup": setup}
                call = {"arm": arm, "row": row, "design": design, "folder": f"probe-{name}", "probe": True}
                jobs.append(Job(key, {**dev, **call}))
        return jobs
    if part == "recipe":
        first = study.grids[study.arms[main].tuned_as or main][0]
        for (name, design), row in itertools.product(study.recipes.items(), study.recipe_rows):
            key = {"recipe": name, "labelled": row, "setup": study.setup(main, first, design)}
            call = {"arm": main, "row": row, "tuned": first, "design": design, "folder": f"recipe-{name}"}
            jobs.append(Job(key, {**dev, **call}))
        return jobs
    if part == "tune":
        for arm, setting in ((arm, setting) for arm, grid in study.grids.items() for setting in grid):
            key = {"arm": arm, "setting": said(setting), "setup": study.setup(arm, setting)}
            name = f"tune-{arm}-{said(setting).replace(' ', '-')}"
            jobs.append(Job(key, {**dev, "arm": arm, "name": name, "row": study.tune_row, "tuned": setting}))
        return spread(study, jobs)
    return _main_jobs(study, tables, seeds, labelled, arms)


def _main_jobs(
    study: Study, tables: Results, seeds: tuple[int, ...], labelled: list[Row], arms: list[str]
) -> list[Job]:
    if study.dev_seed in seeds:
        raise UserError(
            f"seed {study.dev_seed} is the development seed, "
            "on which rates were chosen: it has no place in the main "
            "table"
        )
    chosen = {name: arm for name, arm in study.arms.items() if not arms or name in arms}
    tuned = tables.tuned(study, {arm.tuned_as or name for name, arm in chosen.items()})
    jobs = []
    for seed, fold in study.units(seeds):
        of_unit = []
        for (name, arm), row in itertools.product(chosen.items(), labelled or study.labelled):
            if arm.rows and row not in arm.rows:
                continue
            rates = tuned[arm.tuned_as or name]
            key = {
                "labelled": row,
                "arm": name,
                "seed": seed,
                "fold": fold,
                "setup": study.setup(name, rates),
            }
            of_unit.append(Job(key, {"seed": seed, "fold": fold, "arm": name, "row": row, "tuned": rates}))
        jobs += spread(study, of_unit)
    return jobs


def spread(study: Study, jobs: list[Job]) -> list[Job]:
    """The jobs of a unit in an order that keeps processes busy.

    First one of each pre-training, which makes it; then those that need none; then the others.
    """
    arms = [job.call["arm"] for job in jobs]
    rank = [
        1 if study.arms[arm].init == "scratch" else 0 if arms.index(arm) == place else 2
        for place, arm in enumerate(arms)
    ]
    return [job for _, job in sorted(zip(rank, jobs), key=lambda pair: pair[0])]


def run_job(
    study: str,
    data: str,
    out: str,
    seed: int,
    arm: str,
    row: Row,
    tuned: dict[str, Any] | None = None,
    fold: int = 0,
    name: str = "",
    design: dict[str, Any] | None = None,
    folder: str = "",
    probe: bool = False,
    quick: int = 1,
    threads: int = 0,
) -> dict[str, Any]:
    """One arm of one unit, or with `probe` what a linear model reads off its encoder's tokens.

    Args:
        study, data, out, quick, threads: see `run_study`; 0 threads: as many as torch takes.
        name: of the run's folder; the arm's when empty.
        design, folder: see `Unit`.

    Returns:
        `rows` of the table, `scores` of cases for intervals by patients, and where it was `made`.
    """
    if threads:
        torch.set_num_threads(threads)
    made_of = _study(study, quick)
    unit = Unit(made_of, Place(data, Path(out)), seed, fold, design, folder)
    scores = []
    if probe:
        means, made = unit.probe(made_of.arms[arm], row)
    else:
        means, table, made = unit.run_arm(name or arm, made_of.arms[arm], row, tuned or {})
        if made_of.metric == "mauc":
            wanted = ["patient", "case", "class", "target", "score"]
            scores = json.loads(table[wanted].to_json(orient="records", double_precision=15))
    rows = [{"metric": metric, "value": value} for metric, value in means.items()]
    return {"rows": rows, "scores": scores, "made": made._asdict()}
