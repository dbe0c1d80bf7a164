"""Look at a data set before anything is trained: what is wrong with it, and what a preset would cost on it here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from smae_utils import accel
from smae_utils.cost import crop_cost, measured_flops_per_second
from smae_utils.data import read_case
from smae_utils.errors import UserError
from smae_utils.reading import ReadRadiograph, ReadScan, check_label_values, check_same_place, contradiction
from smae_utils.settings import resolve, total_steps
from smae_utils.tasks import Case, Task, get_task

# Crops seen in pre-training by the released configurations: BTCV 10000 epochs x 18 scans x 4 crops, BraTS 500 x 387 x 4; radiographs 800 x 86,524.
CROPS_3D, CROPS_2D = 750_000, 69_000_000
# Training reaches about a third of the speed of a plain matrix product.
EFFICIENCY = 1 / 3


@dataclass
class Report:
    """What `check` found: a row a case, one line a problem, and proposals for the list's "settings"."""

    table: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    proposal: dict = field(default_factory=dict)
    counts: list[str] = field(default_factory=list)


def check(list_or_task: str, data_dir: str = "", preset: str = "small", say: Callable[[str], None] = print) -> Report:
    """Read every scan of a list (or of a known task's download) and report; problems go to standard error, a line each.

    Raises:
        UserError: if the list itself cannot be understood.
    """
    task = get_task(list_or_task)
    splits = task.read_splits(Path(data_dir), 0, 0)
    rows, problems = [], []
    for split, cases in splits.items():
        for case in cases:
            try:
                rows.append({"split": split, **(_look_2d if task.spatial_dims == 2 else _look_3d)(case, task)})
            except UserError as error:
                problems.append(str(error))
    report = Report(pd.DataFrame(rows), problems)
    if rows:
        _remarks(report, task, splits)
        report.table = report.table.drop(columns="header", errors="ignore")
        if task.spatial_dims == 3:
            report.proposal = _propose(report.table, task)
    _print(report, task, splits, preset, say)
    return report


def _look_3d(case: Case, task: Task) -> dict:
    image = read_case(ReadScan(["image"]), {k: case[k] for k in ("case", "image")})["image"]
    name = str(image.meta["filename_or_obj"])
    values = image.as_tensor().numpy()
    if values.ndim != 4 or min(values.shape[1:]) < 1:
        raise UserError(f"{name} has shape {values.shape[1:]}: expected a 3D scan")
    if values.shape[0] != task.in_chans:
        raise UserError(f"{name} has {values.shape[0]} channels, expected {task.in_chans} ({', '.join(task.channels)}) in every case")
    affine = np.asarray(image.affine)
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds {int((~np.isfinite(values)).sum())} NaN or infinite values: repair or leave out this scan")
    if np.ptp(values) == 0:
        raise UserError(f"{name} is constant ({values.flat[0]:g} everywhere): leave out this scan")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = np.percentile(values, (0.5, 99.5))
    row = {"case": case["case"], "shape": "x".join(map(str, values.shape[1:])), "spacing_mm": "x".join(f"{s:.2f}" for s in spacing)}
    row |= {"orientation": "".join(_codes(affine)), "low": float(low), "high": float(high), "labels": ""}
    row["header"] = "; ".join(f"{Path(f).name}: {said}" for f in _nifti_files(case) if (said := contradiction(f)))
    if isinstance(case.get("label"), str):
        row["labels"] = _look_label(case, task, affine, values.shape[1:], name)
    return row


def _nifti_files(case: Case) -> list[str]:
    """Images and mask of a case, as far as they are NIfTI."""
    files = [*(case["image"] if isinstance(case["image"], list) else [case["image"]]), case.get("label")]
    return [f for f in files if isinstance(f, str) and f.endswith((".nii", ".nii.gz"))]


def _codes(affine: np.ndarray) -> tuple[str, ...]:
    import nibabel as nib

    return nib.aff2axcodes(affine)


