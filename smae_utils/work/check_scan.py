"""What a case of a list looks like: size, voxels, intensities, labels, and what its header contradicts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from smae_utils.data.batches import read_case
from smae_utils.data.case import Case, files_of
from smae_utils.data.pictures import ReadRadiograph
from smae_utils.data.reading import read_channels, read_label
from smae_utils.data.same_place import contradiction
from smae_utils.data.tasks import Task
from smae_utils.errors import UserError
from smae_utils.paths import NIFTI_ENDINGS, has_ending


def look_3d(case: Case, task: Task) -> dict[str, Any]:
    """Read a 3D case (C, X, Y, Z): its row of `Report.table`, without `split`.

    Raises:
        UserError: for other channels than the task's, NaN, one value everywhere, or an unreadable file.
    """
    image = read_case(lambda c: read_channels(c["image"]), case)
    values = image.values
    if len(values) != task.in_chans:
        raise UserError(
            f"{image.path} has {len(values)} channels, "
            f"expected {task.in_chans} ({', '.join(task.channels)}) in every case"
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"{image.path} holds {int((~np.isfinite(values)).sum())} NaN or infinite "
            "values: repair or leave out this scan"
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


def look_2d(case: Case, task: Task) -> dict[str, Any]:
    """Read a 2D case (H, W) in 8 bits: its row of `Report.table`, without `split`.

    Raises:
        UserError: for one value everywhere, or files that cannot be read.
    """
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
    """Label number -> voxels, or name of a class that is there -> 1; None without a label."""
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
    """Those files of a case that are NIfTI: its images and its mask."""
    files = files_of(case["image"])
    if task.kind == "segmentation" and "label" in case:
        files.append(str(case["label"]))
    return [f for f in files if has_ending(f, NIFTI_ENDINGS)]
