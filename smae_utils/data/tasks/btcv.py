"""BTCV: abdominal CT, 13 organs (Synapse, 'Multi-Atlas Labeling Beyond the Cranial Vault')."""

from __future__ import annotations

import re
from pathlib import Path

from smae_utils.data.case import Splits
from smae_utils.data.splits import hold_out
from smae_utils.data.tasks.record import Task
from smae_utils.data.tasks.registry import existing_folder
from smae_utils.errors import UserError

# TransUNet's split, used by the paper: 18 for training, these 12 for testing.
TEST_IDS = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava",
    "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
PAPER_ORGANS = tuple(ORGANS[i - 1] for i in (1, 2, 3, 4, 6, 7, 8, 11))


def read_splits(data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """Cases of `RawData/Training/{img,label}`.

    A sixth of the training cases is for validation, to be given back after choosing.
    """
    images = existing_folder(data_dir, "RawData/Training/img", "Training/img", "img")
    labels = images.parent / "label"
    found: Splits = {"train": [], "test": []}
    for path in sorted(images.iterdir()):
        match = re.fullmatch(r"img(\d{4})\.nii(\.gz)?", path.name)
        if not match:
            continue
        label = labels / path.name.replace("img", "label")
        if not label.is_file():
            raise UserError(f"{path} has no label: expected {label}")
        case = {"case": f"img{match[1]}", "patient": match[1], "image": str(path), "label": str(label)}
        found["test" if int(match[1]) in TEST_IDS else "train"].append(case)
    if not found["train"]:
        raise UserError(
            f"no training cases img0005.nii.gz, img0006.nii.gz, ... in {images}: "
            "unpack RawData.zip of the BTCV download there"
        )
    train, val = hold_out(found["train"], 1 / 6, seed)
    return {"train": train, "val": val, "test": found["test"]}


TASK = Task(
    name="btcv",
    title="abdominal CT, 13 organs",
    kind="segmentation",
    spatial_dims=3,
    channels=("CT",),
    classes=ORGANS,
    subset=PAPER_ORGANS,
    read_splits=read_splits,
    spacing_mm=(1.5, 1.5, 2.0),
    window=(-175.0, 250.0),
    real_train=18,
    sided=True,
    source="Synapse syn3193805",
)
