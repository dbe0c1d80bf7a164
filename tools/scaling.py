"""How much faster several processes train: `python -m tools benchmark --what processes`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from smae_utils.atomic import must_be_free, write_text
from smae_utils.errors import UserError
from smae_utils.phantoms import write_phantoms
from smae_utils.work.provenance import provenance
from smae_utils.work.run_folder import Run

SETTINGS = ["steps=40", "log_every=10", "val_every=0", "save_every=1000"]
FIRST = 10  # steps that warm up
# One process on one core, two on one each, and one on both.
SHARES = ((1, 1), (2, 1), (1, 2))


def benchmark_processes(
    out: str | Path, tasks: tuple[str, ...] = ("btcv", "cxr14"), preset: str = "small"
) -> pd.DataFrame:
    """Pre-train a few steps with each of `SHARES`, at the same batch, and write `processes.csv`.

    Raises:
        UserError: when a training fails, or `out` holds something.
    """
    out = Path(out).absolute()
    must_be_free(out)
    rows = []
    for task in tasks:
        write_phantoms(task, out / task, 16)
        for processes, threads in SHARES:
            run = out / f"{task}-{processes}-{threads}"
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            words = [
                "pretrain",
                "--task",
                task,
                "--data",
                str(out / task),
                "--preset",
                preset,
                "--out",
                str(run),
            ]
            command = [
                sys.executable,
                *launch,
                "-m",
                "smae_utils",
                *words,
                "--set",
                *SETTINGS,
                "batch_size=8",
            ]
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
            )
            if done.returncode:
                raise UserError(f"{' '.join(words)} failed: {done.stdout[-500:]}{done.stderr[-1000:]}")
            log = {line["step"]: line["seconds"] for line in Run(run).read_log()}
            step = (log[max(log)] - log[FIRST]) / (max(log) - FIRST)
            rows.append(
                (
                    task,
                    processes,
                    threads,
                    round(step, 3),
                    rows[-1][3] / step if processes > 1 else float("nan"),
                )
            )
            print(*rows[-1], flush=True)
    columns = ["task", "processes", "threads each", "seconds a step", "times as fast as one"]
    table = pd.DataFrame(rows, columns=columns)
    made = provenance()
    facts = (
        f"{made['machine']}, commit {made['commit']}, torch {made['packages']['torch']}, {made['date'][:16]}"
    )
    head = "# python -m tools benchmark --what processes\n"
    head += f"# {facts}; preset {preset}, batches of 8 scans, {Run(run).config['precision']}\n"
    write_text(out / "processes.csv", head + table.to_csv(index=False, float_format="%.3f"))
    return table
