"""How a run of either stage starts: which weights, what they have seen, and what its config.yaml says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smae_utils.data.case import Case
from smae_utils.data.tasks import Task
from smae_utils.data.tasks.from_run import record_of
from smae_utils.data.tasks.lists import is_list
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import hash_case, seen_cases, weights_file
from smae_utils.method.checkpoints.other_libraries import TIMM
from smae_utils.work.progress import Say
from smae_utils.work.provenance import provenance
from smae_utils.work.run_folder import absolute, recorded_places
from smae_utils.work.settings import Settings, as_dict


def check_unseen(init: str | Path, splits: dict[str, list[Case]]) -> None:
    """Refuse an encoder that has seen this run's test images, as one of another fold has.

    Weights carry the names of their cases, so it does not matter by which path they are given. Cases are
    compared by name, so only runs of the same data are.

    Raises:
        UserError: naming one of them.
    """
    if seen := seen_of(init, splits["test"]):
        raise UserError(
            f"{init} was trained on {len(seen)} of this run's test cases, {seen[0]} for one: pre-train with "
            "the same split "
            "and fold (of other scans that have the same names, give each a 'case' of its own in a list)"
        )


def seen_of(init: str | Path, cases: list[Case]) -> list[str]:
    """Names of the cases that weights were trained on, directly or by the weights that these started from."""
    seen = seen_cases(init)
    return sorted(c["case"] for c in cases if hash_case(c["case"]) in seen)


def is_scratch(init: str | Path) -> bool:
    """Whether training starts from random weights.

    Raises:
        UserError: if other weights are named that do not exist.
    """
    if str(init) == "scratch":
        return True
    if not str(init).startswith(TIMM):
        weights_file(init)
    return False


def tell_notes(record: Task, report: Say, store: str = "") -> None:
    """Report what was assumed of a list, and which settings have no effect, a line each.

    `store` is the setting of that name.
    """
    for note in record.notes:
        report(f"note: {note}")
    if store and record.spatial_dims == 2:
        report("note: store is of no effect: 2D images are read anew, or kept in memory by cache_rate")


def facts_of(
    record: Task, spacing_mm: Sequence[float], train: list[Case], init: str | Path
) -> dict[str, Any]:
    """What weights say of the data they were trained on, see `method.checkpoints.save.save_weights`."""
    earlier = set() if str(init) == "scratch" else seen_cases(init)
    z_score = "z-score of non-zero voxels" if record.spatial_dims == 3 else "z-score of all pixels"
    return {
        "channels": list(record.channels),
        "spacing_mm": list(spacing_mm or record.spacing_mm),
        "window": list(record.window) if record.window else None,
        "normalisation": "window" if record.window else z_score,
        "seen": sorted(earlier | {hash_case(c["case"]) for c in train}),
    }


def config_of(
    stage: str,
    task: str,
    record: Task,
    data_dir: str | Path,
    out: str | Path,
    preset: str,
    settings: Settings,
    splits: dict[str, list[Case]],
    init: str | Path,
    adapt: bool,
) -> dict[str, Any]:
    """Everything needed to repeat the run. Places are absolute, so that they hold from another folder too."""
    if is_list(task):
        own_folder = str(data_dir) in ("", ".")
        where = recorded_places(out, task=task, data=Path(absolute(task)).parent if own_folder else data_dir)
        said = {"task": where.pop("task"), "record": record_of(record), **where}
    else:
        said = {"task": record.name, **recorded_places(out, data=data_dir)}
    start: dict[str, Any] = {"init": str(init), "adapt": adapt}
    if str(init) != "scratch" and not str(init).startswith(TIMM):
        start["init"] = absolute(init)
        with weights_file(init).open("rb") as file:
            start["init_digest"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {
        "stage": stage,
        **said,
        "preset": preset,
        **start,
        "settings": as_dict(settings),
        "cases": {part: [c["case"] for c in cases] for part, cases in splits.items()},
        "provenance": provenance(),
    }
