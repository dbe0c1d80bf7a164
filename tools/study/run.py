"""The command: find a set-up and tune it on the development seed, then run the fresh seeds. What the tables
hold is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from smae_utils.errors import UserError
from tools.study.figures import draw
from tools.study.plan import Arm, Row, Study, read_study, shortened
from tools.study.tables import Results, said
from tools.study.unit import Made, Place, Unit

PARTS = ("room", "probe", "recipe", "tune", "main")
Rows = list[dict[str, Any]]
Answer = tuple[
    Rows, Rows, Made
]  # rows of the table, scores of cases for intervals by patients, where the run was made


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
        jobs: processes at a time, which share the threads that torch may take (`OMP_NUM_THREADS`).
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
    for option, value in (("jobs", jobs), ("quick", quick)):
        if value < 1:
            raise UserError(f"--{option} must be at least 1, got {value}")
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
    if quick > 1:
        study = shortened(study, quick)
    place = Place(str(Path(data).resolve()), Path(out), max(1, torch.get_num_threads() // jobs))
    Unit(study, place, study.dev_seed)  # wrong data are told before processes start
    for part in PARTS:
        if part in parts:
            missing = [
                job
                for job in _jobs(part, study, place, tables, seeds, labelled, arms)
                if not tables.has(part, job[0])
            ]
            run_jobs(jobs, missing, lambda key, answer, part=part: tables.add(part, key, answer))
    draw(tables.folder, study)


def _jobs(
    part: str,
    study: Study,
    place: Place,
    tables: Results,
    seeds: tuple[int, ...],
    labelled: list[Row],
    arms: list[str],
) -> list[tuple]:
    """(key of the row, function, arguments) of each run of a part, in the order in which they are started."""
    scratch, dev = study.arms["scratch"], study.dev_seed
    if part == "room":
        first = study.grids["scratch"][0]
        return [
            (
                {"design": name, "labelled": row, "setup": study.setup("scratch", first, design)},
                run_one,
                (study, place, dev, 0, "scratch", scratch, row, first, design, f"design-{name}"),
            )
            for name, design in study.designs.items()
            for row in study.design_rows
        ]
    if part == "probe":
        arm = study.arms[study.recipe_arm]
        return [
            (
                {
                    "design": name,
                    "encoder": encoder,
                    "labelled": row,
                    "setup": study.setup(study.recipe_arm, {}, design),
                },
                probe_one,
                (
                    study,
                    place,
                    dev,
                    arm if encoder == "pre-trained" else scratch,
                    row,
                    design,
                    f"probe-{name}",
                ),
            )
            for name, design in study.probes.items()
            for encoder in ("random", "pre-trained")
            for row in study.recipe_rows
        ]
    if part == "recipe":
        main = study.recipe_arm
        first = study.grids[study.arms[main].tuned_as or main][0]
        return [
            (
                {"recipe": name, "labelled": row, "setup": study.setup(main, first, more)},
                run_one,
                (study, place, dev, 0, main, study.arms[main], row, first, more, f"recipe-{name}"),
            )
            for name, more in study.recipes.items()
            for row in study.recipe_rows
        ]
    if part == "tune":
        return spread(
            (
                {"arm": name, "setting": said(setting), "setup": study.setup(name, setting)},
                run_one,
                (
                    study,
                    place,
                    dev,
                    0,
                    f"tune-{name}-{said(setting).replace(' ', '-')}",
                    study.arms[name],
                    study.tune_row,
                    setting,
                ),
            )
            for name, grid in study.grids.items()
            for setting in grid
        )
    if dev in seeds:
        raise UserError(
            f"seed {dev} is the development seed, on which rates were chosen: it has no place in the main "
            "table"
        )
    tuned = tables.tuned(
        study, {arm.tuned_as or name for name, arm in study.arms.items() if not arms or name in arms}
    )
    chosen: list[tuple[str, Arm]] = [
        (name, arm) for name, arm in study.arms.items() if not arms or name in arms
    ]
    jobs = []
    for seed, fold in study.units(seeds):
        jobs += spread(
            (
                {
                    "labelled": row,
                    "arm": name,
                    "seed": seed,
                    "fold": fold,
                    "setup": study.setup(name, tuned[arm.tuned_as or name]),
                },
                run_one,
                (study, place, seed, fold, name, arm, row, tuned[arm.tuned_as or name]),
            )
            for name, arm in chosen
            for row in labelled or study.labelled
            if not arm.rows or row in arm.rows
        )
    return jobs


def spread(jobs: Iterable[tuple]) -> list[tuple]:
    """The jobs of a unit in an order that keeps processes busy: one of each pre-training, which makes it,
    then those that need none, then the others.
    """
    jobs = list(jobs)
    arms = [job[2][5] for job in jobs]
    rank = [
        1 if arm.init == "scratch" else 0 if arms.index(arm) == place else 2 for place, arm in enumerate(arms)
    ]
    return [job for _, job in sorted(zip(rank, jobs), key=lambda pair: pair[0])]


def run_one(study, place, seed, fold, name, arm, row, tuned, design=None, folder="") -> Answer:
    """One arm of one unit, in this process with its share of the cores."""
    torch.set_num_threads(place.threads)
    means, table, made = Unit(study, place, seed, fold, design, folder).run_arm(name, arm, row, tuned)
    rows = [{"metric": metric, "value": value} for metric, value in means.items()]
    scores = (
        table[["patient", "case", "class", "target", "score"]].to_dict("records")
        if study.metric == "mauc"
        else []
    )
    return rows, scores, made


def probe_one(study, place, seed, arm, row, design, folder) -> Answer:
    """What a linear model reads off an encoder's tokens."""
    torch.set_num_threads(place.threads)
    means, made = Unit(study, place, seed, 0, design, folder).probe(arm, row)
    return [{"metric": metric, "value": value} for metric, value in means.items()], [], made


def run_jobs(jobs: int, todo: list[tuple], receive: Callable[[dict, Answer], None]) -> None:
    """Run each, `jobs` at a time in processes of their own; `receive` gets each answer as it comes."""
    if jobs == 1:
        for key, function, arguments in todo:
            receive(key, function(*arguments))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(function, *arguments): key for key, function, arguments in todo}
        try:
            for future in as_completed(futures):
                receive(futures[future], future.result())
        except BaseException:  # said at once, not after hours of the others
            pool.shutdown(wait=False, cancel_futures=True)
            raise
