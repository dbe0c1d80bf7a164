"""A real 4D scan from nibabel's test data, for masking and pre-training: two volumes as two channels."""

from __future__ import annotations

from pathlib import Path

from smae_utils.data.case import Splits
from smae_utils.data.tasks.record import Task
from smae_utils.data.tasks.registry import existing_folder


def packaged() -> Path:
    """Folder of the file inside the installed nibabel."""
    import nibabel

    return Path(nibabel.__file__).parent / "tests" / "data"


def read_splits(data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """One scan, for training; nothing is held out."""
    path = existing_folder(data_dir, "example4d.nii.gz")
    return {
        "train": [{"case": "example4d", "patient": "example4d", "image": str(path)}],
        "val": [],
        "test": [],
    }


TASK = Task(
    name="example4d",
    title="one real MRI scan from nibabel's test data",
    kind="segmentation",
    spatial_dims=3,
    channels=("volume 1", "volume 2"),
    classes=(),
    read_splits=read_splits,
    spacing_mm=(2.0, 2.0, 2.2),
    packaged=packaged,
    source="nibabel, tests/data/example4d.nii.gz",
)
