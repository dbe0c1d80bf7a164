"""MSD Task04_Hippocampus: T1-weighted MRI cut to one hippocampus, its anterior and posterior part.

It is small enough for an evening on two cores. The left and the right hippocampus of one person may be two
cases, and no list says which: they can stand on both sides of any split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smae_utils.data.case import Splits
from smae_utils.data.splits import hold_out
from smae_utils.data.tasks.msd import read_cases
from smae_utils.data.tasks.record import Task
from smae_utils.errors import UserError

TEST_SEED, N_TEST = 2026, 60


def read_splits(data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """60 test cases, drawn once and the same for every seed; a tenth of the others is for validation."""
    cases = read_cases(data_dir, "Task04_Hippocampus")
    if len(cases) < 6:
        raise UserError(
            f"{data_dir} lists {len(cases)} cases of hippocampus: "
            "at least 6 are needed; unpack the download again"
        )
    n_test = min(N_TEST, len(cases) // 4)
    test = set(np.random.default_rng(TEST_SEED).permutation(len(cases))[:n_test].tolist())
    train, val = hold_out([c for i, c in enumerate(cases) if i not in test], 0.1, seed)
    return {"train": train, "val": val, "test": [cases[i] for i in sorted(test)]}


TASK = Task(
    name="hippocampus",
    title="brain MRI, hippocampus",
    kind="segmentation",
    spatial_dims=3,
    channels=("T1w",),
    classes=("anterior", "posterior"),
    read_splits=read_splits,
    spacing_mm=(1.0, 1.0, 1.0),
    sided=True,  # each case is of one side, and no list says which
    source="Medical Segmentation Decathlon, Task04_Hippocampus "
    "(Antonelli et al., arXiv 2106.05735; CC BY-SA 4.0)",
)
