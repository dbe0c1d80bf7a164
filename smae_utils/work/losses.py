"""What fine-tuning minimises, by task: BCE, Dice + cross-entropy, or Dice of overlapping regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn

from smae_utils.data.case import IGNORE
from smae_utils.data.tasks import Task


def build_loss(task: Task, class_weights: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, label) -> scalar: BCE (findings), Dice + CE (organs), Dice on sigmoids (regions), in fp32.

    Dice is summed over the batch and smoothed by one voxel on both sides: per sample and unsmoothed, a class
    that is absent from most crops pays most for being predicted at all and collapses to empty.

    Args:
        class_weights: (out_chans,) weights of the cross-entropy, see `class_weights`; None weighs all alike.
    """
    if task.kind == "classification":
        return known_bce
    if not task.exclusive:
        overlapping = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
        return lambda logits, label: overlapping(
            as_background(logits.float(), label, False), region_targets(label, task)
        )
    dice = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0
    )
    ce = nn.CrossEntropyLoss(weight=class_weights, ignore_index=IGNORE)

    def dice_ce(logits: Tensor, label: Tensor) -> Tensor:
        logits = logits.float()
        overlap = dice(as_background(logits, label, True), label.masked_fill(label == IGNORE, 0))
        if bool((label == IGNORE).all()):  # the mean over no voxels is NaN
            return overlap
        return overlap + ce.to(logits.device)(logits, label[:, 0].long())

    return dice_ce


def region_targets(label: Tensor, task: Task) -> Tensor:
    """Integer label (B, 1, *spatial) -> one channel a class (B, classes, *spatial), overlapping where regions
    do.
    """
    values = label.new_tensor
    return torch.cat([torch.isin(label, values(region)) for region in task.class_values], 1).float()


def known_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy (B, classes) over what is known; NaN in the target is unknown."""
    known = torch.isfinite(target)
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits.float(), target.nan_to_num(), reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp(min=1)


def as_background(logits: Tensor, label: Tensor, exclusive: bool) -> Tensor:
    """Logits (B, K, *spatial) that say "nothing here" where the label (B, 1, *spatial) is `IGNORE`: no
    overlap counts there, and no gradient comes.
    """
    ignored = label == IGNORE
    if not bool(ignored.any()):
        return logits
    nothing = torch.full_like(logits, -1e4)
    if exclusive:
        nothing[:, 0] = 1e4
    return torch.where(ignored, nothing, logits)


def class_weights(counted: Iterable[Tensor], n_values: int, power: float) -> Tensor:
    """(n_values,) weights proportional to frequency ** -power over the training labels, with a voxel-weighted
    mean of 1.

    Args:
        counted: of each label, the voxels of its label numbers by slab, see `data.crops.slab_counts`.

    Power 0.5 kept every organ of the CT phantom alive where unweighted cross-entropy lost nine of thirteen
    within the same steps.
    """
    counts = torch.zeros(n_values, dtype=torch.double)
    for slabs in counted:
        own = slabs.sum(0)[:n_values]
        counts[: len(own)] += own
    counts = counts.clamp(min=1)
    weights = (counts.sum() / counts) ** power
    return (weights * counts.sum() / (weights * counts).sum()).float()
