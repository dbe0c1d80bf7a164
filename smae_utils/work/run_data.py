"""Where a run's list and data lie now."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from smae_utils.data.tasks.lists import is_list
from smae_utils.errors import UserError
from smae_utils.work.run_folder import Run, absolute


def find_data(run: Run, data_dir: str | Path | None = None) -> tuple[str, str]:
    """Where the data of a run lie now: (the task's name, or the path of its list file; the data folder).

    Args:
        data_dir: where they were moved to. Of a list: the list file itself; or a folder that holds a list of
            the same name, whose paths are then relative to it; or the folder that the paths of the recorded
            list are relative to. Without it: the recorded place, else the same place as seen from the run
            folder, for where both were moved together.

    Raises:
        UserError: naming the places where nothing is.
    """
    config = run.config
    if not is_list(config["task"]):
        return config["task"], absolute(data_dir) if data_dir else _place(
            run, config, "data", "the data folder"
        )
    name = Path(config["task"]).name
    recorded = config.get("data") or ""
    # Paths are relative to the list's own folder.
    own = not recorded or recorded == os.path.dirname(config["task"])
    if data_dir:
        folder = absolute(data_dir)
        if os.path.isfile(folder):
            return folder, os.path.dirname(folder)
        as_before = (
            not own and os.path.exists(config["task"]) and os.path.isdir(recorded) and _same(recorded, folder)
        )
        if os.path.isfile(os.path.join(folder, name)) and not as_before:
            return os.path.join(folder, name), folder
        return _place(run, config, "task", "the list file"), folder
    file = _place(run, config, "task", "the list file")
    return file, os.path.dirname(file) if own else _place(run, config, "data", "the data folder")


def _same(a: str, b: str) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _place(run: Run, config: dict[str, Any], key: str, what: str) -> str:
    """A recorded place, or where it is as seen from the run folder."""
    tried = [absolute(config.get(key) or "")]
    if near := config.get(f"{key}_from_run"):
        tried.append(os.path.normpath(os.path.join(absolute(run.path), near)))
    for place in tried:
        if os.path.exists(place):
            return place
    raise UserError(
        f"{what} of {run.path} is neither at {' nor at '.join(dict.fromkeys(tried))}: say where it lies now "
        "with --data NEW"
    )
