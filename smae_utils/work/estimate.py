"""What a preset would cost on this machine: time, memory, and how long to pre-train."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from smae_utils.data.tasks import Task
from smae_utils.work import devices
from smae_utils.work.cost import crop_cost, measured_flops_per_second
from smae_utils.work.presets import resolve
from smae_utils.work.settings import total_steps

# Crops seen in pre-training by the released configurations: BTCV 10000 epochs x 18 scans x 4 crops, BraTS 500
# x 387 x 4; radiographs 800 x 86,524.
CROPS_3D, CROPS_2D = 750_000, 69_000_000

# Training reaches about a third of the speed of a plain matrix product.
EFFICIENCY = 1 / 3

# Scans that would take more of the machine's memory belong into a store.
MEMORY_SHARE = 0.7
TOO_MANY = ", more than this machine has room for: --set store=FOLDER keeps them on disk and reads only crops"


def estimate(
    task: Task,
    n_train: int,
    preset: str,
    scan_voxels: float = 0.0,
    overrides: dict[str, Any] | None = None,
    n_val: int = 0,
) -> list[str]:
    """What a preset would cost on this machine, and how long to pre-train for so many cases.

    Args:
        overrides: settings that are to be other than the preset's.
        scan_voxels: voxels of a prepared scan, or pixels of a radiograph; 0 takes four crops.
        n_val: validation cases, which fine-tuning keeps too.
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
            * (n_train + (n_val if stage == "finetune" else 0))
            * (0 if settings.store and task.spatial_dims == 3 else settings.cache_rate)
            * max(1, settings.num_workers)
        )
        # Gradients and AdamW's two moments are as large as the weights; on top of what is kept for the
        # backward pass comes a fifth for the moment; bf16 halves most of it (both measured with the preset
        # small).
        training = 4 * cost.weights + cost.activations * crops * (0.7 if precision == "bf16" else 1.2)
        room = "" if kept < MEMORY_SHARE * machine_memory() else TOO_MANY
        lines.append(
            f"{stage} with preset {preset}: {steps} steps, about "
            f"{_hours(cost.flops * steps * crops / speed)} on this "
            f"{devices.device_name(device)} in {precision}; memory about {training / 1e9:.1f} GB to train "
            f"with, {kept / 1e9:.1f} GB for scans that are kept{room}"
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


def machine_memory() -> float:
    """Bytes of main memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, seconds / 60):.0f} minutes"
