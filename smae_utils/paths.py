"""Names of files: which endings are read as what, and what a case is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NIFTI_ENDINGS = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")
NIBABEL_ENDINGS = (*NIFTI_ENDINGS, ".mgz", ".mgh")
ITK_ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
VOLUME_ENDINGS = (*NIBABEL_ENDINGS, *ITK_ENDINGS)
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
FLAT_ENDINGS = (*DICOM_ENDINGS, ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def has_ending(path: str | Path, endings: Sequence[str]) -> bool:
    """Whether a name ends so, in capitals or not."""
    return str(path).lower().endswith(tuple(endings))


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM, by its ending or its content (PACS export without an ending)."""
    if Path(path).is_dir():
        return False
    if has_ending(path, DICOM_ENDINGS):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def split_series(path: str | Path) -> tuple[Path, str]:
    """`folder#series` -> (folder, series); the series is "" if none is named or a file has this very name."""
    folder, sep, series = str(path).rpartition("#")
    return (Path(folder), series) if sep and not Path(path).exists() else (Path(path), "")


def case_name(path: str | Path) -> str:
    """A file's name without its ending; folders, and names whose dots are no ending (DICOM UIDs), whole."""
    folder, series = split_series(path)
    name = folder.name
    if not folder.is_dir():
        endings = sorted((*VOLUME_ENDINGS, *FLAT_ENDINGS), key=len, reverse=True)
        name = next((name[: -len(e)] for e in endings if name.lower().endswith(e)), name)
    return f"{name}_{series}" if series else name