def _look_label(case: Case, task: Task, affine: np.ndarray, shape: tuple[int, ...], image: str) -> str:
    label = read_case(ReadScan(["label"]), {"case": case["case"], "label": case["label"]})["label"]
    values = label.as_tensor().numpy()
    if values.shape[1:] != shape or len(values) != 1:
        raise UserError(f"{case['label']} has shape {values.shape[1:]}, its image {image} {shape}: they must lie on one grid (are they swapped?)")
    check_same_place(np.asarray(label.affine), affine, shape, case["label"], image)
    check_label_values(values, task, case["label"])
    found, counts = np.unique(values, return_counts=True)
    return " ".join(f"{int(v)}:{c}" for v, c in zip(found, counts) if v) or "empty"


def _look_2d(case: Case, task: Task) -> dict:
    image = ReadRadiograph(task.in_chans)({"image": case["image"]})["image"]
    pixels = np.asarray(image)
    if np.ptp(pixels) == 0:
        raise UserError(f"{case['image']} is constant ({pixels.flat[0]} everywhere): leave out this image")
    labels = "" if "label" not in case else "|".join(n for n, v in zip(task.classes, case["label"]) if v) or "none"
    return {
        "case": case["case"],
        "shape": "x".join(map(str, pixels.shape[:2])),
        "low": int(pixels.min()),
        "high": int(pixels.max()),
        "labels": labels,
    }


def _remarks(report: Report, task: Task, splits: dict[str, list[Case]]) -> None:
    table = report.table
    if empty := table[table.labels == "empty"].case.tolist():
        report.remarks.append(f"{len(empty)} labels are empty: {', '.join(empty[:5])}; right if these patients have nothing, else a mistake")
    odd = table[table["header"] != ""] if "header" in table else table[:0]
    if len(odd):
        some = "; ".join(odd["header"][:5])
        report.remarks.append(
            f"{len(odd)} headers contradict themselves, and other programs may read them otherwise: the affine counts here ({some})"
        )
    for name, values in zip(task.classes, task.class_values):
        if task.kind == "segmentation":
            has = table.labels.map(lambda text, values=values: any(f" {v}:" in f" {text}" for v in values))
        else:
            has = table.labels.map(lambda text, name=name: name in text.split("|"))
        if (table.labels != "").any():
            report.counts.append(f"{name} {int(has.sum())}")
        for split in ("train", "test"):
            part = has[table.split == split]
            if len(part) and (table[table.split == split].labels != "").any() and not part.any():
                report.remarks.append(f"class {name!r} occurs in no {split} case: it cannot be {'learned' if split == 'train' else 'scored'}")
    unlabelled = [c["case"] for c in splits["train"] if "label" not in c]
    if unlabelled:
        report.remarks.append(f"{len(unlabelled)} training cases have no label: they serve for pre-training only")
    if not splits["test"]:
        report.remarks.append("no test cases: what is reported on validation cases flatters as soon as anything is chosen on them")


