"""The figure of a study: score against the number of labelled cases, each arm a line, each unit a dot."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smae_utils.atomic import write_text
from tools.study.plan import Study
from tools.study.tables import Results, intervals, patient_interval

STYLES = {
    "scratch": ("#555555", "o", "from scratch"),
    "self": ("#56B4E9", "s", "pre-trained on the labelled images"),
    "self_all": ("#0072B2", "D", "pre-trained on all training images"),
    "scratch_equal_compute": ("#E69F00", "^", "from scratch, equal total compute"),
    "cnn": ("#009E73", "v", "convolutional network"),
    "scratch_scaled": ("#CC79A7", "P", "random weights of the pre-trained size"),
    "frozen": ("#D55E00", "X", "pre-trained and frozen"),
}
NAMES = {"dsc": "mean DSC", "mauc": "mAUC", "hd95_mm": "HD95 in mm"}


def draw(folder: Path, study: Study) -> None:
    """`intervals.csv` and `main.png` from `main.csv`, if it is there.

    `patients.csv` too, where the scores of cases are.
    """
    results = Results(folder)
    main = results.counted(study)
    if main.empty or (table := intervals(main)).empty:
        return
    text = table.to_csv(index=False, float_format="%.4g")
    write_text(
        folder / "intervals.csv", f"# paired by seed and fold, 95 % t intervals, from main.csv\n{text}"
    )
    cases = results.read("cases")
    if study.folds and not cases.empty:
        rows = [
            (r.labelled, r.arm, *patient_interval(cases, r.labelled, r.arm))
            for r in table.itertuples()
            if r.metric == study.metric
        ]
        text = pd.DataFrame(rows, columns=["labelled", "arm", "difference", "low", "high"]).to_csv(
            index=False, float_format="%.4g"
        )
        write_text(
            folder / "patients.csv",
            "# each seed's folds pooled, patients and seeds resampled together, 95 % intervals, from "
            f"cases.csv\n{text}",
        )
    figure = figure_of(main, study)
    figure.savefig(folder / "main.png", dpi=90)
    plt.close(figure)


def figure_of(main: pd.DataFrame, study: Study) -> Figure:
    """Scores of the arms, then differences to scratch with their intervals, a panel a figure."""
    rows = [str(row) for row in study.labelled if str(row) in set(main.labelled)]
    main = main[main.labelled.isin(rows)]
    columns = 1 + len(study.metrics)
    figure, (scores, *gains) = plt.subplots(1, columns, figsize=(4.5 * columns, 3.6), layout="constrained")
    table = intervals(main)
    for number, (arm, (colour, marker, label)) in enumerate(STYLES.items()):
        part = main[(main.arm == arm) & (main.metric == study.metric)]
        if part.empty:
            continue
        shift = (number - 2) * 0.06
        place = np.array([rows.index(row) for row in part.labelled]) + shift
        scores.plot(place, part.value, marker, color=colour, alpha=0.35, markersize=3)
        mean = (
            part.groupby("labelled").value.mean().reindex([row for row in rows if row in set(part.labelled)])
        )
        scores.plot(
            [rows.index(row) + shift for row in mean.index],
            mean,
            "-",
            color=colour,
            marker=marker,
            markersize=5,
            label=label,
        )
        for metric, axis in zip(study.metrics, gains):
            found = table[(table.arm == arm) & (table.metric == metric)]
            at = [rows.index(row) + shift for row in found.labelled]
            spread = [found.difference - found.low, found.high - found.difference]
            axis.errorbar(at, found.difference, spread, fmt=marker, color=colour, capsize=3, markersize=5)
    _name(scores, rows, NAMES[study.metric])
    for metric, axis in zip(study.metrics, gains):
        axis.axhline(0, color="#777777", linewidth=1)
        _name(axis, rows, f"{NAMES[metric]}, difference to scratch")
    scores.legend(fontsize=7, loc="lower right")
    figure.suptitle(
        f"{study.title}: {table.units.max()} {'seeds x folds' if study.folds else 'seeds'} with both arms",
        fontsize=10,
    )
    return figure


def _name(axis: Axes, rows: list[str], ylabel: str) -> None:
    axis.set(
        xticks=range(len(rows)), xlabel="labelled training cases", ylabel=ylabel, xlim=(-0.5, len(rows) - 0.5)
    )
    axis.set_xticklabels(rows)
