"""The one place that knows DICOM, all through highdicom.

It reads a folder of slices or an enhanced file to a volume, and one image file to pixels. highdicom was
chosen after trying it beside SimpleITK on folders that go wrong in public reports. Both put slices in the
order of their places and rescale each slice by its own numbers. Where a slice is missing, or two
acquisitions lie at one place, SimpleITK only warns and spreads the slices evenly; highdicom refuses.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from smae_utils.errors import UserError
from smae_utils.paths import split_series

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Attributes that tell of which series an image is, and where it lies. Pixels are read later, of one series.
INDEX = [
    "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImageType", "Rows", "Columns",
    "NumberOfFrames", "PhotometricInterpretation",
    "ImagePositionPatient", "ImageOrientationPatient", "SOPClassUID", "SamplesPerPixel",
]  # fmt: skip


def read_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A DICOM series, or one enhanced multi-frame file -> values (X, Y, Z) and affine (4, 4).

    The path is `folder`, `folder#series` or a file. Values are float32, rescaled slice by slice (HU for CT);
    the affine is in mm, RAS+. Files that hold no image, and localizers, are left out.

    Raises:
        UserError: for several series, slices that are missing or lie twice at one place, a tilted gantry,
            colour, or files that cannot be read.
    """
    hd, pydicom = _library(path)
    folder, series = split_series(path)
    files = (
        sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("._"))
        if folder.is_dir()
        else [folder]
    )
    headers = []
    for file in files:
        if found := _header(pydicom, file):
            headers.append((file, found))
    chosen = _one_series(folder, series, headers)
    colour = next(
        (
            h.PhotometricInterpretation
            for _, h in chosen
            if h.get("SamplesPerPixel", 1) > 1 or "PALETTE" in str(h.get("PhotometricInterpretation"))
        ),
        "",
    )
    if colour:
        raise UserError(
            f"{path} holds colour images ({colour}): expected grey values; "
            "export the original series, not a secondary capture"
        )
    if len(chosen) > 1:
        _check_places(folder, [h for _, h in chosen])
    with warnings.catch_warnings():
        # It warns of values that break the standard in ways which do not matter here.
        warnings.simplefilter("ignore")
        try:
            volume = _volume(hd, pydicom, [file for file, _ in chosen])
        except UserError:
            raise
        except Exception as error:  # whatever highdicom, pydicom or a decoder finds wrong with these files
            raise UserError(
                f"cannot read the DICOM series in {path}: {_line(error)}. {_what_to_do(error)}"
            ) from error
    values = volume.array.transpose(2, 1, 0)  # (slice, row, column) -> (column, row, slice)
    affine = LPS_TO_RAS @ volume.affine[:, [2, 1, 0, 3]]
    return np.ascontiguousarray(values, dtype=np.float32), affine


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """One DICOM image as a viewer shows it: (values (H, W) or (H, W, 3), padding (H, W), windowed).

    The modality and VOI transforms, the palette and MONOCHROME1 are applied. Where the file has no VOI
    window, `windowed` is False and the values are the detector's own. Pixels outside the exposed field, which
    the file marks as padding, are True in `padding`.

    Raises:
        UserError: for several frames, or a file that cannot be read.
    """
    hd, _ = _library(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = hd.imread(str(path))
            frames = int(image.number_of_frames)
            if frames > 1:
                raise UserError(
                    f"{path} holds {frames} frames: expected one image; export the frame that is meant"
                )
            stored = image.get_stored_frame(1)
            padding = _padding(image, stored)
            colour = image.get("SamplesPerPixel", 1) > 1 or "PALETTE" in image.PhotometricInterpretation
            if colour:
                values = image.get_frame(1, apply_voi_transform=False, apply_icc_profile=False).astype(
                    np.float64
                )
                return _to_byte_range(values), np.zeros(values.shape[:2], bool), True
            windowed = (
                bool(image.get("VOILUTSequence"))
                or _set(image, "WindowCenter")
                and _set(image, "WindowWidth")
            )
            if not windowed:
                for name in ("WindowCenter", "WindowWidth"):
                    if name in image:
                        del image[name]
            values = image.get_frame(
                1, apply_voi_transform=windowed or None, apply_real_world_transform=False
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"cannot read the DICOM image {path}: {_line(error)}. {_what_to_do(error)}"
            ) from error
    return np.asarray(values, np.float64) * (255 if windowed else 1), padding, windowed


def read_stored(path: str | Path) -> np.ndarray:
    """The stored numbers of one DICOM image (H, W), for masks; nothing is applied to them.

    Raises:
        UserError: for several frames, colours, or a file that cannot be read.
    """
    hd, _ = _library(path)
    try:
        image = hd.imread(str(path))
        values = image.get_stored_frame(1)
    except Exception as error:
        raise UserError(
            f"cannot read the DICOM image {path}: {_line(error)}. {_what_to_do(error)}"
        ) from error
    if values.ndim != 2 or int(image.number_of_frames) > 1:
        raise UserError(f"{path} holds colours or several frames: a mask holds one label value a pixel")
    return values


def _to_byte_range(values: np.ndarray) -> np.ndarray:
    """Colours of 8 or 16 bits -> 0 .. 255."""
    return values / 257 if values.max(initial=0) > 255 else values


def _set(image, name: str) -> bool:
    """Whether an attribute is there with a value: anonymisers leave empty ones."""
    return image.get(name) not in (None, "")


def _padding(image, stored: np.ndarray) -> np.ndarray:
    """Which pixels the file marks as outside the exposed field, by their stored values."""
    if not _set(image, "PixelPaddingValue") or stored.ndim != 2:
        return np.zeros(stored.shape[:2], bool)
    low, high = sorted(
        (
            int(image.PixelPaddingValue),
            int(
                image.PixelPaddingRangeLimit
                if _set(image, "PixelPaddingRangeLimit")
                else image.PixelPaddingValue
            ),
        )
    )
    found = (stored >= low) & (stored <= high)
    return np.zeros_like(found) if found.all() else found


def _library(path: str | Path):
    try:
        import highdicom
        import pydicom
    except ImportError:
        raise UserError(f"{path} is DICOM: pip install 'smae-utils[dicom]' to read it") from None
    return highdicom, pydicom


def _header(pydicom, file: Path):
    """The attributes of `INDEX` of an image file; None for what is no image (texts, DICOMDIR, structures)."""
    try:
        found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=INDEX)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError):
        return None
    except Exception as error:  # pydicom raises whatever a damaged header makes it stumble over
        raise UserError(f"cannot read {file}: {_line(error)}. Copy or export it again") from error
    return found if "Rows" in found and "SeriesInstanceUID" in found else None