def _propose(table: pd.DataFrame, task: Task) -> dict:
    """Spacing: the median, rounded; window of CT-like values: soft tissue; crop: what fits into the median scan, at most 96."""
    # Training turns every scan to RAS before it resamples: the figures are wanted in that order of axes.
    turned = [[next(i for i, c in enumerate(codes) if c in pair) for pair in ("LR", "PA", "IS")] for codes in table.orientation]
    spacing = np.median([[float(s.split("x")[i]) for i in order] for s, order in zip(table.spacing_mm, turned)], axis=0)
    shape = np.median([[int(s.split("x")[i]) for i in order] for s, order in zip(table["shape"], turned)], axis=0)
    crop = [int(min(96, max(16, n // 16 * 16))) for n in shape]
    proposal = {"spacing_mm": [float(round(s, 2)) for s in spacing], "settings": {"crop_size": crop}}
    if task.in_chans == 1 and table.low.median() < -500:
        proposal["window"] = [-175.0, 250.0]
    return proposal


def _print(report: Report, task: Task, splits: dict[str, list[Case]], preset: str, say: Callable[[str], None]) -> None:
    counts = ", ".join(f"{len(cases)} {split}" for split, cases in splits.items())
    say(f"{task.title or task.name}: {task.kind}, {counts}; channels {', '.join(task.channels)}; classes {', '.join(task.classes) or '(none)'}")
    if len(report.table):
        say(report.table.to_string(index=False, max_rows=40, max_colwidth=60))
    if report.counts:
        say(f"cases with each class: {', '.join(report.counts)}")
    for line in report.remarks:
        say(f"note: {line}")
    if report.proposal:
        say(f"proposal for the list file: {json.dumps(report.proposal)}")
    for line in report.problems:
        print(f"error: {line}", file=sys.stderr)
    say(f"{len(report.problems)} errors, {len(report.remarks)} notes in {len(report.table) + len(report.problems)} cases")
    if len(report.table):
        for line in estimate(task, len(splits["train"]), preset, _prepared_voxels(report.table, task, preset)):
            say(line)


def estimate(task: Task, n_train: int, preset: str, scan_voxels: float = 0.0) -> list[str]:
    """What a preset would cost on this machine, and how long to pre-train for so many cases.

    Args:
        scan_voxels: voxels of a prepared scan, or pixels of a radiograph; 0 takes four crops.
    """
    device = accel.best_device()
    lines = []
    for stage in ("pretrain", "finetune"):
        settings = resolve(task, stage, preset)
        if stage == "finetune" and not task.classes:
            continue
        precision = accel.pick_precision(settings.precision, device)
        speed = measured_flops_per_second(device, precision) * EFFICIENCY
        steps, _ = total_steps(settings, n_train)
        cost, crops = crop_cost(task, settings), settings.batch_size * settings.crops_per_scan
        # fp32 and labels of a byte; radiographs are kept as they were read, a byte a pixel; each loading process keeps its own.
        voxel = 4 * task.in_chans + (stage == "finetune") if task.spatial_dims == 3 else task.in_chans
        kept = (scan_voxels or 4 * np.prod(settings.crop_size)) * voxel * n_train * settings.cache_rate * max(1, settings.num_workers)
        # Gradients and AdamW's two moments are as large as the weights; on top of what is kept for the backward pass comes a fifth for the moment;
        # bf16 halves most of it (both measured with the preset small).
        training = 4 * cost.weights + cost.activations * crops * (0.7 if precision == "bf16" else 1.2)
        lines.append(
            f"{stage} with preset {preset}: {steps} steps, about {cost.flops * steps * crops / speed / 3600:.1f} hours on this "
            f"{accel.device_name(device)} in {precision}; memory about {training / 1e9:.1f} GB to train with, {kept / 1e9:.1f} GB for scans that are kept"
        )
    settings = resolve(task, "pretrain", preset)
    wanted = CROPS_2D if task.spatial_dims == 2 else CROPS_3D
    per_epoch = n_train * settings.crops_per_scan
    lines.append(
        f"how long to pre-train {n_train} scans: the released recipes show the network about {wanted:,} crops, here {wanted // max(per_epoch, 1):,} epochs "
        f"or {wanted // (settings.batch_size * settings.crops_per_scan):,} steps; stop when val_loss rises"
    )
    return lines


def _prepared_voxels(table: pd.DataFrame, task: Task, preset: str) -> float:
    """Voxels of the median scan at the voxel size it is trained with, before it is cut to the body; pixels of the median radiograph."""
    if task.spatial_dims == 2:
        return float(np.median([np.prod([int(v) for v in shape.split("x")]) for shape in table["shape"]]))
    spacing = resolve(task, "pretrain", preset).spacing_mm or task.spacing_mm
    if not spacing:
        return 0.0
    volumes = [np.prod([float(v) for v in f"{row.shape}x{row.spacing_mm}".split("x")]) for row in table[["shape", "spacing_mm"]].itertuples()]
    return float(np.median(volumes) / np.prod(spacing))
