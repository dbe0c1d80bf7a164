"""What every notebook needs at its start: where data and runs are, and phantoms where there is no data."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from smae_utils.data.batches import read_middle
from smae_utils.data.case import Case
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.lists import is_list
from smae_utils.data.tasks.mni152 import write_list as write_mni152_list
from smae_utils.phantoms import DEFAULT_N, write_phantoms
from smae_utils.places import run_folder as run_folder
from smae_utils.places import work_root
from smae_utils.show.linear_probe import linear_probe, read_tokens
from smae_utils.whole import new_folder
from smae_utils.work.build import build_transform
from smae_utils.work.settings import Settings


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
    few = {
        "training": (splits["train"] + splits["val"])[: 60 if record.spatial_dims == 2 else 6],
        "test": splits["test"][: 30 if record.spatial_dims == 2 else 2],
    }
    plain = {
        part: [
            {
                k: v if isinstance(v, str) else [None if np.isnan(x) else int(x) for x in v]
                for k, v in c.items()
            }
            for c in cases
        ]
        for part, cases in few.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": f"a few scans of {task}", "like": task, **plain}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


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


def probe(
    task: Task, settings: Settings, encoder: torch.nn.Module, cases: list[Case], most: int = 60
) -> float:
    """Mean AUC of a linear probe (see `linear_probe`) on the last third of the patients of at most so many
    cases, fitted on the others.

    Returns:
        NaN where there are too few patients, or no class with both outcomes in both parts.
    """
    cases = cases[: most if task.kind == "classification" else most // 5]
    patients = list(dict.fromkeys(case["patient"] for case in cases))
    held_out = set(patients[len(patients) - max(1, len(patients) // 3) :])
    parts = [[case for case in cases if (case["patient"] in held_out) == scored] for scored in (False, True)]
    return linear_probe(*(read_tokens(task, settings, encoder, part) for part in parts))


def versions() -> str:
    """One line of the versions that matter."""
    return "  ".join(
        f"{name} {version(name)}" for name in ("torch", "monai", "timm", "accelerate", "papermill")
    )


def load_crop(task: Task, settings: Settings, case: dict) -> torch.Tensor:
    """A prepared scan cut to the model's input around its middle: (C, *crop_size); what the network sees
    whole is resized.
    """
    return read_middle(
        build_transform(task, settings, with_label=False), case, settings.crop_size, task.whole
    )[0]
