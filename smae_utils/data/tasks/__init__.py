"""Tasks: what is special about a data set, one file each.

A module here that defines `TASK` adds a task.
"""

from __future__ import annotations

from pathlib import Path

from smae_utils.data.case import IGNORE, Case, Splits
from smae_utils.data.splits import hold_out
from smae_utils.data.tasks.from_run import task_from_record
from smae_utils.data.tasks.lists import is_list, task_from_list
from smae_utils.data.tasks.record import Task
from smae_utils.data.tasks.registry import existing_folder, named_task, task_names


def get_task(name: str) -> Task:
    """The record of a task, by name or by the path of a list file (JSON, CSV), see `tasks.lists`.

    Raises:
        UserError: if the name is unknown, or the list cannot be used.
    """
    return task_from_list(name) if is_list(name) else named_task(name)


def task_of(config: dict, list_file: str | Path | None = None) -> Task:
    """The task of a run's config.yaml; that of a list file as it was when the run was made.

    Args:
        list_file: where the list lies now, if it was moved.
    """
    return (
        task_from_record(str(list_file or config["task"]), config["record"])
        if "record" in config
        else get_task(config["task"])
    )


__all__ = [
    "IGNORE",
    "Case",
    "Splits",
    "Task",
    "existing_folder",
    "get_task",
    "hold_out",
    "task_names",
    "task_of",
]
