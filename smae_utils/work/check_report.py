"""What `check` found, in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from smae_utils.data.case import IGNORE, Case
from smae_utils.data.same_place import by
from smae_utils.data.tasks import Task
from smae_utils.work.estimate import estimate
from smae_utils.work.presets import resolve

# The table shows so many cases. Of more, it shows those that stand out, and a summary.
MOST_ROWS = 20


def print_report(
    report: Report, task: Task, splits: dict[str, list[Case]], preset: str, say: Callable[[str], None]
) -> None:
    """Say what `check` found, and what the preset would cost; problems go to standard error."""
    counts = ", ".join(f"{len(cases)} {split}" for split, cases in splits.items())
    said = f"channels {', '.join(task.channels)}; classes {', '.join(task.classes) or '(none)'}"
    say(f"{task.title or task.name}: {task.spatial_dims}D {task.kind}, {counts}; {said}")
    if len(report.table):
        say(_shown(report.table, task))
    if report.counts:
        say(f"cases with each class: {', '.join(report.counts)}")
    for line in report.remarks:
        say(f"note: {line}")
    if report.proposal:
        say(f"proposal for the list file: {json.dumps(report.proposal)}")
    for line in report.problems:
        print(f"error: {line}", file=sys.stderr)
    say(
        f"{len(report.problems)} errors, {len(report.remarks)} notes in "
        f"{sum(map(len, splits.values()))} cases"
    )
    if len(report.table):
        n_train, n_val = len(splits["train"]), len(splits["val"])
        voxels = _prepared_voxels(report.table, task, preset)
        for line in estimate(task, n_train, preset, voxels, n_val=n_val):
            say(line)
        changed = (
            {"spacing_mm": report.proposal.get("spacing_mm"), **report.proposal.get("settings", {})}
            if report.proposal
            else {}
        )
        now = resolve(task, "pretrain", preset)
        if any(
            list(getattr(now, k)) != v if isinstance(v, list) else getattr(now, k) != v
            for k, v in changed.items()
        ):
            shapes = np.array([canonical(row, row.shape) for row in report.table.itertuples()], float)
            voxels = float(np.median(shapes.prod(1)))
            for line in estimate(task, n_train, preset, voxels, changed, n_val)[:-1]:
                say(f"with the proposal: {line}")


def _shown(table: pd.DataFrame, task: Task) -> str:
    """The table in words; of many cases a summary, and the few that are unlike the others."""
    if len(table) <= MOST_ROWS:
        return _in_words(table, task).to_string(index=False, max_colwidth=60)
    lines = [
        f"{len(table)} cases, "
        f"{', '.join(f'{n} {split}' for split, n in table.split.value_counts(sort=False).items())}"
    ]
    for name in ("shape", "spacing_mm"):
        if name in table:
            values = np.array(table[name].tolist(), float)
            low, mid, high = (by(v) for v in (values.min(0), np.median(values, axis=0), values.max(0)))
            lines.append(f"  {name}: median {mid}, from {low} to {high}")
    if "orientation" in table:
        lines.append(
            "  orientation: "
            + ", ".join(f"{code} {n}" for code, n in table.orientation.value_counts().items())
        )
    lines.append(
        f"  intensity (0.5th to 99.5th percentile): from {table.low.min():.4g} to {table.high.max():.4g}, "
        f"median {table.high.median():.4g}"
    )
    odd = _unlike(table)
    if len(odd):
        lines += [
            "  unlike the others:",
            _in_words(odd.head(8), task).to_string(index=False, max_colwidth=60),
        ]
        if len(odd) > 8:
            lines.append(f"  and {len(odd) - 8} more")
    return "\n".join(lines)


def _unlike(table: pd.DataFrame) -> pd.DataFrame:
    """Cases that are unlike the others.

    Size, spacing or largest intensity is more than three times the median or less than a third,
    or the orientation is rare.
    """
    odd = pd.Series(False, index=table.index)
    columns = [table.high.abs().to_numpy(float)]
    for name in ("shape", "spacing_mm"):
        if name in table:
            columns += list(np.array(table[name].tolist(), float).T)
    for values in columns:
        middle = np.median(values)
        far = (values > 3 * middle) | (values < middle / 3)
        # Where many differ, as intensities of MRI do, none is unlike the others.
        if far.mean() <= 0.1:
            odd |= far
    if "orientation" in table:
        odd |= table.orientation.map(table.orientation.value_counts()) <= len(table) / 20
    return table[odd]


def _in_words(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    out = table.drop(columns=["header", "hash"]).copy()
    for name in ("shape", "spacing_mm"):
        if name in out:
            out[name] = out[name].map(lambda values: "x".join(f"{v:.4g}" for v in values))
    out["low"], out["high"] = out.low.map("{:.4g}".format), out.high.map("{:.4g}".format)
    if task.kind == "classification":
        out["labels"] = out.labels.map(lambda found: "" if found is None else "|".join(found) or "none")
    else:
        written = {i: str(v) for i, v in enumerate(task.written_labels)} | {IGNORE: "ignore"}
        out["labels"] = out.labels.map(
            lambda found: (
                "" if found is None else " ".join(f"{written[v]}:{n}" for v, n in found.items()) or "empty"
            )
        )
    return out


def _prepared_voxels(table: pd.DataFrame, task: Task, preset: str) -> float:
    """Voxels of the median scan as it is trained, before it is cut to the body; pixels of a radiograph."""
    sizes = np.array(table["shape"].tolist(), float).prod(1)
    if task.spatial_dims == 2:
        return float(np.median(sizes))
    spacing = resolve(task, "pretrain", preset).spacing_mm or task.spacing_mm
    if not spacing:
        return 0.0
    return float(np.median(sizes * np.array(table.spacing_mm.tolist(), float).prod(1)) / np.prod(spacing))


@dataclass
class Report:
    """What `check` found.

    Attributes:
        table: a row a case. `split`, `case`, `shape` and `spacing_mm` (tuples; mm), `orientation` (as RAS),
            `low` and `high` (0.5th and 99.5th percentile of intensity; of 2D images the range), `labels`
            (label number -> voxels, or class -> 1; None without a label), `header` (what it contradicts),
            `hash` (of the voxels).
        problems: what has to be mended, a line each.
        remarks: what to know, a line each.
        proposal: for the list file, of 3D scans.
        counts: cases with each class, in words.
    """

    table: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    proposal: dict = field(default_factory=dict)
    counts: list[str] = field(default_factory=list)


def canonical(row: Any, values: tuple) -> list:
    """Sizes along the axes of a scan, in training's order: left-right, front-back, up-down."""
    order = dict(zip(row.orientation, values))
    return [order.get(one, order.get(other)) for one, other in ("LR", "PA", "IS")]
