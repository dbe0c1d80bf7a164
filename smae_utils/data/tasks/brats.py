"""MSD Task01_BrainTumour: four MRI sequences, three overlapping tumour regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smae_utils.data.case import Splits
from smae_utils.data.splits import hold_out
from smae_utils.data.tasks.msd import read_cases
from smae_utils.data.tasks.record import Task
from smae_utils.errors import UserError

FOLDS = 5


def read_splits(data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """Five folds by seed: fold `fold` is the test part, a tenth of the rest is for validation.

    Only `dataset.json` says what exists.
    """
    if not 0 <= fold < FOLDS:
        raise UserError(f"fold must be 0 .. {FOLDS - 1}, got {fold}")
    cases = read_cases(data_dir, "Task01_BrainTumour")
    if len(cases) < FOLDS + 1:
        raise UserError(
            f"{data_dir} lists {len(cases)} cases: at least {FOLDS + 1} are needed for {FOLDS} folds"
        )
    order = np.random.default_rng(seed).permutation(len(cases))
    test = set(order[fold::FOLDS].tolist())
    train, val = hold_out([c for i, c in enumerate(cases) if i not in test], 0.1, seed)
    return {"train": train, "val": val, "test": [cases[i] for i in sorted(test)]}


TASK = Task(
    name="brats",
    title="multi-modal brain MRI, tumour regions",
    kind="segmentation",
    spatial_dims=3,
    channels=("FLAIR", "T1w", "T1gd", "T2w"),
    classes=("WT", "TC", "ET"),
    real_train=387,  # four of five folds of 484
    regions=((1, 2, 3), (2, 3), (3,)),
    read_splits=read_splits,
    spacing_mm=(1.0, 1.0, 1.0),
    source="Medical Segmentation Decathlon, Task01_BrainTumour",
)
