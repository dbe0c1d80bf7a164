"""NIH ChestX-ray14: frontal chest radiographs, 14 findings."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from smae_utils.data.case import Splits
from smae_utils.data.splits import hold_out
from smae_utils.data.tasks.record import Task
from smae_utils.data.tasks.registry import existing_folder
from smae_utils.errors import UserError

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation",
    "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


def read_splits(data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """The official lists; a tenth of the training patients is held out for validation.

    Images that were not downloaded are left out.
    """
    table = existing_folder(data_dir, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
    root = table.parent
    rows = _read_table(table)
    files = {
        path.name: path
        for folder in sorted(root.glob("images*"))
        for path in sorted(folder.rglob("*.png"))
        if path.name in rows
    }
    if not files:
        raise UserError(
            f"none of the {len(rows)} images of {table.name} is below {root}/images*: "
            "unpack the image archives there"
        )
    listed = {}
    for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        path = existing_folder(root, name)
        listed[split] = list(map(str.strip, path.read_text(encoding="utf-8-sig").splitlines()))
    cases: Splits = {"train": [], "test": []}
    for split, names in listed.items():
        for name in filter(files.__contains__, names):
            label, patient = rows[name]
            cases[split].append({"case": name, "patient": patient, "image": str(files[name]), "label": label})
    shared = {c["patient"] for c in cases["train"]} & {c["patient"] for c in cases["test"]}
    if shared:
        raise UserError(
            f"{len(shared)} patients stand in both lists, "
            f"patient {min(shared)} for one: use the official split files"
        )
    train, val = hold_out(cases["train"], 0.1, seed)
    return {"train": train, "val": val, "test": cases["test"]}


def _read_table(path: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Image name -> (14 zeros and ones, patient).

    Columns are read by position, up to the names in brackets, which commas split in two.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            header, *rows = list(csv.reader(handle)) or [[]]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error}): download it again") from None
    expected = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID"]
    if header[:4] != expected:
        raise UserError(f"{path} starts with the columns {header[:4]}, expected {expected}")
    for line, row in enumerate(rows, start=2):
        if row and len(row) < 4:
            raise UserError(
                f"{path}, line {line}: {len(row)} columns, "
                f"expected at least {', '.join(expected)}: download it again"
            )
    return {row[0]: (_findings(row[1], path, row[0]), row[3]) for row in rows if row}


def _findings(text: str, path: Path, image: str) -> np.ndarray:
    label = np.zeros(len(FINDINGS), np.float32)
    for name in text.split("|"):
        if name in FINDINGS:
            label[FINDINGS.index(name)] = 1
        elif name != "No Finding":
            raise UserError(
                f"{path}: unknown finding {name!r} of image {image}: "
                f"expected {', '.join(FINDINGS)} or No Finding"
            )
    return label


TASK = Task(
    name="cxr14",
    title="chest X-ray, 14 findings",
    kind="classification",
    spatial_dims=2,
    channels=("radiograph",),
    classes=FINDINGS,
    real_train=86_524,
    read_splits=read_splits,
    source="NIH Clinical Center, ChestX-ray14",
)
