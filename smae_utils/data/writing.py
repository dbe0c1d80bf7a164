"""Files of predictions."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from smae_utils.atomic import new_file
from smae_utils.data.tasks import Task
from smae_utils.data.volumes import Volume


def write_mask(stem: Path, labels: np.ndarray, task: Task, image: Volume | None) -> Path:
    """Label numbers (*spatial) -> a file with the values of the task's own masks.

    3D as NIfTI on the image's grid, 2D as PNG.
    """
    stored = task.written_labels[labels]
    if image is not None:
        path = stem.with_name(stem.name + ".nii.gz")
        save_nifti(path, stored, image.affine, image.units, "labels: see labels.json")
        return path
    path = stem.with_name(stem.name + ".png")
    with new_file(path) as part:
        Image.fromarray(stored if stored.dtype == np.uint8 else stored.astype(np.uint16)).save(part)
    return path


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray, units: tuple[str, str], text: str) -> None:
    """Write a NIfTI; a kill leaves no half file of its name."""
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units(*(u if u != "unknown" else None for u in units))
    image.header["descrip"] = text[:79]
    with new_file(path) as part:
        nib.save(image, part)
