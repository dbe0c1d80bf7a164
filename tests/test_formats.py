"""A table of what is read and how it is understood: each row makes a small file and compares what is read
with numbers known apart.

`python tests/test_formats.py --write` makes docs/formats.md from the same table.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from smae_utils.cli import main
from smae_utils.data.case import IGNORE
from smae_utils.data.pictures import ReadRadiograph, read_image
from smae_utils.data.reading import read_channels, read_label, read_mask
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.from_run import record_of, task_from_record
from smae_utils.data.volumes import Volume, read_volume
from smae_utils.data.writing import write_mask
from smae_utils.errors import UserError
from smae_utils.paths import case_name
from smae_utils.predict_files import _sizes
from smae_utils.work import check as checking
from smae_utils.work import check_report
from smae_utils.work.build import build_augmentation
from smae_utils.work.evaluation import score_masks
from smae_utils.work.losses import build_loss, known_bce
from smae_utils.work.metrics import mean_auc
from smae_utils.work.settings import FinetuneSettings

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
COMMAND = "python tests/test_formats.py --write"
SHAPE = (4, 5, 6)
VALUES = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
# Voxels of 2 x 3 x 4 mm, turned a little, with a corner away from 0.
TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = TURN * [2, 3, 4], [-11, 7, 5]


@dataclass(frozen=True)
class Row:
    """What one has, how it is understood, and the function that makes it in a folder and proves it."""

    section: str
    have: str
    understood: str
    prove: Callable[[Path], None]

    def __str__(self) -> str:
        return self.have


ROWS: list[Row] = []
SECTION = ""


def section(name: str) -> None:
    """The rows below belong to this part of the page."""
    global SECTION
    SECTION = name


def row(have: str, understood: str):
    """Put the function below into the table."""

    def add(prove: Callable[[Path], None]) -> Callable[[Path], None]:
        ROWS.append(Row(SECTION, have, understood, prove))
        return prove

    return add


def proved_in_test_dicom(have: str, understood: str, test: str, case: str = "") -> None:
    """A row whose proof is a test of tests/test_dicom.py, with the name of its case."""

    def prove(_: Path) -> None:
        text = (Path(__file__).parent / "test_dicom.py").read_text(encoding="utf-8")
        assert f"def {test}(" in text and case in text

    ROWS.append(Row(SECTION, have, understood, prove))


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def is_read_as(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """A file gives these values (C, X, Y, Z) on this grid."""
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.values, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


@contextlib.contextmanager
def refused(*words: str):
    """The block ends with one line for the user that holds these words."""
    with pytest.raises(UserError) as caught:
        yield caught
    for word in words:
        assert word in str(caught.value), caught.value


def checked(file: Path) -> checking.Report:
    """`check` without its half second of measuring the machine."""
    with mock.patch.object(check_report, "estimate", lambda *_, **__: []):
        return checking.check(str(file), say=lambda line: None)


# ------------------------------------------------------------------------------------------------------------
# scans
section("Scans")


@row("`.nii`, `.nii.gz`", "voxels and affine as nibabel gives them")
def _(folder):
    for name in ("a.nii", "a.nii.gz"):
        path = save(folder / name, VALUES)
        is_read_as(path, VALUES[None], nib.load(path).affine)
        assert case_name(path) == "a"


@row("a name in capitals (`SCAN.NII.GZ`)", "the same; the case is called SCAN")
def _(folder):
    (folder / "SCAN.NII.GZ").write_bytes(save(folder / "a.nii.gz", VALUES).read_bytes())
    is_read_as(folder / "SCAN.NII.GZ", VALUES[None])
    assert case_name(folder / "SCAN.NII.GZ") == "SCAN"


@row("a pair of `.hdr` and `.img`", "one scan; either file may be given, both have to be there")
def _(folder):
    nib.save(nib.Nifti1Pair(VALUES, AFFINE), folder / "a.img")
    for name in ("a.img", "a.hdr"):
        is_read_as(folder / name, VALUES[None])
    (folder / "a.img").unlink()
    with refused("a.hdr", "other half"):
        read_volume(folder / "a.hdr")


@row("FreeSurfer's `.mgz`", "voxels and affine as nibabel gives them")
def _(folder):
    nib.save(nib.MGHImage(VALUES.astype(np.float32), AFFINE), folder / "a.mgz")
    is_read_as(folder / "a.mgz", VALUES[None])


def write_itk(path: Path, components: int = 1) -> np.ndarray:
    """A file of SimpleITK; its values (C, X, Y, Z)."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, of the itk extra, is not installed")
    values = np.stack([VALUES + 1000 * c for c in range(components)])
    array = values.transpose(3, 2, 1, 0)  # SimpleITK's arrays have z first and the components last
    image = sitk.GetImageFromArray(array[..., 0] if components == 1 else array, isVector=components > 1)
    image.SetSpacing((2.0, 3.0, 4.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(TURN.ravel().tolist())
    sitk.WriteImage(image, str(path))
    return values


def lies_where_simpleitk_says(path: Path, values: np.ndarray) -> None:
    import SimpleITK as sitk

    theirs, ours = sitk.ReadImage(str(path)), read_volume(path)
    np.testing.assert_array_equal(ours.values, values)
    for index in ([0, 0, 0], [3, 4, 5], [1, 3, 2]):
        left, back, up = theirs.TransformIndexToPhysicalPoint(index)  # ITK counts to the left and to the back
        np.testing.assert_allclose(
            nib.affines.apply_affine(ours.affine, index), [-left, -back, up], atol=1e-6
        )
        assert np.atleast_1d(theirs[index]).tolist() == ours.values[(slice(None), *index)].tolist()


@row(
    "`.mha`, `.mhd`",
    "each voxel where SimpleITK says it lies, in mm, counted to the right, front and head (RAS)",
)
def _(folder):
    for name in ("a.mha", "a.mhd"):
        lies_where_simpleitk_says(folder / name, write_itk(folder / name))


@row("`.nrrd`", "the same")
def _(folder):
    lies_where_simpleitk_says(folder / "a.nrrd", write_itk(folder / "a.nrrd"))


@row("`.mha` or `.nrrd` with two numbers a voxel", "two channels")
def _(folder):
    for name in ("a.mha", "a.nrrd"):
        values = write_itk(folder / name, 2)
        assert len(values) == 2
        lies_where_simpleitk_says(folder / name, values)


@row("a big-endian NIfTI with slope and intercept", "stored number × slope + intercept")
def _(folder):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    header.set_data_shape(SHAPE)
    header.set_sform(AFFINE, 1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = 0.5, -1024, 352, b"n+1"
    (folder / "a.nii").write_bytes(header.binaryblock + b"\0" * 4 + VALUES.astype(">i2").tobytes(order="F"))
    is_read_as(folder / "a.nii", VALUES[None] * 0.5 - 1024)


@row("shape (X, Y, Z, 1)", "one channel")
def _(folder):
    is_read_as(save(folder / "a.nii.gz", VALUES[..., None]), VALUES[None])


@row("shape (X, Y, Z, C)", "C channels")
def _(folder):
    is_read_as(
        save(folder / "a.nii.gz", np.stack([VALUES, VALUES + 7, -VALUES], -1)),
        np.stack([VALUES, VALUES + 7, -VALUES]),
    )


@row("shape (X, Y, Z, 1, C), as ITK writes channels", "C channels")
def _(folder):
    is_read_as(
        save(folder / "a.nii.gz", np.stack([VALUES, VALUES + 7], -1)[:, :, :, None]),
        np.stack([VALUES, VALUES + 7]),
    )


@row("one file a channel: a list of files as `image`", "channels in this order; all have to lie on one grid")
def _(folder):
    one, two = save(folder / "t1.nii.gz", VALUES), save(folder / "t2.nii.gz", VALUES + 7)
    np.testing.assert_array_equal(read_channels([str(two), str(one)]).values, np.stack([VALUES + 7, VALUES]))
    moved = save(folder / "moved.nii.gz", VALUES, AFFINE + np.array([[0, 0, 0, 9.0]] + [[0.0] * 4] * 3))
    with refused("moved.nii.gz", "9 mm away"):
        read_channels([str(one), str(moved)])


@row(
    "micro-CT: voxels of 0.008 mm",
    "a scan like any other: the command `check` proposes 0.008 mm, and volumes in ml keep four digits",
)
def _(folder):
    fine = np.diag([0.008, 0.008, 0.008, 1.0])
    for name, extra in (("a", 0), ("b", 1)):
        save(folder / f"{name}.nii.gz", VALUES + np.int16(extra), fine)
    is_read_as(folder / "a.nii.gz", VALUES[None], fine)
    file = write_json(folder, training=["a.nii.gz", "b.nii.gz"], labels={"1": "bone"})
    report = checked(file)
    assert report.problems == [] and report.proposal["spacing_mm"] == [0.008, 0.008, 0.008]
    mask = np.zeros((30, 30, 30), np.uint8)
    mask[:10, :10, :20] = 1
    bone = mask_task(folder, {"1": "bone"})
    assert _sizes(mask, fine, bone) == {"bone (ml)": pytest.approx(2000 * 0.008**3 / 1000, rel=1e-4)}


@row(
    "a header whose voxel sizes (pixdim) contradict its affine",
    "the affine counts, for voxel sizes and for distances in mm; `check` tells of it",
)
def _(folder):
    affine = np.diag([3.0, 3.0, 4.0, 1.0])
    label = np.zeros(SHAPE, np.uint8)
    label[1, 1:4, 1:5] = 1
    save(folder / "m.nii.gz", label, affine)
    header = nib.Nifti1Header()
    header.set_data_shape(SHAPE)
    header["pixdim"][1:4] = 1, 1, 1
    header.set_sform(affine, 1)
    nib.save(nib.Nifti1Image(VALUES, None, header), folder / "a.nii.gz")
    assert nib.load(folder / "a.nii.gz").header.get_zooms() == (1, 1, 1)
    assert read_volume(folder / "a.nii.gz").spacing_mm == (3, 3, 4)
    file = write_json(folder, training=[{"image": "a.nii.gz", "label": "m.nii.gz"}], labels={"1": "liver"})
    task = get_task(str(file))
    numbers, image = read_label(task.read_splits(Path(""), 0, 0)["train"][0], task)
    shifted = np.roll(numbers, 2, axis=0)  # two voxels of 3 mm further on
    assert score_masks(shifted, numbers, task, image.spacing_mm, "a")[0]["hd95_mm"] == pytest.approx(6)
    assert any(
        "a.nii.gz: voxel sizes 1x1x1 mm, by its affine 3x3x4" in line for line in checked(file).remarks
    )


@row("more bytes behind the end of a `.nii.gz`", "they are left out")
def _(folder):
    values = np.random.default_rng(9).integers(0, 1000, (12, 11, 10)).astype(np.int16)
    whole = save(folder / "a.nii.gz", values).read_bytes()
    variants = {
        "zeros": whole + b"\0" * 512,
        "words": whole + b"words" * 50,
        "inside": gzip.compress(gzip.decompress(whole) + b"words" * 50),
    }
    for name, content in variants.items():
        (folder / f"{name}.nii.gz").write_bytes(content)
        is_read_as(folder / f"{name}.nii.gz", values[None])


@row("a NIfTI of complex numbers", "refused, with its name: write their magnitude into a new file")
def _(folder):
    save(folder / "wave.nii.gz", VALUES.astype(np.complex64))
    with refused("wave.nii.gz", "complex", "magnitude"):
        read_volume(folder / "wave.nii.gz")


@row("a NIfTI of colours (RGB)", "refused, with its name: give the original scan")
def _(folder):
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save(folder / "coloured.nii.gz", colours)
    with refused("coloured.nii.gz", "RGB", "original"):
        read_volume(folder / "coloured.nii.gz")


@row("a time series with channels, shape (X, Y, Z, T, C)", "refused, with its shape")
def _(folder):
    save(folder / "cine.nii.gz", np.zeros((*SHAPE, 3, 2), np.int16))
    with refused("cine.nii.gz", "(4, 5, 6, 3, 2)", "expected a 3D scan"):
        read_volume(folder / "cine.nii.gz")


proved_in_test_dicom(
    "DICOM: a folder that holds one series",
    "one scan; slices lie where their positions say, values are rescaled (HU for CT)",
    "test_a_series_is_read_in_the_patients_space_and_in_hu",
)
proved_in_test_dicom(
    "DICOM: a folder with several series",
    "one has to be named: `folder#series`, by its number or UID",
    "test_of_two_series_in_a_folder_one_has_to_be_chosen",
)
proved_in_test_dicom(
    "DICOM: an enhanced file (a whole series in one file)",
    "the same scan as the series",
    "test_an_enhanced_multi_frame_file_is_the_series_in_one_file",
)
REFUSED = "test_slices_that_are_no_volume_are_refused_with_what_was_found"
proved_in_test_dicom(
    "DICOM: a slice is missing",
    "refused, with the slice behind which the gap is",
    REFUSED,
    "a slice is missing",
)
proved_in_test_dicom(
    "DICOM: two acquisitions in one series",
    "refused: keep one of them in the folder",
    REFUSED,
    "two acquisitions",
)
proved_in_test_dicom(
    "DICOM: a tilted gantry",
    "refused: straighten it first, for example with dcm2niix",
    REFUSED,
    "tilted gantry",
)


# ------------------------------------------------------------------------------------------------------------
# masks
section("Masks")
LABEL = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)


def write_json(folder: Path, file: str = "list.json", **content) -> Path:
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder / file


def mask_task(folder: Path, labels: dict, flat: bool = False) -> Task:
    """The task of a list of one image and its mask, whose values mean `labels`."""
    image, mask = ("i.png", "m.png") if flat else ("i.nii.gz", "m.nii.gz")
    if not (folder / image).exists():
        Image.fromarray(PICTURE).save(folder / image) if flat else save(folder / image, VALUES)
    if not (folder / mask).exists():
        Image.fromarray(np.zeros_like(PICTURE)).save(folder / mask) if flat else save(folder / mask, LABEL)
    return get_task(str(write_json(folder, training=[{"image": image, "label": mask}], labels=labels)))


def numbers_of(folder: Path, stored: np.ndarray, labels: dict) -> tuple[np.ndarray, Task]:
    """A mask file with these values as label numbers, and its task."""
    save(folder / "m.nii.gz", stored)
    task = mask_task(folder, labels)
    return read_label(task.read_splits(Path(""), 0, 0)["train"][0], task)[0], task


def written_back(folder: Path, numbers: np.ndarray, task: Task) -> np.ndarray:
    """Label numbers as they are written for a prediction, read by nibabel."""
    return np.asarray(
        nib.load(
            write_mask(folder / "predicted", numbers, task, Volume(VALUES[None], AFFINE, "i.nii.gz"))
        ).dataobj
    )


def stored_otherwise(
    values: np.ndarray, order: Sequence[int], flips: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels at the same places, counted along other axes and from other corners: values and their
    affine.
    """
    affine = AFFINE.copy()
    for axis in flips:
        affine[:3, 3] += AFFINE[:3, axis] * (values.shape[axis] - 1)
        affine[:3, axis] *= -1
    affine[:3, :3] = affine[:3, order]
    return np.flip(values, flips).transpose(order), affine


def is_brought_over(folder: Path, order: Sequence[int], flips: Sequence[int]) -> None:
    image = read_volume(save(folder / "i.nii.gz", VALUES))
    values, affine = stored_otherwise(LABEL, order, flips)
    stored = nib.load(save(folder / "m.nii.gz", values, affine))
    found = read_mask(folder / "m.nii.gz", image)
    np.testing.assert_array_equal(found, LABEL)
    to_mask = np.linalg.inv(stored.affine) @ AFFINE
    for index in np.ndindex(*SHAPE):  # voxel by voxel, by their places in mm
        there = nib.affines.apply_affine(to_mask, index).round().astype(int)
        assert found[index] == np.asarray(stored.dataobj)[tuple(there)]


@row(
    "a mask counted from other corners (LPS, its image RAS)",
    "turned to the image's axes, voxel for voxel; nothing is resampled",
)
def _(folder):
    is_brought_over(folder, (0, 1, 2), (0, 1))
    assert nib.aff2axcodes(nib.load(folder / "m.nii.gz").affine) == ("L", "P", "S")


@row("a mask whose axes are in another order", "the same")
def _(folder):
    for order, flips in (((2, 0, 1), ()), ((1, 0, 2), (2,)), ((2, 1, 0), (0, 1, 2))):
        is_brought_over(folder, order, flips)


@row(
    "a mask on another grid",
    "refused, with the command `resample`, which writes it on the image's grid by nearest neighbour",
)
def _(folder):
    rough, fine = np.diag([4.0, 4.0, 4.0, 1.0]), np.diag([1.5, 1.5, 1.5, 1.0])
    fine[
        :3, 3
        # The image is larger than the mask; its voxels lie in all parts of the mask's, outer halves too
    ] = -2.9
    label = np.random.default_rng(2).choice([0, 1, 700], (5, 5, 5)).astype(np.int16)
    save(folder / "m m.nii.gz", label, rough)  # a blank in the name: the command quotes it
    image = read_volume(save(folder / "i.nii.gz", np.ones((15, 16, 17), np.int16), fine))
    with refused("m m.nii.gz", "one grid") as caught:
        read_mask(folder / "m m.nii.gz", image)
    words = shlex.split(str(caught.value).split("To resample it: smae ")[1])
    with contextlib.chdir(folder), contextlib.redirect_stdout(None):
        assert words[0] == "resample" and main(words) == 0
    made = nib.load(folder / words[-1])
    np.testing.assert_allclose(made.affine, fine, atol=1e-6)
    nearest = np.stack(
        np.meshgrid(
            *(((np.arange(n) * 1.5 - 2.9) / 4).round().astype(int) for n in (15, 16, 17)), indexing="ij"
        )
    )
    inside = ((nearest >= 0) & (nearest < 5)).all(0)
    expected = np.where(inside, label[tuple(nearest.clip(0, 4))], 0)
    np.testing.assert_array_equal(np.asarray(made.dataobj), expected)
    np.testing.assert_array_equal(read_mask(folder / words[-1], image), expected)


@row("a float mask with 0.9999999", "rounded to 1")
def _(folder):
    numbers, _ = numbers_of(folder, LABEL.astype(np.float64) * 0.9999999, {"1": "liver", "2": "tumour"})
    np.testing.assert_array_equal(numbers, LABEL)


@row("a float mask with 0.5", "refused: a probability map is no mask")
def _(folder):
    with refused("m.nii.gz", "0.5", "probability map"):
        numbers_of(folder, LABEL.astype(np.float32) * 0.5, {"1": "liver", "2": "tumour"})


@row("a mask of shape (X, Y, Z, 1)", "one mask (X, Y, Z)")
def _(folder):
    numbers, _ = numbers_of(folder, LABEL[..., None], {"1": "liver", "2": "tumour"})
    np.testing.assert_array_equal(numbers, LABEL)


@row("values 0, 17, 1002", "numbered 0, 1, 2 for training; predictions are written with 0, 17, 1002")
def _(folder):
    stored = np.array([0, 17, 1002], np.int16)[LABEL]
    numbers, task = numbers_of(folder, stored, {"0": "background", "1002": "tumour", "17": "liver"})
    np.testing.assert_array_equal(numbers, LABEL)
    assert task.label_numbers == {0: 0, 17: 1, 1002: 2} and task.classes == ("liver", "tumour")
    assert task.written_labels.tolist() == [0, 17, 1002]
    np.testing.assert_array_equal(written_back(folder, numbers, task), stored)


STORED = np.random.default_rng(3).integers(0, 4, SHAPE).astype(np.uint8)


@row(
    'nnU-Net\'s `{"kidney": [1, 2], "tumour": 3}`',
    "values 1 and 2 are one class; predictions are written with the first of them",
)
def _(folder):
    numbers, task = numbers_of(folder, STORED, {"background": 0, "kidney": [1, 2], "tumour": 3})
    np.testing.assert_array_equal(numbers, np.select([np.isin(STORED, (1, 2)), STORED == 3], [1, 2]))
    assert task.exclusive and task.classes == ("kidney", "tumour")
    np.testing.assert_array_equal(written_back(folder, numbers, task), np.where(STORED == 2, 1, STORED))


def are_regions(folder: Path, stored: np.ndarray, regions: dict[str, list[int]]) -> None:
    numbers, task = numbers_of(folder, stored, {"background": 0, **regions})
    assert not task.exclusive and task.classes == tuple(regions)
    for found, values in zip(task.class_masks(numbers), regions.values()):
        np.testing.assert_array_equal(found, np.isin(stored, values))
    np.testing.assert_array_equal(written_back(folder, numbers, task), stored)


@row(
    'nnU-Net\'s `{"whole": [1, 2, 3], "core": [2, 3], "active": 3}`',
    "regions that lie in one another, the widest first: each is a class of its own",
)
def _(folder):
    are_regions(folder, STORED, {"whole": [1, 2, 3], "core": [2, 3], "active": [3]})
    with refused("nested", "core"):
        numbers_of(folder, STORED, {"core": [2, 3], "whole": [1, 2, 3]})


@row("BraTS values 1, 2, 4 in regions", "the same; predictions are written with 1, 2, 4")
def _(folder):
    stored = np.array([0, 1, 2, 4], np.uint8)[STORED]
    are_regions(folder, stored, {"whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": [4]})


@row('`"ignore": 3`', "neither the loss nor the scores look at these voxels")
def _(folder):
    for labels in ({"liver": 1, "tumour": 2}, {"whole": [1, 2], "core": [2]}):
        stored = STORED.copy()
        stored[2:] = 3  # half of the scan, so that it can also be cut away
        stored[:2][stored[:2] == 3] = 0
        numbers, task = numbers_of(folder, stored, {**labels, "ignore": 3})
        assert (numbers[2:] == IGNORE).all() and not (numbers[:2] == IGNORE).any()
        loss, rng = build_loss(task), torch.Generator().manual_seed(0)
        logits, label = (
            torch.randn(1, task.out_chans, *SHAPE, generator=rng),
            torch.from_numpy(numbers)[None, None],
        )
        other, elsewhere = logits.clone(), logits.clone()
        other[:, :, 2:] = torch.randn(1, task.out_chans, 2, *SHAPE[1:], generator=rng) * 9
        elsewhere[:, :, :2] += torch.randn(1, task.out_chans, 2, *SHAPE[1:], generator=rng)
        assert loss(other, label) == loss(logits, label) != loss(elsewhere, label)
        assert float(loss(logits, label)) == pytest.approx(
            float(loss(logits[:, :, :2], label[:, :, :2])), rel=1e-5
        )
        predicted = np.random.default_rng(4).integers(0, 3, SHAPE).astype(np.uint8)
        changed = predicted.copy()
        changed[2:] = (changed[2:] + 1) % 3
        rows = [score_masks(p, numbers, task, (2, 3, 4), "a") for p in (predicted, changed)]
        assert rows[0] == rows[1]
        for found, values in zip(rows[0], task.class_values):
            p, t = (np.isin(a[:2], values) for a in (predicted, numbers))
            assert found["dsc"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))


@row('`"background": [0, 3]`', "value 3 is background too")
def _(folder):
    numbers, task = numbers_of(folder, STORED, {"background": [0, 3], "liver": 1, "tumour": 2})
    np.testing.assert_array_equal(numbers, np.where(STORED == 3, 0, STORED))
    assert task.classes == ("liver", "tumour")


def flat_numbers(folder: Path, mask: Image.Image, labels: dict) -> tuple[np.ndarray, Task]:
    """A mask of a picture as label numbers, and its task."""
    mask.save(folder / "m.png")
    task = mask_task(folder, labels, flat=True)
    return read_label(task.read_splits(Path(""), 0, 0)["train"][0], task)[0], task


PICTURE = np.random.default_rng(5).integers(0, 256, (6, 8)).astype(np.uint8)
FLAT = np.random.default_rng(6).integers(0, 3, (6, 8)).astype(np.uint8)


@row("a mask in a PNG of 16 bits", "values as stored, up to 65535")
def _(folder):
    stored = np.array([0, 300, 65535], np.uint16)[FLAT]
    numbers, task = flat_numbers(folder, Image.fromarray(stored), {"300": "left lung", "65535": "right lung"})
    np.testing.assert_array_equal(numbers, FLAT)
    np.testing.assert_array_equal(
        np.asarray(Image.open(write_mask(folder / "predicted", numbers, task, None))), stored
    )


@row("a mask in a PNG with a palette", "the index of each pixel counts, not its colour")
def _(folder):
    image = Image.fromarray(FLAT).copy()
    image.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0])
    assert image.mode == "P"
    numbers, _ = flat_numbers(folder, image, {"1": "heart", "2": "lung"})
    np.testing.assert_array_equal(numbers, FLAT)


@row("a mask in a PNG of one bit", "0 and 1")
def _(folder):
    numbers, _ = flat_numbers(folder, Image.fromarray(FLAT > 0), {"1": "lung"})
    assert Image.open(folder / "m.png").mode == "1"
    np.testing.assert_array_equal(numbers, FLAT > 0)


@row(
    'a mask of 0 and 255, with `{"255": "lung"}`',
    "255 is the class lung; predictions are written with 0 and 255",
)
def _(folder):
    stored = np.where(FLAT > 0, 255, 0).astype(np.uint8)
    numbers, task = flat_numbers(folder, Image.fromarray(stored), {"0": "background", "255": "lung"})
    np.testing.assert_array_equal(numbers, FLAT > 0)
    np.testing.assert_array_equal(
        np.asarray(Image.open(write_mask(folder / "predicted", numbers, task, None))), stored
    )


# ------------------------------------------------------------------------------------------------------------
# pictures
section("Pictures")


def is_turned(number: int, quarters: int) -> Callable[[Path], None]:
    """What a camera stored with this orientation is turned by so many quarters to the left."""

    def prove(folder: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = number
        Image.fromarray(PICTURE).save(folder / "i.png", exif=exif)
        assert Image.open(folder / "i.png").getexif()[0x0112] == number
        np.testing.assert_array_equal(np.asarray(read_image(folder / "i.png")), np.rot90(PICTURE, quarters))
        seen = np.asarray(ReadRadiograph()({"image": str(folder / "i.png")})["image"])
        np.testing.assert_array_equal(seen, np.rot90(PICTURE, quarters))

    return prove


row("EXIF orientation 3", "turned by half a turn")(is_turned(3, 2))
row("EXIF orientation 6", "turned by a quarter to the right")(is_turned(6, -1))
row("EXIF orientation 8", "turned by a quarter to the left")(is_turned(8, 1))


def stored_in_tiff(path: Path, kind: type) -> np.ndarray:
    """The numbers in an uncompressed TIFF of one strip, read without PIL's decoder."""
    with Image.open(path) as file:
        tags, (width, height) = file.tag_v2, file.size
        assert tags[262] == 0 and len(tags[273]) == 1 and tags[259] == 1
        return np.frombuffer(path.read_bytes(), kind, width * height, tags[273][0]).reshape(height, width)


@row("a TIFF of 8 bits in which white is 0", "white as white")
def _(folder):
    Image.fromarray(PICTURE).save(folder / "i.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(
        np.asarray(read_image(folder / "i.tif")), 255 - stored_in_tiff(folder / "i.tif", np.uint8)
    )


DEEP = (PICTURE.astype(np.uint16) * 13 + 400).astype(np.uint16)  # 12 bits in 16


def to_8_bits(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / np.ptp(values) * 255


@row("a TIFF of 16 bits in which white is 0", "white as white, scaled by its own smallest and largest value")
def _(folder):
    Image.fromarray(DEEP).save(folder / "i.tif", tiffinfo={262: 0})
    stored = stored_in_tiff(folder / "i.tif", np.uint16).astype(float)
    assert np.ptp(stored) > 3000
    assert np.abs(np.asarray(read_image(folder / "i.tif")) - to_8_bits(-stored)).max() <= 0.5


@row("a PNG of 16 bits", "scaled to 0 .. 255 by its own smallest and largest value")
def _(folder):
    Image.fromarray(DEEP).save(folder / "i.png")
    assert np.abs(np.asarray(read_image(folder / "i.png")) - to_8_bits(DEEP.astype(float))).max() <= 0.5


@row("a PNG with a palette", "the colours that a viewer shows")
def _(folder):
    image, palette = Image.fromarray(FLAT).copy(), np.array([[9, 9, 9], [250, 0, 0], [0, 200, 100]], np.uint8)
    image.putpalette(palette.ravel().tolist())
    image.save(folder / "i.png")
    np.testing.assert_array_equal(np.asarray(read_image(folder / "i.png")), palette[FLAT])


def over_black(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return grey.astype(float) * alpha / 255


ALPHA = np.random.default_rng(7).choice([0, 128, 255], PICTURE.shape).astype(np.uint8)


@row("a PNG with colours and transparency (RGBA)", "shown over black: what is transparent is black")
def _(folder):
    colours = np.stack([PICTURE, 255 - PICTURE, np.full_like(PICTURE, 200)], -1)
    Image.fromarray(np.dstack([colours, ALPHA])).save(folder / "i.png")
    seen = np.asarray(read_image(folder / "i.png"))
    assert seen.shape == (6, 8, 3) and np.abs(seen - over_black(colours, ALPHA[..., None])).max() <= 1
    assert (seen[ALPHA == 0] == 0).all()


@row("a grey PNG with transparency (LA)", "the same")
def _(folder):
    Image.fromarray(np.dstack([PICTURE, ALPHA])).save(folder / "i.png")
    assert Image.open(folder / "i.png").mode == "LA"
    seen = np.asarray(ReadRadiograph()({"image": str(folder / "i.png")})["image"])
    assert np.abs(seen - over_black(PICTURE, ALPHA)).max() <= 1


@row("a JPEG in printing colours (CMYK)", "the colours that a viewer shows")
def _(folder):
    inks = {(0, 255, 255, 0): (255, 0, 0), (0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for number, (ink, colour) in enumerate(inks.items()):
        path = folder / f"{number}.jpg"
        Image.new("CMYK", (16, 16), ink).save(path)
        assert Image.open(path).mode == "CMYK"
        assert np.abs(np.asarray(read_image(path)).astype(int) - colour).max() <= 3


@row("a TIFF of several pages", "refused: save the one that is meant")
def _(folder):
    Image.fromarray(PICTURE).save(
        folder / "i.tif", save_all=True, append_images=[Image.fromarray(255 - PICTURE)]
    )
    with refused("i.tif", "2 pages"):
        read_image(folder / "i.tif")


@row("an animated GIF called `.png`", "refused: save the picture that is meant")
def _(folder):
    Image.fromarray(PICTURE).save(
        folder / "i.gif", save_all=True, append_images=[Image.fromarray(255 - PICTURE)]
    )
    (folder / "i.gif").rename(folder / "i.png")
    with refused("i.png", "2 pages or frames"):
        read_image(folder / "i.png")


# ------------------------------------------------------------------------------------------------------------
# lists
section("Lists")
TABLE = "image,label,split,patient\ni0.png,sick,train,p0\ni1.png,well,train,p1\n"
TABLE += "i2.png,sick,val,p2\ni3.png,well,test,p3\n"


def pictures(folder: Path, n: int = 4) -> None:
    for i in range(n):
        Image.fromarray(np.roll(PICTURE, i)).save(folder / f"i{i}.png")


def read_table(folder: Path, text: str | bytes, n: int = 4, fold: int = 0) -> tuple[Task, dict]:
    """A CSV list's task and its cases."""
    pictures(folder, n)
    (folder / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    task = get_task(str(folder / "list.csv"))
    return task, task.read_splits(Path(""), 0, fold)


def said(splits: dict) -> dict:
    """(split, patient, label, file's name) of each case."""
    return {
        c["case"]: (split, c["patient"], c["label"].tolist() if "label" in c else None, Path(c["image"]).name)
        for split, cases in splits.items()
        for c in cases
    }


PLAIN = {
    "i0": ("train", "p0", [1, 0], "i0.png"),
    "i1": ("train", "p1", [0, 1], "i1.png"),
    "i2": ("val", "p2", [1, 0], "i2.png"),
    "i3": ("test", "p3", [0, 1], "i3.png"),
}


def says_the_same(folder: Path, content: str | bytes) -> None:
    task, splits = read_table(folder, content)
    assert (task.kind, task.classes) == ("classification", ("sick", "well")) and said(splits) == PLAIN


row("CSV with commas", "a line an image; `split` and `patient` where they are said")(
    lambda folder: says_the_same(folder, TABLE)
)
row("CSV with semicolons", "the same")(lambda folder: says_the_same(folder, TABLE.replace(",", ";")))
row("CSV with tabs", "the same")(lambda folder: says_the_same(folder, TABLE.replace(",", "\t")))
row("CSV in UTF-16", "the same")(lambda folder: says_the_same(folder, TABLE.encode("utf-16")))
row("CSV that starts with a mark of UTF-8 (BOM)", "the same")(
    lambda folder: says_the_same(folder, TABLE.encode("utf-8-sig"))
)


@row("CSV with the row numbers of pandas", "the column without a name is left out, and a note says so")
def _(folder):
    pictures(folder)
    (folder / "plain.csv").write_text(TABLE)
    pd.read_csv(folder / "plain.csv").to_csv(folder / "once.csv")
    pd.read_csv(folder / "once.csv").to_csv(folder / "twice.csv", index=False)
    for name, column in (("once", "''"), ("twice", "'Unnamed: 0'")):
        task = get_task(str(folder / f"{name}.csv"))
        assert task.classes == ("sick", "well") and said(task.read_splits(Path(""), 0, 0)) == PLAIN
        assert [n for n in task.notes if column in n and "left out" in n]


@row(
    "a column `patient_id`, `PatientID` or `subject`",
    "the patient; a list with one patient in two splits is refused",
)
def _(folder):
    for name in ("patient_id", "PatientID", "subject"):
        says_the_same(folder, TABLE.replace("patient", name))
        with refused("patient p0", "train", "val"):
            read_table(folder, TABLE.replace("patient", name).replace("p2", "p0"))


@row(
    "a column or a key that is not known", "left out, and a note says so, with the nearest word that is known"
)
def _(folder):
    task, splits = read_table(folder, TABLE.replace("patient", "pateint"))
    assert any("column 'pateint' is not used here: did you mean 'patient'?" in note for note in task.notes)
    assert {c["patient"] for cases in splits.values() for c in cases} == {"i0", "i1", "i2", "i3"}
    entries = [{"image": f"i{i}.png", "class": "ab"[i % 2], "pateint": "p"} for i in range(4)]
    notes = get_task(str(write_json(folder, training=entries, validaton=[], scanner="x"))).notes
    assert any("key 'pateint' is not used here: did you mean 'patient'?" in note for note in notes)
    assert any("key 'validaton' is not used here: did you mean 'validation'?" in note for note in notes)
    assert "key 'scanner' is not used here" in notes


@row("a column or a key `fold`", "images of fold N validate, the others train; choose by `--set fold=N`")
def _(folder):
    text = "image,label,fold\n" + "".join(f"i{i}.png,{'ab'[i % 2]},{i % 3}\n" for i in range(6))
    entries = [{"image": f"i{i}.png", "class": "ab"[i % 2], "fold": i % 3} for i in range(6)]
    for fold in range(3):
        _, splits = read_table(folder, text, 6, fold)
        json_splits = get_task(str(write_json(folder, training=entries))).read_splits(Path(""), 0, fold)
        for parts in (splits, json_splits):
            assert {c["case"] for c in parts["val"]} == {f"i{fold}", f"i{fold + 3}"} and len(
                parts["train"]
            ) == 4
    with refused("no training entry has fold 7", "0, 1, 2"):
        read_table(folder, text, 6, 7)


@row("a column `label`, `class` or `Finding Labels`", "the class of each image, in words")
def _(folder):
    for name in ("label", "class", "Finding Labels"):
        says_the_same(folder, TABLE.replace("label", name))


def vectors(splits: dict) -> dict[str, list | None]:
    return {case: label for case, (_, _, label, _) in said(splits).items()}


@row("`A | B`", "both classes")
def _(folder):
    task, splits = read_table(
        folder, "image,label\ni0.png,Mass | Nodule\ni1.png,Mass\ni2.png,Nodule|Mass\ni3.png,Nodule\n"
    )
    assert task.classes == ("Mass", "Nodule")
    assert vectors(splits) == {"i0": [1, 1], "i1": [1, 0], "i2": [1, 1], "i3": [0, 1]}


@row("an empty cell for the label", "an image without a label: for pre-training only")
def _(folder):
    for text in (
        TABLE.replace("i1.png,well", "i1.png,"),
        "image,sick,well,split\ni0.png,1,0,\ni1.png,,,\ni2.png,1,0,val\ni3.png,0,1,test\n",
    ):
        _, splits = read_table(folder, text)
        assert vectors(splits) == {"i0": [1, 0], "i1": None, "i2": [1, 0], "i3": [0, 1]}


@row("-1 for a class", "unknown: the loss and the AUC of this class leave the image out")
def _(folder):
    n, rng = 30, np.random.default_rng(8)
    truth = rng.choice([-1, 0, 1], (n, 2))
    text = "image,mass,nodule,split\n" + "".join(f"i{i}.png,{a},{b},test\n" for i, (a, b) in enumerate(truth))
    _, splits = read_table(folder, text, n)
    known, scores = truth >= 0, rng.random((n, 2)).astype(np.float32)
    targets = np.array([c.get("label", [np.nan, np.nan]) for c in splits["test"]], np.float32)
    np.testing.assert_array_equal(np.isfinite(targets), known)
    mean, each = mean_auc(targets, scores)
    expected = [roc_auc_score(truth[known[:, k], k], scores[known[:, k], k]) for k in range(2)]
    np.testing.assert_allclose(each, expected)
    assert mean == pytest.approx(np.mean(expected))
    q, t = scores[known].astype(float), truth[known]
    bce = -(t * np.log(q) + (1 - t) * np.log(1 - q)).mean()
    logits = torch.logit(torch.from_numpy(scores))
    assert float(known_bce(logits, torch.from_numpy(targets))) == pytest.approx(bce, rel=1e-5)
    entries = [{"image": f"i{i}.png", "label": list(map(int, truth[i]))} for i in range(n)]
    cases = get_task(str(write_json(folder, classes=["mass", "nodule"], test=entries))).read_splits(
        Path(""), 0, 0
    )["test"]
    np.testing.assert_array_equal(
        np.array([c.get("label", [np.nan, np.nan]) for c in cases], np.float32), targets
    )


@row("`No Finding`", "none of the classes")
def _(folder):
    task, splits = read_table(
        folder,
        "image,Finding Labels\ni0.png,Mass\ni1.png,No Finding\ni2.png,Mass|Nodule\ni3.png,no finding\n",
    )
    assert task.classes == ("Mass", "Nodule")
    assert vectors(splits) == {"i0": [1, 0], "i1": [0, 0], "i2": [1, 1], "i3": [0, 0]}


@row('a number as label, with `"classes": [...]`', "the class at this place, counted from 0")
def _(folder):
    pictures(folder)
    entries = [{"image": f"i{i}.png", "label": number} for i, number in enumerate((2, 0, 1, 2))]
    task = get_task(str(write_json(folder, classes=["well", "mass", "nodule"], training=entries)))
    assert task.kind == "classification" and task.classes == ("well", "mass", "nodule")
    assert vectors(task.read_splits(Path(""), 0, 0)) == {
        "i0": [0, 0, 1],
        "i1": [1, 0, 0],
        "i2": [0, 1, 0],
        "i3": [0, 0, 1],
    }
    with refused("label of i0 is 3", "0 .. 2"):
        get_task(
            str(
                write_json(
                    folder, classes=["well", "mass", "nodule"], training=[{"image": "i0.png", "label": 3}]
                )
            )
        ).read_splits(Path(""), 0, 0)


def scans(folder: Path, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        save(folder / name, LABEL if "label" in name else VALUES + np.int16(i))


@row(
    "`dataset.json` of the Medical Segmentation Decathlon",
    "scans and masks as listed; test scans, which are bare paths, have no label",
)
def _(folder):
    scans(
        folder,
        [f"{part}/liver_{i}.nii.gz" for i in range(3) for part in ("imagesTr", "labelsTr")]
        + ["imagesTs/liver_7.nii.gz"],
    )
    entries = [
        {"image": f"./imagesTr/liver_{i}.nii.gz", "label": f"./labelsTr/liver_{i}.nii.gz"} for i in range(3)
    ]
    content = {
        "name": "Liver",
        "tensorImageSize": "3D",
        "licence": "CC",
        "release": "1.0",
        "modality": {"0": "CT"},
        "numTraining": 3,
        "numTest": 1,
    }
    content |= {
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": entries,
        "test": ["./imagesTs/liver_7.nii.gz"],
    }
    task = get_task(str(write_json(folder, "dataset.json", **content)))
    splits = task.read_splits(Path(""), 0, 0)
    assert (task.kind, task.channels, task.classes, task.title) == (
        "segmentation",
        ("CT",),
        ("liver", "cancer"),
        "Liver",
    )
    assert not [note for note in task.notes if "not used" in note]
    assert {c["case"] for c in splits["train"] + splits["val"]} == {"liver_0", "liver_1", "liver_2"}
    assert [(c["case"], "label" in c) for c in splits["test"]] == [("liver_7", False)]
    np.testing.assert_array_equal(read_label(splits["train"][0], task)[0], LABEL)


@row(
    "`dataset.json` of nnU-Net's second version",
    "scans are what lies in imagesTr and imagesTs, one file a channel; masks in labelsTr",
)
def _(folder):
    names = [f"imagesTr/br_{i}_000{c}.nii.gz" for i in range(3) for c in range(2)] + [
        f"labelsTr/br_{i}.nii.gz" for i in range(3)
    ]
    scans(folder, [*names, "imagesTs/br_9_0000.nii.gz", "imagesTs/br_9_0001.nii.gz"])
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "edema": 1, "core": 2},
        "numTraining": 3,
    }
    task = get_task(str(write_json(folder, "dataset.json", **content, file_ending=".nii.gz")))
    splits = task.read_splits(Path(""), 0, 0)
    assert (task.kind, task.channels, task.classes) == ("segmentation", ("T1", "FLAIR"), ("edema", "core"))
    cases = {c["case"]: c for c in splits["train"] + splits["val"]}
    assert set(cases) == {"br_0", "br_1", "br_2"} and [(c["case"], "label" in c) for c in splits["test"]] == [
        ("br_9", False)
    ]
    assert [Path(f).name for f in cases["br_1"]["image"]] == ["br_1_0000.nii.gz", "br_1_0001.nii.gz"]
    assert Path(cases["br_1"]["label"]) == folder / "labelsTr" / "br_1.nii.gz"


@row("one scan listed twice, through a link or with `..` in its path", "refused: each scan once")
def _(folder):
    pictures(folder, 2)
    (folder / "sub").mkdir()
    os.symlink(folder / "i0.png", folder / "link.png")
    for again in ("link.png", "sub/../i0.png"):
        entries = [
            {"image": "i0.png", "class": "a"},
            {"image": "i1.png", "class": "b"},
            {"image": again, "class": "a", "case": "again"},
        ]
        with refused("twice", "i0", "again"):
            get_task(str(write_json(folder, training=entries))).read_splits(Path(""), 0, 0)


def mirrored(task: Task) -> bool:
    """Whether augmentation that always flips turns left and right round; front and back go with them, up and
    down always turn.
    """
    none = {"rotate_prob": 0.0, "intensity_prob": 0.0}
    settings = FinetuneSettings(crop_size=SHAPE, flip_prob=1.0, crops_per_scan=1, **none)
    image = torch.from_numpy(VALUES.astype(np.float32))[None]
    (out,) = build_augmentation(task, settings)({"image": image, "label": torch.from_numpy(LABEL)[None]})
    for axes in ((3,), (1, 2, 3)):
        if torch.equal(torch.as_tensor(out["image"]), image.flip(axes)):
            assert torch.equal(
                torch.as_tensor(out["label"])[0].byte(), torch.from_numpy(LABEL).flip([a - 1 for a in axes])
            )
            return len(axes) == 3
    raise AssertionError("neither up-down alone nor all three axes")


def sided_task(folder: Path, names: Sequence[str], **more) -> Task:
    scans(folder, ["a.nii.gz", "a_label.nii.gz"])
    labels = {str(i): name for i, name in enumerate(names, start=1)}
    return get_task(
        str(
            write_json(
                folder, training=[{"image": "a.nii.gz", "label": "a_label.nii.gz"}], labels=labels, **more
            )
        )
    )


@row(
    "classes named by sides (left kidney, kidney_r, LH)",
    "labels have sides: images are not mirrored left-right, and a note says so",
)
def _(folder):
    for name in ("left kidney", "kidney_r", "LH cortex", "Lung-Right"):
        task = sided_task(folder, ["liver", name])
        assert task.sided and not mirrored(task)
        assert any(
            f"the class {name!r} names a side" in note and "does not mirror" in note for note in task.notes
        )


@row(
    'a list that does not say `"sided"`',
    "the same: images are not mirrored left-right, and a note says how to allow it",
)
def _(folder):
    task = sided_task(folder, ["liver", "bright lesion"])
    assert task.sided and not mirrored(task)
    assert any("does not say" in note and '"sided": false' in note for note in task.notes)


@row('`"sided": false`', "images are mirrored left-right in fine-tuning")
def _(folder):
    task = sided_task(folder, ["liver", "tumour"], sided=False)
    assert not task.sided and mirrored(task) and not [note for note in task.notes if "mirror" in note]


@row("a DICOM folder named by its UID", "the case keeps the whole name, dots and all")
def _(folder):
    uids = ["1.2.840.113619.2.55.3", "1.2.840.113619.2.55.4"]
    for uid in uids:
        (folder / uid).mkdir()
    splits = get_task(str(write_json(folder, training=uids))).read_splits(Path(""), 0, 0)
    assert sorted(c["case"] for c in splits["train"] + splits["val"]) == uids


@row(
    "a list that is a link to a file of another name (DVC, DataLad)",
    "read under its own name and from its own folder",
)
def _(folder):
    (folder / "store").mkdir()
    (folder / "store" / "d41d8cd98f").write_text(TABLE)
    (folder / "data").mkdir()
    pictures(folder / "data")
    os.symlink(folder / "store" / "d41d8cd98f", folder / "data" / "list.csv")
    task = get_task(str(folder / "data" / "list.csv"))
    assert task.name == str(folder / "data" / "list.csv") and task.title == "list"
    assert said(task.read_splits(Path(""), 0, 0)) == PLAIN
    assert said(get_task(task.name).read_splits(Path(""), 0, 0)) == PLAIN
    with contextlib.chdir(folder / "data"):
        assert get_task("list.csv").name == task.name


# ------------------------------------------------------------------------------------------------------------
# tests
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_what_is_given_is_understood_as_the_page_says(case, tmp_path):
    case.prove(tmp_path)


def test_a_class_that_the_list_gets_later_does_not_move_those_of_a_run(tmp_path):
    pictures(tmp_path)
    (tmp_path / "list.csv").write_text(TABLE)
    record = json.loads(json.dumps(record_of(get_task(str(tmp_path / "list.csv")))))
    # Stands before the others in the alphabet.
    changed = TABLE.replace("i1.png,well", "i1.png,blurred | well")
    (tmp_path / "list.csv").write_text(changed)
    assert get_task(str(tmp_path / "list.csv")).classes == ("blurred", "sick", "well")
    task = task_from_record(str(tmp_path / "list.csv"), record)
    assert task.classes == ("sick", "well") and said(task.read_splits(Path(""), 0, 0)) == PLAIN
    columns = "image,blurred,well,sick,split,patient\n"  # the same truth in columns of another order
    lines = [
        f"i{i}.png,0,{i % 2},{1 - i % 2},{('train', 'train', 'val', 'test')[i]},p{i}\n" for i in range(4)
    ]
    (tmp_path / "list.csv").write_text(columns + "".join(lines))
    assert said(task.read_splits(Path(""), 0, 0)) == PLAIN


@pytest.mark.parametrize("flat", [True, False], ids=["2D", "3D"])
def test_the_same_image_under_two_names_is_a_problem_in_two_splits_and_a_remark_in_one(flat, tmp_path):
    ending = "png" if flat else "nii.gz"
    for name, extra in (("one", 0), ("copy", 0), ("other", 1), ("last", 2)):
        path = tmp_path / f"{name}.{ending}"
        Image.fromarray(np.roll(PICTURE, extra)).save(path) if flat else save(path, VALUES + np.int16(extra))

    def entries(*names: str) -> list[dict]:
        return [{"image": f"{name}.{ending}", "class": "ab"[number % 2]} for number, name in enumerate(names)]

    apart = checked(
        write_json(
            tmp_path, training=entries("one"), validation=entries("other"), test=entries("copy", "last")
        )
    )
    (problem,) = apart.problems
    assert (
        "several splits" in problem
        and "one (train)" in problem
        and "copy (test)" in problem
        and "other" not in problem
    )
    together = checked(
        write_json(
            tmp_path, training=entries("one", "copy"), validation=entries("other"), test=entries("last")
        )
    )
    assert together.problems == [] and any(
        "several times: one (train), copy (train)" in line for line in together.remarks
    )


def test_the_page_lists_every_row():
    assert len(ROWS) >= 70 and len({r.have for r in ROWS}) == len(ROWS)
    assert PAGE.read_text(encoding="utf-8") == page(), f"run {COMMAND}"


def page() -> str:
    """docs/formats.md: the rows by section."""
    lines = [
        "# What is read, and how it is understood",
        "",
        f"Written by `{COMMAND}` from the cases that the tests run:",
    ]
    lines += [
        "each line is made as a small file and compared with nibabel, SimpleITK, Pillow, "
        "scikit-learn or numbers known beforehand."
    ]
    lines += [
        "The lines on DICOM are proved by tests/test_dicom.py. "
        "What is refused ends with one line that names the file and says what to do.",
        "",
    ]
    for name in dict.fromkeys(r.section for r in ROWS):
        lines += [f"## {name}", "", "| what you have | how it is understood |", "|---|---|"]
        lines += [f"| {cell(r.have)} | {cell(r.understood)} |" for r in ROWS if r.section == name]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def cell(text: str) -> str:
    """Words that may stand in a table: a stroke would end the cell."""
    return re.sub(r"\|", r"\\|", text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"{COMMAND} writes docs/formats.md")
    for case in ROWS:  # nothing is written that is not so
        with tempfile.TemporaryDirectory() as root:
            case.prove(Path(root).resolve())
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {len(ROWS)} rows to {PAGE.name}")
