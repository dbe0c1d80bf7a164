"""Figures of evaluated runs, and the comparison of two arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from smae_utils.errors import UserError
from smae_utils.work.run_folder import FREE_SETTINGS, Run, said_of_list


def metrics_file(run_dir: str | Path, split: str = "test") -> Path:
    """Where the figures of a split are."""
    return Run.open(run_dir).path / f"{of_split('metrics', split)}.json"


def per_class(run_dir: str | Path) -> pd.DataFrame:
    """The figures of each class of an evaluated run, a row a class."""
    return pd.DataFrame(read_metrics(run_dir)["classes"]).T.astype(float).round(3)


def read_metrics(run_dir: str | Path, split: str = "test") -> dict[str, Any]:
    """metrics.json of an evaluated run, or that of another split."""
    import json

    file = metrics_file(run_dir, split)
    if not file.is_file():
        raise UserError(f"{file} does not exist: run 'smae evaluate' on this run first")
    return json.loads(file.read_text(encoding="utf-8"))


def _precisions(config: dict) -> set[str]:
    """In which precisions a run was computed: its first sitting's, and those it went on in."""
    return {config.get("precision", ""), *(sitting["precision"] for sitting in config.get("segments", ()))}


def compare(scratch: str | Path, self_pretrained: str | Path) -> pd.DataFrame:
    """The table scratch | self pre-trained | difference, a row a mean figure and class.

    Raises:
        UserError: if the runs differ in task, test cases or settings other than what the arms may have of
            their own.
    """
    runs = [Run.open(p, "finetune").config for p in (scratch, self_pretrained)]
    free = ("lr", "base_lr", "layer_decay", "encoder_lr")
    for what in ("task", "cases"):
        one, other = (
            (said_of_list(config) or config["task"]) if what == "task" else config[what] for config in runs
        )
        if one != other:  # of a list what it says counts, not where it lay
            raise UserError(
                f"{scratch} and {self_pretrained} differ in {what}: only runs on the same cases can be "
                "compared"
            )
    free_too = (*free, *FREE_SETTINGS)
    different = [
        k for k, v in runs[0]["settings"].items() if v != runs[1]["settings"].get(k) and k not in free_too
    ]
    if different or _precisions(runs[0]) != _precisions(runs[1]):
        names = ", ".join(different or ["precision"])
        raise UserError(
            f"{scratch} and {self_pretrained} differ in {names}: only {', '.join(free)} may differ between "
            "arms"
        )
    a, b = (read_metrics(p) for p in (scratch, self_pretrained))
    if a["split"] != b["split"]:
        raise UserError(
            f"{scratch} was scored on {a['split']} cases, {self_pretrained} on {b['split']}: evaluate both "
            "on the same"
        )
    inits = [config["init"] == "scratch" for config in runs]
    if inits == [False, True]:
        raise UserError(
            f"{scratch} is the self pre-trained run, {self_pretrained} the one from scratch: give scratch "
            "first"
        )
    key = "auc" if "mauc" in a["mean"] else "dsc"
    rows = [("mean", metric, a["mean"][metric], b["mean"][metric]) for metric in a["mean"]]
    rows += [(name, key, a["classes"][name][key], b["classes"][name][key]) for name in a["classes"]]
    table = pd.DataFrame(rows, columns=["class", "metric", "scratch", "self"]).astype(
        {"scratch": float, "self": float}
    )
    return table.assign(difference=table["self"] - table["scratch"])


def of_split(name: str, split: str) -> str:
    """Names of results: the test part has the plain ones."""
    return name if split == "test" else f"{name}_{split}"
