"""Files to arrays by one rule for checking, training and evaluation, and the checks that refuse what would train or score silently wrong."""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from nibabel.spatialimages import HeaderDataError

from smae_utils.data import dicom
from smae_utils.data.pictures import ReadRadiograph, read_flat_mask, read_image
from smae_utils.data.tasks import Task
from smae_utils.errors import UserError
from smae_utils.paths import ITK_ENDINGS, NIBABEL_ENDINGS, case_name, has_ending, is_dicom, split_series

# What nibabel, zlib and the system raise for a file that is damaged; everything else is a mistake of this package and is not blamed on the file.
FILE_ERRORS = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)
# A float mask may miss an integer by so much: what scaling factors and other tools' nearest neighbours leave.
INTEGER_TOLERANCE = 1e-3


@dataclass
class Volume:
    """A 3D scan or mask as stored.

    Attributes:
        values: (C, X, Y, Z); float32, or float64 where float32 cannot hold them.
        affine: (4, 4) to mm, RAS+; of NIfTI the sform first.
        path: the file or folder it came from.
        units: units of space and time of its header.
    """

    values: np.ndarray
    affine: np.ndarray
    path: str
    units: tuple[str, str] = ("mm", "unknown")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along each axis, by the affine."""
        return tuple(float(s) for s in voxel_sizes(self.affine))


def read_volume(path: str | Path) -> Volume:
    """A scan or a mask from any 3D file that is read here: NIfTI (also .hdr/.img pairs and FreeSurfer's .mgz), .mha, .mhd, .nrrd, DICOM.

    Raises:
        UserError: naming the file, for what cannot be read or is no volume of grey values.
    """
    path = str(path)
    file, series = split_series(path)
    if series or file.is_dir() or is_dicom(path):
        values, affine = dicom.read_volume(path)
        return Volume(values[None], affine, path)
    if has_ending(path, ITK_ENDINGS):
        return _read_itk(path)
    if not has_ending(path, NIBABEL_ENDINGS):
        raise UserError(
            f"{path} is no 3D scan that is read here (NIfTI, {', '.join(ITK_ENDINGS)}, or a folder of one DICOM series): convert it first"
        )
    try:
        scan = nib.load(path)
    except FILE_ERRORS as error:
        raise unreadable(path, error) from error
    check_header(scan, path)
    shape = volume_shape(scan, path)
    try:
        values = np.asarray(scan.dataobj)
    except FILE_ERRORS as error:
        raise unreadable(path, error) from error
    return Volume(_channels_first(values.reshape(shape)), scan.affine, path, units_of(scan))


def units_of(scan: nib.spatialimages.SpatialImage) -> tuple[str, str]:
    """Units of space and time as a NIfTI header has them; other formats count in mm."""
    try:
        return scan.header.get_xyzt_units()
    except (AttributeError, KeyError):  # other formats; codes that the standard does not know
        return "mm", "unknown"


def volume_shape(scan: nib.spatialimages.SpatialImage, path: str) -> tuple[int, ...]:
    """(X, Y, Z, C) of a stored image: 3D, 4D, or 5D as ITK writes channels (X, Y, Z, 1, C).

    Raises:
        UserError: for colours, complex numbers, and arrays of other axes.
    """
    kind = scan.header.get_data_dtype()
    if kind.fields:
        raise UserError(f"{path} holds colours (RGB), no grey values: give the original scan, not a coloured copy")
    if kind.kind == "c":
        raise UserError(f"{path} holds complex numbers: write their magnitude (np.abs) into a new file and give that")
    shape = tuple(int(n) for n in scan.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if not 3 <= len(shape) <= 4 or min(shape) < 1:
        raise UserError(f"{path} has shape {tuple(scan.shape)}: expected a 3D scan (X, Y, Z), with channels (X, Y, Z, C)")
    return shape if len(shape) == 4 else (*shape, 1)


def _channels_first(values: np.ndarray) -> np.ndarray:
    """(X, Y, Z, C) -> (C, X, Y, Z) in the float type that holds the values."""
    wide = values.dtype.kind in "iu" and values.dtype.itemsize > 2 or values.dtype.itemsize > 4
    exact = np.float64 if wide else np.float32
    return np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=exact)


def unreadable(path: str, error: Exception) -> UserError:
    line = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist, or its other half (.hdr and .img belong together): {line}")
    if "not a gzip" in line.lower():
        return UserError(f"cannot read {path}: its content is not compressed with gzip, though it is called .gz: rename it, or copy it again")
    return UserError(f"cannot read {path}: {line}. The file may be cut short: copy or unpack it again")


def _read_itk(path: str) -> Volume:
    """.mha, .mhd and .nrrd, through SimpleITK."""
    try:
        import SimpleITK as sitk
    except ImportError:
        raise UserError(f"{path}: pip install 'smae-utils[itk]' to read {Path(path).suffix}") from None
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        image = sitk.ReadImage(path)
    except RuntimeError as error:
        line = " ".join(str(error).split("\n")[-1].split())[:200]
        raise UserError(f"cannot read {path}: {line}. The file may be cut short: copy it again") from error
    if image.GetDimension() != 3:
        raise UserError(f"{path} has {image.GetDimension()} axes of size {image.GetSize()}: expected a 3D scan")
    values = sitk.GetArrayFromImage(image)
    if np.iscomplexobj(values):
        raise UserError(f"{path} holds complex numbers: write their magnitude into a new file and give that")
    values = values[None] if image.GetNumberOfComponentsPerPixel() == 1 else np.moveaxis(values, -1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(_channels_first(np.moveaxis(values.transpose(0, 3, 2, 1), 0, -1)), dicom.LPS_TO_RAS @ affine, path)


def read_mask(path: str | Path, image: Volume) -> np.ndarray:
    """A mask brought to the axes of its image: (X, Y, Z). Voxels are counted from other corners, none is resampled.

    Raises:
        UserError: for channels, another shape or another place, with what to run.
    """
    mask = read_volume(path)
    if len(mask.values) != 1:
        raise UserError(f"{path} has {len(mask.values)} channels: a mask is one volume of label values (X, Y, Z)")
    values, affine = to_axes_of(image.affine, mask.values[0], mask.affine)
    if values.shape != image.shape:
        raise UserError(
            f"{path} has shape {mask.shape}, its image {image.path} {image.shape}: they must lie on one grid (are they swapped?). {_resample(mask, image)}"
        )
    check_same_place(affine, image.affine, image.shape, str(path), image.path, _resample(mask, image))
    return values


def to_axes_of(target: np.ndarray, values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and flip values (X, Y, Z) with affine (4, 4) so that their axes run as those of `target` (4, 4): (values, affine)."""
    change = ornt_transform(io_orientation(affine), io_orientation(target))
    return np.ascontiguousarray(apply_orientation(values, change)), affine @ inv_ornt_aff(change, values.shape)


def _resample(mask: Volume, image: Volume) -> str:
    """What brings a mask onto its image's grid."""
    new = case_name(mask.path) + "_resampled.nii.gz"
    return f"To resample it: python -m smae_utils resample {shlex.quote(mask.path)} {shlex.quote(image.path)} {shlex.quote(new)}"


def resample_mask(mask: str | Path, image: str | Path, out: str | Path) -> None:
    """Write a mask on the grid of an image by nearest neighbour; what lies outside the mask's own grid is 0.

    Raises:
        UserError: if a file cannot be read, or `out` exists or is no NIfTI name.
    """
    if not has_ending(out, (".nii", ".nii.gz")) or Path(out).exists():
        raise UserError(f"{out} exists or is no NIfTI name (.nii, .nii.gz): give a new name for the resampled mask")
    source, target = read_volume(mask), read_volume(image)
    values = whole_numbers(source.values[0], source.path, "integers")
    kind = np.int16 if np.abs(values).max(initial=0) < 2**15 else np.int32
    if len(source.values) != 1:
        raise UserError(f"{mask} has {len(source.values)} channels: a mask is one volume of label values (X, Y, Z)")
    # "grid-constant" keeps the outer half of the mask's border voxels, which scipy's "constant" sets to 0.
    moved = resample_from_to(nib.Nifti1Image(values.astype(kind), source.affine), (target.shape, target.affine), order=0, mode="grid-constant")
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj).astype(kind), target.affine), out)


