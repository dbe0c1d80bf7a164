"""Between the grid that a network sees and the scan's own: windows, probabilities carried back, labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor

from smae_utils.data import out_of_core
from smae_utils.data.case import IGNORE
from smae_utils.data.tasks import Task
from smae_utils.work.metrics import dsc


def slabs(size: int, window: int, overlap: float, planes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut an axis so that windows run slab by slab give what they give over the whole axis.

    Windows start each `window * (1 - overlap)` planes, as MONAI places them. A plane is finished only when
    all windows that hold it are.

    Args:
        size: planes of the scan, at least `window`.
        planes: how many a slab may have; at least what two finished rows of windows need is taken.

    Yields:
        (start, stop, first, last): run the windows on planes start .. stop - 1, and keep first .. last - 1.
    """
    step = window if size == window else max(int(window * (1 - overlap)), 1)
    again = math.ceil(window / step)  # rows of windows that hold one plane
    rows = max((planes - window) // step, again)
    row, done = 0, 0
    while done < size:
        start = row * step
        stop = min(start + rows * step + window, size)
        # The next window would start here; the last of all is moved back so that it ends with the scan.
        last = size if stop == size else min(start + (rows + 1) * step, size - window)
        yield start, stop, done, last
        # The next slab starts where every window that holds its first unfinished plane is there.
        row, done = (max(0, (last - window + step) // step), last)


def activate(logits: Tensor, task: Task) -> Tensor:
    """Logits (out_chans, *spatial) -> probabilities.

    They are over classes that exclude each other, or of each region by itself.
    """
    return logits.softmax(0) if task.exclusive else logits.sigmoid()


def windows(size: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """How many windows cover a volume of `size` voxels."""
    return math.prod(1 + math.ceil((n - w) / max(int(w * (1 - overlap)), 1)) for n, w in zip(size, window))


def to_scan_grid(channels: Tensor, source: np.ndarray, shape: Sequence[int], target: np.ndarray) -> Tensor:
    """Volumes (K, *spatial) -> (K, *shape) float32 on another grid, linearly interpolated.

    `source` and `target` are the affines (4, 4) of both grids. Only the box of the source that the target
    touches is read. The source's edge holds for half a voxel more, no less certain than what lies inside;
    further out everything is 0.
    """
    found = out_of_core.source_box(
        out_of_core.whole(shape), np.linalg.inv(source) @ target, channels.shape[1:]
    )
    if found is None:
        return torch.zeros(len(channels), *shape)
    box, moved = channels[(slice(None), *found)].float(), source @ out_of_core.start_of(found)
    covered = torch.cat([box, torch.ones_like(box[:1])])
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
    # bf16 is too coarse for where a voxel lies.
    with torch.autocast("cpu", enabled=False):
        resampled = resample(
            MetaTensor(covered, affine=torch.from_numpy(moved)),
            dst_affine=torch.from_numpy(target),
            spatial_size=tuple(shape),
        )
    out = resampled.as_subclass(Tensor)
    coverage = out[-1:]
    return out[:-1] / coverage.clamp(min=0.5) * (coverage >= 0.5 - 1e-4)


def label_map(values: Tensor, task: Task) -> np.ndarray:
    """Probabilities (out_chans, *spatial) -> the task's label numbers (*spatial), uint8.

    It is the likeliest class, or of nested regions the innermost above one half.
    """
    if task.exclusive:
        return values.argmax(0).numpy().astype(np.uint8)
    return region_labels(list((values > 0.5).numpy()), task)


def region_labels(masks: list[np.ndarray], task: Task) -> np.ndarray:
    """Boolean masks (*spatial) from the widest region to the narrowest -> one image of label numbers.

    A voxel gets the label of the innermost region that holds it, as far as the wider ones hold it too:
    enhancing tumour outside the tumour is none. A region's label is the one that it has and the next
    narrower region has not.
    """
    regions = task.class_values
    out, inside = np.zeros(masks[0].shape, np.uint8), np.ones(masks[0].shape, bool)
    for i, (mask, values) in enumerate(zip(masks, regions)):
        inner = regions[i + 1] if i + 1 < len(regions) else ()
        inside = inside & mask
        out[inside] = next(v for v in values if v not in inner)
    return out


def dsc_of_classes(predicted: np.ndarray, label: np.ndarray, task: Task) -> Iterator[float]:
    """DSC of each class from two images (*spatial) of label numbers; ignored voxels are left out of both."""
    for pred, true in zip(*(task.class_masks(values) for values in (ignoring(predicted, label), label))):
        yield dsc(pred, true)


def ignoring(predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A prediction with background where the label says `IGNORE`."""
    return np.where(label == IGNORE, 0, predicted).astype(predicted.dtype)