def _one_series(folder: Path, series: str, headers: list) -> list:
    """The headers of the series that is meant.

    Raises:
        UserError: where there is none, or more than one and none is named.
    """
    if not headers:
        raise UserError(f"{folder} holds no DICOM images: expected the slices of one series")
    images = [(file, header) for file, header in headers if not _is_localizer(header)] or headers
    found: dict[str, list] = {}
    for file, header in images:
        found.setdefault(str(header.SeriesInstanceUID), []).append((file, header))
    if series:
        wanted = {
            uid: of for uid, of in found.items() if series in (uid, str(of[0][1].get("SeriesNumber", "")))
        }
        if len(wanted) == 1:
            return next(iter(wanted.values()))
        raise UserError(
            f"{folder} holds no single series {series!r}, but {_listing(found)}: "
            "name one by its number or UID"
        )
    if len(found) > 1:
        first = next(iter(found))
        raise UserError(
            f"{folder} holds {len(found)} series, {_listing(found)}: "
            f"choose one by writing {folder}#{first}, or give each a folder"
        )
    return next(iter(found.values()))


def _is_localizer(header) -> bool:
    return "LOCALIZER" in map(str.upper, map(str, header.get("ImageType") or ()))


def _listing(found: dict[str, list]) -> str:
    parts = []
    for uid, of in list(found.items())[:6]:
        header = of[0][1]
        parts.append(
            f"{uid} (number {header.get('SeriesNumber', '?')}, "
            f"{header.get('SeriesDescription', 'no description')!r}, {len(of)} images)"
        )
    return "; ".join(parts) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _check_places(folder: Path, headers: list) -> None:
    """Say in millimetres why slices are no volume; highdicom would refuse them too, in fewer words."""
    if any("ImagePositionPatient" not in h or "ImageOrientationPatient" not in h for h in headers):
        raise UserError(
            f"{folder} has slices that do not say where they lie "
            "(ImagePositionPatient): export the original series"
        )
    sizes = {
        (h.Rows, h.Columns, tuple(np.round(np.array(h.ImageOrientationPatient, float), 3))) for h in headers
    }
    if len(sizes) > 1:
        raise UserError(
            f"{folder} has slices of {len(sizes)} sizes or directions in one series: "
            "keep only the slices of one stack in the folder"
        )
    directions = np.array(headers[0].ImageOrientationPatient, float)
    normal = np.cross(directions[:3], directions[3:])
    places = np.array([h.ImagePositionPatient for h in headers], float)
    along = places @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    twice = int((np.abs(steps) < 1e-3).sum())
    if twice:
        raise UserError(
            f"{folder} has {twice} slices at a place where another one lies (two "
            "acquisitions, echoes or phases, or copies): "
            "keep one of them in the folder, or export them as series of their own"
        )
    usual = float(np.median(steps))
    worst = int(np.argmax(np.abs(steps - usual)))
    if abs(steps[worst] - usual) > max(0.01 * usual, 1e-3):
        raise UserError(
            f"{folder} has slices that are not evenly spaced: {usual:.3g} mm apart, but {steps[worst]:.3g} "
            f"mm after slice {worst + 1} of {len(places)} "
            "(by place): a slice is missing or lies between; export the series again, "
            "or resample it with a tool that fills gaps"
        )
    drift = (places[order[-1]] - places[order[0]]) - (along[order[-1]] - along[order[0]]) * normal
    if np.linalg.norm(drift) > max(0.01 * abs(along[order[-1]] - along[order[0]]), 1e-3):
        raise UserError(
            f"{folder} was taken with a tilted gantry: its slices are shifted by "
            f"{np.linalg.norm(drift):.3g} mm from first to last; "
            "convert it with a tool that straightens such stacks (dcm2niix does), and give the NIfTI file"
        )


