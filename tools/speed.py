"""How fast against what people would use instead: this package and MONAI by turns, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from smae_utils.atomic import write_text
from smae_utils.errors import UserError
from smae_utils.work.cost import measured_flops_per_second
from smae_utils.work.devices import pick_precision
from smae_utils.work.provenance import provenance
from tools.speed_works import (
    Act,
    Work,
    crops_work,
    disk_work,
    import_work,
    mae_work,
    unetr_work,
    window_work,
)

COLUMNS = [
    "work",
    "subject",
    "peer",
    "ratio_median",
    "ratio_min",
    "ratio_max",
    "subject_s",
    "peer_s",
    "floor_s",
]

WORKS: dict[str, Callable[[], Work]] = {
    "import": import_work,
    "mae 96^3 x 1, mask .75": lambda: mae_work((96, 96, 96), 1, 16, 0.75),
    "mae 96^3 x 1, mask .125": lambda: mae_work((96, 96, 96), 1, 16, 0.125),
    "crops of fine-tuning": lambda: crops_work((200, 170, 150), (96, 96, 96), "finetune"),
    "crops of pre-training": lambda: crops_work((200, 170, 150), (96, 96, 96), "pretrain"),
    "crops from disk": lambda: disk_work((200, 170, 150), (96, 96, 96), 6),
    "mae 128^3 x 4, mask .75": lambda: mae_work((128, 128, 128), 4, 16, 0.75),
    "mae 224^2 x 1, mask .75": lambda: mae_work((224, 224), 1, 16, 0.75),
    "unetr 96^3 x 1": lambda: unetr_work((96, 96, 96), 1, 14),
    "unetr 128^3 x 4": lambda: unetr_work((128, 128, 128), 4, 4),
    "sliding window 512 x 512 x 150": lambda: window_work((512, 512, 150), (96, 96, 96)),
}


def seconds(act: Act, precision: str) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    act(precision)
    return time.perf_counter() - begin


def compare(work: Work, auto: str, repeats: int) -> list[tuple]:
    """Rows of a work: the peer as it comes, and both in one precision.

    After one call of each to warm up, both are called by turns. The floor is the time of this package's
    counted FLOPs at the rate of a plain matrix product.

    Args:
        auto: the precision this package computes in on this machine.
    """
    pairs = work.pairs(auto)
    acts = {("smae_utils", mine): work.ours for mine, _ in pairs}
    acts |= {(work.peer, other): work.theirs for _, other in pairs}
    floors = {}
    for (name, precision), act in acts.items():
        with FlopCounterMode(display=False) as counter:
            act(precision)
        if name == "smae_utils" and work.precisions:
            rate = measured_flops_per_second(torch.device("cpu"), precision)
            floors[precision] = counter.get_total_flops() / rate
    repeats = min(repeats, work.at_most or repeats)
    times = [{key: seconds(act, key[1]) for key, act in acts.items()} for _ in range(repeats)]
    rows = []
    for mine, other in pairs:
        own, peer = (
            np.array([turn[key] for turn in times]) for key in (("smae_utils", mine), (work.peer, other))
        )
        ratios = peer / own
        figures = [np.median(ratios), ratios.min(), ratios.max(), np.median(own), np.median(peer)]
        figures.append(floors.get(mine, float("nan")))
        names = (
            (f"smae_utils {mine}", f"{work.peer} {other}") if work.precisions else ("smae_utils", work.peer)
        )
        rows.append((work.name, *names, *(float(f"{v:.4g}") for v in figures)))
    return rows


def benchmark_speed(out: str | Path, repeats: int = 5, only: str = "") -> pd.DataFrame:
    """Measure each work as `compare` does, and write speed.csv.

    Rows of other works that are there already stay, with the lines that say how they were made.

    Args:
        repeats: calls of each side.
        only: works whose name begins so.

    Returns:
        One or two rows a work; a ratio is the peer's time over this package's, of neighbouring calls.

    Raises:
        UserError: where no work is called so.
    """
    chosen = {name: make for name, make in WORKS.items() if name.startswith(only)}
    if not chosen or repeats < 1:
        raise UserError(
            f"no work begins with {only!r}, or repeats {repeats} < 1: expected some of {', '.join(WORKS)}"
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    source = provenance()
    facts = [
        f"python -m tools benchmark --what speed --repeats {repeats}{f' --only {only!r}' if only else ''}",
        f"{source['machine']}, {torch.get_num_threads()} threads, {source['date']}, "
        f"commit {source['commit']}, torch {source['packages']['torch']}, monai "
        f"{source['packages']['monai']}",
    ]
    file, earlier = Path(out) / "speed.csv", pd.DataFrame(columns=COLUMNS)
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        facts = [line.removeprefix("# ") for line in lines if line.startswith("# ")] + facts
        earlier = pd.read_csv(file, comment="#")
    rows: list[tuple] = []
    auto = pick_precision("auto", torch.device("cpu"))
    for make in chosen.values():
        for row in compare(make(), auto, repeats):
            rows.append(row)
            print(*row, flush=True)
        made = pd.DataFrame(rows, columns=COLUMNS)
        table = pd.concat([earlier[~earlier.work.isin(made.work)], made]) if len(earlier) else made
        text = "".join(f"# {fact}\n" for fact in facts) + table.to_csv(index=False)
        write_text(file, text)  # after each, since the last ones take minutes
    return table
