"""Figures of the README: written from committed result files by `python -m tools readme`, never by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.show.notebook_helpers import load_crop
from smae_utils.show.plots import show_reconstruction
from smae_utils.work.build import build_splits
from smae_utils.work.rebuild import load_pretrained
from smae_utils.work.run_data import find_data
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import STAGES, describe
from tools.demo import pivot
from tools.reference import api_block, commands_block, modules_block
from tools.study.figures import NAMES
from tools.study.plan import Study, read_study
from tools.study.tables import KEYS, Results, intervals


def _facts(file: Path) -> str:
    return "".join(
        f"\n{line[2:]}  " for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")
    )


def _table(frame: pd.DataFrame) -> str:
    text = frame.map(
        lambda v: (f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}") if isinstance(v, float) else str(v)
    )
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_block(root: Path, name: str = "summary") -> str:
    """Table of `results/demo/NAME.csv`: the summary that a demo left, as it was committed."""
    file = root / "results" / "demo" / f"{name}.csv"
    return _table(pivot(pd.read_csv(file, comment="#"))) + "\n" + _facts(file)


def paper_block(root: Path) -> str:
    """Table of `results/benchmark/paper_presets.csv`."""
    file = root / "results" / "benchmark" / "paper_presets.csv"
    return _table(pd.read_csv(file, comment="#")) + "\n" + _facts(file)


STUDIES = ("hippocampus", "cxr14_64px")  # of tools/study
SHORT = {"dsc": "DSC", "mauc": "mAUC", "hd95_mm": "HD95 (mm)"}


def _study(root: Path, name: str, table: str) -> pd.DataFrame:
    return Results(root / "results" / "evidence" / "real" / name).read(table)


def _details(files: Iterable[Path]) -> str:
    facts = "".join(_facts(file) for file in files if file.is_file())
    return f"\n\n<details><summary>Commands, machines, dates, commits</summary>\n{facts}\n\n</details>"


def _span(low: float, high: float) -> str:
    return f"{low:+.3f} to {high:+.3f}" if pd.notna(low) else "one unit only"


def _order(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table of intervals in the order of the study: by labelled cases, then by arm. What the study
    no longer names is left out.
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
        parts.append(f"{heading}\n\n{_table(lines)}\n\n")
    return "".join(parts).rstrip() + _details([folder / "main.csv"])


def _line(row, patients: pd.DataFrame) -> dict[str, object]:
    """An arm beside scratch, as a row of a table; with its interval by patients where there is one."""
    line = {
        "labelled": row.labelled,
        "arm": row.arm,
        "scratch": row.scratch,
        "arm's": row.value,
    }
    line |= {"difference": f"{row.difference:+.3f}", "95 % interval": _span(row.low, row.high)}
    line["above scratch in"] = f"{row.above} of {row.units} units"
    if not patients.empty:
        own = patients[(patients.labelled == row.labelled) & (patients.arm == row.arm)]
        line["by patients"] = _span(*own[["low", "high"]].to_numpy()[0]) if len(own) else "not made"
    return line


def first_block(root: Path) -> str:
    """The README's tables: a row a number of labelled cases; scratch, pre-trained on all training images, and
    a convolutional network where one was run.
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
            columns[f"{short} difference, 95 %"] = trained.apply(lambda row: _span(row.low, row.high), axis=1)
            if "cnn" in of:
                columns[f"{short} convolutional"] = of["cnn"].value.reindex(trained.index)
        figures = _table(pd.DataFrame(columns).reset_index())
        parts.append(f"{study.title}\n\n{_figure(root, name, '')}{figures}{_details([folder / 'main.csv'])}")
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
    return _table(wide.fillna("not run")) + _details([file])


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
    return _table(wide) + _details([root / "results" / "evidence" / "real" / name / f"{file or table}.csv"])


# Arms of the phantom study that are shown, in their order.
PHANTOM_ARMS = (
    "self",
    "steps_x4",
    "raw_pixels",
    "raw_pixels_x4",
    "scratch_equal_compute",
    "cnn",
    "shuffled_patches",
    "permuted_weights",
)


def phantoms_block(root: Path) -> str:
    """Primary figures of `results/evidence/phantoms/intervals.csv`."""
    folder = root / "results" / "evidence" / "phantoms"
    table = pd.read_csv(folder / "intervals.csv", comment="#", dtype={"condition": str}).fillna(
        {"condition": ""}
    )
    table = table[
        table.arm.isin(PHANTOM_ARMS)
        & table.metric.isin(["mauc", "dsc"])
        & table.condition.isin(["", "finetune4x"])
    ]
    table = table.sort_values(
        ["task", "condition", "arm"], key=lambda c: c.map(PHANTOM_ARMS.index) if c.name == "arm" else c
    )
    rows = [
        (
            r.task,
            r.metric,
            "4x" if r.condition else "1x",
            r.arm,
            r.seeds,
            r.scratch,
            r.value,
            f"{r.difference:+.3f}",
            _span(r.low, r.high),
        )
        for r in table.itertuples()
    ]
    columns = [
        "task",
        "metric",
        "fine-tuning",
        "arm",
        "seeds",
        "scratch",
        "arm's",
        "difference",
        "95 % interval",
    ]
    return _table(pd.DataFrame(rows, columns=columns)) + _details(
        folder / f"{name}.csv" for name in ("main", "sweeps", "controls")
    )


