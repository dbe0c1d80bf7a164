"""From a fine-tuned model to predictions: sliding window over a scan, and back onto the scan's own grid, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, SpatialResample
from torch import Tensor, nn

from smae_utils.data import out_of_core
from smae_utils.data.batches import read_case
from smae_utils.data.pictures import ReadRadiograph
from smae_utils.data.reading import CheckCase, ReadScan
from smae_utils.data.tasks import IGNORE, Case, Task
from smae_utils.data.transforms import ResizeRadiograph
from smae_utils.work.build import build_transform
from smae_utils.work.metrics import dsc, mean_auc
from smae_utils.work.settings import FinetuneSettings

Progress = Callable[[int, int], None]  # windows done, windows in all


class Segmented(NamedTuple):
    """A prediction on the scan's own grid.

    Attributes:
        labels: (X, Y, Z) or (H, W) uint8, the task's label numbers.
        affine: (4, 4) of that grid, in mm, RAS+; None of 2D images.
        probabilities: (out_chans, *labels.shape) float32 when they were asked for.
    """

    labels: np.ndarray
    affine: np.ndarray | None
    probabilities: np.ndarray | None


def slabs(size: int, window: int, overlap: float, planes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut an axis so that windows run slab by slab give what they give over the whole axis.

    Windows start each `window * (1 - overlap)`, as MONAI places them; a plane is finished only when all windows that hold it are.

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
        row, done = max(0, (last - window + step) // step), last  # from where every window that holds the next plane is there


def probabilities(
    model: nn.Module, image: Tensor, task: Task, settings: FinetuneSettings, device: torch.device, progress: Progress | None = None
) -> Tensor:
    """Prepared scan (C, *spatial) of any size -> class probabilities (out_chans, *spatial) on the CPU, by Gaussian-weighted windows.

    A scan too large for `out_of_core.CHANNEL_VOXELS` is run in slabs along the last axis, so that its class volumes need not be in memory at once; the
    values are those of one run, kept in half precision.
    """
    sizes, window = tuple(image.shape[1:]), settings.crop_size
    out: np.ndarray | None = None
    planes = out_of_core.CHANNEL_VOXELS // (math.prod(sizes[:2]) * task.out_chans)
    pieces = list(slabs(sizes[2], window[2], settings.overlap, planes))
    total = sum(_count((*sizes[:2], stop - start), window, settings.overlap) for start, stop, *_ in pieces)
    done = 0

    def counted(crops: Tensor) -> Tensor:
        nonlocal done
        logits = model(crops)
        done += len(crops)
        if progress:
            progress(done, total)
        return logits

    for start, stop, first, last in pieces:
        part = image[None, ..., start:stop].to(device)
        logits = sliding_window_inference(part, window, 4, counted, overlap=settings.overlap, mode="gaussian", device="cpu")[0]
        probs = activate(logits.float(), task)
        if len(pieces) == 1:
            return probs
        if out is None:
            out = out_of_core.room((len(probs), *sizes), np.float16)
        out[..., first:last] = probs[..., first - start : last - start].numpy()
    return torch.from_numpy(out)


def activate(logits: Tensor, task: Task) -> Tensor:
    """Logits (out_chans, *spatial) -> probabilities: over classes that exclude each other, or of each region by itself."""
    return logits.softmax(0) if task.exclusive else logits.sigmoid()


def _count(size: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Windows over a volume."""
    return math.prod(1 + math.ceil((n - w) / max(int(w * (1 - overlap)), 1)) for n, w in zip(size, window))


def to_scan_grid(channels: Tensor, source: np.ndarray, shape: Sequence[int], target: np.ndarray) -> Tensor:
    """Volumes (K, *spatial) with affine `source` (4, 4) -> (K, *shape) float32 on the grid with affine `target`, linearly interpolated.

    Only the box of the source that the target touches is read. The source's edge holds for half a voxel more, no less certain than
    what lies inside; further out everything is 0.
    """
    found = out_of_core.touched(tuple(slice(0, n) for n in shape), np.linalg.inv(source) @ target, channels.shape[1:])
    if found is None:
        return torch.zeros(len(channels), *shape)
    box, moved = channels[(slice(None), *found)].float(), source @ out_of_core.start_of(found)
    covered = torch.cat([box, torch.ones_like(box[:1])])
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):  # bf16 is too coarse for where a voxel lies
        out = resample(
            MetaTensor(covered, affine=torch.from_numpy(moved)), dst_affine=torch.from_numpy(target), spatial_size=tuple(shape)
        ).as_tensor()
    coverage = out[-1:]
    return out[:-1] / coverage.clamp(min=0.5) * (coverage >= 0.5 - 1e-4)


def segment(
    model: nn.Module,
    case: Case,
    task: Task,
    settings: FinetuneSettings,
    device: torch.device,
    keep: bool = False,
    progress: Progress | None = None,
) -> Segmented:
    """Predict a scan on its own grid; with `keep` also the probabilities there.

    Probabilities, not labels, are carried back, so that edges stay smooth; block by block, so that memory stays at a few volumes of
    `out_of_core.CHANNEL_VOXELS`. Outside the resampled body everything is background.
    """
    if task.spatial_dims == 2:
        return _segment_flat(model, case, task, settings, device, keep)
    prepared = read_case(lambda scan: _prepare(scan, task, settings), _image_of(case))
    probs = probabilities(model, prepared.image, task, settings, device, progress)
    labels = out_of_core.room(prepared.shape, np.uint8)
    kept = out_of_core.room((len(probs), *prepared.shape)) if keep else None
    for box in out_of_core.blocks(prepared.shape, len(probs), np.linalg.inv(prepared.affine) @ prepared.scan_affine):
        size = [s.stop - s.start for s in box]
        values = to_scan_grid(probs, prepared.affine, size, prepared.scan_affine @ out_of_core.start_of(box))
        labels[box] = label_map(values, task)
        if kept is not None:
            kept[(slice(None), *box)] = values.numpy()
    return Segmented(labels, prepared.scan_affine, kept)


