"""The MNI152 T1 template that comes inside nilearn (the `examples` extra): a real average head. For masking and pre-training."""

from __future__ import annotations

from pathlib import Path

from smae_utils.errors import UserError
from smae_utils.tasks import Splits, Task, existing_folder

NAME = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def packaged() -> Path:
    """Folder of the template inside the installed nilearn.

    Raises:
        UserError: if nilearn is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("nilearn")
    if spec is None:
        raise UserError("the MNI152 template comes with nilearn, which is not installed: pip install nilearn")
    return Path(spec.origin).parent / "datasets" / "data"


def read_splits(data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """One scan, for training; nothing is held out."""
    path = existing_folder(data_dir, NAME)
    return {"train": [{"case": "mni152", "patient": "mni152", "image": str(path)}], "val": [], "test": []}


TASK = Task(
    name="mni152",
    title="the MNI152 T1 template from nilearn",
    kind="segmentation",
    spatial_dims=3,
    channels=("T1w",),
    classes=(),
    read_splits=read_splits,
    spacing_mm=(1.0, 1.0, 1.0),
    packaged=packaged,
    source="nilearn, MNI152 template (ICBM 152 nonlinear symmetric 2009a)",
)
