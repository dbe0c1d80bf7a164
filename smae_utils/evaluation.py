"""Evaluation on the test cases, on each scan's own grid, and the comparison of two arms."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from smae_utils import accel
from smae_utils.build import build_model
from smae_utils.data import read_splits
from smae_utils.errors import UserError
from smae_utils.inference import Teller, classify, segment
from smae_utils.metrics import dsc, hd95_mm, mean_auc
from smae_utils.reading import check_label_values, check_same_place
from smae_utils.runs import Run, write_text
from smae_utils.settings import FinetuneSettings, make_settings
from smae_utils.tasks import Task, task_of
from smae_utils.training import Say, say
from smae_utils.weights import load_weights


def load_finetuned(run: Run) -> tuple[torch.nn.Module, Task, FinetuneSettings]:
    """The network of a finished fine-tuning run, with its weights and in eval mode, and what it was made for."""
    config = run.config
    task = task_of(config)
    settings = make_settings(FinetuneSettings, config["settings"], where=str(run.path / "config.yaml"))
    model = build_model(task, settings)
    load_weights(model, run.path, require="")
    return model.eval(), task, settings


def evaluate(
    run_dir: str | Path, data_dir: str | Path | None = None, split: str = "test", save_masks: bool = True, report: Say = say
) -> pd.DataFrame:
    """Score a fine-tuned run and write metrics.csv and metrics.json into its folder (and label maps into `predictions/`).

    Args:
        data_dir: where the data lies now; the run remembers where it was.
        split: "test", or "val" for choosing.

    Returns:
        One row a case and class: dsc, hd95_mm, and whether label and prediction are there; for classification target and score.
    """
    run = Run.open(run_dir, stage="finetune")
    if not run.finished:
        raise UserError(f"{run.path} is not finished: go on with finetune --resume before evaluating it")
    model, task, settings = load_finetuned(run)
    cases = read_splits(task, data_dir or run.config["data"], settings).get(split)
    if not cases:
        raise UserError(f"no cases in split {split!r} of {data_dir or run.config['data']}: expected test, or val when train_on_val is off")
    recorded = run.config["cases"]
    trained = set(recorded["train"]) | (set(recorded["val"]) if split == "test" else set())
    if seen := sorted(trained & {c["case"] for c in cases}):
        raise UserError(
            f"{len(seen)} of the {split} cases were used in training this run, {seen[0]} for one: evaluate on the data it was trained with"
        )
    if unlabelled := [c["case"] for c in cases if "label" not in c]:
        raise UserError(f"{len(unlabelled)} {split} cases have no label, {unlabelled[0]} for one: they cannot be scored, only predicted")
    accelerator, _ = accel.make_accelerator(run.config.get("precision", "auto"))
    model.to(accelerator.device, memory_format=accel.memory_format(task.spatial_dims))
    started = time.monotonic()
    with torch.inference_mode(), accelerator.autocast():
        if task.kind == "classification":
            table = _classification_rows(model, cases, task, settings, accelerator.device)
        else:
            folder = run.path / "predictions" if save_masks else None
            table = _segmentation_rows(model, cases, task, settings, accelerator.device, folder, report)
    summary = summarise(table, task)
    write_text(run.path / "metrics.csv", table.to_csv(index=False))
    run.write_json("metrics.json", {"split": split, "cases": len(cases), **summary})
    means = "  ".join(f"{k} {v:.4g}" for k, v in summary["mean"].items())
    report(f"{run.path.name}: {len(cases)} {split} cases  {means}  ({time.monotonic() - started:.0f} s)")
    return table


def _classification_rows(model, cases, task: Task, settings, device) -> pd.DataFrame:
    scores = classify(model, cases, task, settings, device)
    rows = [
        {"case": case["case"], "class": name, "target": int(case["label"][i]), "score": float(scores[n, i])}
        for n, case in enumerate(cases)
        for i, name in enumerate(task.classes)
    ]
    return pd.DataFrame(rows)


def read_label(case: dict) -> tuple[nib.Nifti1Image, np.ndarray]:
    """A case's label image and its voxels, as stored.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        stored = nib.load(case["label"])
        return stored, np.asarray(stored.dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {case['label']}: {line}. The file may be cut short: copy or unpack it again") from None


def first_file(image: str | list[str]) -> str:
    """The file that says where a scan lies; channels in several files share one grid."""
    return image if isinstance(image, str) else image[0]


def _segmentation_rows(model, cases, task: Task, settings, device, folder: Path | None, report: Say) -> pd.DataFrame:
    rows = []
    for number, case in enumerate(cases, start=1):
        stored, values = read_label(case)
        truth = task.class_masks(values)
        predicted = segment(model, case, task, settings, device, progress=Teller(case["case"], report)).labels
        masks = task.class_masks(predicted)
        if masks[0].shape != truth[0].shape:
            raise UserError(f"{case['label']} has shape {truth[0].shape}, its image {masks[0].shape}: they must lie on one grid")
        check_same_place(stored.affine, nib.load(first_file(case["image"])).affine, truth[0].shape, case["label"], first_file(case["image"]))
        check_label_values(values, task, case["label"])
        spacing = [float(s) for s in stored.header.get_zooms()[: truth[0].ndim]]
        for name, pred, label in zip(task.classes, masks, truth):
            rows.append(
                {
                    "case": case["case"], "class": name, "dsc": dsc(pred, label), "hd95_mm": hd95_mm(pred, label, spacing),
                    "labelled": bool(label.any()), "predicted": bool(pred.any()),
                }
            )  # fmt: skip
        if folder:
            folder.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(predicted, stored.affine, stored.header), folder / f"{case['case']}.nii.gz")
        mean = np.nanmean([row["dsc"] for row in rows[-len(task.classes) :]])
        report(f"  {case['case']}  DSC {mean:.3f}  ({number}/{len(cases)})")
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame, task: Task) -> dict[str, Any]:
    """Per class and mean figures of a per-case table. Means are over the classes' means; what is NaN is left out."""
    if task.kind == "classification":
        wide = {k: table.pivot(index="case", columns="class", values=k)[list(task.classes)].to_numpy() for k in ("target", "score")}
        mauc, per_class = mean_auc(wide["target"], wide["score"])
        classes = {
            name: {"auc": float(auc), "n_positive": int(wide["target"][:, i].sum()), "n": len(wide["target"])}
            for i, (name, auc) in enumerate(zip(task.classes, per_class))
        }
        return {"mean": {"mauc": mauc}, "classes": classes}
    classes = {}
    for name, rows in table.groupby("class", sort=False):
        both = rows[rows.labelled & rows.predicted]
        classes[name] = {
            "dsc": float(rows.dsc.mean()),
            "hd95_mm": float(rows.hd95_mm.mean()),
            "hd95_mm_detected": float(both.hd95_mm.mean()),
            "miss_rate": float((~rows.predicted[rows.labelled]).mean()),
            "n": int(rows.dsc.notna().sum()),
            "n_labelled": int(rows.labelled.sum()),
        }
    keys = ("dsc", "hd95_mm", "hd95_mm_detected", "miss_rate")
    mean = {key: _mean(c[key] for c in classes.values()) for key in keys}
    if task.subset:
        mean |= {f"{key}_{len(task.subset)}_classes": _mean(classes[name][key] for name in task.subset) for key in keys[:2]}
    return {"mean": mean, "classes": classes}


