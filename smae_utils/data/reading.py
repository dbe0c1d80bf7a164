"""Files to arrays by one rule, and the checks that refuse what would train or score silently wrong.

Checking, training and evaluation all read in this way.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.processing import resample_from_to

from smae_utils.atomic import new_file
from smae_utils.data.labels import encode_labels, whole_numbers
from smae_utils.data.pictures import read_flat_mask, read_image
from smae_utils.data.same_place import check_grid, check_same_place
from smae_utils.data.tasks import Task
from smae_utils.data.volumes import Volume, read_volume
from smae_utils.errors import UserError
from smae_utils.paths import case_name, has_ending


def read_mask(path: str | Path, image: Volume) -> np.ndarray:
    """A mask (X, Y, Z) brought to the axes of its image: turned and flipped, not resampled.

    Raises:
        UserError: for channels, another shape or another place, with what to run.
    """
    mask = read_volume(path)
    if len(mask.values) != 1:
        raise UserError(
            f"{path} has {len(mask.values)} channels: a mask is one volume of label values (X, Y, Z)"
        )
    values, affine = to_axes_of(image.affine, mask.values[0], mask.affine)
    if values.shape != image.shape:
        raise UserError(
            f"{path} has shape {mask.shape}, its image {image.path} {image.shape}: they must lie on one grid "
            f"(are they swapped?). {_resample(mask, image)}"
        )
    check_same_place(affine, image.affine, image.shape, str(path), image.path, _resample(mask, image))
    return values


def to_axes_of(target: np.ndarray, values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and flip values (X, Y, Z) with affine (4, 4) so that their axes run as those of `target` (4, 4).

    Returns the new values and their affine.
    """
    change = ornt_transform(io_orientation(affine), io_orientation(target))
    return np.ascontiguousarray(apply_orientation(values, change)), affine @ inv_ornt_aff(
        change, values.shape
    )


def _resample(mask: Volume, image: Volume) -> str:
    """What brings a mask onto its image's grid."""
    new = case_name(mask.path) + "_resampled.nii.gz"
    return (
        f"To resample it: smae resample {shlex.quote(mask.path)} {shlex.quote(image.path)} {shlex.quote(new)}"
    )


def resample_mask(mask: str | Path, image: str | Path, out: str | Path) -> None:
    """Write a mask on the grid of an image by nearest neighbour; what lies outside the mask's own grid is 0.

    Raises:
        UserError: if a file cannot be read, or `out` exists or is no NIfTI name.
    """
    if not has_ending(out, (".nii", ".nii.gz")) or Path(out).exists():
        raise UserError(
            f"{out} exists or is no NIfTI name (.nii, .nii.gz): give a new name for the resampled mask"
        )
    source, target = read_volume(mask), read_volume(image)
    values = whole_numbers(source.values[0], source.path, "integers")
    kind = np.int16 if np.abs(values).max(initial=0) < 2**15 else np.int32
    if len(source.values) != 1:
        raise UserError(
            f"{mask} has {len(source.values)} channels: a mask is one volume of label values (X, Y, Z)"
        )
    # "grid-constant" keeps the outer half of the mask's border voxels, which scipy's "constant" sets to 0.
    moved = resample_from_to(
        nib.Nifti1Image(values.astype(kind), source.affine),
        (target.shape, target.affine),
        order=0,
        mode="grid-constant",
    )
    with new_file(Path(out)) as part:
        nib.save(nib.Nifti1Image(np.asarray(moved.dataobj).astype(kind), target.affine), part)


class ReadScan(mt.Transform):
    """Files of `image`, and of `label` where wanted -> MetaTensors (C, X, Y, Z) with their affine.

    Several files of an image are its channels. The label is brought to the axes
    of the image, see `read_mask`.
    """

    def __init__(self, keys: Sequence[str]):
        self.keys = keys

    def __call__(self, data: dict) -> dict:
        image = read_channels(data["image"]) if "image" in data else None
        out = dict(data)
        if "image" in self.keys:
            out["image"] = _tensor(image.values.astype(np.float32, copy=False), image)
        if "label" in self.keys:
            out["label"] = _tensor(read_mask(data["label"], image)[None], image, str(data["label"]))
        return out


def _tensor(values: np.ndarray, image: Volume, path: str = "") -> MetaTensor:
    affine = torch.from_numpy(np.asarray(image.affine, float))
    meta = {
        "filename_or_obj": path or image.path,
        "original_affine": np.asarray(image.affine, float),
        "spatial_shape": np.array(image.shape),
    }
    return MetaTensor(torch.from_numpy(values), affine=affine, meta=meta)


def read_channels(image: str | Sequence[str]) -> Volume:
    """A scan of one file, or of several that are its channels in order.

    Raises:
        UserError: where channels do not lie on one grid.
    """
    files = [image] if isinstance(image, (str, Path)) else list(image)
    first, *others = (read_volume(f) for f in files)
    for other in others:
        check_grid((other.shape, other.affine), other.path, (first.shape, first.affine), first.path)
    if others:
        first.values = np.concatenate([first.values, *(o.values for o in others)])
    return first


class CheckCase(mt.Transform):
    """Refuse what would train silently wrong, and number the label values from 0.

    That is: other channels, NaN, and values that are no label.
    """

    def __init__(self, task: Task, with_label: bool):
        self.task, self.with_label = task, with_label

    def __call__(self, data: dict) -> dict:
        image, name = data["image"], data["image"].meta["filename_or_obj"]
        check_channels(image.shape[0], tuple(image.shape[1:]), self.task, name)
        check_finite(image.as_tensor().numpy(), name)
        if self.with_label:
            label, path = data["label"], data["label"].meta["filename_or_obj"]
            numbered = encode_labels(label.as_tensor().numpy(), self.task, path)
            data = {**data, "label": MetaTensor(torch.from_numpy(numbered), meta=label.meta)}
        return data


def first_file(image: str | Sequence[str]) -> str:
    """The file that says where a scan lies; channels in several files share one grid."""
    return image if isinstance(image, str) else image[0]


def check_channels(channels: int, shape: tuple[int, ...], task: Task, path: str) -> None:
    """Refuse a scan of other channels or dimensions than the task's."""
    if len(shape) != task.spatial_dims or channels != task.in_chans:
        raise UserError(
            f"{path} has {channels} channels of shape {tuple(shape)}: task {task.name} expects "
            f"{task.in_chans} ({', '.join(task.channels)}) in {task.spatial_dims}D"
        )


def check_finite(values: np.ndarray, path: str) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinite values: repair or leave out this scan")


def read_label(case: Mapping[str, Any], task: Task) -> tuple[np.ndarray, Volume | None]:
    """A case's mask as label numbers on the grid of its image, and the image (None for 2D).

    Raises:
        UserError: if a file cannot be read, they lie on different grids, or a mask value is no label.
    """
    if task.spatial_dims == 2:
        label = encode_labels(read_flat_mask(case["label"]), task, case["label"])
        width, height = read_image(case["image"]).size
        if label.shape != (height, width):
            raise UserError(
                f"{case['label']} has {label.shape} pixels, "
                f"its image {(height, width)}: they must lie on one grid"
            )
        return label, None
    image = read_volume(first_file(case["image"]))
    return encode_labels(read_mask(case["label"], image), task, case["label"]), image
