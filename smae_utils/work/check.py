"""Look at a data set before anything is trained: what is wrong with it, and what a preset would cost on it
here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from smae_utils.data.batches import read_case
from smae_utils.data.case import IGNORE, Case, files_of
from smae_utils.data.pictures import ReadRadiograph
from smae_utils.data.reading import read_channels, read_label
from smae_utils.data.same_place import by, contradiction
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.lists import is_list
from smae_utils.errors import UserError
from smae_utils.paths import NIFTI_ENDINGS, has_ending
from smae_utils.work import devices
from smae_utils.work.cost import crop_cost, measured_flops_per_second
from smae_utils.work.presets import resolve
from smae_utils.work.settings import total_steps

# Crops seen in pre-training by the released configurations: BTCV 10000 epochs x 18 scans x 4 crops, BraTS 500
# x 387 x 4; radiographs 800 x 86,524.
CROPS_3D, CROPS_2D = 750_000, 69_000_000
# Training reaches about a third of the speed of a plain matrix product.
EFFICIENCY = 1 / 3
# The table shows so many cases; of more, those that stand out and a summary.
MOST_ROWS = 20


@dataclass
class Report:
    """What `check` found.

    Attributes:
        table: a row a case: `shape`, `spacing_mm` (tuples), `orientation`, `low`, `high` (percentiles of
            intensity), `labels` (label number or class -> voxels or 1; None without a label), `header` (what
            its header contradicts), `hash` of its voxels.
        problems: what has to be mended, a line each.
        remarks: what to know.
        proposal: for the list file.
        counts: cases with each class, in words.
    """

    table: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    proposal: dict = field(default_factory=dict)
    counts: list[str] = field(default_factory=list)


def check(
    list_or_task: str, data_dir: str = "", preset: str = "small", say: Callable[[str], None] = print
) -> Report:
    """Read every scan of a list (or of a known task's download) and report; problems go to standard error, a
    line each.

    Raises:
        UserError: if the list itself cannot be understood.
    """
    task = get_task(list_or_task)
    fold = None if is_list(task.name) else 0
    splits = task.read_splits(Path(data_dir), 0, fold)  # type: ignore[arg-type]  # a list's reader takes None too
    rows, problems = [], []
    for split, cases in splits.items():
        for case in cases:
            try:
                rows.append(
                    {"split": split, **(_look_2d if task.spatial_dims == 2 else _look_3d)(case, task)}
                )
            except UserError as error:
                problems.append(str(error))
    report = Report(pd.DataFrame(rows), problems, list(task.notes))
    if rows:
        _same_voxels(report)
        _remarks(report, task, splits)
        if task.spatial_dims == 3:
            report.proposal = _propose(report.table, task)
    _print(report, task, splits, preset, say)
    return report


def _look_3d(case: Case, task: Task) -> dict[str, Any]:
    image = read_case(lambda c: read_channels(c["image"]), case)
    values = image.values
    if len(values) != task.in_chans:
        raise UserError(
            f"{image.path} has {len(values)} channels, expected {task.in_chans} ({', '.join(task.channels)}) "
            "in every case"
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"{image.path} holds {int((~np.isfinite(values)).sum())} NaN or infinite values: repair or leave "
            "out this scan"
        )
    if np.ptp(values) == 0:
        raise UserError(f"{image.path} is constant ({values.flat[0]:g} everywhere): leave out this scan")
    low, high = np.percentile(values, (0.5, 99.5))
    row = {
        "case": case["case"],
        "shape": image.shape,
        "spacing_mm": image.spacing_mm,
        "orientation": "".join(nib.aff2axcodes(image.affine)),
    }
    row |= {"low": float(low), "high": float(high), "labels": _look_label(case, task), "hash": _hash(values)}
    row["header"] = "; ".join(
        f"{Path(f).name}: {said}" for f in _nifti_files(case, task) if (said := contradiction(f))
    )
    return row


def _look_2d(case: Case, task: Task) -> dict[str, Any]:
    pixels = np.asarray(ReadRadiograph(task.in_chans)({"image": case["image"]})["image"])
    if np.ptp(pixels) == 0:
        raise UserError(f"{case['image']} is constant ({pixels.flat[0]} everywhere): leave out this image")
    row = {
        "case": case["case"],
        "shape": pixels.shape[:2],
        "low": int(pixels.min()),
        "high": int(pixels.max()),
    }
    return {**row, "labels": _look_label(case, task), "hash": _hash(pixels), "header": ""}


def _look_label(case: Case, task: Task) -> dict | None:
    """Label number -> voxels, or class -> 1, or 0 for unknown ones; None without a label."""
    if "label" not in case:
        return None
    if task.kind == "classification":
        return {name: 1 for name, value in zip(task.classes, case["label"]) if value == 1}
    label, _ = read_label(case, task)
    found, counts = np.unique(label, return_counts=True)
    return {int(v): int(c) for v, c in zip(found, counts) if v}


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _nifti_files(case: Case, task: Task) -> list[str]:
    """Images and mask of a case, as far as they are NIfTI."""
    files = files_of(case["image"])
    if task.kind == "segmentation" and "label" in case:
        files.append(str(case["label"]))
    return [f for f in files if has_ending(f, NIFTI_ENDINGS)]


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


def _canonical(row: Any, values: tuple) -> list:
    """Sizes along the axes of a scan in the order left-right, front-back, up-down, which is that of
    training."""
    return [
        values[next(i for i, code in enumerate(row.orientation) if code in pair)]
        for pair in ("LR", "PA", "IS")
    ]


def _propose(table: pd.DataFrame, task: Task) -> dict:
    """Spacing: the median; window of CT-like values: soft tissue; crop: what fits into the median scan, at
    most 96.
    """
    spacing = np.median([_canonical(row, row.spacing_mm) for row in table.itertuples()], axis=0)
    shape = np.median([_canonical(row, row.shape) for row in table.itertuples()], axis=0)
    crop = [int(min(96, max(16, n // 16 * 16))) for n in shape]
    patch = {"patch_size": 8} if min(crop) < 48 else {}  # patches of 16 would leave a handful of tokens
    proposal: dict[str, Any] = {
        "spacing_mm": [float(f"{s:.3g}") for s in spacing],
        "settings": {"crop_size": crop, **patch},
    }
    if task.in_chans == 1 and table.low.median() < -500:
        proposal["window"] = [-175.0, 250.0]
    return proposal


def _print(
    report: Report, task: Task, splits: dict[str, list[Case]], preset: str, say: Callable[[str], None]
) -> None:
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
        f"{len(report.problems)} errors, {len(report.remarks)} notes in {sum(map(len, splits.values()))} "
        "cases"
    )
    if len(report.table):
        for line in estimate(
            task, len(splits["train"]), preset, _prepared_voxels(report.table, task, preset)
        ):
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
            voxels = np.array([_canonical(row, row.shape) for row in report.table.itertuples()], float).prod(
                1
            )
            for line in estimate(task, len(splits["train"]), preset, float(np.median(voxels)), changed)[:-1]:
                say(f"with the proposal: {line}")


def _shown(table: pd.DataFrame, task: Task) -> str:
    """The table in words; of many cases a summary, and the few that are unlike the others."""
    if len(table) <= MOST_ROWS:
        return _in_words(table, task).to_string(index=False, max_colwidth=60)
    lines = [
        f"{len(table)} cases, {', '.join(f'{n} {split}' for split, n in table.split.value_counts(sort=False).items())}"
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
    """Cases whose size, spacing or largest intensity is more than three times the median or less than a
    third, or whose orientation is rare.
    """
    odd = pd.Series(False, index=table.index)
    columns = [table.high.abs().to_numpy(float)]
    for name in ("shape", "spacing_mm"):
        if name in table:
            columns += list(np.array(table[name].tolist(), float).T)
    for values in columns:
        middle = np.median(values)
        far = (values > 3 * middle) | (values < middle / 3)
        if far.mean() <= 0.1:  # where many differ, as intensities of MRI do, none is unlike the others
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


def estimate(
    task: Task, n_train: int, preset: str, scan_voxels: float = 0.0, overrides: dict[str, Any] | None = None
) -> list[str]:
    """What a preset would cost on this machine, and how long to pre-train for so many cases.

    Args:
        overrides: settings that are to be other than the preset's.
        scan_voxels: voxels of a prepared scan, or pixels of a radiograph; 0 takes four crops.
    """
    device = devices.best_device()
    lines = []
    for stage in ("pretrain", "finetune"):
        settings = resolve(task, stage, preset, overrides=overrides)
        if stage == "finetune" and not task.classes:
            continue
        precision = devices.pick_precision(settings.precision, device)
        speed = measured_flops_per_second(device, precision) * EFFICIENCY
        steps, _ = total_steps(settings, n_train)
        cost, crops = crop_cost(task, settings), settings.batch_size * settings.crops_per_scan
        # fp32 and labels of a byte; 2D images without masks are kept as they were read, a byte a pixel; each
        # loading process keeps its own.
        as_read = task.spatial_dims == 2 and (stage == "pretrain" or task.kind == "classification")
        voxel = task.in_chans if as_read else 4 * task.in_chans + (stage == "finetune")
        kept = (
            (scan_voxels or 4 * np.prod(settings.crop_size))
            * voxel
            * n_train
            * settings.cache_rate
            * max(1, settings.num_workers)
        )
        # Gradients and AdamW's two moments are as large as the weights; on top of what is kept for the
        # backward pass comes a fifth for the moment; bf16 halves most of it (both measured with the preset
        # small).
        training = 4 * cost.weights + cost.activations * crops * (0.7 if precision == "bf16" else 1.2)
        lines.append(
            f"{stage} with preset {preset}: {steps} steps, about "
            f"{_hours(cost.flops * steps * crops / speed)} on this "
            f"{devices.device_name(device)} in {precision}; memory about {training / 1e9:.1f} GB to train "
            f"with, {kept / 1e9:.1f} GB for scans that are kept"
        )
    settings = resolve(task, "pretrain", preset, overrides=overrides)
    wanted = CROPS_2D if task.spatial_dims == 2 else CROPS_3D
    per_epoch = n_train * settings.crops_per_scan
    lines.append(
        f"how long to pre-train {n_train} scans: the released recipes show the network about {wanted:,} "
        f"crops, here {wanted // max(per_epoch, 1):,} epochs "
        f"or {wanted // (settings.batch_size * settings.crops_per_scan):,} steps; stop when val_loss rises"
    )
    return lines


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, seconds / 60):.0f} minutes"


def _prepared_voxels(table: pd.DataFrame, task: Task, preset: str) -> float:
    """Voxels of the median scan at the voxel size it is trained with, before it is cut to the body; pixels of
    the median radiograph.
    """
    sizes = np.array(table["shape"].tolist(), float).prod(1)
    if task.spatial_dims == 2:
        return float(np.median(sizes))
    spacing = resolve(task, "pretrain", preset).spacing_mm or task.spacing_mm
    if not spacing:
        return 0.0
    return float(np.median(sizes * np.array(table.spacing_mm.tolist(), float).prod(1)) / np.prod(spacing))
