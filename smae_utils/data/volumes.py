"""3D files as they are stored, from any format, to one kind of array with its affine.

Formats: NIfTI, MetaImage, NRRD, MGH and folders of DICOM slices.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from smae_utils.data import dicom
from smae_utils.errors import UserError
from smae_utils.paths import ITK_ENDINGS, NIBABEL_ENDINGS, has_ending, is_dicom, split_series

# What nibabel, zlib and the system raise for a damaged file. Everything else is a mistake of this package,
# and is not blamed on the file.
FILE_ERRORS = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)


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
        """(X, Y, Z), without the channels."""
        return tuple(self.values.shape[1:])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along each axis, by the affine."""
        return tuple(float(s) for s in voxel_sizes(self.affine))


def read_volume(path: str | Path) -> Volume:
    """A scan or a mask from any 3D file that is read here.

    That is: NIfTI (also .hdr/.img pairs), FreeSurfer's .mgz and .mgh, .mha, .mhd, .nrrd, .nhdr, and DICOM.

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
            f"{path} is no 3D scan that is read here (NIfTI, {', '.join(ITK_ENDINGS)}, or a folder of one "
            "DICOM series): convert it first"
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
    # Other formats have no units; some headers hold codes that the standard does not know.
    except (AttributeError, KeyError):
        return "mm", "unknown"


def volume_shape(scan: nib.spatialimages.SpatialImage, path: str) -> tuple[int, ...]:
    """(X, Y, Z, C) of a stored image: 3D, 4D, or 5D as ITK writes channels (X, Y, Z, 1, C).

    Raises:
        UserError: for colours, complex numbers, and arrays of other axes.
    """
    kind = scan.header.get_data_dtype()
    if kind.fields:
        raise UserError(
            f"{path} holds colours (RGB), no grey values: give the original scan, not a coloured copy"
        )
    if kind.kind == "c":
        raise UserError(
            f"{path} holds complex numbers: write their magnitude (np.abs) into a new file and give that"
        )
    shape = tuple(int(n) for n in scan.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if not 3 <= len(shape) <= 4 or min(shape) < 1:
        raise UserError(
            f"{path} has shape {tuple(scan.shape)}: expected a 3D scan (X, Y, Z), with channels (X, Y, Z, C)"
        )
    return shape if len(shape) == 4 else (*shape, 1)


def _channels_first(values: np.ndarray) -> np.ndarray:
    """(X, Y, Z, C) -> (C, X, Y, Z) in the float type that holds the values."""
    wide = values.dtype.kind in "iu" and values.dtype.itemsize > 2 or values.dtype.itemsize > 4
    exact = np.float64 if wide else np.float32
    return np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=exact)


def unreadable(path: str, error: Exception) -> UserError:
    """The error that tells why a file cannot be read, and what to do."""
    line = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist, or its other half (.hdr and .img belong together): {line}")
    if "not a gzip" in line.lower():
        return UserError(
            f"cannot read {path}: its content is not compressed with gzip, though it is called .gz: rename "
            "it, or copy it again"
        )
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
        raise UserError(
            f"{path} has {image.GetDimension()} axes of size {image.GetSize()}: expected a 3D scan"
        )
    values = sitk.GetArrayFromImage(image)
    if np.iscomplexobj(values):
        raise UserError(f"{path} holds complex numbers: write their magnitude into a new file and give that")
    values = values[None] if image.GetNumberOfComponentsPerPixel() == 1 else np.moveaxis(values, -1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(
        _channels_first(np.moveaxis(values.transpose(0, 3, 2, 1), 0, -1)), dicom.LPS_TO_RAS @ affine, path
    )


def check_header(scan: nib.spatialimages.SpatialImage, path: str) -> None:
    """Refuse a NIfTI header in other units than mm, or an affine (4, 4) that is singular.

    With such an affine the voxels lie in a plane, or nowhere. The test does not depend on the size of the
    voxels: those of micro-CT are .008 mm.
    """
    if "xyzt_units" in scan.header and (
        unit := {1: "metres", 3: "micrometres"}.get(int(scan.header["xyzt_units"]) % 8)
    ):
        raise UserError(
            f"the header of {path} counts in {unit}: voxel sizes are taken as mm here; correct the header or "
            "convert the scan"
        )
    axes = scan.affine[:3, :3]
    sizes = np.linalg.norm(axes, axis=0)
    if not np.isfinite(scan.affine).all() or (sizes == 0).any() or abs(np.linalg.det(axes / sizes)) < 1e-4:
        raise UserError(
            f"{path} has a singular affine: its header does not say where the voxels lie; repair it, for "
            "example with its DICOM original"
        )
