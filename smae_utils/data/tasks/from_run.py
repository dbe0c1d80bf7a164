"""A task as a run folder keeps it, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from smae_utils.data.case import Splits
from smae_utils.data.tasks.list_cases import no_reader, splits_of_list
from smae_utils.data.tasks.list_files import read_list
from smae_utils.data.tasks.record import Task

FIELDS = (
    "title", "kind", "spatial_dims", "channels", "classes", "subset", "spacing_mm", "window", "regions",
    "stored_labels", "ignored_labels", "sided",
    "like", "settings",
)  # fmt: skip


def record_of(task: Task) -> dict[str, Any]:
    """What a run has to remember of a list's task, as plain values.

    It must mean the same when the list was changed or is gone.
    """
    return json.loads(json.dumps({name: getattr(task, name) for name in FIELDS}))


def task_from_record(name: str, record: dict[str, Any]) -> Task:
    """The task that `record_of` remembered, with the run's classes in the run's order.

    Its cases are read from the list `name`.
    """

    def tuples(value: Any) -> Any:
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    values = {k: v if k == "settings" else tuples(v) for k, v in record.items()}
    bare = Task(name=name, read_splits=no_reader, **values)

    def read(data_dir: Path, seed: int = 0, fold: int | None = 0) -> Splits:
        return splits_of_list(
            Path(name), read_list(Path(name))["cases"], bare, data_dir, seed, fold, strict=False
        )

    return replace(bare, read_splits=read)
