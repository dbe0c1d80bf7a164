"""Look at a data set before anything is trained: what is wrong with it, and what a preset would cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from smae_utils.data.case import IGNORE, Case
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.lists import is_list
from smae_utils.errors import UserError
from smae_utils.work.check_report import Report, canonical, print_report
from smae_utils.work.check_scan import look_2d, look_3d


def check(
    list_or_task: str, data_dir: str = "", preset: str = "small", say: Callable[[str], None] = print
) -> Report:
    """Read every scan of a list, or of a known task's download, and report.

    Problems go to standard error, a line each.

    Raises:
        UserError: if the list itself cannot be understood.
    """
    task = get_task(list_or_task)
    fold = None if is_list(task.name) else 0
    # A list's reader takes None too.
    splits = task.read_splits(Path(data_dir), 0, fold)  # type: ignore[arg-type]
    rows, problems = [], []
    for split, cases in splits.items():
        for case in cases:
            try:
                rows.append({"split": split, **(look_2d if task.spatial_dims == 2 else look_3d)(case, task)})
            except UserError as error:
                problems.append(str(error))
    report = Report(pd.DataFrame(rows), problems, list(task.notes))
    if rows:
        _same_voxels(report)
        _remarks(report, task, splits)
        if task.spatial_dims == 3:
            report.proposal = _propose(report.table, task)
    print_report(report, task, splits, preset, say)
    return report


def _same_voxels(report: Report) -> None:
    """The same image under several names: a problem where it is in two splits, else worth knowing."""
    for _, rows in report.table.groupby("hash", sort=False):
        if len(rows) < 2:
            continue
        names = ", ".join(f"{c} ({s})" for c, s in zip(rows.case, rows.split))
        if rows.split.nunique() > 1:
            report.problems.append(
                f"the same image stands in several splits: {names}: the figures would flatter; keep it in "
                "one split"
            )
        else:
            report.remarks.append(f"the same image stands in the list several times: {names}")


def _remarks(report: Report, task: Task, splits: dict[str, list[Case]]) -> None:
    table = report.table
    labelled = table[table.labels.notna()]
    if task.kind == "segmentation" and (
        empty := labelled[
            labelled.labels.map(lambda found: not set(found) - {IGNORE}).astype(bool)
        ].case.tolist()
    ):
        report.remarks.append(
            f"{len(empty)} labels are empty: {', '.join(empty[:5])}; right if these patients have nothing, "
            "else a mistake"
        )
    odd = table[table["header"] != ""]
    if len(odd):
        some = "; ".join(odd["header"][:5])
        report.remarks.append(
            f"{len(odd)} headers contradict themselves or say too little: the affine counts here ({some})"
        )
    if task.ignored_labels:
        share = labelled.labels.map(lambda found: found.get(IGNORE, 0) > 0).sum()
        report.remarks.append(
            f"label value {', '.join(map(str, task.ignored_labels))} is ignore: {share} cases hold it; "
            "neither loss nor scores look there"
        )
    for name, values in zip(
        task.classes, task.class_values if task.kind == "segmentation" else [(n,) for n in task.classes]
    ):
        has = labelled.labels.map(lambda found, values=values: any(v in found for v in values)).astype(bool)
        if len(labelled):
            report.counts.append(f"{name} {int(has.sum())}")
        for split in ("train", "test"):
            part = has[labelled.split == split]
            if len(part) and not part.any():
                report.remarks.append(
                    f"class {name!r} occurs in no {split} case: it cannot be "
                    f"{'learned' if split == 'train' else 'scored'}"
                )
    unlabelled = [c["case"] for c in splits["train"] if "label" not in c]
    if unlabelled and task.classes:
        report.remarks.append(
            f"{len(unlabelled)} training cases have no label: they serve for pre-training only"
        )
    if not any("label" in c for c in splits["test"]) and task.classes:
        report.remarks.append(
            "no test case has a label: --set test_share=0.2, given to pretrain and finetune alike, holds out "
            "a fifth of the patients; "
            "what is reported on validation cases flatters as soon as anything is chosen on them"
        )


def _propose(table: pd.DataFrame, task: Task) -> dict:
    """What the list file could say: voxel size, window, crop size and patch size.

    The voxel size is the median; the window, of CT-like values, is that of soft tissue; the crop is what fits
    into the median scan, at most 96.
    """
    spacing = np.median([canonical(row, row.spacing_mm) for row in table.itertuples()], axis=0)
    shape = np.median([canonical(row, row.shape) for row in table.itertuples()], axis=0)
    crop = [int(min(96, max(16, n // 16 * 16))) for n in shape]
    # Patches of 16 would leave a handful of tokens.
    patch = {"patch_size": 8} if min(crop) < 48 else {}
    proposal: dict[str, Any] = {
        "spacing_mm": [float(f"{s:.3g}") for s in spacing],
        "settings": {"crop_size": crop, **patch},
    }
    if task.in_chans == 1 and table.low.median() < -500:
        proposal["window"] = [-175.0, 250.0]
    return proposal
