"""A case: one scan or image of a patient, by the paths of its files. Nothing of it is read yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from smae_utils.paths import case_name

# In label images as training holds them: voxels that neither loss nor scores look at.
IGNORE = 255


class Case(TypedDict):
    """Paths and labels of a case.

    What transforms make of it, with tensors in place of paths, is a sample and no `Case`.

    Attributes:
        case: its name, which is also that of its results.
        patient: cases of one patient never stand on both sides of a split.
        image: file, DICOM folder (or folder#series), or the files of its channels.
        label: file of the mask, or for classification a vector of 1, 0 and NaN (unknown); absent if unknown.
    """

    case: str
    patient: str
    image: str | list[str]
    label: NotRequired[str | np.ndarray]


Splits = dict[str, list[Case]]  # "train", "val", "test"


def files_of(image: str | list[str]) -> list[str]:
    """The files of an image, one a channel or one in all."""
    return list(image) if isinstance(image, list) else [image]


def case_of(files: Sequence[str | Path]) -> Case:
    """A case of one image, named after its file. Several files are its channels. The patient is unknown."""
    names = [str(file) for file in files]
    return {"case": case_name(names[0]), "patient": "", "image": names if len(names) > 1 else names[0]}


def without_label(case: Case) -> Case:
    """The image alone."""
    return {"case": case["case"], "patient": case["patient"], "image": case["image"]}
