"""The result files of the study: CSV with machine, date, commit, precision and command in `#` lines; intervals; the figure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from smae_utils.errors import UserError
from smae_utils.evidence.study import Made
from smae_utils.runs import machine_name, provenance, write_text

ARM_COLOURS = {"self": "#0072B2", "scratch_equal_compute": "#E69F00", "cnn": "#009E73"}
KEYS = {
    "tuning": ["task", "arm", "lr_factor", "layer_decay"],
    "gates": ["task", "gate", "what"],
    "main": ["task", "arm", "seed", "metric"],
    "controls": ["task", "arm", "seed", "metric"],
    "sweeps": ["task", "condition", "arm", "seed", "metric"],
}


def read(file: Path) -> pd.DataFrame:
    """A result file without its `#` lines; empty when it is not there."""
    table = pd.read_csv(file, comment="#", dtype={"condition": str}) if file.is_file() else pd.DataFrame()
    return table.fillna({"condition": ""}) if "condition" in table else table  # the study's own data: an empty cell


def read_tuned(results: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """task -> arm -> (factor of the learning rate, layer decay) with the best score on the development seed."""
    table = read(Path(results) / "tuning.csv")
    out: dict = {}
    if not table.empty:
        for row in table.sort_values("score").itertuples():
            out.setdefault(row.task, {})[row.arm] = (row.lr_factor, row.layer_decay)
    return out


class Writer:
    """Adds rows to the result files as they come; a row of the same key replaces the old one. The `#` lines name the commands, the latest last."""

    def __init__(self, results: Path, command: str = "", quick: int = 1):
        self.results, self.command, self.quick = Path(results), command, quick
        self.made: dict[str, set[Made]] = {}

    def tuning(self, rows: pd.DataFrame) -> None:
        """Scores of the learning-rate grids."""
        self._add("tuning", rows, KEYS["tuning"])

    def gates(self, rows: pd.DataFrame) -> None:
        """What must hold before arms are compared."""
        self._add("gates", rows, KEYS["gates"])

    def part(self, name: str) -> Callable[[pd.DataFrame], None]:
        """The receiver of main, controls or sweeps; only sweeps tell conditions apart."""
        return lambda rows: self._add(name, rows[[*KEYS[name], "value"]], KEYS[name])

    def _add(self, name: str, rows: pd.DataFrame, keys: list[str]) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        file = self.results / f"{name}.csv"
        if file.is_file() and ("figures of a quick run" in file.read_text(encoding="utf-8")) != (self.quick > 1):
            raise UserError(f"{file} holds figures of {'a full' if self.quick > 1 else 'a quick'} run: choose another --results")
        table = pd.concat([read(file), rows], ignore_index=True).drop_duplicates(keys, keep="last").sort_values(keys, kind="stable")
        # Where and when the runs behind the rows were made, which a command may only have found again.
        made = self.made.setdefault(name, set())
        made |= set(rows.attrs.get("made", ()))
        head = [
            f"python -m smae_utils evidence {self.command}"
            + (f" --quick {self.quick} (figures of a quick run mean nothing)" if self.quick > 1 else ""),
            "; ".join(_places(made)) if made else f"{machine_name()}, {provenance()['date']}, commit {provenance()['commit']}",
        ]
        # Rows come from several commands: each is named with where and when it was run last.
        said = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")] if file.is_file() else []
        earlier = [pair for pair in zip(said[::2], said[1::2]) if pair[0] != head[0]]
        lines = [line for pair in [*earlier, tuple(head)] for line in pair]
        write_text(file, "".join(f"# {line}\n" for line in lines) + table.to_csv(index=False, float_format="%.6g"))

    def finish(self) -> None:
        """Intervals and the figure, from whatever is there."""
        main = read(self.results / "main.csv")
        if main.empty or intervals(main).empty:  # nothing to compare with yet
            return
        table = intervals(pd.concat([main, *(read(self.results / f"{name}.csv") for name in ("controls", "sweeps"))]))
        write_text(
            self.results / "intervals.csv",
            f"# paired t intervals over seeds, from main.csv, controls.csv, sweeps.csv\n{table.to_csv(index=False, float_format='%.4g')}",
        )
        figures = {"main": show_differences(main)}
        longer = show_pretraining(main, read(self.results / "sweeps.csv"))
        for name, figure in {**figures, **({"longer": longer} if longer else {})}.items():
            figure.savefig(self.results / f"{name}.png", dpi=90)
            plt.close(figure)


def _places(made: set[Made]) -> list[str]:
    """A line for each machine, device and precision: when and by which commits runs were made there."""
    groups: dict[tuple, list[Made]] = {}
    for one in sorted(made):
        groups.setdefault((one.machine, one.torch, one.device, one.precision), []).append(one)
    lines = []
    for (machine, torch, device, precision), runs in groups.items():
        dates = sorted({datetime.fromisoformat(r.date).astimezone(UTC).strftime("%Y-%m-%d %H:%M") for r in runs})
        commits = sorted({r.commit for r in runs})
        span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines.append(f"{machine}, {span} UTC, commit {' '.join(commits)}, torch {torch}, {device}, {precision}")
    return lines


def intervals(table: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Mean difference of each arm to scratch, paired by seed, with its t interval.

    Returns:
        task, condition, metric, arm, seeds, scratch, value, difference, low, high; the interval is NaN with fewer than two seeds.
    """
    rows = []
    table = table.assign(condition=table["condition"].fillna("") if "condition" in table else "")
    table = table.replace({"arm": {"probe_random": "scratch", "probe_pretrained": "self"}})  # the probe's twin of scratch is the random encoder
    for (task, condition, metric), part in table.groupby(["task", "condition", "metric"], sort=False):
        wide = part.pivot(index="seed", columns="arm", values="value")
        if "scratch" not in wide or metric in ("dead_classes",):
            continue
        for arm in (a for a in wide.columns if a != "scratch"):
            both = wide[["scratch", arm]].dropna()
            change = both[arm] - both["scratch"]
            n = len(change)
            half = stats.t.ppf(0.5 + level / 2, n - 1) * change.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
            rows.append(
                (task, condition, metric, arm, n, both["scratch"].mean(), both[arm].mean(), change.mean(), change.mean() - half, change.mean() + half)
            )
    return pd.DataFrame(rows, columns=["task", "condition", "metric", "arm", "seeds", "scratch", "value", "difference", "low", "high"])


