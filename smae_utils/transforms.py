"""MONAI transforms per stage. A scan is normalised as a whole, then cropped; pre-training never touches a label.

`prepare` is the deterministic part (its result can be cached and inverted), `augment` the random part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from monai import transforms as mt
from monai.transforms import Compose
from PIL import Image

from smae_utils.errors import UserError
from smae_utils.reading import CheckCase, ReadRadiograph, ReadScan
from smae_utils.settings import FinetuneSettings, Settings
from smae_utils.tasks import Task
from smae_utils.timm_glue import RandomResizedCropAndInterpolation, rand_augment_transform


def prepare(task: Task, settings: Settings, with_label: bool) -> Compose:
    """Read, orient, resample, normalise, crop to the body, pad to the crop size: {image: (C, *spatial)[, label: (1, *spatial)]}."""
    if task.spatial_dims == 2:
        return Compose([ReadRadiograph(task.in_chans)])
    keys = ["image", "label"] if with_label else ["image"]
    modes = ["bilinear", "nearest"][: len(keys)]
    steps = [
        ReadScan(keys),
        CheckCase(task, with_label),
        mt.Orientationd(keys, **oriented()),
        mt.Spacingd(keys, **resampled(task, settings), mode=modes),
        normalisation(task),
        mt.CropForegroundd(keys, source_key="image", select_fn=is_foreground, allow_smaller=True),
        mt.SpatialPadd(keys, spatial_size=settings.crop_size),
        mt.EnsureTyped(keys, dtype=[torch.float32, torch.uint8][: len(keys)]),
    ]
    return Compose(steps)


def oriented() -> dict:
    """Arguments of MONAI's Orientation: every scan is turned to RAS."""
    return {"axcodes": "RAS", "labels": (("L", "R"), ("P", "A"), ("I", "S"))}


def resampled(task: Task, settings: Settings) -> dict:
    """Arguments of MONAI's Spacing: the voxel size in mm.

    Raises:
        UserError: where neither the settings nor the task say it.
    """
    if spacing := settings.spacing_mm or task.spacing_mm:
        return {"pixdim": spacing}
    raise UserError(f'{task.name} does not say to which voxel size scans are resampled: add "spacing_mm": [x, y, z]; the command check proposes one')


def normalisation(task: Task) -> mt.MapTransform:
    """The task's window to 0 .. 1; without one, each channel's mean and spread of what is not 0."""
    if task.window:
        return mt.ScaleIntensityRanged("image", *task.window, 0.0, 1.0, clip=True)
    return mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True)


def middle(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle of a volume (C, *spatial), cut to (C, *size)."""
    corner = [(n - c) // 2 for n, c in zip(image.shape[1:], size)]
    return image[(slice(None), *(slice(o, o + c) for o, c in zip(corner, size)))]


def is_foreground(image: torch.Tensor) -> torch.Tensor:
    """Voxels that hold something: not the value to which the normalisation maps air and empty background."""
    return image != 0


def augment_pretrain(task: Task, settings: Settings) -> Compose:
    """Random crops around intensity foreground, and flips. Images only."""
    if task.spatial_dims == 2:
        return Compose([RandomRadiograph(settings.crop_size, settings.flip_prob, settings.crop_area, "")])
    return Compose(
        [
            AddForeground(),
            mt.RandWeightedCropd("image", w_key="foreground", spatial_size=settings.crop_size, num_samples=settings.crops_per_scan),
            *_flips(["image"], settings.flip_prob, axes=(0, 1, 2)),
        ]
    )


def augment_finetune(task: Task, settings: FinetuneSettings) -> Compose:
    """Crops balanced over the labels, flips, quarter turns, intensity scale and shift."""
    if task.spatial_dims == 2:
        flip = 0.0 if task.sided and not settings.mirror else settings.flip_prob
        return Compose([RandomRadiograph(settings.crop_size, flip, settings.crop_area, settings.rand_augment)])
    keys, size = ["image", "label"], settings.crop_size
    steps = [
        mt.RandCropByLabelClassesd(
            keys, label_key="label", spatial_size=size, num_classes=task.label_values, num_samples=settings.crops_per_scan, warn=False
        ),
        # Mirroring left-right would call a right kidney left; so would front-back followed by half a turn.
        *_flips(keys, settings.flip_prob, axes=(2,) if task.sided and not settings.mirror else (0, 1, 2)),
    ]
    if settings.rotate_prob and size[0] == size[1]:
        steps.append(mt.RandRotate90d(keys, prob=settings.rotate_prob, spatial_axes=(0, 1)))
    if settings.intensity_prob:
        steps.append(mt.RandScaleIntensityd("image", factors=settings.intensity_scale, prob=settings.intensity_prob))
        steps.append(mt.RandShiftIntensityd("image", offsets=settings.intensity_shift, prob=settings.intensity_prob))
    return Compose(steps)


def _flips(keys: Sequence[str], prob: float, axes: Sequence[int]) -> list:
    return [mt.RandFlipd(keys, prob=prob, spatial_axis=axis) for axis in axes] if prob else []


class AddForeground(mt.Transform):
    """Adds `foreground` (1, *spatial): where crops may be centred, from the image alone."""

    def __call__(self, data: dict) -> dict:
        return {**data, "foreground": is_foreground(data["image"]).any(0, keepdim=True).float()}


def to_tensor(data: dict, image: Image.Image) -> torch.Tensor:
    """PIL image -> (C, H, W), standardised by the statistics of the whole radiograph, not of the crop."""
    pixels = np.array(image, np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return (torch.from_numpy(np.ascontiguousarray(pixels)) - data["mean"]) / data["std"]


class ResizeRadiograph(mt.Transform):
    """The whole radiograph at the model's input size, for validation and testing."""

    def __init__(self, size: Sequence[int]):
        self.size = tuple(size)

    def __call__(self, data: dict) -> dict:
        resized = data["image"].resize(self.size[::-1], Image.Resampling.BICUBIC)
        return {**data, "image": to_tensor(data, resized)}


class RandomRadiograph(mt.RandomizableTransform):
    """Random resized crop, horizontal flip and RandAugment, by timm."""

    def __init__(self, size: Sequence[int], flip_prob: float, area: Sequence[float], policy: str):
        super().__init__()
        self.crop = RandomResizedCropAndInterpolation(tuple(size), scale=tuple(area), interpolation="bicubic")
        self.flip_prob = flip_prob
        try:
            self.augment = rand_augment_transform(policy, {"translate_const": int(0.45 * min(size)), "img_mean": (128,)}) if policy else None
        except (AssertionError, ValueError, KeyError):
            raise UserError(f"rand_augment {policy!r} is no policy of timm: expected one as rand-m9-mstd0.5-inc1, or empty for none") from None

    def __call__(self, data: dict) -> list[dict]:
        # timm draws from Python's and numpy's global generators; they are seeded from this transform's own.
        seed = int(self.R.randint(2**31))
        random.seed(seed)
        np.random.seed(seed)
        image = self.crop(data["image"])
        if random.random() < self.flip_prob:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment:
            image = self.augment(image)
        return [{**data, "image": to_tensor(data, image)}]
