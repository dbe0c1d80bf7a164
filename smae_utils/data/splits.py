"""Cases to training, validation and test part, by patient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from smae_utils.data.case import Case, Splits
from smae_utils.errors import UserError


def read_splits(
    reader: Callable[[Path, int, int], Splits],
    data_dir: str | Path,
    split_seed: int = 0,
    fold: int = 0,
    test_share: float = 0.0,
    train_on_val: bool = False,
) -> Splits:
    """Train, validation and test cases of a data folder.

    Args:
        reader: `Task.read_splits` of the task, which knows the folder.
        data_dir: where the download lies.
        split_seed, fold: as it takes them.
        test_share: where no test case has a label, this share of the labelled patients is the test part.
        train_on_val: give the validation cases back to the training ones.
    """
    splits = reader(Path(data_dir), split_seed, fold)
    if test_share and not any("label" in c for c in splits["test"]):
        splits = hold_out_test(splits, test_share, split_seed)
    if train_on_val:
        names = {c["case"] for c in splits["val"]}
        train = sorted(splits["train"] + splits["val"], key=lambda c: c["case"])
        splits = {"train": train, "val": [], "test": [c for c in splits["test"] if c["case"] not in names]}
    return splits


def hold_out(cases: list[Case], share: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Split a part off **by patient**, at least one patient: (rest, part), both in their old order."""
    patients = sorted({c["patient"] for c in cases})
    if len(patients) < 2:
        raise UserError(
            f"{len(cases)} training cases of {len(patients)} patient: at least 2 patients are needed to hold "
            "one out for validation"
        )
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count]}
    return [c for c in cases if c["patient"] not in chosen], [c for c in cases if c["patient"] in chosen]


def hold_out_test(splits: Splits, share: float, seed: int) -> Splits:
    """Draw test cases from the labelled training and validation cases, by patient.

    Validation keeps its share of the rest.
    """
    labelled = [c for c in splits["train"] + splits["val"] if "label" in c]
    _, test = hold_out(labelled, share, seed)
    patients = {c["patient"] for c in test}
    rest = {part: [c for c in splits[part] if c["patient"] not in patients] for part in ("train", "val")}
    if not rest["val"] and len({c["patient"] for c in rest["train"]}) > 1:
        rest["train"], rest["val"] = hold_out(rest["train"], 0.1, seed)
    return {**rest, "test": test}
