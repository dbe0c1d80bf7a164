"""A fine-tuned run and new scans to results one can open in a viewer: masks on each scan's own grid, volumes,
pictures, probabilities.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from PIL import Image

from smae_utils.atomic import write_text
from smae_utils.data import out_of_core
from smae_utils.data.case import Case, case_of
from smae_utils.data.pictures import read_image
from smae_utils.data.reading import first_file
from smae_utils.data.tasks import Task, get_task
from smae_utils.data.tasks.list_cases import images_of
from smae_utils.data.tasks.lists import is_list
from smae_utils.data.volumes import Volume, read_volume, units_of
from smae_utils.data.writing import save_nifti, write_mask
from smae_utils.errors import UserError
from smae_utils.paths import NIBABEL_ENDINGS, has_ending, split_series
from smae_utils.show.result_plots import show_flat_overlay, show_overlay
from smae_utils.work.devices import in_shares, is_main_process, of_main_process, one_folder
from smae_utils.work.predictor import Predictor
from smae_utils.work.progress import Say, WindowProgress, say
from smae_utils.work.run_folder import Run


def predict(
    run_dir: str | Path,
    scans: Sequence[str | Path],
    out: str | Path,
    probabilities: bool = False,
    occlusion: bool = False,
    report: Say = say,
) -> pd.DataFrame:
    """Apply a finished fine-tuning run to scans that need no label.

    Args:
        scans: image files, DICOM folders, or list files (JSON, CSV) whose scans are all taken.
        out: folder to make. Segmentation: CASE.nii.gz (labels on the scan's grid, with the values that the
            training masks have), labels.json, volumes.csv (ml), CASE.png; of 2D images CASE_mask.png,
            areas.csv and CASE.png. Classification: probabilities.csv.
        probabilities: write also CASE_probabilities.nii.gz (one volume a class), or .npy for 2D images.
        occlusion: for radiographs, write also CASE_occlusion.png: how much each place, when greyed out,
            lowers the likeliest finding.

    Returns:
        The table that was written: volumes in ml (areas in pixels), or probabilities; `image` says which file
            or folder each row came from.

    Raises:
        UserError: for a run or a scan that cannot be used; nothing is left half-written.
    """
    report = of_main_process(report)
    run = Run.open(run_dir, stage="finetune")
    predictor = Predictor.from_run(run, report=report)
    task = predictor.task
    if occlusion and (task.kind != "classification" or task.spatial_dims != 2):
        raise UserError(
            f"--occlusion is for classes of 2D images, {run.path} is a run of {task.spatial_dims}D "
            f"{task.kind}: leave it out"
        )
    cases = collect(scans, task, report)
    with one_folder(Path(out)) as part:
        if task.kind == "classification":
            table = _classify(
                predictor, cases, part, run.config["settings"]["patch_size"] if occlusion else 0, report
            )
        else:
            table = _segment(predictor, cases, part, probabilities, report)
    report(f"wrote the results of {len(cases)} scans to {out}")
    return table


def collect(scans: Sequence[str | Path | list[str]], task: Task, report: Say = say) -> list[Case]:
    """Cases from files, folders and list files; several files in one Python list are the channels of one
    case. Names are made distinct.

    Raises:
        UserError: for a path that does not exist, or a list whose channels are not the run's.
    """
    cases: list[Case] = []
    for scan in scans:
        files = [str(f) for f in scan] if isinstance(scan, (list, tuple)) else [str(scan)]
        if missing := next((f for f in files if not split_series(f)[0].exists()), None):
            raise UserError(
                f"{missing} does not exist: expected an image file, a DICOM folder, or a list file (.json, "
                ".csv)"
            )
        if is_list(files[0]):
            listed = get_task(files[0])
            order = channel_order(listed, task, files[0], report)
            cases += [_in_order(c, order, files[0]) for c in images_of(files[0])]
        else:
            cases.append(case_of(files))
    if not cases:
        raise UserError("no scans were given: expected image files, DICOM folders or a list file")
    return distinct(cases)


def distinct(cases: list[Case]) -> list[Case]:
    """Cases whose names differ, also where a file system does not tell capitals; who shares a name gets a
    number before it.
    """
    names = [c["case"].casefold() for c in cases]
    taken = {name for name in names if names.count(name) == 1}
    out = []
    for number, case in enumerate(cases, start=1):
        name = case["case"]
        if names.count(name.casefold()) > 1:
            name = f"{number:03d}_{name}"
            while name.casefold() in taken:
                name = f"x{name}"
            taken.add(name.casefold())
        out.append({**case, "case": name})
    return out


def _unnamed(channels: list[str]) -> bool:
    """Whether nobody has said what the channels are."""
    return all(name.startswith("channel ") for name in channels)


def channel_order(listed: Task, task: Task, path: str, report: Say) -> list[int]:
    """Where each of the run's channels stands in a list's channels; [] when they stand alike.

    Raises:
        UserError: for other channels than the run was trained with.
    """
    theirs, ours = [*map(str.lower, listed.channels)], [*map(str.lower, task.channels)]
    if theirs == ours or ((_unnamed(theirs) or _unnamed(ours)) and len(theirs) == len(ours)):
        return []
    if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        if len(theirs) == len(ours) == 1:
            report(
                f"note: {path} calls its channel {listed.channels[0]}, the run was trained with "
                f"{task.channels[0]}"
            )
            return []
        raise UserError(
            f"{path} has the channels {', '.join(listed.channels)}, the run was trained with "
            f"{', '.join(task.channels)}: give these, by these names"
        )
    report(
        f"note: {path} lists the channels {', '.join(listed.channels)}; they are put in the run's order "
        f"{', '.join(task.channels)}"
    )
    return [theirs.index(c) for c in ours]


def _in_order(case: Case, order: list[int], path: str) -> Case:
    if not order:
        return case
    if not isinstance(case["image"], list):
        raise UserError(
            f"{path}: the channels of {case['image']} stand in another order than the run's: write them in "
            "the run's order, or one file a channel"
        )
    return {**case, "image": [case["image"][i] for i in order]}


def _segment(
    predictor: Predictor, cases: list[Case], out: Path, probabilities: bool, report: Say
) -> pd.DataFrame:
    task = predictor.task
    # A scan that cannot be used shows before anything is written.
    in_shares(cases, lambda share: [predictor.check(case) for case in share])
    started = time.monotonic()

    def one(case: Case, number: int, count: int) -> dict[str, Any]:
        values, affine, probs = predictor.segment(
            case, keep=probabilities, progress=WindowProgress(case["case"], report)
        )
        image = (
            None if affine is None else Volume(np.zeros(0), affine, first_file(case["image"]), _units(case))
        )
        write_mask(out / (case["case"] if image else f"{case['case']}_mask"), values, task, image)
        if probs is not None and image:
            target = out / f"{case['case']}_probabilities.nii.gz"
            save_nifti(
                target, np.moveaxis(probs, 0, -1), affine, image.units, "probabilities: see labels.json"
            )
        elif probs is not None:
            np.save(out / f"{case['case']}_probabilities.npy", probs)
        sizes = _sizes(values, affine, task)
        _picture(case, values, affine, task, out / f"{case['case']}.png")
        found = sum(v > 0 for v in sizes.values())
        report(
            f"{case['case']}  ({number}/{count})  {found} of {len(sizes)} structures  "
            f"{time.monotonic() - started:.0f} s"
        )
        return {"case": case["case"], **sizes, "image": str(first_file(case["image"]))}

    table = pd.DataFrame(
        in_shares(cases, lambda share: [one(case, n, len(share)) for n, case in enumerate(share, start=1)])
    )
    if not is_main_process():
        return table
    write_text(out / ("volumes.csv" if task.spatial_dims == 3 else "areas.csv"), table.to_csv(index=False))
    write_text(
        out / "labels.json",
        json.dumps({**labels_of(task), "classes": list(task.classes)}, indent=1, ensure_ascii=False),
    )
    return table


def labels_of(task: Task) -> dict[str, str]:
    """Which class each value in a written mask means; of regions, which regions hold it."""
    return {
        "0": "background",
        **{str(task.written_labels[n]): name for n, name in enumerate(task.label_names, start=1)},
    }


def _sizes(values: np.ndarray, affine: np.ndarray | None, task: Task) -> dict[str, float]:
    """Volume in ml of each class, or area in pixels (mm² where the task says the pixel size)."""
    if affine is None:
        unit, size = ("mm²", math.prod(task.spacing_mm)) if task.spacing_mm else ("px", 1.0)
        counts = np.bincount(values.ravel(), minlength=task.label_values)
    else:
        unit, size = "ml", abs(np.linalg.det(affine[:3, :3])) / 1000
        counts = sum(
            np.bincount(values[box].ravel(), minlength=task.label_values)
            for box in out_of_core.blocks(values.shape)
        )
    sizes = {name: float(counts[list(of)].sum() * size) for name, of in zip(task.classes, task.class_values)}
    # Three decimals; where voxels are small (micro-CT), as many as show something.
    return {
        f"{name} ({unit})": round(value, 3) if value >= 0.1 else float(f"{value:.4g}")
        for name, value in sizes.items()
    }


def _units(case: Case) -> tuple[str, str]:
    """Units of space and time as a scan's header has them; DICOM counts in mm."""
    file = first_file(case["image"])
    return (
        units_of(nib.load(file))
        if has_ending(file, NIBABEL_ENDINGS) and Path(file).is_file()
        else ("mm", "unknown")
    )


