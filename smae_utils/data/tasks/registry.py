"""The tasks that have a module of their own here, and what their readers share."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from smae_utils.data.tasks.record import Task
from smae_utils.errors import UserError


@cache
def _registry() -> dict[str, Task]:
    package = __name__.rpartition(".")[0]
    modules = (
        importlib.import_module(f"{package}.{m.name}")
        for m in pkgutil.iter_modules([str(Path(__file__).parent)])
    )
    return {m.TASK.name: m.TASK for m in modules if hasattr(m, "TASK")}


def task_names() -> list[str]:
    """Names of all tasks."""
    return sorted(_registry())


def named_task(name: str) -> Task:
    """The record of a task that has a module here.

    Raises:
        UserError: if the name is unknown.
    """
    if name not in _registry():
        raise UserError(
            f"unknown task {name!r}: expected one of {', '.join(task_names())}, or the path of a list file "
            "(.json, .csv)"
        )
    return _registry()[name]


def existing_folder(data_dir: Path | str, *candidates: str) -> Path:
    """The first of `candidates` below `data_dir` that exists.

    Raises:
        UserError: with the layout that was looked for.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(
            f"data folder {root} does not exist: give the folder of the download, or write phantoms there "
            "with 'smae phantom'"
        )
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(
        f"{root} does not look like this task's download: expected one of {', '.join(candidates)} in it"
    )