def settings_block(root: Path) -> str:
    """All settings, from their fields in `settings.py`."""
    parts = [pd.DataFrame(describe()).query("stage == @stage") for stage in ("both", *STAGES)]
    return "\n\n".join(f"### {part.stage.iloc[0]}\n\n{_table(part.drop(columns='stage'))}" for part in parts)


def speed_block(root: Path) -> str:
    """Table of `results/bench/speed.csv`."""
    file = root / "results" / "bench" / "speed.csv"
    text = pd.read_csv(file, comment="#").map(lambda v: f"{v:.3g}" if isinstance(v, float) else v)
    return _table(text.replace("nan", "")) + "\n" + _facts(file)


def memory_block(root: Path) -> str:
    """Table of `results/bench/memory.csv`."""
    file = root / "results" / "bench" / "memory.csv"
    text = pd.read_csv(file, comment="#").map(lambda v: f"{v:.3g}" if isinstance(v, float) else v)
    return _table(text) + "\n" + _facts(file)


def processes_block(root: Path) -> str:
    """Table of `results/bench/processes.csv`."""
    file = root / "results" / "bench" / "processes.csv"
    return (
        _table(pd.read_csv(file, comment="#").astype({"times as fast as one": object}).fillna(""))
        + "\n"
        + _facts(file)
    )


def faults_block(root: Path) -> str:
    """Trials of `results/faults/faults.csv`, a row a work and fault."""
    file = root / "results" / "faults" / "faults.csv"
    table = pd.read_csv(file, comment="#", keep_default_na=False, na_values=[])
    table["right"] = (table.again == 0) & table.equal & (table.left_behind == "") & (table.orphans == 0)
    rows = table.groupby(["fault", "work"], sort=False).agg({"moment": "size", "right": "sum"})
    return _table(rows.rename(columns={"moment": "trials"}).reset_index()) + "\n" + _facts(file)


def explorer_block(root: Path) -> str:
    """Table of `results/benchmark/explorer.csv`."""
    file = root / "results" / "benchmark" / "explorer.csv"
    return _table(pd.read_csv(file, comment="#")) + "\n" + _facts(file)


EARLIER = "whole_window"  # of hippocampus: first tries, with windows that held the whole structure

# file of the project -> name of a block in it -> what writes it
BLOCKS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"real": first_block},
    "docs/demo.md": {"demo": demo_block, "real": partial(demo_block, name="hippocampus")},
    "docs/real_data.md": {"paper": paper_block},
    "docs/explorer.md": {"explorer": explorer_block},
    "docs/speed.md": {"speed": speed_block, "memory": memory_block},
    "docs/faults.md": {"faults": faults_block},
    "docs/processes.md": {"processes": processes_block},
    "docs/evidence.md": {
        **{f"main-{name}": partial(main_block, name=name) for name in STUDIES},
        "stopped": stopped_block,
        "missing": missing_block,
    },
    "docs/recipe.md": {
        **{
            f"{table}-{name}": partial(chosen_block, name=name, table=table)
            for name in STUDIES
            for table in ("room", "probe", "recipe", "tune")
        },
        **{
            f"{table}-{EARLIER}": partial(
                chosen_block, name="hippocampus", table=table, file=f"{table}_{EARLIER}"
            )
            for table in ("room", "recipe")
        },
    },
    "docs/phantoms.md": {"phantoms": phantoms_block},
    "docs/settings.md": {"settings": settings_block},
    "docs/commands.md": {"commands": commands_block},
    "docs/api.md": {"api": api_block},
    "docs/modules.md": {"modules": modules_block},
}


def draw_reconstruction(run_dir: str | Path, target: Path) -> None:
    """The README's picture: the first held-out image of a pre-training run."""
    run = Run.open(run_dir, "pretrain")
    model, task, settings = load_pretrained(run)
    name, data = find_data(run)
    splits = build_splits(get_task(name), data, settings)
    case = (splits["val"] or splits["test"])[0]  # never one it was trained on
    crop = load_crop(task, case, settings.crop_size, settings.spacing_mm)
    figure = show_reconstruction(model, crop, seed=0)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=80, pil_kwargs={"optimize": True})


def render(text: str, root: Path, name_of_file: str = "README.md") -> str:
    """`text` of a file with everything between `<!-- NAME:start -->` and `<!-- NAME:end -->` written anew
    from the results.

    Raises:
        UserError: if a block's markers are missing.
    """
    for name, block in BLOCKS[name_of_file].items():
        pattern = rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)"
        if not re.search(pattern, text, re.S):
            raise UserError(f"{name_of_file} has no markers <!-- {name}:start --> and <!-- {name}:end -->")
        content = block(root)
        text = re.sub(pattern, lambda m, content=content: m[1] + content + "\n" + m[2], text, flags=re.S)
    return text