def _segment_flat(model: nn.Module, case: Case, task: Task, settings: FinetuneSettings, device: torch.device, keep: bool) -> Segmented:
    """A 2D image is seen whole at the network's input size; its probabilities are brought back to its own pixels linearly."""
    read = build_transform(task, settings, with_label=False)
    data = read_case(read, _image_of(case))
    width, height = data["image"].size
    logits = model(ResizeRadiograph(settings.crop_size)(data)["image"][None].to(device))[0].float().cpu()
    probs = activate(logits, task)
    with torch.autocast("cpu", enabled=False):
        probs = nn.functional.interpolate(probs[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    return Segmented(label_map(probs, task), None, probs.numpy() if keep else None)


def check_scan(case: Case, task: Task) -> None:
    """Refuse a scan that cannot be predicted, before anything is.

    Raises:
        UserError: naming the file.
    """
    if task.spatial_dims == 2:
        read_case(ReadRadiograph(task.in_chans), _image_of(case))
        return
    read = Compose([ReadScan(["image"]), CheckCase(task, with_label=False)])
    read_case(lambda scan: out_of_core.look_through(scan, task) if out_of_core.is_large(scan) else read(scan), _image_of(case))


def _image_of(case: Case) -> Case:
    return {"case": case["case"], "image": case["image"]}


def _prepare(case: Case, task: Task, settings: FinetuneSettings) -> out_of_core.Prepared:
    if out_of_core.is_large(case):
        return out_of_core.prepare_large(case, task, settings.spacing_mm, settings.crop_size)
    image = build_transform(task, settings, with_label=False)(_image_of(case))["image"]
    shape = tuple(int(n) for n in image.meta["spatial_shape"])[:3]
    return out_of_core.Prepared(image.as_tensor(), np.asarray(image.affine, float), shape, np.asarray(image.meta["original_affine"], float))


def label_map(values: Tensor, task: Task) -> np.ndarray:
    """Probabilities (out_chans, *spatial) -> the task's label numbers (*spatial), uint8: the likeliest class, or nested regions above one half."""
    if task.exclusive:
        return values.argmax(0).numpy().astype(np.uint8)
    return region_labels(list((values > 0.5).numpy()), task)


def region_labels(masks: list[np.ndarray], task: Task) -> np.ndarray:
    """Region masks, from the widest to the narrowest -> one image of the task's label numbers.

    A voxel gets the label of the innermost region that holds it, as far as the wider ones hold it too: enhancing tumour outside
    the tumour is none. The label of a region is the one that it has and the next narrower one has not.
    """
    out, inside = np.zeros(masks[0].shape, np.uint8), np.ones(masks[0].shape, bool)
    for i, (mask, values) in enumerate(zip(masks, task.regions)):
        inner = task.regions[i + 1] if i + 1 < len(task.regions) else ()
        inside = inside & mask
        out[inside] = next(v for v in values if v not in inner)
    return out


def classify(model: nn.Module, cases: list[Case], task: Task, settings: FinetuneSettings, device: torch.device, batch_size: int = 64) -> np.ndarray:
    """Probabilities (cases, classes) of whole images at the model's input size."""
    read = Compose([build_transform(task, settings, with_label=False), ResizeRadiograph(settings.crop_size)])
    batch_size = batch_size if task.spatial_dims == 2 else 4
    rows = []
    for start in range(0, len(cases), batch_size):
        images = torch.stack([torch.as_tensor(read_case(read, case)["image"]) for case in cases[start : start + batch_size]])
        rows.append(model(images.to(device)).float().sigmoid().cpu())
    return torch.cat(rows).numpy()


def score_cases(model: nn.Module, task: Task, settings: FinetuneSettings, cases: list[Case]) -> float:
    """One number for choosing on validation cases: the mean that is reported (mAUC, or the mean over classes of their mean DSC).

    DSC is that of the prepared grid; the final evaluation uses the scan's own.
    """
    device = next(model.parameters()).device
    if task.kind == "classification":
        return mean_auc(np.stack([c["label"] for c in cases]), classify(model, cases, task, settings, device))[0]
    transform = build_transform(task, settings, with_label=True)
    scores = []
    for case in cases:
        data = read_case(transform, case)
        label = torch.as_tensor(data["label"])[0].numpy()
        if task.spatial_dims == 2:
            numbers = segment(model, case, task, settings, device).labels
        else:
            numbers = label_map(probabilities(model, data["image"].as_tensor(), task, settings, device), task)
        scores.append(list(dsc_of_classes(numbers, label, task)))
    classes = [column[np.isfinite(column)] for column in np.array(scores, float).T]
    means = [column.mean() for column in classes if len(column)]
    return float(np.mean(means)) if means else float("nan")


def dsc_of_classes(predicted: np.ndarray, label: np.ndarray, task: Task) -> Iterator[float]:
    """DSC of each class from two images of label numbers; what the label ignores is left out of both."""
    for pred, true in zip(*(task.class_masks(values) for values in (ignoring(predicted, label), label))):
        yield dsc(pred, true)


def ignoring(predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A prediction with background where the label says `IGNORE`."""
    return np.where(label == IGNORE, 0, predicted).astype(predicted.dtype)
