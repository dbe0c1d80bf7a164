"""Metrics, as pure functions on arrays.

The conventions are the same everywhere. A structure that is missed, or predicted though absent, has DSC 0
and the scan's diagonal as HD95. Absent in both, it is NaN and left out of means. A class that cannot be
scored is NaN, never 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from sklearn.metrics import roc_auc_score

from smae_utils.errors import UserError


def _pair(pred: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, label = np.asarray(pred), np.asarray(label)
    if pred.shape != label.shape or pred.dtype != bool or label.dtype != bool:
        raise UserError(
            f"expected two boolean arrays of one shape, got {pred.dtype} {pred.shape} and {label.dtype} "
            f"{label.shape}: compare one class at a time"
        )
    return pred, label


def dsc(pred: np.ndarray, label: np.ndarray) -> float:
    """Dice similarity coefficient of two boolean arrays, 2 |P n L| / (|P| + |L|); NaN when both are empty."""
    pred, label = _pair(pred, label)
    total = int(pred.sum()) + int(label.sum())
    return 2 * int((pred & label).sum()) / total if total else float("nan")


def hd95_mm(pred: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance in mm: the larger of the two directed 95th percentiles of surface distances.

    Args:
        pred, label: boolean arrays (X, Y[, Z]) on the same grid.
        spacing_mm: voxel size along each axis.

    Returns:
        NaN when both are empty; the diagonal of the scan in mm when only one is. Computed by MONAI.
    """
    pred, label = _pair(pred, label)
    if len(spacing_mm) != pred.ndim or min(spacing_mm) <= 0:
        raise UserError(f"expected {pred.ndim} positive voxel sizes, one an axis, got {tuple(spacing_mm)}")
    if not pred.any() and not label.any():
        return float("nan")
    if not pred.any() or not label.any():
        return float(np.linalg.norm([n * s for n, s in zip(pred.shape, spacing_mm)]))
    # Padding makes voxels at the border of the scan surface voxels like any other.
    one, other = (torch.from_numpy(np.pad(a, 1))[None, None] for a in (pred, label))
    with warnings.catch_warnings():
        # MONAI warns of an argument that it passes to itself.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(
            one, other, include_background=True, percentile=95, spacing=[float(s) for s in spacing_mm]
        )
    return float(distance.item())


def mean_auc(targets: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean area under the ROC curve over the classes that can be scored.

    Args:
        targets: (n, classes) zeros and ones, NaN where nobody knows: such images are left out of that class.
        scores: (n, classes), larger means more likely.

    Returns:
        The mean, and the AUC of each class (classes,), NaN where only one outcome occurs.
    """
    targets, scores = np.asarray(targets), np.asarray(scores)
    if targets.shape != scores.shape or targets.ndim != 2:
        raise UserError(
            f"expected targets and scores of one shape (n, classes), got {targets.shape} and {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise UserError("scores hold NaN or infinity: the model diverged, or an image did")
    per_class = np.full(targets.shape[1], np.nan)
    for i, column in enumerate(targets.T):
        known = np.isfinite(column)
        if 0 < column[known].sum() < known.sum():
            per_class[i] = roc_auc_score(column[known], scores[known, i])
    return (float(np.nanmean(per_class)) if np.isfinite(per_class).any() else float("nan")), per_class