def show_pretraining(main: pd.DataFrame, sweeps: pd.DataFrame) -> Figure | None:
    """Score of each seed against the length of pre-training (0 is scratch), after the study's fine-tuning and after four times as much; a panel a task.

    Returns:
        None when no longer pre-training was run.
    """
    if sweeps.empty or not sweeps.arm.isin(["steps_x4"]).any():
        return None
    lengths = {"scratch": "0", "steps_x0.25": "1/4", "self": "1", "steps_x4": "4", "samples_x16": "16"}
    raw = {"scratch": "scratch", "self": "raw_pixels", "steps_x4": "raw_pixels_x4"}  # the arm of that length with the other target
    table = pd.concat([main.assign(condition=""), sweeps[sweeps.condition.isin(["", "finetune4x"])]])
    table = table[table.arm.isin([*lengths, *raw.values()]) & table.metric.isin(["mauc", "dsc"])]
    tasks = sorted(sweeps[sweeps.arm == "steps_x4"].task.unique())
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.8 * len(tasks), 3.2), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        shown = [arm for arm in lengths if arm != "samples_x16" or arm in set(table[table.task == task].arm)]
        for condition, colour, label in (("", "#0072B2", "fine-tuning 1x"), ("finetune4x", "#D55E00", "fine-tuning 4x")):
            wide = table[(table.task == task) & (table.condition == condition)].pivot(index="seed", columns="arm", values="value")
            for arms, style, target in ((shown, "o-", ""), ([raw.get(arm, "") for arm in shown], "s--", ", raw pixels")):
                rows = np.stack([wide[arm] if arm in wide else np.full(len(wide), np.nan) for arm in arms], 1)
                for number, row in enumerate(rows[np.isfinite(rows).sum(1) > 1]):
                    there = np.flatnonzero(np.isfinite(row))
                    axis.plot(there, row[there], style, color=colour, alpha=0.5, markersize=4, linewidth=1, label=None if number else label + target)
        axis.set(title=task, xticks=range(len(shown)), xlabel="masked crops, times the study's", ylabel="mAUC" if task == "cxr14" else "mean DSC")
        axis.set_xticklabels([lengths[arm] for arm in shown])
        axis.legend(fontsize=7)
    return figure


def show_differences(main: pd.DataFrame) -> Figure:
    """Difference to scratch of each seed (dots), mean and 95 % interval of each arm; a panel a task."""
    table = intervals(main)
    tasks = [task for task in main.task.unique() if task in set(table.task)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.2), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        metric = "mauc" if "mauc" in set(main[main.task == task].metric) else "dsc"
        wide = main[(main.task == task) & (main.metric == metric)].pivot(index="seed", columns="arm", values="value")
        arms = [a for a in ARM_COLOURS if a in wide]
        for x, arm in enumerate(arms):
            row = table[(table.task == task) & (table.metric == metric) & (table.arm == arm)].iloc[0]
            axis.plot([x] * len(wide), wide[arm] - wide["scratch"], "o", color=ARM_COLOURS[arm], alpha=0.5)
            axis.errorbar(
                x + 0.15, row.difference, [[row.difference - row.low], [row.high - row.difference]], fmt="D", color="black", capsize=4, ms=4
            )
        axis.axhline(0, color="#777777", linewidth=1)
        axis.set(title=f"{task}, {len(wide)} seeds", xticks=range(len(arms)), xlim=(-0.5, len(arms) - 0.5), ylabel=f"{metric} - scratch")
        axis.set_xticklabels([a.replace("_", "\n") for a in arms], fontsize=8)
    return figure
