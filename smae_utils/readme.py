"""Figures of the README: written from committed result files by `python -m smae_utils readme`, never by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from smae_utils.build import build_mae
from smae_utils.data import read_splits
from smae_utils.demo import pivot
from smae_utils.errors import UserError
from smae_utils.evidence.tables import intervals, read
from smae_utils.lesson import load_crop
from smae_utils.plots import show_reconstruction
from smae_utils.runs import Run, find_data
from smae_utils.settings import PretrainSettings, make_settings
from smae_utils.tasks import get_task
from smae_utils.weights import load_weights


def _facts(file: Path) -> str:
    return "".join(f"\n{line[2:]}  " for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))


def _table(frame: pd.DataFrame) -> str:
    text = frame.map(lambda v: (f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}") if isinstance(v, float) else str(v))
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_block(root: Path) -> str:
    """Table of `results/demo/summary.csv`."""
    file = root / "results" / "demo" / "summary.csv"
    return _table(pivot(pd.read_csv(file, comment="#"))) + "\n" + _facts(file)


def paper_block(root: Path) -> str:
    """Table of `results/benchmark/paper_presets.csv`."""
    file = root / "results" / "benchmark" / "paper_presets.csv"
    return _table(pd.read_csv(file, comment="#")) + "\n" + _facts(file)


PRIMARY = {"cxr14": "mauc", "btcv": "dsc", "brats": "dsc"}


# Arms of the tables that compare, in their order, and how long the arms of a condition were fine-tuned.
COMPARED = ("self", "steps_x0.25", "steps_x4", "samples_x16", "raw_pixels", "raw_pixels_x4", "scratch_equal_compute", "cnn")
CONTROLLED = {"shuffled_patches", "permuted_weights", "shuffled_labels", "probe_random"}
FINE_TUNED = {"": "1x", "finetune4x": "4x"}
MATCHED = {"": "self", "finetune4x": "steps_x4"}  # whose total compute scratch_equal_compute has


def _longer_labelled(folder: Path, task: str, metric: str) -> list:
    """Scratch with four times the fine-tuning steps beside scratch: the other way to spend more time."""
    main, sweeps = read(folder / "main.csv"), read(folder / "sweeps.csv")
    longer = sweeps[(sweeps.condition == "finetune4x") & (sweeps.arm == "scratch")].assign(arm="longer", condition="")
    both = pd.concat([main[main.arm == "scratch"], longer])
    table = intervals(both[(both.task == task) & (both.metric == metric)])
    return list(table.itertuples())


def _compared(row) -> tuple:
    """seeds, scratch, the arm's figure, difference and interval; two seeds give no interval worth printing."""
    span = f"{row.low:+.3f} to {row.high:+.3f}" if row.seeds > 2 else f"{row.seeds} seeds only"
    return row.seeds, row.scratch, row.value, f"{row.difference:+.3f}", span


def evidence_block(root: Path) -> str:
    """Primary figures of `results/evidence/intervals.csv`, and the real data sets, which nobody has run."""
    folder = root / "results" / "evidence"
    table = read(folder / "intervals.csv")
    rows = []
    for task, metric in PRIMARY.items():
        for condition, times in FINE_TUNED.items():
            part = table[(table.task == task) & (table.metric == metric) & (table.condition == condition)].set_index("arm")
            for row in part.reindex([arm for arm in COMPARED if arm in part.index]).itertuples():
                name = f"{row.Index} (to {MATCHED[condition]})" if row.Index == "scratch_equal_compute" else row.Index
                rows.append((f"{task} phantoms", metric, times, name, *_compared(row)))
        rows += [
            (f"{task} phantoms", metric, "4x", "scratch, against scratch at 1x", *_compared(row)) for row in _longer_labelled(folder, task, metric)
        ]
    for task, metric in PRIMARY.items():
        real = read(folder / f"real-{task}" / "intervals.csv")
        part = real[(real.arm == "self") & (real.metric == metric) & (real.condition == "")] if len(real) else real
        for row in part.itertuples():
            rows.append((f"{task}, real data", metric, "1x", "self", *_compared(row)))
        if part.empty:
            rows.append((f"{task}, real data", metric, "", "self", 0, "not run", "not run", "", ""))
    made = pd.DataFrame(rows, columns=["data", "metric", "fine-tuning", "arm", "seeds", "scratch", "arm's", "difference", "95 % interval"])
    facts = _facts(folder / "main.csv") + _facts(folder / "sweeps.csv")
    return f"{_table(made)}\n\n<details><summary>Commands, machines, dates, commits</summary>\n{facts}\n\n</details>"


