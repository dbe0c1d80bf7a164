"""MONAI transforms of each stage. A scan is normalised as a whole, then cropped.

`prepare` is the deterministic part (its result can be cached and inverted); `augment_pretrain`, which never
touches a label, and `augment_finetune` are the random part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from monai import transforms as mt
from monai.transforms import Compose
from PIL import Image

from smae_utils.data.crops import CropByClasses, CropForeground, is_foreground, plain
from smae_utils.data.labels import encode_labels
from smae_utils.data.pictures import ReadRadiograph, read_flat_mask
from smae_utils.data.reading import CheckCase, ReadScan
from smae_utils.data.tasks import Task
from smae_utils.errors import UserError
from smae_utils.timm_library import RandomResizedCropAndInterpolation, rand_augment_transform


def prepare(
    task: Task, with_label: bool, spacing_mm: Sequence[float] = (), crop_size: Sequence[int] = ()
) -> Compose:
    """Read, orient, resample, normalise, crop to the body, pad to the crop size.

    The result is {image: (C, *spatial)} and, where wanted, {label: (1, *spatial)}. 2D images stay PIL images
    until they are cropped, unless a mask goes with them.

    Args:
        task: whose channels, window and labels.
        with_label: also read and prepare the mask.
        spacing_mm: voxel size of 3D scans; empty: the task's own.
        crop_size: smaller 3D scans are padded to it with zeros; empty: none is.
    """
    if task.spatial_dims == 2:
        return Compose([ReadRadiograph(task.in_chans), *([ReadFlatMask(task)] if with_label else [])])
    keys = ["image", "label"] if with_label else ["image"]
    modes = ["bilinear", "nearest"][: len(keys)]
    steps = [
        ReadScan(keys),
        CheckCase(task, with_label),
        mt.Orientationd(keys, **oriented()),
        mt.Spacingd(keys, **resampled(task, spacing_mm), mode=modes),
        normalisation(task),
        mt.CropForegroundd(keys, source_key="image", select_fn=is_foreground, allow_smaller=True),
        *([] if task.whole or not crop_size else [mt.SpatialPadd(keys, spatial_size=crop_size)]),
        mt.EnsureTyped(keys, dtype=[torch.float32, torch.uint8][: len(keys)]),
    ]
    return Compose(steps)


class ReadFlatMask(mt.Transform):
    """After `ReadRadiograph`: image (C, H, W), standardised, and its mask (1, H, W) as label numbers."""

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, data: dict) -> dict:
        label = encode_labels(read_flat_mask(data["label"]), self.task, str(data["label"]))
        width, height = data["image"].size
        if label.shape != (height, width):
            raise UserError(
                f"{data['label']} has {label.shape} pixels, its image {(height, width)}: "
                "they must lie on one grid (are they swapped?)"
            )
        return {**data, "image": to_tensor(data, data["image"]), "label": torch.from_numpy(label[None])}


def oriented() -> dict:
    """Arguments of MONAI's Orientation: every scan is turned to RAS."""
    return {"axcodes": "RAS", "labels": (("L", "R"), ("P", "A"), ("I", "S"))}


def resampled(task: Task, spacing_mm: Sequence[float] = ()) -> dict:
    """Arguments of MONAI's Spacing: the voxel size in mm, the task's own where none is given.

    Raises:
        UserError: where neither the settings nor the task say it.
    """
    if spacing := tuple(spacing_mm) or task.spacing_mm:
        return {"pixdim": spacing}
    raise UserError(
        f'{task.name} does not say to which voxel size scans are resampled: add "spacing_mm": [x, y, z]; '
        "the command check proposes one"
    )


def normalisation(task: Task) -> mt.MapTransform:
    """The task's window to 0 .. 1; without one, z-scores of each channel's non-zero voxels."""
    if task.window:
        return mt.ScaleIntensityRanged("image", *task.window, 0.0, 1.0, clip=True)
    return mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True)


