"""Which cases a unit of the study trains on and is scored on.

They are written as list files that every command of this package reads.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from smae_utils.atomic import write_text
from smae_utils.data.case import Case
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.locks import held
from smae_utils.work.finetune import few_labelled
from tools.study.plan import Row, Study


def all_cases(study: Study, data: str) -> tuple[list[Case], list[Case], dict]:
    """(cases for training, fixed test cases, what a list says of the task).

    Raises:
        UserError: when the data are not what the study expects.
    """
    if isinstance(study.task, str):
        splits = get_task(study.task).read_splits(Path(data), 0, 0)
        pool = sorted([*splits["train"], *splits["val"]], key=lambda case: case["case"])
        return pool, splits["test"], {"like": study.task}
    table = study.task
    file = Path(data) / table["table"]
    if not file.is_file():
        raise UserError(f"{file} is not there: --data must be the folder that holds {table['table']}")
    frame = pd.read_csv(file, dtype={table["patient"]: str})
    if missing := {table["image"], table["patient"], *table["classes"]} - set(frame):
        raise UserError(
            f"{file} has no column {sorted(missing)[0]!r}: it is not the table that the study {study.name} "
            "expects"
        )
    pool = [
        {
            "case": Path(row[table["image"]]).stem,
            "patient": row[table["patient"]],
            "image": str(Path(data) / table["folder"] / row[table["image"]]),
            "label": [int(row[name]) for name in table["classes"]],
        }
        for _, row in frame.iterrows()
    ]
    return (
        pool,
        [],
        {"classes": list(table["classes"]), "sided": bool(table.get("sided", True)), "spatial_dims": 2},
    )


def parts(
    study: Study, pool: list[Case], test: list[Case], seed: int, fold: int
) -> tuple[list[Case], list[Case]]:
    """(training cases, scored cases) of a unit.

    The development seed is scored on patients of its own, who train every fresh seed and never test one.
    """
    patients = sorted({case["patient"] for case in pool})
    order = np.random.default_rng(study.split_seed).permutation(len(patients))
    n_dev = math.ceil(study.dev_share * len(patients))
    dev = {patients[i] for i in order[:n_dev]}
    if seed == study.dev_seed:
        return [c for c in pool if c["patient"] not in dev], [c for c in pool if c["patient"] in dev]
    if not study.folds:
        return pool, test
    held = {patients[i] for place, i in enumerate(order[n_dev:]) if place % study.folds == fold}
    return [c for c in pool if c["patient"] not in held], [c for c in pool if c["patient"] in held]


def draw_labelled(cases: list[Case], row: Row, seed: int) -> list[Case]:
    """As many cases as `row` says, or all cases of a share of the patients; fewer are always a part of more.

    Raises:
        UserError: when there are not so many.
    """
    if isinstance(row, int) and row > len(cases):
        raise UserError(f"{row} labelled cases were asked for, there are {len(cases)}")
    if isinstance(row, int):
        return few_labelled(sorted(cases, key=lambda case: case["case"]), row, seed)
    patients = sorted({case["patient"] for case in cases})
    count = max(1, round(float(row.rstrip("%")) / 100 * len(patients)))
    kept = few_labelled(patients, count, seed)
    return [case for case in cases if case["patient"] in kept]


def write_list(file: Path, about: dict, training: list[Case], test: list[Case], labels: bool = True) -> Path:
    """A list file of these cases, written once; without `labels` the training images alone.

    Raises:
        UserError: when the file is there and lists others.
    """
    content = {
        **about,
        "training": [_entry(case, labels) for case in training],
        "test": [_entry(case, True) for case in test],
    }
    text = json.dumps(content, indent=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    with held(Path(f"{file}.lock")):  # two processes of the study may come at once
        if not file.exists():
            write_text(file, text)
        elif file.read_text(encoding="utf-8") != text:
            raise UserError(f"{file} lists other cases than this study with these data: choose another --out")
    return file


def _entry(case: Case, label: bool) -> dict:
    """A case as a list says it: paths absolute, findings as numbers."""
    out = {"case": case["case"], "patient": case["patient"], "image": _absolute(case["image"])}
    if label:
        out["label"] = (
            _absolute(case["label"])
            if isinstance(case["label"], (str, Path))
            else [int(v) for v in case["label"]]
        )
    return out


def _absolute(files: str | Path | list) -> str | list[str]:
    return [str(Path(f).resolve()) for f in files] if isinstance(files, list) else str(Path(files).resolve())
