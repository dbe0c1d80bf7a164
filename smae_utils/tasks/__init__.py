"""Tasks: what is special about a data set, one file each. Adding a task is adding a module here that defines `TASK`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from smae_utils.errors import UserError

Case = dict
Splits = dict[str, list[Case]]


@dataclass(frozen=True)
class Task:
    """One record of what a task is; everything else asks this record and never the task's name.

    Attributes:
        kind: "segmentation" or "classification".
        channels: names of the image channels.
        classes: what is reported: organs, tumour regions, findings.
        read_splits: (data folder, seed, fold) -> {"train": [...], "val": [...], "test": [...]} of cases. A case is a dict with
            `case`, `patient`, `image` (path) and `label` (path, or a vector for classification); paths only, nothing is read.
        window: intensity range mapped to 0..1 (HU for CT); None standardises the non-zero voxels of each channel.
        regions: label values that make up each class, when classes overlap (then each class has its own sigmoid);
            None: class i has label i + 1 and classes exclude each other (softmax with background).
        real_train: training scans of the real data set, for counting what a recipe costs there.
        sided: labels tell left from right, so images are not mirrored left-right.
        like: for a task made from a list: the task whose sections of the presets it takes.
        settings: what such a task wants differently, shaped like a preset's section.
        packaged: for scans that come inside a Python package: where they lie.
        subset: classes of which the mean is reported too (the 8 organs of the paper).
    """

    name: str
    title: str
    kind: str
    spatial_dims: int
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    read_splits: Callable[[Path, int, int], Splits]
    spacing_mm: tuple[float, ...] = ()
    window: tuple[float, float] | None = None
    regions: tuple[tuple[int, ...], ...] | None = None
    real_train: int = 0
    sided: bool = False
    subset: tuple[str, ...] = ()
    packaged: Callable[[], Path] | None = None
    source: str = ""
    like: str = ""
    settings: dict = field(default_factory=dict, hash=False)

    @property
    def in_chans(self) -> int:
        return len(self.channels)

    @property
    def exclusive(self) -> bool:
        """True when a voxel has one class at most."""
        return self.kind == "segmentation" and self.regions is None

    @property
    def out_chans(self) -> int:
        return len(self.classes) + (1 if self.exclusive else 0)

    @property
    def label_values(self) -> int:
        """Values that a label image may hold: 0 .. label_values - 1."""
        return len(self.classes) + 1 if self.regions is None else max(map(max, self.regions)) + 1

    @property
    def class_values(self) -> tuple[tuple[int, ...], ...]:
        """The label values that make up each class."""
        return self.regions or tuple((i + 1,) for i in range(len(self.classes)))

    def class_masks(self, label: np.ndarray) -> list[np.ndarray]:
        """Integer label image -> one boolean mask a class."""
        return [np.isin(label, values) for values in self.class_values]


@cache
def _registry() -> dict[str, Task]:
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return {m.TASK.name: m.TASK for m in modules if hasattr(m, "TASK")}


def task_names() -> list[str]:
    """Names of all tasks."""
    return sorted(_registry())


def get_task(name: str) -> Task:
    """The record of a task, by name or by the path of a list file (JSON, CSV) that makes one, see `tasks.lists`.

    Raises:
        UserError: if the name is unknown.
    """
    from smae_utils.tasks.lists import is_list, task_from_list

    if is_list(name):
        return task_from_list(name)
    if name not in _registry():
        raise UserError(f"unknown task {name!r}: expected one of {', '.join(task_names())}, or the path of a list file (.json, .csv)")
    return _registry()[name]


def task_of(config: dict) -> Task:
    """The task of a run's config.yaml; that of a list file as it was when the run was made."""
    from smae_utils.tasks.lists import task_from_record

    return task_from_record(config["task"], config["record"]) if "record" in config else get_task(config["task"])


def existing_folder(data_dir: Path | str, *candidates: str) -> Path:
    """The first of `candidates` below `data_dir` that exists.

    Raises:
        UserError: with the layout that was looked for.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(
            f"data folder {root} does not exist: give the folder of the download, or write phantoms there with 'python -m smae_utils phantom'"
        )
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(f"{root} does not look like this task's download: expected one of {', '.join(candidates)} in it")


def hold_out(cases: list[Case], share: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Split a part off **by patient**, at least one patient: (rest, part), both in their old order."""
    patients = sorted({c["patient"] for c in cases})
    if len(patients) < 2:
        raise UserError(f"{len(cases)} training cases of {len(patients)} patient: at least 2 patients are needed to hold one out for validation")
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count]}
    return [c for c in cases if c["patient"] not in chosen], [c for c in cases if c["patient"] in chosen]
