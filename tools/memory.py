"""How much memory against what people would use instead: each call alone in a process of its own."""

from __future__ import annotations

import multiprocessing
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from smae_utils.atomic import write_text
from smae_utils.errors import UserError
from smae_utils.work.devices import pick_precision
from smae_utils.work.provenance import provenance
from tools.speed import WORKS

COLUMNS = ["work", "subject", "peer", "subject_gb", "peer_gb", "ratio"]
MEASURED = ("mae 96^3 x 1, mask .75", "unetr 96^3 x 1")


def benchmark_memory(out: str | Path, only: str = "") -> pd.DataFrame:
    """Measure each work as `peak_gb` does, and write memory.csv.

    Args:
        only: works whose name begins so.

    Returns:
        One or two rows a work; the ratio is the peer's memory over this package's.

    Raises:
        UserError: where no work is called so, or the system does not tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("only Linux tells the highest memory of a moment: run this benchmark there")
    chosen = [name for name in MEASURED if name.startswith(only)]
    if not chosen:
        raise UserError(f"no work begins with {only!r}: expected some of {', '.join(MEASURED)}")
    Path(out).mkdir(parents=True, exist_ok=True)
    auto, source = pick_precision("auto", torch.device("cpu")), provenance()
    facts = [
        f"python -m tools benchmark --what memory{f' --only {only!r}' if only else ''}",
        f"{source['machine']}, {source['date']}, commit {source['commit']}, "
        f"torch {source['packages']['torch']}, monai {source['packages']['monai']}",
    ]
    rows: list[tuple] = []
    for name in chosen:
        work = WORKS[name]()
        for mine, other in work.pairs(auto):
            own, peer = _alone(name, "ours", mine), _alone(name, "theirs", other)
            figures = (float(f"{v:.3g}") for v in (own, peer, peer / own))
            rows.append((work.name, f"smae_utils {mine}", f"{work.peer} {other}", *figures))
            print(*rows[-1], flush=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    text = "".join(f"# {fact}\n" for fact in facts) + table.to_csv(index=False)
    write_text(Path(out) / "memory.csv", text)
    return table


@cache
def _alone(name: str, side: str, precision: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_gb, (name, side, precision))


def peak_gb(name: str, side: str, precision: str) -> float:
    """Memory in GB that the first call of a work takes at its highest, on top of both networks.

    It holds activations, gradients and the optimiser's state, or the volumes of a prediction.
    """
    work = WORKS[name]()
    # Writing 5 resets VmHWM, the highest memory so far.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_gb("VmRSS")
    getattr(work, side)(precision)
    return _status_gb("VmHWM") - before


def _status_gb(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1e6
