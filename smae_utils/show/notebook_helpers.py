"""What every notebook needs at its start: where data and runs are, and phantoms where there is no data."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from smae_utils.data.batches import read_case
from smae_utils.data.case import IGNORE
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.lists import is_list
from smae_utils.data.tasks.mni152 import write_list as write_mni152_list
from smae_utils.data.transforms import ResizeRadiograph, middle, resize
from smae_utils.method.patches import patchify
from smae_utils.phantoms import DEFAULT_N, write_phantoms
from smae_utils.places import work_root
from smae_utils.work.build import build_transform
from smae_utils.work.settings import Settings


def data_folder(task: str, data_dir: str = "", seed: int = 0) -> Path:
    """`data_dir`, or, when it is empty, scans that come with a package or a folder of demo phantoms below `data/`, written at the first call."""
    if data_dir:
        return Path(data_dir)
    if is_list(task):
        return Path(task).absolute().parent  # a link into a store of data counts as lying here
    if packaged := get_task(task).packaged:
        return packaged()
    folder = work_root() / "data" / f"phantom-{task}-seed{seed}"
    if not folder.exists():
        # Written beside and renamed: a kill leaves no half data set that looks whole.
        part = folder.with_name(folder.name + ".part")
        if part.exists():
            shutil.rmtree(part)
        write_phantoms(task, part, DEFAULT_N[task], seed)
        part.rename(folder)
    return folder


def own_list(task: str, data_dir: str, folder: Path) -> Path:
    """A list file: the one that is given, or one written into `folder` of the MNI152 template or of a few scans of a known task."""
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
        part: [{k: v if isinstance(v, str) else [None if np.isnan(x) else int(x) for x in v] for k, v in c.items()} for c in cases]
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
    """What the committed study on real scans found for a task: difference of each arm to scratch with its 95 % interval over seeds; may be empty."""
    file = work_root() / "results" / "evidence" / "real" / Path(task).stem / "intervals.csv"
    return pd.read_csv(file, comment="#").round(3) if file.is_file() else pd.DataFrame()


def run_folder(task: str, run_dir: str = "", preset: str = "demo", seed: int = 0) -> Path:
    """`run_dir`, or `runs/TASK-PRESET-seedN` below the project."""
    return Path(run_dir) if run_dir else work_root() / "runs" / f"{Path(task).stem}-{Path(preset).stem}-seed{seed}"


def probe(task: Task, settings: Settings, encoder: torch.nn.Module, cases: list[dict], most: int = 60) -> float:
    """How well a linear model reads labels off an encoder's tokens: AUC on the last third of at most so many cases, fitted on the others.

    Masks: is more than a tenth of a patch structure, from its token. Classes: the first class with both outcomes, from the mean of an image's tokens.

    Returns:
        NaN where there are too few cases, or no class with both outcomes in both parts.
    """
    cases = cases[: most if task.kind == "classification" else most // 5]
    fitted = len(cases) - max(1, len(cases) // 3)
    with torch.inference_mode():
        rows = [_tokens_and_labels(task, settings, encoder.eval(), case) for case in cases]
    parts = [[np.concatenate([row[i] for row in part]) for i in (0, 1)] for part in (rows[:fitted], rows[fitted:]) if part]
    if len(parts) < 2:
        return float("nan")
    (x, y), (new_x, new_y) = parts
    for column in range(y.shape[1]):
        if len(np.unique(y[:, column])) == 2 == len(np.unique(new_y[:, column])):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1)).fit(x, y[:, column])
            return float(roc_auc_score(new_y[:, column], model.decision_function(new_x)))
    return float("nan")


def _tokens_and_labels(task: Task, settings: Settings, encoder: torch.nn.Module, case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens (N, D) and of labels (N, columns) of one case."""
    tokens = encoder(load_crop(task, settings, case)[None])[0][0, encoder.prefix_tokens :].numpy()
    if task.kind == "classification":
        return tokens.mean(0, keepdims=True), np.nan_to_num(np.asarray(case["label"], float))[None] > 0.5
    label = read_case(build_transform(task, settings, with_label=True), case)["label"]
    label = resize(label, settings.crop_size, True) if task.whole else middle(label.as_tensor(), settings.crop_size)
    structure = ((label > 0) & (label != IGNORE)).float()[None]
    return tokens, patchify(structure, encoder.patch_size)[0].mean(-1, keepdim=True).numpy() > 0.1


def versions() -> str:
    """One line of the versions that matter."""
    return "  ".join(f"{name} {version(name)}" for name in ("torch", "monai", "timm", "accelerate", "papermill"))


def load_crop(task: Task, settings: Settings, case: dict) -> torch.Tensor:
    """A prepared scan cut to the model's input around its middle: (C, *crop_size); what the network sees whole is resized."""
    scan = read_case(build_transform(task, settings, with_label=False), case)
    if task.whole:
        return ResizeRadiograph(settings.crop_size)(scan)["image"]
    return middle(scan["image"].as_tensor(), settings.crop_size)
