"""What training costs: FLOPs and memory counted without running it, and the speed of this machine."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from smae_utils.data.tasks import Task, get_task
from smae_utils.work.build import build_mae, build_model
from smae_utils.work.presets import resolve
from smae_utils.work.settings import PretrainSettings, StageSettings, total_steps


class CropCost(NamedTuple):
    """What one crop costs in one training step.

    Attributes:
        flops: counted FLOPs of its forward and backward pass.
        activations: bytes in fp32 that the forward pass keeps for the backward pass.
        weights: bytes of the parameters in fp32. Gradients and both moments of AdamW make
            it four times as much.
    """

    flops: float
    activations: int
    weights: int


def crop_cost(task: Task, settings: StageSettings) -> CropCost:
    """What a crop costs, counted and not measured, without allocating weights or data."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views share a storage, and holding one keeps its address from another.
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # The meta device does the shapes and none of the arithmetic.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = (
            build_mae(task, settings)
            if isinstance(settings, PretrainSettings)
            else build_model(task, settings)
        )
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        image = torch.zeros(1, task.in_chans, *settings.crop_size)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(image)
        (out.loss if isinstance(settings, PretrainSettings) else out.float().mean()).backward()
    held = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    return CropCost(float(counter.get_total_flops()), held, sum(4 * p.numel() for p in model.parameters()))


def run_flops(task: str, stage: str, preset: str, n_train: int) -> tuple[float, int]:
    """(FLOPs of a whole run, steps) of a preset on `n_train` scans."""
    record = get_task(task)
    settings = resolve(record, stage, preset)
    steps, _ = total_steps(settings, n_train)
    return crop_cost(record, settings).flops * steps * settings.batch_size * settings.crops_per_scan, steps


def measured_flops_per_second(device: torch.device, precision: str = "fp32", seconds: float = 0.5) -> float:
    """FLOPs per second of this device on a plain matrix product: more than training will reach."""
    size, together = (8192, 8) if device.type == "cuda" else (1024, 1)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    (a @ a).sum().item()
    count, begin = 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        # A GPU works while Python goes on: wait for it once in a while, not each time.
        for _ in range(together):
            b = a @ a
        b[0, 0].item()
        count += together
    return 2 * size**3 * count / (time.monotonic() - begin)
