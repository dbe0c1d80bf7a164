"""Figures of results: test scans with label and predictions, and bars of two arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nibabel.affines import voxel_sizes

from smae_utils.data.labels import encode_labels
from smae_utils.data.pictures import read_flat_mask, read_image
from smae_utils.data.reading import read_channels, read_label, read_mask
from smae_utils.data.tasks import Task
from smae_utils.show.plots import (
    ARM_COLOURS,
    PALETTE,
    PLANES,
    axes_grid,
    centre_of,
    draw_outlines,
    pictures,
    plane,
    scale_of,
)

MOST_NAMES = 14  # in a legend


def _legend(figure: Figure, classes: Sequence[str], labels: Iterable[np.ndarray]) -> None:
    """Names of the classes that are drawn; of more than `MOST_NAMES`, the largest."""
    counts = sum(
        np.bincount(values.ravel(), minlength=len(classes) + 1)[: len(classes) + 1] for values in labels
    )
    found = [i for i in np.argsort(-counts[1:], kind="stable") if counts[i + 1]]
    handles = [Patch(color=PALETTE[i % len(PALETTE)], label=classes[i]) for i in sorted(found[:MOST_NAMES])]
    if len(found) > MOST_NAMES:
        handles.append(Patch(color="none", label=f"and {len(found) - MOST_NAMES} more"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)


def show_overlay(
    image: np.ndarray, label: np.ndarray, predictions: dict[str, np.ndarray], classes: Sequence[str],
    title: str = "",
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0), first: str = "label",
) -> Figure:  # fmt: skip
    """One scan (X, Y, Z): the label, then each arm's prediction, outlined.

    Shown are the planes with most labelled voxels, in true proportions.
    """
    shown = {first: label, **predictions}
    figure, axes = axes_grid(len(shown), 3)
    at = centre_of(label) if label.any() else None
    low, high = scale_of(image)
    for row, (name, values) in zip(axes, shown.items()):
        for axis, (view, picture), outline in zip(
            row, pictures(image, at=at).items(), pictures(values, at=at).values()
        ):
            across, up = (spacing_mm[a] for a in range(3) if a != PLANES[view])
            axis.imshow(
                picture, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=up / across
            )
            draw_outlines(axis, outline, len(classes))
            axis.set_title(f"{name}, {view}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    _legend(figure, classes, shown.values())
    return figure


def show_comparison(table, metric: str) -> Figure:
    """Bars of a `compare` table, two a class."""
    rows = table[(table["class"] != "mean") & (table.metric == metric)]
    place = np.arange(len(rows))
    figure, axis = plt.subplots(figsize=(6.5, 0.32 * len(rows) + 1.2), layout="constrained")
    for offset, arm in ((0.2, "scratch"), (-0.2, "self")):
        axis.barh(place + offset, rows[arm], height=0.38, label=arm, color=ARM_COLOURS[arm])
    # A missing bar is no figure, not 0: the class cannot be scored.
    names = [
        f"{r['class']} (n/a)" if np.isnan(r["scratch"]) or np.isnan(r["self"]) else r["class"]
        for _, r in rows.iterrows()
    ]
    axis.set_yticks(place, names)
    axis.invert_yaxis()
    axis.set(xlabel=metric, xlim=(0, 1))
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def show_flat_overlay(
    image: np.ndarray,
    label: np.ndarray,
    predictions: dict[str, np.ndarray],
    classes: Sequence[str],
    title: str = "",
    first: str = "label",
) -> Figure:
    """One 2D image (H, W): the label, then each arm's prediction, outlined."""
    shown = {first: label, **predictions}
    figure, axes = axes_grid(1, len(shown), 3)
    for axis, (name, values) in zip(axes[0], shown.items()):
        axis.imshow(image, cmap="gray", interpolation="nearest")
        draw_outlines(axis, values, len(classes))
        axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _legend(figure, classes, shown.values())
    return figure


def show_test_case(task: Task, case: dict, runs: dict[str, Path], tables: dict, title: str) -> Figure:
    """One test case: label and each arm's prediction outlined; for classification, targets and scores."""
    if task.kind == "classification":
        return _show_scores(task, case, tables, title)
    label, scan = read_label(case, task)
    names = task.label_names
    ending = ".png" if scan is None else ".nii.gz"
    files = {arm: run / "predictions" / f"{case['case']}{ending}" for arm, run in runs.items()}
    if scan is None:
        predicted = {arm: encode_labels(read_flat_mask(file), task, str(file)) for arm, file in files.items()}
        return show_flat_overlay(
            np.asarray(read_image(case["image"]).convert("L")), label, predicted, names, title
        )
    picture = scan.values[0].astype(np.float32)
    if task.window:
        picture = picture.clip(*task.window)
    predicted = {arm: encode_labels(read_mask(file, scan), task, str(file)) for arm, file in files.items()}

    def canonical(values: np.ndarray) -> nib.Nifti1Image:
        return nib.as_closest_canonical(nib.Nifti1Image(values, scan.affine))

    drawn = canonical(picture)
    arms = {arm: np.asarray(canonical(values).dataobj) for arm, values in predicted.items()}
    return show_overlay(
        np.asarray(drawn.dataobj),
        np.asarray(canonical(label).dataobj),
        arms,
        names,
        title,
        voxel_sizes(drawn.affine),
    )


def _middle_picture(task: Task, case: dict) -> np.ndarray:
    """A 2D image, or the middle axial plane of a 3D scan, in grey."""
    if task.spatial_dims == 2:
        return np.asarray(read_image(case["image"]).convert("L"))
    scan = read_channels(case["image"])
    values = np.asarray(
        nib.as_closest_canonical(nib.Nifti1Image(scan.values[0].astype(np.float32), scan.affine)).dataobj
    )
    return plane(values.clip(*task.window) if task.window else values, "axial")


def _show_scores(task: Task, case: dict, tables: dict, title: str) -> Figure:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.5, 3.4), layout="constrained", width_ratios=(1, 1.1)
    )
    left.imshow(_middle_picture(task, case), cmap="gray")
    left.set(xticks=[], yticks=[], title=title)
    place = np.arange(len(task.classes))
    for offset, (arm, table) in zip((0.2, -0.2), tables.items()):
        rows = table[table.case == case["case"]].set_index("class").loc[list(task.classes)]
        right.barh(place + offset, rows.score, height=0.38, label=arm, color=ARM_COLOURS[arm])
    targets = rows.target.astype(float)
    right.set_yticks(
        place, [f"{'> ' if t == 1 else ''}{name}" for name, t in zip(task.classes, targets)], fontsize=7
    )
    right.invert_yaxis()
    right.set(xlabel="predicted probability (> marks findings that are there)", xlim=(0, 1))
    right.legend(fontsize=7, frameon=False)
    return figure
