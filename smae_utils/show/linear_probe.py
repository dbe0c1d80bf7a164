"""The cheapest test of an encoder: what a linear model reads off its tokens (Alain and Bengio, arXiv
1610.01644).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from smae_utils.data.batches import read_case, read_middle
from smae_utils.data.case import Case
from smae_utils.data.tasks import Task
from smae_utils.method.patches import patchify
from smae_utils.work.build import build_transform
from smae_utils.work.settings import Settings

# A patch counts as a class when so much of it is.
SHARE = 0.3


Tokens = tuple[np.ndarray, np.ndarray]  # (N, D) tokens, (N, classes) labels: 1, 0, or NaN where nobody knows


def read_tokens(task: Task, settings: Settings, encoder: nn.Module, cases: list[Case]) -> Tokens:
    """Tokens of an encoder and the labels that belong to them.

    Masks: is more than `SHARE` of a patch this class, for each token; windows lie at both ends of each axis,
    so that one place in a window is
    several in the scan. Classes of whole images: the mean of an image's tokens.
    """
    with torch.inference_mode():
        rows = [row for case in cases for row in _rows(task, settings, encoder.eval(), case)]
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


def _windows(task: Task, settings: Settings, case: Case) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images (C, *crop_size) of a case, and label numbers (1, *crop_size) where it has a mask."""
    masked = task.kind == "segmentation" and "label" in case
    transform, size = build_transform(task, settings, with_label=masked), settings.crop_size
    if task.whole:
        yield read_middle(transform, case, size, whole=True)
        return
    sample = read_case(transform, case)
    image, label = (sample[key].as_tensor() if key in sample else None for key in ("image", "label"))
    ends = [sorted({0, n - c}) for n, c in zip(image.shape[1:], size)]
    for corner in itertools.product(*ends):
        box = (slice(None), *(slice(o, o + c) for o, c in zip(corner, size)))
        yield image[box], label[box] if masked else None


def _rows(
    task: Task, settings: Settings, encoder: nn.Module, case: Case
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (N, D) and labels (N, classes; NaN: unknown) of each window."""
    for image, label in _windows(task, settings, case):
        tokens = encoder(image[None])[0][0, encoder.prefix_tokens :].numpy()
        if task.kind == "classification":
            yield tokens.mean(0, keepdims=True), np.asarray(case["label"], float)[None]
        else:
            masks = [torch.from_numpy(mask).float() for mask in task.class_masks(label.numpy())]
            shares = [patchify(mask[None], encoder.patch_size)[0].mean(-1) for mask in masks]
            yield tokens, (torch.stack(shares, 1) > SHARE).double().numpy()