def whole_numbers(values: np.ndarray, path: str, expected: str) -> np.ndarray:
    """Label values as integers; floats that miss one by less than `INTEGER_TOLERANCE` are rounded.

    Raises:
        UserError: for fractions.
    """
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    rounded = np.round(values)
    off = np.abs(values - rounded)
    if not np.isfinite(values).all() or off.max(initial=0) > INTEGER_TOLERANCE:
        found = np.unique(values[~(off <= INTEGER_TOLERANCE)])
        some = ", ".join(f"{v:.6g}" for v in found[:6]) + (" and more" if len(found) > 6 else "")
        raise UserError(f"{path} holds values {some}: expected {expected}; is it a probability map or an image?")
    return rounded.astype(np.int64)


class ReadScan(mt.Transform):
    """Files of `image` (several are channels) and, where wanted, `label` -> MetaTensors (C, X, Y, Z) with their affine.

    The label is brought to the axes of the image, see `read_mask`.
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
    meta = {"filename_or_obj": path or image.path, "original_affine": np.asarray(image.affine, float), "spatial_shape": np.array(image.shape)}
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
    """Refuse what would train silently wrong (other channels, NaN, values that are no label) and number the label values from 0."""

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


def encode_labels(values: np.ndarray, task: Task, path: str) -> np.ndarray:
    """Values as stored -> uint8 0 .. label_values - 1, and `tasks.IGNORE` for what the list calls ignore.

    Raises:
        UserError: for values that are no label of the task.
    """
    expected = f"integers {describe_values(task)}"
    whole = whole_numbers(values, path, expected)
    found = np.unique(whole)
    numbers = task.label_numbers
    if strange := [int(v) for v in found if int(v) not in numbers]:
        some = ", ".join(map(str, strange[:8])) + (" and more" if len(strange) > 8 else "")
        hint = (
            ' Name them in "labels"; {"background": [0, VALUE]} in nnU-Net\'s style makes a value background'
            if task.name.endswith((".json", ".csv"))
            else ""
        )
        raise UserError(f"{path} holds values {some}: task {task.title or task.name} expects {expected}.{hint}")
    table = np.array([numbers[int(v)] for v in found], np.uint8)
    return table[np.searchsorted(found, whole)]


def describe_values(task: Task) -> str:
    """The stored label values of a task in words: `0 .. 2`, or `0, 17, 1002`."""
    stored = sorted(task.label_numbers)
    if stored == list(range(len(stored))):
        return f"0 .. {stored[-1]}"
    return ", ".join(map(str, stored[:12])) + (" and more" if len(stored) > 12 else "")


def read_label(case: Mapping[str, Any], task: Task) -> tuple[np.ndarray, Volume | None]:
    """A case's mask as label numbers on the grid of its image, and the image (None for 2D).

    Raises:
        UserError: if a file cannot be read, they do not lie on one grid, or the mask holds values that are no label.
    """
    if task.spatial_dims == 2:
        label = encode_labels(read_flat_mask(case["label"]), task, case["label"])
        width, height = read_image(case["image"]).size
        if label.shape != (height, width):
            raise UserError(f"{case['label']} has {label.shape} pixels, its image {(height, width)}: they must lie on one grid")
        return label, None
    image = read_volume(first_file(case["image"]))
    return encode_labels(read_mask(case["label"], image), task, case["label"]), image


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


def check_header(scan: nib.spatialimages.SpatialImage, path: str) -> None:
    """Refuse a NIfTI header that counts in other units than mm, or an affine (4, 4) by which the voxels lie in a plane, or nowhere.

    Whether an affine is singular does not depend on the size of its voxels: those of micro-CT are .008 mm.
    """
    if "xyzt_units" in scan.header and (unit := {1: "metres", 3: "micrometres"}.get(int(scan.header["xyzt_units"]) % 8)):
        raise UserError(f"the header of {path} counts in {unit}: voxel sizes are taken as mm here; correct the header or convert the scan")
    axes = scan.affine[:3, :3]
    sizes = np.linalg.norm(axes, axis=0)
    if not np.isfinite(scan.affine).all() or (sizes == 0).any() or abs(np.linalg.det(axes / sizes)) < 1e-4:
        raise UserError(f"{path} has a singular affine: its header does not say where the voxels lie; repair it, for example with its DICOM original")


def check_grid(other: tuple, path: str, first: tuple, first_path: str) -> None:
    """Refuse a channel whose grid (shape, affine) is not the first one's."""
    if tuple(other[0]) != tuple(first[0]):
        raise UserError(f"{path} has shape {tuple(other[0])}, {first_path} {tuple(first[0])}: channels must lie on one grid")
    check_same_place(other[1], first[1], other[0], path, first_path)


