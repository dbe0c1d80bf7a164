"""Files to arrays, and the checks that refuse what would train or score silently wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor, PydicomReader
from PIL import Image, UnidentifiedImageError

from smae_utils.errors import UserError
from smae_utils.tasks import Task

# Where pydicom is installed, MONAI tells at each scan, NIfTI too, that a decoder for GPUs is not: nobody asked for it.
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")


class ReadScan(mt.Transform):
    """NIfTI and what else MONAI reads by its ending, a folder of one DICOM series, or several files as channels -> (C, X, Y, Z)."""

    def __init__(self, keys: Sequence[str]):
        self.keys = keys

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.keys:
            files = data[key] if isinstance(data[key], (list, tuple)) else [data[key]]
            headers = []
            if all(str(f).endswith((".nii", ".nii.gz")) for f in files):
                headers = [nib.load(f) for f in files]
                for header, f in zip(headers, files):
                    check_header(header, str(f))
                reader = mt.LoadImage("NibabelReader", image_only=True, ensure_channel_first=True)
            elif Path(files[0]).is_dir():
                reader = mt.LoadImage(_dicom_reader(files[0]), image_only=True, ensure_channel_first=True)
            else:
                raise UserError(f"{files[0]} is no NIfTI file (.nii, .nii.gz) and no folder of a DICOM series: convert it first")
            parts = [reader(str(f)) for f in files]
            # As viewers take it, sform first: MONAI takes the qform, even one that is not set, where the voxel sizes contradict the sform.
            for part, header in zip(parts, headers):
                part.affine, part.meta["original_affine"] = torch.from_numpy(header.affine), header.affine
            for other, name in zip(parts[1:], files[1:]):
                check_grid((other.shape[1:], np.asarray(other.affine)), str(name), (parts[0].shape[1:], np.asarray(parts[0].affine)), str(files[0]))
            joined = torch.cat([p.as_tensor() for p in parts]) if len(parts) > 1 else parts[0].as_tensor()
            out[key] = MetaTensor(joined, meta={**parts[0].meta, "filename_or_obj": str(files[0])})
        return out


def _dicom_reader(folder: str):
    try:
        import pydicom  # noqa: F401 (MONAI asks for it only when a file is read)
    except ImportError:
        raise UserError(f"{folder} is a DICOM folder: pip install 'smae-utils[dicom]' to read it") from None
    return PydicomReader()


class CheckCase(mt.Transform):
    """Refuse what would train silently wrong: other channels, another grid of the label, NaN, values that are no label."""

    def __init__(self, task: Task, with_label: bool):
        self.task, self.with_label = task, with_label

    def __call__(self, data: dict) -> dict:
        image, name = data["image"], data["image"].meta["filename_or_obj"]
        check_channels(image.shape[0], tuple(image.shape[1:]), self.task, name)
        check_finite(image.as_tensor().numpy(), name)
        if self.with_label:
            label, path = data["label"], data["label"].meta["filename_or_obj"]
            if label.shape[1:] != image.shape[1:]:
                raise UserError(f"{path} has shape {tuple(label.shape[1:])}, its image {name} {tuple(image.shape[1:])}: they must lie on one grid")
            check_same_place(np.asarray(label.affine), np.asarray(image.affine), image.shape[1:], path, name)
            check_label_values(label.as_tensor().numpy(), self.task, path)
        return data


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


def check_header(scan: nib.Nifti1Image, path: str) -> None:
    """Refuse a NIfTI header that counts in other units than mm, or an affine (4, 4) by which the voxels lie in a plane, or nowhere."""
    if unit := {1: "metres", 3: "micrometres"}.get(int(scan.header["xyzt_units"]) % 8):
        raise UserError(f"the header of {path} counts in {unit}: voxel sizes are taken as mm here; correct the header or convert the scan")
    affine = scan.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise UserError(f"{path} has a singular affine: its header does not say where the voxels lie; repair it, for example with its DICOM original")


def check_grid(other: tuple, path: str, first: tuple, first_path: str) -> None:
    """Refuse a channel whose grid (shape, affine) is not the first one's."""
    if tuple(other[0]) != tuple(first[0]):
        raise UserError(f"{path} has shape {tuple(other[0])}, {first_path} {tuple(first[0])}: channels must lie on one grid")
    check_same_place(other[1], first[1], other[0], path, first_path)