def _mean(values) -> float:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


def per_class(run_dir: str | Path) -> pd.DataFrame:
    """The figures of each class of an evaluated run, a row a class."""
    return pd.DataFrame(read_metrics(run_dir)["classes"]).T.astype(float).round(3)


def read_metrics(run_dir: str | Path) -> dict[str, Any]:
    """metrics.json of an evaluated run."""
    import json

    file = Run.open(run_dir).path / "metrics.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: run 'python -m smae_utils evaluate' on this run first")
    return json.loads(file.read_text())


def compare(scratch: str | Path, self_pretrained: str | Path) -> pd.DataFrame:
    """The table scratch | self pre-trained | difference, a row a mean figure and class.

    Raises:
        UserError: if the runs differ in task, test cases or settings other than what the arms may have of their own.
    """
    runs = [Run.open(p, "finetune").config for p in (scratch, self_pretrained)]
    free = ("base_lr", "layer_decay")
    for what in ("task", "cases"):
        if runs[0][what] != runs[1][what]:
            raise UserError(f"{scratch} and {self_pretrained} differ in {what}: only runs on the same cases can be compared")
    different = [k for k, v in runs[0]["settings"].items() if v != runs[1]["settings"].get(k) and k not in free]
    if different or runs[0].get("precision") != runs[1].get("precision"):
        names = ", ".join(different or ["precision"])
        raise UserError(f"{scratch} and {self_pretrained} differ in {names}: only {', '.join(free)} may differ between arms")
    a, b = (read_metrics(p) for p in (scratch, self_pretrained))
    if a["split"] != b["split"]:
        raise UserError(f"{scratch} was scored on {a['split']} cases, {self_pretrained} on {b['split']}: evaluate both on the same")
    inits = [config["init"] == "scratch" for config in runs]
    if inits == [False, True]:
        raise UserError(f"{scratch} is the self pre-trained run, {self_pretrained} the one from scratch: give scratch first")
    key = "auc" if "mauc" in a["mean"] else "dsc"
    rows = [("mean", metric, a["mean"][metric], b["mean"][metric]) for metric in a["mean"]]
    rows += [(name, key, a["classes"][name][key], b["classes"][name][key]) for name in a["classes"]]
    table = pd.DataFrame(rows, columns=["class", "metric", "scratch", "self"]).astype({"scratch": float, "self": float})
    return table.assign(difference=table["self"] - table["scratch"])
