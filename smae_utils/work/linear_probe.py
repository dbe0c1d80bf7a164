"""The cheapest test of an encoder: what a linear model reads off its tokens (Alain and Bengio, arXiv
1610.01644).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from smae_utils.data.batches import read_case, read_middle
from smae_utils.data.case import Case
from smae_utils.data.crops import plain
from smae_utils.data.tasks import Task
from smae_utils.data.transforms import prepare
from smae_utils.method.patches import patchify
from smae_utils.method.vit import ViTEncoder

# A patch counts as a class when so much of it is.
SHARE = 0.3


# (N, D) tokens, (N, classes) labels: 1, 0, or NaN where nobody knows.
Tokens = tuple[np.ndarray, np.ndarray]


def probe(
    task: Task, encoder: ViTEncoder, cases: list[Case], spacing_mm: Sequence[float] = (), most: int = 60
) -> float:
    """Mean AUC of a linear probe (see `linear_probe`) on the last third of the patients of some cases, fitted
    on the others.

    Args:
        encoder: a `ViTEncoder`, trained or not.
        spacing_mm: voxel size that scans are resampled to; empty: the task's own.
        most: so many cases at most, of segmentation a fifth of them.

    Returns:
        NaN where there are too few patients, or no class with both outcomes in both parts.
    """
    cases = cases[: most if task.kind == "classification" else most // 5]
    patients = list(dict.fromkeys(case["patient"] for case in cases))
    held_out = set(patients[len(patients) - max(1, len(patients) // 3) :])
    fitted = [case for case in cases if case["patient"] not in held_out]
    scored = [case for case in cases if case["patient"] in held_out]
    return linear_probe(*(read_tokens(task, encoder, part, spacing_mm) for part in (fitted, scored)))


def read_tokens(
    task: Task, encoder: ViTEncoder, cases: list[Case], spacing_mm: Sequence[float] = ()
) -> Tokens:
    """Tokens of an encoder and the labels that belong to them.

    Masks: is more than `SHARE` of a patch this class, for each token; windows lie at both ends of each axis,
    so that one place in a window is several in the scan. Classes of whole images: the mean of an image's
    tokens.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode():
        for case in cases:
            rows += _rows(task, encoder.eval(), case, spacing_mm)
    tokens, labels = zip(*rows) if rows else ([np.empty((0, 0))], [np.empty((0, 0))])
    return np.concatenate(tokens), np.concatenate(labels)


def linear_probe(fitted: Tokens, scored: Tokens) -> float:
    """Mean AUC over classes of a logistic regression, fitted on some tokens and scored on others; unknown
    labels are left out.

    Returns:
        NaN where no class has both outcomes in both parts.
    """
    (x, y), (new_x, new_y) = fitted, scored
    scores = []
    for truth, new_truth in zip(y.T, new_y.T):
        known, new_known = np.isfinite(truth), np.isfinite(new_truth)
        if len(np.unique(truth[known])) == 2 == len(np.unique(new_truth[new_known])):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1)).fit(
                x[known], truth[known]
            )
            scores.append(roc_auc_score(new_truth[new_known], model.decision_function(new_x[new_known])))
    return float(np.mean(scores)) if scores else float("nan")


def effective_rank(tokens: np.ndarray) -> float:
    """In how many directions tokens (N, D) differ: exp of the entropy of the shares of variance (Roy and
    Vetterli, EUSIPCO 2007).
    """
    variances = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False) ** 2
    shares = variances / variances.sum()
    return float(np.exp(-(shares * np.log(shares.clip(1e-12))).sum()))


def _windows(
    task: Task, case: Case, size: Sequence[int], spacing_mm: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images (C, *size) of a case, and label numbers (1, *size) where it has a mask."""
    masked = task.kind == "segmentation" and "label" in case
    transform = prepare(task, masked, spacing_mm, size)
    if task.whole:
        yield read_middle(transform, case, size, whole=True)
        return
    sample = read_case(transform, case)
    image, label = plain(sample["image"]), plain(sample["label"]) if masked else None
    ends = [sorted({0, n - c}) for n, c in zip(image.shape[1:], size)]
    for corner in itertools.product(*ends):
        box = (slice(None), *(slice(o, o + c) for o, c in zip(corner, size)))
        yield image[box], None if label is None else label[box]


def _rows(
    task: Task, encoder: ViTEncoder, case: Case, spacing_mm: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (N, D) and labels (N, classes; NaN: unknown) of each window."""
    for image, label in _windows(task, case, encoder.img_size, spacing_mm):
        tokens = encoder(image[None])[0][0, encoder.prefix_tokens :].numpy()
        if label is None:
            yield tokens.mean(0, keepdims=True), np.asarray(case["label"], float)[None]
        else:
            masks = [torch.from_numpy(mask).float() for mask in task.class_masks(label.numpy())]
            shares = [patchify(mask[None], encoder.patch_size)[0].mean(-1) for mask in masks]
            yield tokens, (torch.stack(shares, 1) > SHARE).double().numpy()
