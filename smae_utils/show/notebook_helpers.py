"""What every notebook needs at its start: where data and runs are, and phantoms where there is no data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from smae_utils.atomic import new_folder, write_text
from smae_utils.data.batches import read_middle
from smae_utils.data.case import Case
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.lists import is_list
from smae_utils.data.tasks.mni152 import write_list as write_mni152_list
from smae_utils.data.transforms import prepare
from smae_utils.phantoms import DEFAULT_N, write_phantoms
from smae_utils.places import work_root


def data_folder(task: str, data_dir: str = "", seed: int = 0) -> Path:
    """`data_dir`, or, when it is empty, scans that come with a package or a folder of demo phantoms below
    `data/`, written at the first call.
    """
    if data_dir:
        return Path(data_dir)
    if is_list(task):
        return Path(task).absolute().parent  # a link into a store of data counts as lying here
    if packaged := get_task(task).packaged:
        return packaged()
    folder = work_root() / "data" / f"phantom-{task}-seed{seed}"
    if not folder.exists():
        with new_folder(folder) as part:
            write_phantoms(task, part, DEFAULT_N[task], seed)
    return folder


def own_list(task: str, data_dir: str, folder: Path) -> Path:
    """A list file: the one that is given, or one written into `folder` of the MNI152 template or of a few
    scans of a known task.
    """
    if is_list(task):
        return Path(task)
    path = folder / "list.json"
    if path.exists():
        return path
    if task == "mni152":
        return write_mni152_list(folder)
    record = get_task(task)
    splits = record.read_splits(data_folder(task, data_dir), 0, 0)
    n_train, n_test = (60, 30) if record.spatial_dims == 2 else (6, 2)
    training, test = (splits["train"] + splits["val"])[:n_train], splits["test"][:n_test]
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": f"a few scans of {task}",
        "like": task,
        "training": [_entry(case) for case in training],
        "test": [_entry(case) for case in test],
    }
    write_text(path, json.dumps(content, indent=1))
    return path


def _entry(case: Case) -> dict[str, Any]:
    """A case as it stands in a list file; None where nobody knows a class."""
    entry: dict[str, Any] = {**case}
    if not isinstance(case.get("label", ""), str):
        entry["label"] = [None if np.isnan(value) else int(value) for value in case["label"]]
    return entry


def fresh(folder: Path) -> Path:
    """The folder, without what an earlier run of the notebook left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def evidence_table(task: str) -> pd.DataFrame:
    """What the committed study on real scans found for a task: difference of each arm to scratch with its 95
    % interval over seeds; may be empty.
    """
    folder = work_root() / "results" / "evidence" / "real"
    files = sorted(folder.glob(f"{Path(task).stem}*/intervals.csv"))  # a study's name starts with its task's
    return pd.read_csv(files[0], comment="#").round(3) if files else pd.DataFrame()


def versions() -> str:
    """One line of the versions that matter."""
    return "  ".join(
        f"{name} {version(name)}" for name in ("torch", "monai", "timm", "accelerate", "papermill")
    )


def load_crop(
    task: Task, case: Case, crop_size: Sequence[int], spacing_mm: Sequence[float] = ()
) -> torch.Tensor:
    """A prepared scan cut to the model's input around its middle: (C, *crop_size); what the network sees
    whole is resized.
    """
    return read_middle(prepare(task, False, spacing_mm, crop_size), case, crop_size, task.whole)[0]
