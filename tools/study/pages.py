"""What the documents say of the study: its tables and figures, from committed CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tools.markdown import details_of, span, table_of
from tools.study.figures import NAMES
from tools.study.plan import Study, read_study
from tools.study.tables import KEYS, Results, intervals

STUDIES = ("hippocampus", "cxr14_64px")  # of tools/study
SHORT = {"dsc": "DSC", "mauc": "mAUC", "hd95_mm": "HD95 (mm)"}


def _study(root: Path, name: str, table: str) -> pd.DataFrame:
    return Results(root / "results" / "evidence" / "real" / name).read(table)


def _order(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table of intervals in the order of the study: by labelled cases, then by arm.

    What the study no longer names is left out.
    """
    rows, arms = [str(row) for row in study.labelled], list(study.arms)
    table = table[table.labelled.isin(rows) & table.arm.isin(arms)]
    return table.sort_values(
        ["labelled", "arm"], key=lambda c: c.map((rows if c.name == "labelled" else arms).index)
    )


def _figure(root: Path, name: str, up: str) -> str:
    """The study's figure as a document shows it that lies `up` from the root, where it was drawn."""
    file = Path("results") / "evidence" / "real" / name / "main.png"
    words = f"{read_study(name).title}: score against labelled training cases, and difference to scratch"
    return f"![{words}]({up}{file.as_posix()})\n\n" if (root / file).is_file() else ""


def main_block(root: Path, name: str) -> str:
    """The figure, and each arm beside scratch, by labelled cases, from the study's `main.csv`."""
    study, folder = read_study(name), root / "results" / "evidence" / "real" / name
    main = Results(folder).counted(study)
    if main.empty:
        return "Not run yet."
    table = _order(study, intervals(main))
    patients = Results(folder).read("patients")
    parts = [_figure(root, name, "../")]
    for metric in study.metrics:
        own = table[table.metric == metric]
        heading = NAMES[metric] + ("" if metric == study.metric else " (less is better)")
        lines = pd.DataFrame([_line(row, patients) for row in own.itertuples()])
        parts.append(f"{heading}\n\n{table_of(lines)}\n\n")
    return "".join(parts).rstrip() + details_of([folder / "main.csv"])


def _line(row, patients: pd.DataFrame) -> dict[str, object]:
    """An arm beside scratch, as a row of a table; with its interval by patients where there is one."""
    line = {
        "labelled": row.labelled,
        "arm": row.arm,
        "scratch": row.scratch,
        "arm's": row.value,
    }
    line |= {"difference": f"{row.difference:+.3f}", "95 % interval": span(row.low, row.high)}
    line["above scratch in"] = f"{row.above} of {row.units} units"
    if not patients.empty:
        own = patients[(patients.labelled == row.labelled) & (patients.arm == row.arm)]
        line["by patients"] = span(*own[["low", "high"]].to_numpy()[0]) if len(own) else "not made"
    return line


def first_block(root: Path) -> str:
    """The README's tables: scratch and pre-trained on all training images, a row a number of labelled cases.

    A convolutional network stands beside them where one was run.
    """
    parts = []
    for name in STUDIES:
        study, folder = read_study(name), root / "results" / "evidence" / "real" / name
        main = Results(folder).counted(study)
        if main.empty:
            continue
        table, columns = _order(study, intervals(main)), {}
        for metric in study.metrics:
            of = {arm: own.set_index("labelled") for arm, own in table[table.metric == metric].groupby("arm")}
            trained, short = of["self_all"], SHORT[metric]
            columns[f"{short} scratch"] = trained.scratch
            columns[f"{short} pre-trained"] = trained.value
            columns[f"{short} difference, 95 %"] = trained.apply(lambda row: span(row.low, row.high), axis=1)
            if "cnn" in of:
                columns[f"{short} convolutional"] = of["cnn"].value.reindex(trained.index)
        figures = table_of(pd.DataFrame(columns).reset_index())
        parts.append(
            f"{study.title}\n\n{_figure(root, name, '')}{figures}{details_of([folder / 'main.csv'])}"
        )
    return "\n\n".join(parts)


def stopped_block(root: Path) -> str:
    """The rows of the first run of hippocampus, which was too short."""
    file = root / "results" / "evidence" / "real" / "hippocampus" / "stopped_at_300_steps.csv"
    table = pd.read_csv(file, comment="#")
    wide = (
        table[table.metric == "dsc"]
        .pivot_table(index=["labelled", "seed"], columns="arm", values="value")
        .reset_index()
    )
    return table_of(wide.fillna("not run")) + details_of([file])


def missing_block(root: Path) -> str:
    """What of the main tables was not run."""
    lines = []
    for name in STUDIES:
        study, results = read_study(name), Results(root / "results" / "evidence" / "real" / name)
        main = results.read("main")
        done = set() if main.empty else set(zip(main.labelled, main.arm, main.seed, main.fold))
        left: dict[str, int] = {}
        for arm, record in study.arms.items():
            for row in record.rows or study.labelled:
                left[arm] = left.get(arm, 0) + sum(
                    (str(row), arm, seed, fold) not in done for seed, fold in study.units()
                )
        text = ", ".join(f"{arm} {count}" for arm, count in left.items() if count) or "nothing"
        lines.append(f"* {name}: {len(done)} runs made; missing: {text}.")
    return "\n".join(lines)


def chosen_block(root: Path, name: str, table: str, file: str = "") -> str:
    """Scores of the development seed: `room`, `recipe` or `tune`, of the file of that name or of another."""
    found = _study(root, name, file or table)
    if found.empty:
        return "Not run yet."
    keys = [key for key in KEYS[table] if key in found]
    wide = found.pivot_table(index=keys, columns="metric", values="value", sort=False).reset_index()
    by = (
        keys[0]
        if table == "tune"
        else next(metric for metric in (read_study(name).metric, "auc") if metric in wide)
    )
    wide = wide.sort_values(by, ascending=table == "tune", kind="stable")
    return table_of(wide) + details_of(
        [root / "results" / "evidence" / "real" / name / f"{file or table}.csv"]
    )
