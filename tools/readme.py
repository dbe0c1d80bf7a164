"""Figures of the documents, from committed result files, and pages of reference, from the code.

`python -m tools readme` writes both, never a hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
from tools.markdown import details_of, facts_of, span, table_of
from tools.reference import api_block, commands_block, modules_block
from tools.study.pages import STUDIES, chosen_block, first_block, main_block, missing_block, stopped_block


def demo_block(root: Path, name: str = "summary") -> str:
    """Table of `results/demo/NAME.csv`: the summary that a demo left, as it was committed."""
    file = root / "results" / "demo" / f"{name}.csv"
    return table_of(pivot(pd.read_csv(file, comment="#"))) + "\n" + facts_of(file)


def benchmark_block(root: Path, name: str) -> str:
    """Table of `results/benchmark/NAME.csv`."""
    file = root / "results" / "benchmark" / f"{name}.csv"
    return table_of(pd.read_csv(file, comment="#")) + "\n" + facts_of(file)


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
            span(r.low, r.high),
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
    return table_of(pd.DataFrame(rows, columns=columns)) + details_of(
        folder / f"{name}.csv" for name in ("main", "sweeps", "controls")
    )


def settings_block(root: Path) -> str:
    """All settings, from their fields in `settings.py`."""
    parts = [pd.DataFrame(describe()).query("stage == @stage") for stage in ("both", *STAGES)]
    return "\n\n".join(
        f"### {part.stage.iloc[0]}\n\n{table_of(part.drop(columns='stage'))}" for part in parts
    )


def bench_block(root: Path, name: str) -> str:
    """Table of `results/bench/NAME.csv`."""
    file = root / "results" / "bench" / f"{name}.csv"
    text = pd.read_csv(file, comment="#").map(lambda v: f"{v:.3g}" if isinstance(v, float) else v)
    return table_of(text.replace("nan", "")) + "\n" + facts_of(file)


def processes_block(root: Path) -> str:
    """Table of `results/bench/processes.csv`."""
    file = root / "results" / "bench" / "processes.csv"
    return (
        table_of(pd.read_csv(file, comment="#").astype({"times as fast as one": object}).fillna(""))
        + "\n"
        + facts_of(file)
    )


def faults_block(root: Path) -> str:
    """Trials of `results/faults/faults.csv`, a row a work and fault."""
    file = root / "results" / "faults" / "faults.csv"
    table = pd.read_csv(file, comment="#", keep_default_na=False, na_values=[])
    table["right"] = (table.again == 0) & table.equal & (table.left_behind == "") & (table.orphans == 0)
    rows = table.groupby(["fault", "work"], sort=False).agg({"moment": "size", "right": "sum"})
    return table_of(rows.rename(columns={"moment": "trials"}).reset_index()) + "\n" + facts_of(file)


# Of hippocampus: first tries, with windows that held the whole structure.
EARLIER = "whole_window"

# file of the project -> name of a block in it -> what writes it
BLOCKS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"real": first_block},
    "docs/demo.md": {"demo": demo_block, "real": partial(demo_block, name="hippocampus")},
    "docs/real_data.md": {"paper": partial(benchmark_block, name="paper_presets")},
    "docs/explorer.md": {"explorer": partial(benchmark_block, name="explorer")},
    "docs/speed.md": {
        "speed": partial(bench_block, name="speed"),
        "memory": partial(bench_block, name="memory"),
    },
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
    # Never an image that it was trained on.
    case = (splits["val"] or splits["test"])[0]
    crop = load_crop(task, case, settings.crop_size, settings.spacing_mm)
    figure = show_reconstruction(model, crop, seed=0)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=80, pil_kwargs={"optimize": True})


def render(text: str, root: Path, name_of_file: str = "README.md") -> str:
    """`text` of a file with its blocks written anew from the results.

    A block is all between `<!-- NAME:start -->` and `<!-- NAME:end -->`.

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