def _picture(case: Case, values: np.ndarray, affine: np.ndarray | None, task: Task, target: Path) -> None:
    """Three planes through the most of what was found; of a large scan each second voxel, or fewer."""
    import matplotlib.pyplot as plt

    names = task.label_names
    if affine is None:
        figure = show_flat_overlay(
            np.asarray(read_image(case["image"]).convert("L")),
            values,
            {},
            names,
            case["case"],
            first="prediction",
        )
    else:
        thin = math.ceil((values.size / out_of_core.CHANNEL_VOXELS) ** (1 / 3))
        some, thinned = (slice(None, None, thin),) * 3, affine @ np.diag([thin, thin, thin, 1.0])
        file = first_file(case["image"])
        if has_ending(file, NIBABEL_ENDINGS) and len(nib.load(file).shape) <= 4:
            voxels = np.asarray(nib.load(file).dataobj[some], np.float32)
            voxels = voxels[..., 0] if voxels.ndim == 4 else voxels
        else:
            voxels = read_volume(file).values[0][some].astype(np.float32)
        scan = nib.as_closest_canonical(nib.Nifti1Image(voxels, thinned))
        mask = nib.as_closest_canonical(nib.Nifti1Image(values[some], thinned))
        grey, labels = np.asarray(scan.dataobj), np.asarray(mask.dataobj)
        for axis, n in enumerate(labels.shape):
            if n == 1:  # an outline needs two pixels each way
                grey, labels = grey.repeat(2, axis), labels.repeat(2, axis)
        grey = grey.clip(*task.window) if task.window else grey
        figure = show_overlay(
            grey, labels, {}, names, case["case"], voxel_sizes(mask.affine), first="prediction"
        )
    figure.savefig(target, dpi=90)
    plt.close(figure)


def _classify(predictor: Predictor, cases: list[Case], out: Path, patch: int, report: Say) -> pd.DataFrame:
    """Probabilities of each class; with `patch` pixels (0: without) also pictures of what speaks for the
    likeliest.
    """
    task = predictor.task
    scores = np.stack(in_shares(cases, lambda share: list(predictor.classify(predictor.scans(share)))))
    table = pd.DataFrame(scores.round(4), columns=list(task.classes))
    table.insert(0, "case", [c["case"] for c in cases])
    table["image"] = [str(first_file(c["image"])) for c in cases]
    if is_main_process():
        write_text(out / "probabilities.csv", table.to_csv(index=False))

    def draw(share: list[tuple[Case, np.ndarray]]) -> list[None]:
        for case, row in share:
            best = int(row.argmax())
            heat = predictor.occlusion_map(case, patch, best)
            _draw_occlusion(
                case,
                heat,
                f"{case['case']}: {task.classes[best]} {row[best]:.2f}",
                out / f"{case['case']}_occlusion.png",
            )
            report(f"{case['case']}  {task.classes[best]} {row[best]:.2f}")
        return [None] * len(share)

    if patch:
        in_shares(list(zip(cases, scores)), draw)
    return table


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
