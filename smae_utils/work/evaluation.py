"""Evaluation on the test cases, on each scan's own grid."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from smae_utils.atomic import write_text
from smae_utils.data.batches import Scans, in_order
from smae_utils.data.case import Case
from smae_utils.data.reading import read_label
from smae_utils.data.tasks import Task, task_of
from smae_utils.data.tasks.lists import is_list
from smae_utils.data.writing import write_mask
from smae_utils.errors import UserError
from smae_utils.work import devices
from smae_utils.work.build import build_splits
from smae_utils.work.comparison import of_split
from smae_utils.work.grids import dsc_of_classes, ignoring, label_map
from smae_utils.work.metrics import dsc, hd95_mm, mean_auc
from smae_utils.work.predictor import Predictor
from smae_utils.work.progress import ProgressLine, Say, WindowProgress, say
from smae_utils.work.rebuild import settings_of
from smae_utils.work.run_data import find_data
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings


def evaluate(
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    split: str = "test",
    save_masks: bool = True,
    report: Say = say,
) -> pd.DataFrame:
    """Score a fine-tuned run; metrics.csv, metrics.json and, with masks, `predictions/` go into its folder
    (of another split with `_SPLIT` in their names).

    Args:
        data_dir: where the data lies now (of a list: the list, its folder, or the folder its paths start
            from); the run remembers where it was.
        split: "test", or "val" for choosing.

    Returns:
        One row a case and class: dsc, hd95_mm (or hd95_px), and whether label and prediction are there; for
            classification target and score.
    """
    report = devices.of_main_process(report)
    run = Run.open(run_dir, stage="finetune")
    if split not in ("test", "val"):
        raise UserError(f"split must be test or val, got {split!r}")
    predictor = Predictor.from_run(run, report=report)
    where, folder = find_data(run, data_dir)
    if is_list(predictor.task.name):
        predictor = replace(predictor, task=task_of(run.config, where))
    task = predictor.task
    cases = _labelled(
        build_splits(task, folder, settings_of(run, FinetuneSettings)).get(split),
        split,
        folder or where,
        report,
    )
    recorded = run.config["cases"]
    trained = set(recorded["train"]) | (set(recorded["val"]) if split == "test" else set())
    if seen := sorted(trained & {c["case"] for c in cases}):
        raise UserError(
            f"{len(seen)} of the {split} cases were used in training this run, {seen[0]} for one: evaluate "
            "on the data it was trained with"
        )
    started = time.monotonic()
    if task.kind == "classification":
        table = _classification_rows(predictor, cases)
    else:
        masks = run.path / of_split("predictions", split) if save_masks else None
        table = _segmentation_rows(predictor, cases, masks, report)
    summary = summarise(table, task)
    if devices.is_main_process():
        write_text(run.path / f"{of_split('metrics', split)}.csv", table.to_csv(index=False))
        run.write_json(f"{of_split('metrics', split)}.json", {"split": split, "cases": len(cases), **summary})
    means = "  ".join(f"{k} {v:.4g}" for k, v in summary["mean"].items())
    report(f"{run.path.name}: {len(cases)} {split} cases  {means}  ({time.monotonic() - started:.0f} s)")
    return table


def score_cases(predictor: Predictor, scans: Scans) -> float:
    """One number for choosing on validation cases: the mean that is reported (mAUC, or the mean over classes
    of their mean DSC).

    DSC is that of the prepared grid; the final evaluation uses the scan's own.

    Args:
        scans: the cases as fine-tuning reads them, so that they are kept from one validation to the next.
    """
    task = predictor.task
    if task.kind == "classification":
        return mean_auc(np.stack([c["label"] for c in scans.cases]), predictor.classify(scans))[0]
    scores = []
    for case, (sample,) in zip(scans.cases, in_order(scans, list, num_workers=predictor.num_workers)):
        label = torch.as_tensor(sample["label"])[0].numpy()
        if task.spatial_dims == 2:
            numbers = predictor.segment(case).labels
        else:
            numbers = label_map(predictor.probabilities(sample["image"]), task)
        scores.append(list(dsc_of_classes(numbers, label, task)))
    classes = [column[np.isfinite(column)] for column in np.array(scores, float).T]
    means = [column.mean() for column in classes if len(column)]
    return float(np.mean(means)) if means else float("nan")


def _labelled(cases: list[Case] | None, split: str, where: str | Path, report: Say) -> list[Case]:
    """The cases that can be scored.

    Raises:
        UserError: if there are none.
    """
    if not cases:
        raise UserError(
            f"no cases in split {split!r} of {where}: expected test cases in the list, or --set "
            "test_share=0.2 when training to hold some out; "
            "or --split val, when train_on_val is off"
        )
    labelled = [c for c in cases if "label" in c]
    if not labelled:
        raise UserError(
            f"none of the {len(cases)} {split} cases has a label, {cases[0]['case']} for one: they cannot be "
            "scored, only predicted"
        )
    if len(labelled) < len(cases):
        report(f"{len(cases) - len(labelled)} of {len(cases)} {split} cases have no label and are not scored")
    return labelled


def _classification_rows(predictor: Predictor, cases: list[Case]) -> pd.DataFrame:
    task = predictor.task
    scores = devices.in_shares(cases, lambda share: list(predictor.classify(predictor.scans(share))))
    rows = []
    for n, case in enumerate(cases):
        for i, name in enumerate(task.classes):
            target = case["label"][i]
            rows.append(
                {
                    "case": case["case"],
                    "class": name,
                    "target": None if np.isnan(target) else int(target),
                    "score": float(scores[n][i]),
                }
            )
    return pd.DataFrame(rows).astype({"target": "Int64"})


def _segmentation_rows(
    predictor: Predictor, cases: list[Case], folder: Path | None, report: Say
) -> pd.DataFrame:
    task = predictor.task
    for case in cases:  # what cannot be scored shows before minutes of prediction
        read_label(case, task)

    def score(share: list[Case]) -> list[list[dict[str, Any]]]:
        return [one(case, number, len(share)) for number, case in enumerate(share, start=1)]

    def one(case: Case, number: int, count: int) -> list[dict[str, Any]]:
        label, image = read_label(case, task)
        predicted = predictor.segment(case, progress=WindowProgress(case["case"], report)).labels
        spacing = image.spacing_mm if image else task.spacing_mm or (1.0, 1.0)
        rows = score_masks(predicted, label, task, spacing, case["case"])
        if folder:
            folder.mkdir(exist_ok=True)
            write_mask(folder / case["case"], predicted, task, image)
        mean = _mean(row["dsc"] for row in rows)
        report(ProgressLine(f"  {case['case']}  DSC {mean:.3f}  ({number}/{count})"))
        return rows

    return pd.DataFrame([row for rows in devices.in_shares(cases, score) for row in rows])


def score_masks(
    predicted: np.ndarray, label: np.ndarray, task: Task, spacing: Sequence[float], case: str
) -> list[dict[str, Any]]:
    """A row a class from two images of label numbers on one grid; what the label ignores is left out of
    both."""
    if predicted.shape != label.shape:
        raise UserError(
            f"the prediction of {case} has shape {predicted.shape}, its label {label.shape}: they must lie "
            "on one grid"
        )
    rows = []
    for name, pred, true in zip(
        task.classes, task.class_masks(ignoring(predicted, label)), task.class_masks(label)
    ):
        row = {
            "case": case,
            "class": name,
            "dsc": dsc(pred, true),
            task.distance: hd95_mm(pred, true, spacing),
        }
        rows.append({**row, "labelled": bool(true.any()), "predicted": bool(pred.any())})
    return rows


def summarise(table: pd.DataFrame, task: Task) -> dict[str, Any]:
    """Per class and mean figures of a per-case table. Means are over the classes' means; what is NaN is left
    out.
    """
    if task.kind == "classification":
        wide = {
            k: table.pivot(index="case", columns="class", values=k)[list(task.classes)].to_numpy(
                float, na_value=np.nan
            )
            for k in ("target", "score")
        }
        mauc, per_class = mean_auc(wide["target"], wide["score"])
        classes = {
            name: {
                "auc": float(auc),
                "n_positive": int(np.nansum(target)),
                "n": int(np.isfinite(target).sum()),
            }
            for name, auc, target in zip(task.classes, per_class, wide["target"].T)
        }
        return {"mean": {"mauc": mauc}, "classes": classes}
    classes, distance = {}, task.distance
    for name, rows in table.groupby("class", sort=False):
        both = rows[rows.labelled & rows.predicted]
        classes[name] = {
            "dsc": float(rows.dsc.mean()),
            distance: float(rows[distance].mean()),
            f"{distance}_detected": float(both[distance].mean()),
            "miss_rate": float((~rows.predicted[rows.labelled]).mean()),
            "n": int(rows.dsc.notna().sum()),
            "n_labelled": int(rows.labelled.sum()),
        }
    keys = ("dsc", distance, f"{distance}_detected", "miss_rate")
    mean = {key: _mean(c[key] for c in classes.values()) for key in keys}
    if task.subset:
        for key in task.metrics:
            of_subset = [classes[name][key] for name in task.subset]
            mean[f"{key}_{len(task.subset)}_classes"] = _mean(of_subset)
    return {"mean": mean, "classes": classes}


def _mean(values) -> float:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")
