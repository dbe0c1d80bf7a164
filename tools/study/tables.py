"""Result files of a study: its rows as they come, and the intervals.

Beside the rows stand the commands, machines and commits that made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from smae_utils.atomic import write_text
from smae_utils.errors import UserError
from smae_utils.places import work_root
from tools.study.plan import Study

KEYS = {
    "room": ["design", "labelled"],
    "probe": ["design", "encoder", "labelled"],
    "recipe": ["recipe", "labelled"],
    "tune": ["arm", "setting"],
    "main": ["labelled", "arm", "seed", "fold"],
}
QUICK = "figures of a quick run mean nothing"
BOOTSTRAP = 2000


def said(setting: dict[str, Any]) -> str:
    """A setting as tables say it: "lr=0.001 encoder_lr=0.3"."""
    return " ".join(f"{key}={value}" for key, value in setting.items())


class Results:
    """The tables of a study in a folder; a row of the same key replaces the old one."""

    def __init__(self, folder: Path, command: str = "", quick: int = 1):
        self.folder, self.quick = Path(folder), quick
        self.command = command + (f" --quick {quick} ({QUICK})" if quick > 1 else "")

    def check(self) -> None:
        """Figures of a quick run and of a full one never share a folder.

        Raises:
            UserError: naming a table of the other kind.
        """
        for file in sorted(self.folder.glob("*.csv")):
            head = file.read_text(encoding="utf-8").split("\n", 1)[0]
            if head.startswith("# python") and (QUICK in head) != (self.quick > 1):
                raise UserError(
                    f"{file} holds figures of {'a full' if self.quick > 1 else 'a quick'} "
                    "run: choose another --results"
                )

    def read(self, name: str) -> pd.DataFrame:
        """A table without its `#` lines; empty when it is not there."""
        file = self.folder / f"{name}.csv"
        text = {"labelled": str, "case": str, "patient": str}
        return (
            pd.read_csv(file, comment="#", dtype=text, keep_default_na=False, na_values=[""])
            if file.is_file()
            else pd.DataFrame()
        )

    def counted(self, study: Study) -> pd.DataFrame:
        """Rows of the main table of the study's own seeds."""
        main = self.read("main")
        return main if main.empty else main[main.seed.isin(study.seeds)]

    def has(self, part: str, key: dict[str, Any]) -> bool:
        """Whether a run's figures are there."""
        table = self.read(part)
        return not table.empty and bool(
            (table.reindex(columns=list(key)).astype(str) == [str(v) for v in key.values()]).all(axis=1).any()
        )

    def add(self, part: str, key: dict[str, Any], answer: dict[str, Any]) -> None:
        """Figures of one run, as `run.run_job` returns them.

        Of the main table also the scores of its cases, where intervals by patients are made of them. Those
        hold labels of the data set: `cases.csv` stays on the machine, `patients.csv` made of it is committed.
        """
        rows, cases, made = answer["rows"], answer["scores"], answer["made"]
        self._write(part, [{**key, **row} for row in rows], [*KEYS[part], "metric"], made)
        if part == "main" and cases:
            self._write("cases", [{**key, **row} for row in cases], [*KEYS[part], "case", "class"], made)

    def _write(self, name: str, rows: list[dict], keys: list[str], made: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.csv"
        head = (
            [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            if file.is_file()
            else []
        )
        fresh = pd.DataFrame(rows).astype(
            {key: str for key in ("labelled", "case", "patient") if key in rows[0]}
        )
        table = (
            pd.concat([self.read(name), fresh], ignore_index=True)
            .drop_duplicates(keys, keep="last")
            .sort_values(keys, kind="stable")
        )
        where = "{machine}, commit {commit}, torch {torch}, {device}, {precision}".format(**made)
        write_text(
            file,
            "".join(f"# {line}\n" for line in _places(head, self.command, where, made["date"]))
            + table.to_csv(index=False, float_format="%.5g"),
        )

    def tuned(self, study: Study, arms: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """arm -> the setting of its grid with the best score on the development seed.

        It comes from this folder, or else from the project's own results.

        Raises:
            UserError: when a grid was not run to its end.
        """
        table, out = self.read("tune"), {}
        if table.empty and self.quick == 1:
            table = Results(work_root() / "results" / "evidence" / "real" / study.name).read("tune")
        for arm, grid in study.grids.items():
            if arms and arm not in arms:
                continue
            if len(grid) == 1:
                out[arm] = grid[0]
                continue
            own = table[(table.arm == arm) & (table.metric == study.metric)] if len(table) else table
            setups = {said(setting): study.setup(arm, setting) for setting in grid}
            own = own[own["setup"] == own["setting"].map(setups)] if "setup" in own else own.iloc[:0]
            scores = own.set_index("setting").value if len(own) else pd.Series(dtype=float)
            if missing := [said(setting) for setting in grid if said(setting) not in scores]:
                raise UserError(
                    f"{self.folder / 'tune.csv'} has no score of {arm} with "
                    f"{missing[0]}: run --part tune first"
                )
            out[arm] = max(grid, key=lambda setting: scores[said(setting)])
        return out


def _places(head: list[str], command: str, where: str, date: str) -> list[str]:
    """The `#` lines with one more run: each command, and below it where and when its runs were made."""
    when = datetime.fromisoformat(date).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    groups: dict[str, dict[str, list[str]]] = {}
    for line in head:
        if line.startswith("python"):
            groups[line] = current = {}
        else:
            place, _, times = line.rpartition(", from ")
            current[place] = times.removesuffix(" UTC").split(" to ")
    spans = groups.setdefault(command, {})
    times = [*spans.get(where, []), when]
    spans[where] = [min(times), max(times)]
    return [
        line
        for name, places in groups.items()
        for line in (name, *(f"{p}, from {' to '.join(t)} UTC" for p, t in places.items()))
    ]


def intervals(main: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Mean difference of each arm to scratch, paired by seed and fold, with its t interval.

    Returns:
        labelled, metric, arm, units, scratch, value, difference, low, high, above; the interval is NaN with
        fewer than two units, `above` counts the units in which the arm's figure is the higher one.
    """
    rows = []
    for (labelled, metric), part in main.groupby(["labelled", "metric"], sort=False):
        wide = part.pivot(index=["seed", "fold"], columns="arm", values="value")
        for arm in (a for a in wide.columns if a != "scratch" and "scratch" in wide):
            both = wide[["scratch", arm]].dropna()
            if both.empty:  # not run on one and the same unit yet
                continue
            change, n = both[arm] - both["scratch"], len(both)
            half = stats.t.ppf(0.5 + level / 2, n - 1) * change.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
            means = both["scratch"].mean(), both[arm].mean(), change.mean()
            span, above = (change.mean() - half, change.mean() + half), int((change > 0).sum())
            rows.append((labelled, metric, arm, n, *means, *span, above))
    columns = ["labelled", "metric", "arm", "units", "scratch", "value", "difference", "low", "high", "above"]
    return pd.DataFrame(rows, columns=columns)


def patient_interval(
    cases: pd.DataFrame, labelled: str, arm: str, draws: int = BOOTSTRAP, level: float = 0.95
) -> tuple[float, float, float]:
    """(difference of mAUC to scratch over all folds, low, high), resampling patients and seeds together.

    Each seed's folds are pooled class by class into one prediction of every patient. A draw takes
    patients, and seeds, with replacement.
    """
    part = cases[(cases.labelled == labelled) & cases.arm.isin(["scratch", arm])]
    both = part.groupby(["seed", "fold"]).arm.nunique()
    if not (both == 2).any():
        return float("nan"), float("nan"), float("nan")
    part = part.set_index(["seed", "fold"]).loc[both[both == 2].index].reset_index()
    patients = {name: i for i, name in enumerate(sorted(part.patient.unique()))}
    seeds = sorted(part.seed.unique())
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), draws)
    counts = np.vstack([np.ones(len(patients), int), counts])  # first the data as they are
    gains = np.stack([_gains(part[part.seed == seed], arm, patients, counts) for seed in seeds])
    picked = np.stack(
        [np.arange(len(seeds))] + [rng.integers(len(seeds), size=len(seeds)) for _ in range(draws)]
    )
    means = gains[picked.T, np.arange(draws + 1)].mean(0)
    low, high = np.nanquantile(means[1:], [0.5 - level / 2, 0.5 + level / 2])
    return float(means[0]), float(low), float(high)


def _gains(part: pd.DataFrame, arm: str, patients: dict[str, int], counts: np.ndarray) -> np.ndarray:
    """mAUC of `arm` minus that of scratch for each row of patients' counts (draws, patients)."""
    out = {}
    for name in ("scratch", arm):
        rows = part[part.arm == name]
        aucs = [
            _weighted_auc(r.score, r.target, counts[:, [patients[p] for p in r.patient]])
            for _, r in rows.groupby("class")
        ]
        out[name] = np.nanmean(aucs, 0)
    return out[arm] - out["scratch"]


def _weighted_auc(score: Iterable[float], target: Iterable[int], weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of N cases under each row of weights (draws, N); ties count half."""
    score, target = np.asarray(score, float), np.asarray(target, int)
    _, place = np.unique(score, return_inverse=True)
    levels = place.max() + 1
    positive, negative = (
        np.stack([np.bincount(place, w * (target == t), levels) for w in weights]) for t in (1, 0)
    )
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