def contradiction(path: str) -> str:
    """In which way a NIfTI header says two things of where the voxels lie; "" where it does not. Its affine (sform first) is what counts here."""
    scan = nib.load(path)
    if "sform_code" not in scan.header:
        return "an Analyze file does not say which side is left: it is taken as nibabel takes it" if has_ending(path, (".hdr", ".img")) else ""
    sizes, stored = np.asarray(scan.header.get_zooms()[:3], float), voxel_sizes(scan.affine)
    if not np.allclose(sizes, stored, rtol=1e-3, atol=0):
        return f"voxel sizes {by(sizes)} mm, by its affine {by(stored)}"
    if scan.header["sform_code"] > 0 and scan.header["qform_code"] > 0:
        try:
            sform, qform = scan.get_sform(), scan.get_qform()
        except ValueError:
            return "its qform is no rotation"
        off = _farthest_corner(sform, qform, scan.shape)
        if off > 0.5 * stored.min():
            return f"its qform lies up to {off:.3g} mm away from its sform"
    return ""


def by(values: Sequence[float]) -> str:
    """Sizes joined by x, with three digits that matter however small they are."""
    return "x".join(f"{v:.3g}" for v in values)


def _farthest_corner(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """How far, in mm, two affines (4, 4) place a corner of a grid apart, along the worst axis."""
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape[:3]), 1]
    return float(np.abs(corners @ (one - other).T)[:, :3].max())


def check_same_place(label: np.ndarray, image: np.ndarray, shape: Sequence[int], label_path: str, image_path: str, what_to_do: str = "") -> None:
    """Refuse a label whose affine (4, 4) puts its corners half a voxel or more away from where the image has them."""
    off = _farthest_corner(label, image, shape)
    if off > 0.5 * voxel_sizes(image).min():
        what = what_to_do or "resample it onto the image's grid"
        raise UserError(f"{label_path} lies up to {off:.3g} mm away from its image {image_path}, by their affines. {what}")


__all__ = ["CheckCase", "ReadRadiograph", "ReadScan", "Volume", "read_image", "read_mask", "read_volume", "resample_mask"]