def middle(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle of a volume (C, *spatial), cut to (C, *size)."""
    corner = [(n - c) // 2 for n, c in zip(image.shape[1:], size)]
    return image[(slice(None), *(slice(o, o + c) for o, c in zip(corner, size)))]


def mirrored_axes(task: Task, mirror: bool) -> tuple[int, ...]:
    """Axes along which crops are flipped, in either stage.

    Left-right is left out where labels have sides, unless `mirror` says otherwise. So is front-back in
    3D, which with half a turn would call a right kidney left. Of 2D images the vertical axis is left out:
    they have an upright side.
    """
    keeps_sides = task.sided and not mirror
    if task.spatial_dims == 2:  # rows, columns
        return () if keeps_sides else (1,)
    return (2,) if keeps_sides else (0, 1, 2)


def augment_pretrain(
    task: Task,
    crop_size: Sequence[int],
    crops_per_scan: int = 1,
    flip_prob: float = 0.2,
    mirror: bool = False,
    crop_area: Sequence[float] = (0.08, 1.0),
) -> Compose:
    """Random crops around intensity foreground, and flips, of images only.

    The flips are those of fine-tuning, so that positions learn one atlas.

    Args:
        task: whether images have sides, and whether the network sees them whole.
        crop_size: voxels or pixels of a crop.
        crops_per_scan: of 3D scans.
        flip_prob, mirror: see `mirrored_axes`.
        crop_area: of what is seen whole, the share that a crop covers before it is resized.
    """
    axes = mirrored_axes(task, mirror)
    if task.spatial_dims == 2:
        return Compose([RandomRadiograph(crop_size, flip_prob if axes else 0.0, crop_area, "")])
    flips = _flips(["image"], flip_prob, axes)
    if task.whole:
        return Compose([*_resized_crop(["image"], crop_size, crop_area), *flips])
    return Compose([CropForeground(crop_size, crops_per_scan), *flips])


def augment_finetune(
    task: Task,
    crop_size: Sequence[int],
    crops_per_scan: int = 1,
    flip_prob: float = 0.2,
    mirror: bool = False,
    crop_area: Sequence[float] = (0.08, 1.0),
    rotate_prob: float = 0.0,
    intensity_prob: float = 0.0,
    intensity_scale: float = 0.1,
    intensity_shift: float = 0.1,
    rand_augment: str = "",
) -> Compose:
    """Crops, flips, quarter turns, and random scale and shift of intensities.

    Crops are balanced over the labels; where the whole image is seen, they are resized crops of it.

    Args:
        task, crop_size, crops_per_scan, flip_prob, mirror, crop_area: as in `augment_pretrain`.
        rotate_prob: probability of quarter turns in the axial plane of 3D crops that are square there.
        intensity_prob: probability of scaling intensities, and of shifting them.
        intensity_scale, intensity_shift: by how much at most.
        rand_augment: a policy of timm for classified 2D images; empty: none.
    """
    axes = mirrored_axes(task, mirror)
    if task.spatial_dims == 2 and task.kind == "classification":
        return Compose(
            [RandomRadiograph(crop_size, flip_prob if axes else 0.0, crop_area, rand_augment, task.in_chans)]
        )
    keys = ["image", "label"] if task.kind == "segmentation" else ["image"]
    if task.whole:
        steps = _resized_crop(keys, crop_size, crop_area)
    else:
        balanced = {"label_key": "label", "num_classes": task.label_values, "warn": False}
        steps = [CropByClasses(keys, spatial_size=crop_size, num_samples=crops_per_scan, **balanced)]
    steps += _flips(keys, flip_prob, axes)
    if rotate_prob and task.spatial_dims == 3 and crop_size[0] == crop_size[1]:
        steps.append(mt.RandRotate90d(keys, prob=rotate_prob, spatial_axes=(0, 1)))
    if intensity_prob:
        steps.append(mt.RandScaleIntensityd("image", factors=intensity_scale, prob=intensity_prob))
        steps.append(mt.RandShiftIntensityd("image", offsets=intensity_shift, prob=intensity_prob))
    return Compose(steps)


def _resized_crop(keys: Sequence[str], size: Sequence[int], area: Sequence[float]) -> list:
    """A random box that covers `area` of the image, resized to the network's input.

    Labels by nearest neighbour: the "exact" one, which shifts nothing by half a pixel.
    """
    low, high = (share ** (1 / len(size)) for share in area)
    crop = mt.RandScaleCropd(keys, roi_scale=low, max_roi_scale=high, random_size=True, random_center=True)
    return [crop, ResizeAll(keys, size)]


def resize(values: torch.Tensor, size: Sequence[int], label: bool = False) -> torch.Tensor:
    """(C, *spatial) -> (C, *size): labels by nearest neighbour, 3D images linearly, 2D images as PIL does.

    PIL's way is bicubic, and smooths where it shrinks.
    """
    batch = plain(values)[None]
    if label:
        return torch.nn.functional.interpolate(batch.float(), size=tuple(size), mode="nearest-exact")[0].to(
            values.dtype
        )
    how = {"mode": "trilinear"} if len(size) == 3 else {"mode": "bicubic", "antialias": True}
    return torch.nn.functional.interpolate(batch.float(), size=tuple(size), align_corners=False, **how)[0]


class ResizeAll(mt.Transform):
    """Image and label at the network's input size, see `resize`."""

    def __init__(self, keys: Sequence[str], size: Sequence[int]):
        self.keys, self.size = keys, tuple(size)

    def __call__(self, data: dict) -> dict:
        return {**data, **{key: resize(data[key], self.size, key == "label") for key in self.keys}}


def _flips(keys: Sequence[str], prob: float, axes: Sequence[int]) -> list:
    return [mt.RandFlipd(keys, prob=prob, spatial_axis=axis) for axis in axes] if prob else []


def to_tensor(data: dict, image: Image.Image) -> torch.Tensor:
    """PIL image -> (C, H, W), standardised by the statistics of the whole radiograph, not of the crop."""
    pixels = np.array(image, np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return (torch.from_numpy(np.ascontiguousarray(pixels)) - data["mean"]) / data["std"]


class ResizeRadiograph(mt.Transform):
    """The whole image at the model's input size, for validation and testing.

    3D scans are resized linearly, radiographs bicubically.
    """

    def __init__(self, size: Sequence[int]):
        self.size = tuple(size)

    def __call__(self, data: dict) -> dict:
        if torch.is_tensor(data["image"]):
            return {**data, "image": resize(data["image"], self.size)}
        resized = data["image"].resize(self.size[::-1], Image.Resampling.BICUBIC)
        return {**data, "image": to_tensor(data, resized)}


class RandomRadiograph(mt.RandomizableTransform):
    """Random resized crop, horizontal flip and RandAugment, by timm."""

    def __init__(
        self, size: Sequence[int], flip_prob: float, area: Sequence[float], policy: str, in_chans: int = 1
    ):
        super().__init__()
        self.crop = RandomResizedCropAndInterpolation(tuple(size), scale=tuple(area), interpolation="bicubic")
        self.flip_prob = flip_prob
        try:
            self.augment = (
                rand_augment_transform(
                    policy, {"translate_const": int(0.45 * min(size)), "img_mean": (128,) * in_chans}
                )
                if policy
                else None
            )
        except (AssertionError, ValueError, KeyError):
            raise UserError(
                f"rand_augment {policy!r} is no policy of timm: "
                "expected one as rand-m9-mstd0.5-inc1, or empty for none"
            ) from None

    def __call__(self, data: dict) -> list[dict]:
        # timm draws from Python's and numpy's global generators. They are seeded from this transform's own
        # generator, and put back afterwards.
        seed = int(self.R.randint(2**31))
        before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self._drawn(data)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def _drawn(self, data: dict) -> list[dict]:
        image = self.crop(data["image"])
        if random.random() < self.flip_prob:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment:
            image = self.augment(image)
        return [{**data, "image": to_tensor(data, image)}]
