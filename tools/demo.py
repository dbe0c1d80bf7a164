"""`demo`: the numbered notebooks for each task, then one comparison."""

from __future__ import annotations

import html
import resource
import time
from pathlib import Path

import pandas as pd

from smae_utils.atomic import write_text
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.phantoms import DEFAULT_N, write_phantoms
from smae_utils.places import need_notebook_packages
from smae_utils.run_notebook import run_notebook
from smae_utils.work.comparison import compare
from smae_utils.work.presets import resolve
from smae_utils.work.provenance import machine_name, provenance
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import STAGES

TASKS = ("btcv", "cxr14", "brats")
MARKER = "delete-me-freely.txt"


# The notebooks of a task, in their order.
NOTEBOOKS = ("00_data", "01_masking", "02_self_pretraining", "03_fine_tuning", "04_evaluation")


def demo(
    out: str | Path,
    tasks: list[str],
    preset: str = "demo",
    seed: int = 0,
    n: int | None = None,
    data_dir: str | Path | None = None,
) -> pd.DataFrame:
    """Run the notebooks of each task headlessly and write index.html and summary.csv.

    A task that is already there is done again from its start, so that the figures are of one piece.

    Args:
        data_dir: a real download of the one task, instead of phantoms.

    Returns:
        The summary: task, init, seed, metric, value.
    """
    out, tasks = Path(out).resolve(), list(tasks) or list(TASKS)
    if data_dir and len(tasks) != 1:
        raise UserError(
            "--data is the download of one task: name it with --task, for example --task hippocampus"
        )
    for task in tasks:
        if task not in TASKS and not data_dir:
            raise UserError(
                f"the demo has no phantoms of task {task!r}: "
                f"expected one of {', '.join(TASKS)}, or --data with a download"
            )
        # A mistyped preset is told before an earlier demo is deleted.
        for stage in STAGES:
            resolve(get_task(task), stage, preset)
    need_notebook_packages("papermill", "nbconvert", "ipykernel")
    begin = time.monotonic()
    rows, tables, pages, times = [], {}, [], {}
    for task in tasks:
        start = time.monotonic()
        folder = out / task
        clear(folder)
        data, runs = Path(data_dir).resolve() if data_dir else folder / "data", folder / "runs"
        if not data_dir:
            write_phantoms(task, data, n or DEFAULT_N[task], seed)
        for notebook in NOTEBOOKS:
            print(f"[{time.monotonic() - begin:5.0f} s] {task}: {notebook}", flush=True)
            values = {
                "task": task,
                "data_dir": str(data),
                "run_dir": str(runs),
                "preset": preset,
                "seed": seed,
            }
            done = run_notebook(notebook, folder, values)
            pages.append((task, done.with_suffix(".html")))
        tables[task] = compare(runs / "scratch", runs / "self")
        rows += _summary_rows(task, tables[task], seed)
        times[task] = time.monotonic() - start
        precision = Run.open(runs / "self").config["precision"]
    summary = pd.DataFrame(rows, columns=["task", "init", "seed", "metric", "value"])
    took = time.monotonic() - begin
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    ) / 1024**2
    source = provenance()
    facts = [
        f"{took / 60:.1f} minutes "
        f"({', '.join(f'{t} {s / 60:.1f}' for t, s in times.items())}), peak memory at most {peak:.1f} GB",
        f"{machine_name()}, {source['date']}, commit {source['commit']}, "
        f"preset {preset}, {precision}, seed {seed}",
    ]
    write_text(out / "summary.csv", "".join(f"# {fact}\n" for fact in facts) + summary.to_csv(index=False))
    _write_index(out, summary, pages, facts)
    print()
    print(pivot(summary).to_string(index=False, float_format="%.3f"))
    print(f"\ndemo: {facts[0]}\nopen {out / 'index.html'}", flush=True)
    return summary


def clear(folder: Path) -> None:
    """Empty a task's folder of an earlier demo; refuses to touch anything else."""
    import shutil

    if folder.exists():
        if not (folder / MARKER).is_file() and any(folder.iterdir()):
            raise UserError(f"{folder} holds something that this command did not make: choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    text = "made by python -m tools demo, which deletes this folder when it runs again\n"
    (folder / MARKER).write_text(text, encoding="utf-8")


def _summary_rows(task: str, table: pd.DataFrame, seed: int) -> list[tuple]:
    means = table[table["class"] == "mean"].set_index("metric")
    return [
        (task, arm, seed, metric, means.loc[metric, arm])
        for metric in get_task(task).metrics
        for arm in ("scratch", "self")
    ]


def pivot(summary: pd.DataFrame) -> pd.DataFrame:
    """summary -> a row a task and metric: scratch | self | difference."""
    wide = summary.set_index(["task", "metric", "init"])["value"].unstack("init", sort=False).reset_index()
    wide.columns.name = None
    return wide.assign(difference=wide["self"] - wide["scratch"])


def _write_index(out: Path, summary: pd.DataFrame, pages: list[tuple[str, Path]], facts: list[str]) -> None:
    links = "".join(f'<li><a href="{p.relative_to(out)}">{task}: {p.stem}</a></li>' for task, p in pages)
    lines = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    table = pivot(summary).to_html(index=False, float_format="%.3f", border=0)
    style = (
        "body{font:16px sans-serif;max-width:50em;margin:2em auto;padding:0 "
        "1em}td,th{padding:.2em 1em;text-align:right}"
    )
    note = (
        "<p>One seed, phantoms, minutes of training: this shows that everything works, "
        "not how much self pre-training helps.</p>"
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-MAE '
        f"demo</title><style>{style}</style><h1>Self-MAE demo</h1>"
    )
    write_text(out / "index.html", f"{page}{table}{note}<ul>{links}</ul>{lines}</html>")