def contradiction(path: str) -> str:
    """In which way a NIfTI header says two things of where the voxels lie; "" where it does not. Its affine (sform first) is what counts here."""
    scan = nib.load(path)
    sizes, stored = np.asarray(scan.header.get_zooms()[:3], float), np.linalg.norm(scan.affine[:3, :3], axis=0)
    if not np.allclose(sizes, stored, rtol=1e-3):
        return f"voxel sizes {_by(sizes)} mm, by its affine {_by(stored)}"
    if scan.header["sform_code"] > 0 and scan.header["qform_code"] > 0:
        try:
            sform, qform = scan.get_sform(), scan.get_qform()
        except ValueError:
            return "its qform is no rotation"
        off = _farthest_corner(sform, qform, scan.shape)
        if off > 0.5 * stored.min():
            return f"its qform lies up to {off:.1f} mm away from its sform"
    return ""


def _by(values: np.ndarray) -> str:
    return "x".join(f"{v:.2f}" for v in values)


def _farthest_corner(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """How far, in mm, two affines (4, 4) place a corner of a grid apart, along the worst axis."""
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape[:3]), 1]
    return float(np.abs(corners @ (one - other).T)[:, :3].max())


def check_same_place(label: np.ndarray, image: np.ndarray, shape: Sequence[int], label_path: str, image_path: str) -> None:
    """Refuse a label whose affine (4, 4) puts its corners half a voxel or more away from where the image has them."""
    off = _farthest_corner(label, image, shape)
    voxel = np.linalg.norm(image[:3, :3], axis=0).min()
    if off > 0.5 * voxel:
        raise UserError(
            f"{label_path} lies up to {off:.1f} mm away from its image {image_path}, by their affines: resample the label onto the image's grid"
        )


def check_label_values(values: np.ndarray, task: Task, path: str) -> None:
    """Refuse values that are no label of the task."""
    found = np.unique(values)
    if (found != np.round(found)).any() or found.min() < 0 or found.max() >= task.label_values:
        some = ", ".join(f"{v:g}" for v in found[:8]) + (" and more" if len(found) > 8 else "")
        raise UserError(f"{path} holds values {some}: task {task.name} expects integers 0 .. {task.label_values - 1}")


class ReadRadiograph(mt.Transform):
    """PNG, JPEG or DICOM -> 8-bit PIL image (grey, or RGB for three channels) with rows from the top, and the mean and std of the whole in 0..1.

    PIL, not MONAI's PILReader, which transposes: left and right would change places with up and down.
    """

    def __init__(self, in_chans: int = 1):
        if in_chans not in (1, 3):
            raise UserError(f"2D images have 1 channel (grey) or 3 (RGB), the task wants {in_chans}")
        self.mode = "L" if in_chans == 1 else "RGB"

    def __call__(self, data: dict) -> dict:
        image = read_image(data["image"]).convert(self.mode)
        pixels = np.asarray(image, np.float32) / 255
        return {**data, "image": image, "mean": float(pixels.mean()), "std": float(max(pixels.std(), 1e-3))}


def read_image(path: str) -> Image.Image:
    """A 2D image file as 8-bit PIL image; 16-bit ones are scaled by their own range.

    Raises:
        UserError: if it cannot be read, or is no 2D image.
    """
    try:
        if str(path).lower().endswith((".dcm", ".dicom")):
            return _read_dicom(path)
        with Image.open(path) as file:
            if not file.mode.startswith(("I", "F")):
                return file.convert("RGB") if file.mode not in ("L", "1") else file.convert("L")
            return _to_8_bit(np.asarray(file, np.float64))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}. Download, copy or unpack it again") from None


def _to_8_bit(values: np.ndarray) -> Image.Image:
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"expected a grey 2D image of finite values, got shape {values.shape}")
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) / max(high - low, 1e-9) * 255).round().astype(np.uint8))


def _read_dicom(path: str) -> Image.Image:
    """Through pydicom; MONOCHROME1 (white is low) is turned round."""
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path} is DICOM: pip install 'smae-utils[dicom]' to read it") from None
    try:
        file = pydicom.dcmread(path)
        values = np.asarray(file.pixel_array, np.float64)
    except (pydicom.errors.InvalidDicomError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"no readable DICOM image: {error}") from None
    return _to_8_bit(-values if file.get("PhotometricInterpretation") == "MONOCHROME1" else values)
