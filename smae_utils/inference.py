"""From a fine-tuned model to predictions: sliding window over a scan, and back onto the scan's own grid."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import Compose
from torch import Tensor, nn

from smae_utils.build import region_targets
from smae_utils.data import read_case
from smae_utils.metrics import dsc, mean_auc
from smae_utils.settings import FinetuneSettings
from smae_utils.tasks import Case, Task
from smae_utils.transforms import ResizeRadiograph, prepare

# Voxels x channels that are brought back to the scan's grid at a time: 256 MB in fp32.
CHANNEL_VOXELS = 64_000_000


def probabilities(model: nn.Module, image: Tensor, task: Task, settings: FinetuneSettings, device: torch.device) -> Tensor:
    """Prepared scan (C, *spatial) of any size -> class probabilities (out_chans, *spatial) on the CPU, by Gaussian-weighted windows."""
    logits = sliding_window_inference(
        image[None].to(device), settings.crop_size, sw_batch_size=4, predictor=model, overlap=settings.overlap, mode="gaussian", device="cpu"
    )[0].float()
    return logits.softmax(0) if task.exclusive else logits.sigmoid()


def to_scan_grid(channels: Tensor, prepared: MetaTensor, transform: Compose) -> np.ndarray:
    """(K, *spatial) on the prepared grid -> (K, *spatial) on the scan's own grid, by inverting `transform` (linear interpolation)."""
    carrier = MetaTensor(channels.clone(), meta=dict(prepared.meta))
    carrier.applied_operations = deepcopy(prepared.applied_operations)  # inverting consumes what is stored there
    return transform.inverse({"image": carrier})["image"].numpy()


def segment(model: nn.Module, case: Case, task: Task, settings: FinetuneSettings, device: torch.device) -> list[np.ndarray]:
    """One boolean mask a class, on the scan's own grid."""
    return segment_probabilities(model, case, task, settings, device)[0]


def segment_probabilities(
    model: nn.Module, case: Case, task: Task, settings: FinetuneSettings, device: torch.device, keep: bool = False
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """One boolean mask a class on the scan's own grid, and with `keep` the probabilities there (out_chans, *spatial).

    Probabilities, not labels, are carried back, so that edges stay smooth; a few classes at a time, so that memory stays
    at a few volumes. Outside the resampled body everything is background.
    """
    transform = prepare(task, settings, with_label=False)
    prepared = read_case(transform, {"image": case["image"], "case": case["case"]})["image"]
    probs = probabilities(model, prepared.as_tensor(), task, settings, device)
    # Whichever grid is larger has to fit.
    own = int(np.prod(prepared.meta["spatial_shape"]))
    together = max(1, CHANNEL_VOXELS // max(own, probs[0].numel()))
    winner, best, masks, kept = None, None, [], []
    for start in range(0, len(probs), together):
        values = to_scan_grid(probs[start : start + together], prepared, transform)
        if keep:
            kept.append(values)
        if not task.exclusive:
            masks += list(values > 0.5)
            continue
        for i, value in enumerate(values, start=start):
            if winner is None:
                winner, best = np.zeros(value.shape, np.uint8), value
                continue
            ahead = value > best
            winner[ahead], best = i, np.where(ahead, value, best)
    return (task.class_masks(winner) if task.exclusive else nest(masks)), (np.concatenate(kept) if keep else None)


def nest(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Regions from the widest to the narrowest, each cut to what the wider ones hold: enhancing tumour outside the tumour is none."""
    out = masks[:1]
    for mask in masks[1:]:
        out.append(out[-1] & mask)
    return out


def classify(model: nn.Module, cases: list[Case], task: Task, settings: FinetuneSettings, device: torch.device, batch_size: int = 64) -> np.ndarray:
    """Probabilities (cases, classes) of whole radiographs at the model's input size."""
    read = Compose([prepare(task, settings, with_label=False), ResizeRadiograph(settings.crop_size)])
    rows = []
    for start in range(0, len(cases), batch_size):
        images = torch.stack([read_case(read, case)["image"] for case in cases[start : start + batch_size]])
        rows.append(model(images.to(device)).float().sigmoid().cpu())
    return torch.cat(rows).numpy()


def score_cases(model: nn.Module, task: Task, settings: FinetuneSettings, cases: list[Case]) -> float:
    """One number for choosing on validation cases: mAUC, or mean DSC on the prepared grid (the final evaluation uses the scan's own)."""
    device = next(model.parameters()).device
    if task.kind == "classification":
        return mean_auc(np.stack([c["label"] for c in cases]), classify(model, cases, task, settings, device))[0]
    transform = prepare(task, settings, with_label=True)
    scores: list[Any] = []
    for case in cases:
        data = read_case(transform, case)
        probs = probabilities(model, data["image"].as_tensor(), task, settings, device)
        label = data["label"].as_tensor()
        if task.exclusive:
            pred = task.class_masks(probs.argmax(0).numpy())
            true = task.class_masks(label[0].numpy())
        else:
            pred = nest(list((probs > 0.5).numpy()))
            true = list(region_targets(label[None], task)[0].bool().numpy())
        scores.append([dsc(p, t) for p, t in zip(pred, true)])
    return float(np.nanmean(scores))