def controls_block(root: Path) -> str:
    """Controls beside scratch and self on the same seeds, from `results/evidence/{main,controls}.csv`."""
    folder = root / "results" / "evidence"
    controls = read(folder / "controls.csv")
    table = pd.concat([read(folder / "main.csv"), controls])
    rows = []
    for task, metric in PRIMARY.items():
        for kind, arms in (
            (metric, ("scratch", "self", "shuffled_patches", "permuted_weights", "shuffled_labels")),
            ("linear_probe_auc", ("probe_random", "probe_pretrained")),
            ("latents_r2", ("probe_random", "probe_pretrained")),
        ):
            part = table[(table.task == task) & (table.metric == kind) & table.arm.isin(arms)]
            wide = part.pivot(index="seed", columns="arm", values="value")
            wide = wide[[arm for arm in arms if arm in wide]].dropna()  # the seeds that all arms have
            if set(wide) & CONTROLLED:
                rows += [(task, kind, arm, len(wide), float(wide[arm].mean()), " ".join(f"{v:.3f}" for v in wide[arm])) for arm in wide]
    made = pd.DataFrame(rows, columns=["task", "metric", "arm", "seeds", "mean", "of each seed"])
    return _table(made) + "\n" + _facts(folder / "controls.csv")


def sweeps_block(root: Path) -> str:
    """Arms against scratch under each condition of `results/evidence/sweeps.csv`, beside the study's own on the same seeds."""
    folder = root / "results" / "evidence"
    own_name = "the study's own"
    sweeps = read(folder / "sweeps.csv").replace({"condition": {"": own_name}})
    main = read(folder / "main.csv").query("arm in ('scratch', 'self')").assign(condition=own_name)
    rows = []
    for task, metric in PRIMARY.items():
        swept = sweeps[(sweeps.task == task) & (sweeps.metric == metric)]
        own = main[(main.task == task) & (main.metric == metric) & main.seed.isin(swept.seed)]
        for condition, part in pd.concat([own, swept]).groupby("condition"):
            wide = part.pivot(index="seed", columns="arm", values="value")
            for arm in (a for a in wide.columns if a != "scratch" and "scratch" in wide):
                both = wide[["scratch", arm]].dropna()
                gains = " ".join(f"{v:+.3f}" for v in both[arm] - both["scratch"])
                if len(both):
                    seeds = " ".join(map(str, both.index))
                    rows.append((task, metric, condition, arm, seeds, float(both["scratch"].mean()), float(both[arm].mean()), gains))
    made = pd.DataFrame(rows, columns=["task", "metric", "condition", "arm", "seeds", "scratch", "arm's", "difference of each seed"])
    return _table(made) + "\n" + _facts(folder / "sweeps.csv")


def repeat_block(root: Path) -> str:
    """The same seeds run twice, on two machines: `results/evidence/main.csv` beside `results/evidence/repeat/main.csv`."""
    folder = root / "results" / "evidence"
    first, again = read(folder / "main.csv"), read(folder / "repeat" / "main.csv")
    if again.empty:
        return "not run"
    both = first.merge(again, on=["task", "arm", "seed", "metric"], suffixes=("", "_again"))
    both = both[both.metric == both.task.map(PRIMARY)].sort_values(["task", "seed", "arm"])
    change = [f"{v:+.3f}" for v in both.value_again - both.value]
    made = pd.DataFrame(
        {"task": both.task, "metric": both.metric, "seed": both.seed, "arm": both.arm, "first": both.value, "again": both.value_again}
    )
    return _table(made.assign(difference=change)) + "\n" + _facts(folder / "repeat" / "main.csv")


def gates_block(root: Path) -> str:
    """`results/evidence/gates.csv`: what held and what did not."""
    table = pd.read_csv(root / "results" / "evidence" / "gates.csv", comment="#", dtype={"gate": str}).sort_values(["task", "gate"], kind="stable")
    table = table.assign(
        limit=table.limit.fillna(""), holds=table.holds.map({"True": "yes", "False": "**no**", True: "yes", False: "**no**"}).fillna("")
    )
    return _table(table[["task", "gate", "what", "value", "limit", "holds"]]) + "\n" + _facts(root / "results" / "evidence" / "gates.csv")


def explorer_block(root: Path) -> str:
    """Table of `results/benchmark/explorer.csv`."""
    file = root / "results" / "benchmark" / "explorer.csv"
    return _table(pd.read_csv(file, comment="#")) + "\n" + _facts(file)


# file of the project -> name of a block in it -> what writes it
BLOCKS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"demo": demo_block, "paper": paper_block, "evidence": evidence_block, "explorer": explorer_block},
    "docs/evidence.md": {
        "evidence": evidence_block,
        "controls": controls_block,
        "sweeps": sweeps_block,
        "gates": gates_block,
        "repeat": repeat_block,
    },
}


def draw_reconstruction(run_dir: str | Path, target: Path) -> None:
    """The README's picture: the first validation image of a pre-training run."""
    run = Run.open(run_dir, "pretrain")
    name, data = find_data(run)
    task = get_task(name)
    settings = make_settings(PretrainSettings, run.config["settings"], str(run.path))
    model = build_mae(task, settings).eval()
    load_weights(model, run.path, require="")
    case = read_splits(task, data, settings)["val"][0]
    figure = show_reconstruction(model, load_crop(task, settings, case), seed=0)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=80, pil_kwargs={"optimize": True})


def render(text: str, root: Path, name_of_file: str = "README.md") -> str:
    """`text` of a file with everything between `<!-- NAME:start -->` and `<!-- NAME:end -->` written anew from the results.

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
