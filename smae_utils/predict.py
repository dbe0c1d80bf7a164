"""A fine-tuned run and new scans to results one can open in a viewer: masks on each scan's own grid, volumes, pictures, probabilities."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from PIL import Image

from smae_utils import accel, large
from smae_utils.data import read_case
from smae_utils.errors import UserError
from smae_utils.evaluation import first_file, load_finetuned
from smae_utils.inference import Teller, check_scan, classify, segment
from smae_utils.plots import show_overlay
from smae_utils.reading import read_image
from smae_utils.runs import Run, write_text
from smae_utils.tasks import Case, Task, get_task
from smae_utils.tasks.lists import is_list
from smae_utils.training import Say, say
from smae_utils.transforms import ResizeRadiograph, prepare


def predict(
    run_dir: str | Path, scans: Sequence[str | Path], out: str | Path, probabilities: bool = False, occlusion: bool = False, report: Say = say
) -> pd.DataFrame:
    """Apply a finished fine-tuning run to scans that need no label.

    Args:
        scans: image files, DICOM folders, or list files (JSON, CSV) whose scans are all taken.
        out: folder to make. Segmentation: CASE.nii.gz (labels on the scan's grid, affine and units), labels.json, volumes.csv (ml), CASE.png;
            classification: probabilities.csv.
        probabilities: write also CASE_probabilities.nii.gz (one volume a class).
        occlusion: for radiographs, write also CASE_occlusion.png: how much each place, when greyed out, lowers the likeliest finding.

    Returns:
        The table that was written: volumes in ml, or probabilities.

    Raises:
        UserError: for a run or a scan that cannot be used; nothing is left half-written.
    """
    run = Run.open(run_dir, stage="finetune")
    if not run.finished:
        raise UserError(f"{run.path} is not finished: go on with finetune --resume before predicting")
    model, task, settings = load_finetuned(run)
    cases = collect(scans, task)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another --out, so that no result is mixed or overwritten")
    accelerator, _ = accel.make_accelerator(run.config.get("precision", "auto"))
    model.to(accelerator.device, memory_format=accel.memory_format(task.spatial_dims))
    part = out.with_name(out.name + ".part")  # renamed when everything is there: a full disk or a kill leaves no half result under the name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with torch.inference_mode(), accelerator.autocast():
            if task.kind == "classification":
                table = _classify(model, task, settings, cases, part, accelerator.device, occlusion, report)
            else:
                table = _segment(model, task, settings, cases, part, accelerator.device, probabilities, report)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    report(f"wrote the results of {len(cases)} scans to {out}")
    return table


def collect(scans: Sequence[str | Path | list[str]], task: Task) -> list[Case]:
    """Cases from files, folders and list files; several files in one Python list are the channels of one case. Names are made distinct.

    Raises:
        UserError: for a path that does not exist.
    """
    cases: list[Case] = []
    for scan in scans:
        files = [str(f) for f in scan] if isinstance(scan, (list, tuple)) else [str(scan)]
        if missing := next((f for f in files if not Path(f).exists()), None):
            raise UserError(f"{missing} does not exist: expected an image file, a DICOM folder, or a list file (.json, .csv)")
        if is_list(files[0]):
            splits = get_task(files[0]).read_splits(Path(""), 0, 0)
            cases += [c for part in ("train", "val", "test") for c in splits[part]]
        else:
            cases.append({"case": Path(files[0]).name.split(".")[0], "patient": "", "image": files if len(files) > 1 else files[0]})
    if not cases:
        raise UserError("no scans were given: expected image files, DICOM folders or a list file")
    names = [c["case"] for c in cases]
    return [{**c, "case": c["case"] if names.count(c["case"]) == 1 else f"{i + 1:03d}_{c['case']}"} for i, c in enumerate(cases)]


def _segment(model, task: Task, settings, cases: list[Case], out: Path, device, probabilities: bool, report: Say) -> pd.DataFrame:
    for case in cases:  # a scan that cannot be used shows before anything is written
        check_scan(case, task)
    rows, started = [], time.monotonic()
    labels = {i + 1: name for i, name in enumerate(task.classes)} if task.exclusive else {v: f"label {v}" for v in range(1, task.label_values)}
    for number, case in enumerate(cases, start=1):
        values, affine, probs = segment(model, case, task, settings, device, keep=probabilities, progress=Teller(case["case"], report))
        units = _units(case)
        save(out / f"{case['case']}.nii.gz", values, affine, units, "labels: see labels.json")
        if probs is not None:
            save(out / f"{case['case']}_probabilities.nii.gz", np.moveaxis(probs, 0, -1), affine, units, "probabilities: see labels.json")
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        counts = sum(np.bincount(values[box].ravel(), minlength=task.label_values) for box in large.blocks(values.shape))
        volumes = {name: round(float(counts[list(of)].sum()) * voxel_ml, 3) for name, of in zip(task.classes, task.class_values)}
        rows.append({"case": case["case"], **{f"{name} (ml)": v for name, v in volumes.items()}})
        _picture(case, values, affine, task, out / f"{case['case']}.png")
        report(
            f"{case['case']}  ({number}/{len(cases)})  {sum(v > 0 for v in volumes.values())} of {len(volumes)} structures  {time.monotonic() - started:.0f} s"
        )
    table = pd.DataFrame(rows)
    write_text(out / "volumes.csv", table.to_csv(index=False))
    write_text(
        out / "labels.json", json.dumps({"0": "background", **{str(k): v for k, v in labels.items()}, "classes": list(task.classes)}, indent=1)
    )
    return table


def _units(case: Case) -> tuple[str, str]:
    """Units of space and time as a scan's header has them; DICOM counts in mm."""
    file = first_file(case["image"])
    return nib.load(file).header.get_xyzt_units() if Path(file).is_file() else ("mm", "unknown")


def save(path: Path, values: np.ndarray, affine: np.ndarray, units: tuple[str, str], text: str) -> None:
    """Write a NIfTI; a kill leaves no half file."""
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units(*(u if u != "unknown" else None for u in units))
    image.header["descrip"] = text[:79]
    part = path.with_name(f".part_{path.name}")
    nib.save(image, part)
    part.replace(path)


def _picture(case: Case, values: np.ndarray, affine: np.ndarray, task: Task, target: Path) -> None:
    """Three planes through the most of what was found; of a large scan each second voxel, or fewer."""
    import matplotlib.pyplot as plt

    file = first_file(case["image"])
    if not Path(file).is_file():
        return
    thin = math.ceil((values.size / large.CHANNEL_VOXELS) ** (1 / 3))
    some, affine = (slice(None, None, thin),) * 3, affine @ np.diag([thin, thin, thin, 1.0])
    voxels = np.asarray(nib.load(file).dataobj[some], np.float32)
    scan = nib.as_closest_canonical(nib.Nifti1Image(voxels[..., 0] if voxels.ndim == 4 else voxels, affine))
    mask = nib.as_closest_canonical(nib.Nifti1Image(values[some], affine))
    grey, labels = np.asarray(scan.dataobj), np.asarray(mask.dataobj)
    for axis, n in enumerate(labels.shape):
        if n == 1:  # an outline needs two pixels each way
            grey, labels = grey.repeat(2, axis), labels.repeat(2, axis)
    grey = grey.clip(*task.window) if task.window else grey
    names = task.classes if task.exclusive else [f"label {i}" for i in range(1, task.label_values)]
    figure = show_overlay(grey, labels, {}, names, case["case"], mask.header.get_zooms()[:3], first="prediction")
    figure.savefig(target, dpi=90)
    plt.close(figure)


def _classify(model, task: Task, settings, cases: list[Case], out: Path, device, occlusion: bool, report: Say) -> pd.DataFrame:
    scores = classify(model, cases, task, settings, device)
    table = pd.DataFrame(scores.round(4), columns=list(task.classes))
    table.insert(0, "case", [c["case"] for c in cases])
    write_text(out / "probabilities.csv", table.to_csv(index=False))
    if occlusion:
        for case, row in zip(cases, scores):
            best = int(row.argmax())
            heat = occlusion_map(model, case, task, settings, device, best)
            _draw_occlusion(case, heat, f"{case['case']}: {task.classes[best]} {row[best]:.2f}", out / f"{case['case']}_occlusion.png")
            report(f"{case['case']}  {task.classes[best]} {row[best]:.2f}")
    return table


def occlusion_map(model, case: Case, task: Task, settings, device, finding: int) -> np.ndarray:
    """(grid) fall of the probability of a finding when one patch is replaced by the image's mean (Zeiler and Fergus, arXiv 1311.2901)."""
    image = ResizeRadiograph(settings.crop_size)(read_case(prepare(task, settings, with_label=False), case))["image"]
    patch = settings.patch_size
    grid = tuple(n // patch for n in settings.crop_size)
    covered = image.repeat(int(np.prod(grid)), 1, 1, 1)
    for i, (row, column) in enumerate(np.ndindex(*grid)):
        covered[i, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 0  # 0 is the mean: images are standardised
    batch = torch.cat([image[None], covered])
    scores = torch.cat([model(part.to(device)).float().sigmoid()[:, finding].cpu() for part in batch.split(64)])
    return (scores[0] - scores[1:]).reshape(grid).numpy()


def _draw_occlusion(case: Case, heat: np.ndarray, title: str, target: Path) -> None:
    import matplotlib.pyplot as plt

    image = read_image(case["image"])
    figure, axis = plt.subplots(figsize=(4.2, 4.4), layout="constrained")
    axis.imshow(image.convert("L"), cmap="gray")
    limit = max(float(np.abs(heat).max()), 1e-6)
    spread = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC))
    drawn = axis.imshow(spread, cmap="PuOr_r", vmin=-limit, vmax=limit, alpha=0.45)
    figure.colorbar(drawn, shrink=0.7, label="fall of the probability when hidden")
    axis.set(xticks=[], yticks=[], title=title)
    figure.savefig(target, dpi=90)
    plt.close(figure)