def _volume(hd, pydicom, files: list[Path]):
    """highdicom's volume of one series.

    A frame of reference only matters between series: it is filled in where an anonymiser removed it.
    """
    options = {
        "apply_presentation_lut": False,
        "apply_voi_transform": False,
        "apply_real_world_transform": False,
        "dtype": np.float64,
    }
    if len(files) == 1:
        image = pydicom.dcmread(files[0])
        _fill_in(image)
        if int(image.get("NumberOfFrames", 1)) > 1:
            return hd.Image.from_dataset(image, copy=False).get_volume(**options)
        if "SpacingBetweenSlices" not in image and "SliceThickness" in image:
            image.SpacingBetweenSlices = image.SliceThickness
        volume = hd.get_volume_from_series([image], **options)
        affine, thickness = volume.affine.copy(), float(image.get("SpacingBetweenSlices") or 1)
        affine[:3, 0] *= thickness / np.linalg.norm(affine[:3, 0])
        return hd.Volume(volume.array, affine=affine, coordinate_system="PATIENT")
    images = [pydicom.dcmread(file) for file in files]
    for image in images:
        if int(image.get("NumberOfFrames", 1)) > 1:
            raise UserError(f"{files[0].parent} holds several multi-frame files: give one file as the scan")
        _fill_in(image)
    return hd.get_volume_from_series(images, **options)


def _fill_in(image) -> None:
    if "FrameOfReferenceUID" not in image:
        image.FrameOfReferenceUID = "2.25.1"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _what_to_do(error: Exception) -> str:
    if re.search(r"decod|decompress|transfer syntax|plugin", str(error), re.IGNORECASE):
        return (
            "Its pixels are compressed: pip install 'smae-utils[dicom]' brings the "
            "decoders, or export it uncompressed"
        )
    return "Copy or export it again"
