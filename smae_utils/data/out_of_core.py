"""Scans that are too large to hold, prepared block by block into a temporary file, for prediction only.

What comes out equals what `transforms.prepare` gives; only a few blocks are held in memory.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from nibabel.affines import from_matvec
from torch import Tensor

from smae_utils.data.case import files_of
from smae_utils.data.reading import check_channels, check_finite
from smae_utils.data.same_place import check_grid
from smae_utils.data.tasks import Task
from smae_utils.data.transforms import normalisation, oriented, resampled
from smae_utils.data.volumes import FILE_ERRORS, check_header, unreadable, volume_shape
from smae_utils.paths import has_ending

# Voxels x channels held in memory at a time, in a few arrays of 256 MB in fp32. More goes to a file.
CHANNEL_VOXELS = 64_000_000

Box = tuple[slice, slice, slice]


def zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """Zeros of a shape; many of them in an unnamed temporary file, which the system reads as needed."""
    if math.prod(shape) <= CHANNEL_VOXELS:
        return np.zeros(shape, dtype)
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the array)
    # A full disk is told here; later it would kill the process.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype, "w+", shape=tuple(shape))


def blocks(shape: Sequence[int], channels: int = 1, to_other: np.ndarray | None = None) -> Iterator[Box]:
    """Boxes that fill a grid; a few of them fit `CHANNEL_VOXELS`.

    They are near cubes: what a turned box touches on another grid is then not much larger.

    Args:
        to_other: (4, 4) to the grid from which each box is filled, where that is another one, maybe finer.
    """
    finer = 1.0 if to_other is None else max(1.0, abs(np.linalg.det(to_other[:3, :3])))
    side = max(8, math.floor((CHANNEL_VOXELS / 8 / channels / finer) ** (1 / 3) + 1e-9))
    cuts = [[slice(start, min(start + side, n)) for start in range(0, n, side)] for n in shape]
    return ((a, b, c) for a in cuts[0] for b in cuts[1] for c in cuts[2])


def whole(shape: Sequence[int]) -> Box:
    """The box that is a whole grid (X, Y, Z)."""
    x, y, z = (slice(0, n) for n in shape)
    return x, y, z


def start_of(box: Box) -> np.ndarray:
    """(4, 4) that counts voxels from the first corner of a box."""
    return from_matvec(np.eye(3), [s.start for s in box])


def source_box(box: Box, to_other: np.ndarray, other: Sequence[int], edge: bool = False) -> Box | None:
    """The box that a box touches on another grid, with one voxel around it; None where there is nothing.

    Args:
        to_other: (4, 4) from voxels of the box's grid to those of the other.
        other: (X, Y, Z) of the other grid.
        edge: the other grid's edge goes on beyond it, so that what lies outside touches its nearest planes.
    """
    corners = np.array(
        [
            [*(s.start if c == 0 else s.stop - 1 for c, s in zip(corner, box)), 1]
            for corner in np.ndindex(2, 2, 2)
        ],
        float,
    )
    inside = (corners @ to_other.T)[:, :3]
    low, high = np.floor(inside.min(0)).astype(int) - 1, np.ceil(inside.max(0)).astype(int) + 2
    low, high = np.clip(low, 0, np.array(other) - edge), np.clip(high, int(edge), other)
    return None if (high <= low).any() else tuple(slice(int(a), int(b)) for a, b in zip(low, high))


class ScanOnDisk:
    """A NIfTI scan, of one file or one a channel, of which boxes are read.

    Raises:
        UserError: for a header that cannot be used, or channels that do not lie on one grid.
    """

    def __init__(self, image: str | list[str], task: Task, stack: ExitStack):
        files = files_of(image)
        self.name, self.parts = files[0], []
        for file in files:
            part = nib.load(file)
            check_header(part, file)
            volume_shape(part, file)
            self.parts.append(part)
            check_grid(
                (part.shape[:3], part.affine), file, (self.parts[0].shape[:3], self.parts[0].affine), files[0]
            )
        self.shape, self.affine = tuple(int(n) for n in self.parts[0].shape[:3]), self.parts[0].affine
        self.channels = sum(math.prod(part.shape[3:]) for part in self.parts)
        check_channels(self.channels, self.shape, task, self.name)
        self.parts = [nib.load(_unpacked(file, stack)) for file in files]

    def read(self, box: Box) -> np.ndarray:
        """(C, *box) float32.

        Raises:
            UserError: where it holds NaN or infinite values.
        """
        values = [np.asarray(part.dataobj[box], np.float32) for part in self.parts]
        joined = np.concatenate([np.moveaxis(v.reshape(*v.shape[:3], -1), -1, 0) for v in values])
        check_finite(joined, self.name)
        return joined


def _unpacked(file: str, stack: ExitStack) -> str:
    """The file itself, or an unpacked copy that goes away with `stack`.

    A single plane of a .gz cannot be read without all before it.
    """
    if not has_ending(file, (".gz",)):
        return file
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    target = Path(folder) / "scan.nii"
    stored = nib.load(file).dataobj
    left = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    try:
        with gzip.open(file) as packed, target.open("wb") as plain:
            # What follows the image is not read, as nibabel does not read it either.
            while left > 0:
                chunk = packed.read(min(left, 1 << 22))
                if not chunk:
                    raise EOFError("the file ends before its image does")
                plain.write(chunk)
                left -= len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise unreadable(file, error) from error
    return str(target)


def is_large(case: Mapping[str, Any]) -> bool:
    """Whether a case is NIfTI and has more voxels than are held at a time."""
    files = files_of(case["image"])
    if not all(has_ending(f, (".nii", ".nii.gz")) for f in files):
        return False
    try:
        return sum(math.prod(nib.load(f).shape) for f in files) > CHANNEL_VOXELS
    except FILE_ERRORS:
        return False  # reading it whole says what is wrong with it


def look_through(case: Mapping[str, Any], task: Task) -> None:
    """Read a large scan once, and refuse what `ReadScan` and `CheckCase` refuse."""
    with ExitStack() as stack:
        scan = ScanOnDisk(case["image"], task, stack)
        for box in blocks(scan.shape, scan.channels):
            scan.read(box)


class Prepared(NamedTuple):
    """A scan as the network takes it, and where it came from.

    Attributes:
        image: (C, *spatial) normalised, cut to the body.
        affine: (4, 4) of that grid.
        shape: (X, Y, Z) of the scan itself.
        scan_affine: (4, 4) of the scan itself.
    """

    image: Tensor
    affine: np.ndarray
    shape: tuple[int, ...]
    scan_affine: np.ndarray


def prepare_large(
    case: Mapping[str, Any], task: Task, spacing_mm: Sequence[float] = (), crop_size: Sequence[int] = ()
) -> Prepared:
    """`transforms.prepare` for a scan that is not to be held: its image, its grid and the scan's."""
    with ExitStack() as stack:
        scan = ScanOnDisk(case["image"], task, stack)
        # MONAI's transforms say what they would do, given a scan that has a shape and no memory.
        ghost = MetaTensor(torch.zeros(1).expand(1, *scan.shape), affine=torch.from_numpy(scan.affine))
        for step in (mt.Orientation(**oriented()), mt.Spacing(**resampled(task, spacing_mm))):
            ghost = step(ghost, lazy=True)
        shape, affine = (
            tuple(int(n) for n in ghost.peek_pending_shape()),
            np.asarray(ghost.peek_pending_affine(), float),
        )
        image = zeros((scan.channels, *shape))
        to_scan = np.linalg.inv(scan.affine) @ affine
        resample = mt.SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float64)
        with torch.autocast("cpu", enabled=False):  # bf16 is too coarse for where a voxel lies
            for box in blocks(shape, scan.channels, to_scan):
                source = source_box(box, to_scan, scan.shape, edge=True)
                values = MetaTensor(
                    torch.from_numpy(scan.read(source)),
                    affine=torch.from_numpy(scan.affine @ start_of(source)),
                )
                size = tuple(s.stop - s.start for s in box)
                image[(slice(None), *box)] = resample(
                    values, dst_affine=torch.from_numpy(affine @ start_of(box)), spatial_size=size
                ).numpy()
    _normalise(image, task)
    body = _body(image)
    image, affine = image[(slice(None), *body)], affine @ start_of(body)
    missing = [max(0, c - n) for c, n in zip(crop_size, image.shape[1:])]
    if any(missing):
        before = [m // 2 for m in missing]
        padded = zeros((len(image), *(n + m for n, m in zip(image.shape[1:], missing))))
        padded[(slice(None), *(slice(b, b + n) for b, n in zip(before, image.shape[1:])))] = image
        image, affine = padded, affine @ from_matvec(np.eye(3), [-b for b in before])
    return Prepared(torch.from_numpy(image), affine, scan.shape, scan.affine)


def _normalise(image: np.ndarray, task: Task) -> None:
    """In place, as `normalisation` does with the whole."""
    if task.window:
        window = normalisation(task)
        for box in blocks(image.shape[1:], len(image)):
            image[(slice(None), *box)] = window(
                {"image": torch.from_numpy(image[(slice(None), *box)].copy())}
            )["image"].numpy()
        return
    for channel in image:
        count, total = 0, 0.0
        for box in blocks(channel.shape):
            values = channel[box][channel[box] != 0].astype(np.float64)
            count, total = count + values.size, total + values.sum()
        mean, squares = total / max(count, 1), 0.0
        for box in blocks(channel.shape):
            squares += np.square(channel[box][channel[box] != 0].astype(np.float64) - mean).sum()
        std = math.sqrt(squares / max(count, 1)) or 1.0
        for box in blocks(channel.shape):
            values = channel[box]
            values[values != 0] = (values[values != 0] - mean) / std


def _body(image: np.ndarray) -> Box:
    """The box of what is not 0 in any channel; the whole grid where all is."""
    there = [np.zeros(n, bool) for n in image.shape[1:]]
    for box in blocks(image.shape[1:], len(image)):
        found = (image[(slice(None), *box)] != 0).any(0)
        for axis in range(3):
            there[axis][box[axis]] |= found.any(tuple(a for a in range(3) if a != axis))
    if not there[0].any():
        return whole(image.shape[1:])
    return tuple(slice(int(np.argmax(t)), int(len(t) - np.argmax(t[::-1]))) for t in there)
