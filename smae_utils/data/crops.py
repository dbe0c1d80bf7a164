"""Random crops around foreground and around classes: MONAI's own draws, without lists of all voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai import transforms as mt


def plain(values: Any) -> torch.Tensor:
    """A tensor of the values, without what MONAI records of them."""
    return torch.as_tensor(values).as_subclass(torch.Tensor)


def slab_counts(label: torch.Tensor) -> torch.Tensor:
    """(X, K) voxels of each label number in each slab label[0, x] of (1, X, ...); K: the largest plus 1."""
    flat = label[0].flatten(1).long()
    kinds = int(flat.max()) + 1
    places = flat + kinds * torch.arange(len(flat))[:, None]
    return torch.bincount(places.flatten(), minlength=len(flat) * kinds).view(len(flat), kinds)


def slab_of(ends: torch.Tensor, place: int) -> tuple[int, int]:
    """(slab, number in it) of the voxel number `place`, where `ends` (X,) counts voxels up to each slab."""
    slab = int(torch.searchsorted(ends, place, right=True))
    return slab, place - (int(ends[slab - 1]) if slab else 0)


def centres(shape: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """The box of a volume (X, Y, Z) in which a crop of `size` may have its centre.

    A crop begins as far from the volume's corner as its centre lies from the corner of this box.
    """
    starts = [min(c, n) // 2 for n, c in zip(shape, size)]
    return tuple(slice(o, o + max(1, n - c)) for o, n, c in zip(starts, shape, size))


class CountForeground(mt.Transform):
    """Adds what `CropForeground` looks a voxel up by; it is the same for each crop.

    `foreground_counts` (X,) are the foreground voxels in each slab of `centres`.
    """

    def __init__(self, size: Sequence[int]):
        self.size = tuple(size)

    def __call__(self, data: dict) -> dict:
        image = plain(data["image"])
        found = is_foreground(image[(slice(None), *centres(image.shape[1:], self.size))]).any(0)
        return {**data, "foreground_counts": found.flatten(1).sum(1)}


class CountClasses(mt.Transform):
    """Adds what `CropByClasses` looks a voxel up by: `class_counts`, see `slab_counts`."""

    def __call__(self, data: dict) -> dict:
        return {**data, "class_counts": slab_counts(plain(data["label"]))}


class CropForeground(mt.RandomizableTransform):
    """Crops around foreground voxels, each as likely; around any voxel where there is no foreground.

    They are drawn as MONAI's RandWeightedCropd draws them from a map of ones and zeros, but of that map
    only one slab is looked at. A sample may bring what `CountForeground` of the same size adds, which
    is then not counted again.
    """

    def __init__(self, size: Sequence[int], count: int):
        super().__init__()
        self.size, self.count = tuple(size), count

    def __call__(self, data: dict) -> list[dict]:
        if "foreground_counts" not in data:
            data = CountForeground(self.size)(data)
        image, box = data["image"], centres(data["image"].shape[1:], self.size)
        ends = data["foreground_counts"].cumsum(0)
        total = int(ends[-1])
        corners = []
        if total:
            for slab, inside in [slab_of(ends, int(r * total)) for r in self.R.random(self.count)]:
                found = is_foreground(image[(slice(None), box[0].start + slab, *box[1:])]).any(0)
                corners.append((slab, *found.nonzero()[inside].tolist()))
        else:
            free = [s.stop - s.start for s in box]
            corners = [np.unravel_index(i, free) for i in self.R.randint(0, math.prod(free), self.count)]
        boxes = [tuple(slice(o, o + c) for o, c in zip(corner, self.size)) for corner in corners]
        return [{**data, "image": image[(slice(None), *box)]} for box in boxes]


class ClassVoxels:
    """The flat indices of the voxels of one label number, in order: one is looked up in its slab alone."""

    def __init__(self, label: torch.Tensor, counts: torch.Tensor, number: int):
        self.label, self.number = label[0], number
        own = counts[:, number] if number < counts.shape[1] else torch.zeros(len(counts), dtype=torch.long)
        self.ends = own.cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, place: int) -> int:
        slab, inside = slab_of(self.ends, place)
        found = (self.label[slab].flatten() == self.number).nonzero()
        return slab * self.label[0].numel() + int(found[inside])


class CropByClasses(mt.RandCropByLabelClassesd):
    """As MONAI's, with the same draws, but without a list of all voxels of all classes for each crop.

    A sample may bring what `CountClasses` adds, which is then not counted again.
    """

    def __call__(self, data: dict, lazy: bool | None = None) -> list[dict]:
        self.counts = data.get("class_counts")
        return super().__call__(data, lazy)

    def randomize(self, label: torch.Tensor, indices: Any = None, image: Any = None) -> None:
        numbers = plain(label)
        counts = slab_counts(numbers) if self.counts is None else self.counts
        voxels = [ClassVoxels(numbers, counts, number) for number in range(self.cropper.num_classes)]
        super().randomize(label, voxels if indices is None else indices, image)


def is_foreground(image: torch.Tensor) -> torch.Tensor:
    """Voxels that hold something: not the value to which the normalisation maps air and empty background."""
    return image != 0
