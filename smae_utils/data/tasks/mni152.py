"""The MNI152 T1 template inside nilearn (the `examples` extra), for masking and pre-training.

It is an average of real heads.
"""

from __future__ import annotations

import json
from pathlib import Path

from smae_utils.atomic import write_text
from smae_utils.data.case import Splits
from smae_utils.data.tasks.record import Task
from smae_utils.data.tasks.registry import existing_folder
from smae_utils.errors import UserError

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


def write_list(out: Path) -> Path:
    """Write the template cut into four quarters, as if they were scans, and the list that makes them a task.

    Masks hold grey matter (1) and white matter (2). One head is no data set: this is for trying the way that
    own scans go. Three quarters are for training, the right front one for testing.
    """
    import nibabel as nib
    import numpy as np

    folder = packaged()
    images = {name: nib.load(folder / NAME.replace("_t1_", f"_{name}_")) for name in ("t1", "gm", "wm")}
    arrays = {name: np.asarray(image.dataobj) for name, image in images.items()}
    tissue = np.stack([arrays["gm"], arrays["wm"]])
    label = np.where(tissue.max(0) > 0.5 * tissue.max(), tissue.argmax(0) + 1, 0).astype(np.uint8)
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, (i, j) in {
        "left_back": (0, 0),
        "left_front": (0, 1),
        "right_back": (1, 0),
        "right_front": (1, 1),
    }.items():
        half = [n // 2 for n in label.shape[:2]]
        place = (slice(i * half[0], (i + 1) * half[0]), slice(j * half[1], (j + 1) * half[1]))
        affine = images["t1"].affine.copy()
        affine[:3, 3] = (images["t1"].affine @ [i * half[0], j * half[1], 0, 1])[:3]
        nib.save(nib.Nifti1Image(arrays["t1"][place].astype(np.float32), affine), out / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(label[place], affine), out / f"{name}_label.nii.gz")
        entries.append({"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz", "patient": name})
    content = {
        "name": "tissue", "labels": {"0": "background", "1": "grey matter", "2": "white matter"},
        "modality": {"0": "T1w"}, "spacing_mm": [3, 3, 3],
        "settings": {
            "crop_size": [32, 32, 32],
            "pretrain": {"steps": 200, "batch_size": 2, "crops_per_scan": 4, "lr": 1e-3},
            "finetune": {"steps": 150, "batch_size": 2, "train_on_val": True, "ce_weight_power": 0.5},
        },
        "training": entries[:3], "test": entries[3:],
    }  # fmt: skip
    path = out / "list.json"
    write_text(path, json.dumps(content, indent=1))
    return path


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
