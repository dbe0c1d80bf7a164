"""Does a paper preset fit, and how long does a step take here? And how fast is the explorer?"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pandas as pd

from smae_utils.atomic import write_text
from smae_utils.data.tasks import get_task
from smae_utils.phantoms import write_phantoms
from smae_utils.work.finetune import finetune
from smae_utils.work.pretrain import pretrain
from smae_utils.work.provenance import provenance
from tools.demo import TASKS, clear


def benchmark_explorer(out: str | Path) -> pd.DataFrame:
    """Milliseconds of a slice change on 128^3 x 4 voxels, and of a new mask; writes explorer.csv.

    The model is the demo preset's.
    """
    import torch

    from smae_utils.show.explorer import explore
    from smae_utils.work.build import build_mae
    from smae_utils.work.settings import PretrainSettings, make_settings

    task, rows = get_task("brats"), []
    for name, overrides in (
        ("128^3 x 4, patch 16", {"crop_size": [128] * 3, "patch_size": 16}),
        ("demo preset, 32^3 x 4", {"crop_size": [32] * 3}),
    ):
        values = {
            "patch_size": 8,
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            "decoder_embed_dim": 64,
            "decoder_depth": 2,
            "decoder_num_heads": 4,
        }
        settings = make_settings(PretrainSettings, {**values, **overrides}, where="benchmark")
        widget = explore(build_mae(task, settings), torch.rand(4, *settings.crop_size))

        def milliseconds(act, times: int) -> float:
            begin = time.monotonic()
            for i in range(times):
                act(i)
            return (time.monotonic() - begin) / times * 1000

        n = settings.crop_size[0]
        # B023: the lambdas are called at once, so they see the widget of this pass.
        slices = milliseconds(lambda i: setattr(widget.slices["axial"], "value", i % n + 1), 40)  # noqa: B023
        masks = milliseconds(lambda i: setattr(widget.seed, "value", i + 1), 10)  # noqa: B023
        rows.append({"image": name, "slice_ms": round(slices, 1), "new_mask_ms": round(masks, 1)})
    table = pd.DataFrame(rows)
    source = provenance()
    head = "# python -m tools benchmark --what explorer\n"
    head += f"# {source['machine']}, {source['date']}, commit {source['commit']}\n"
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out) / "explorer.csv", head + table.to_csv(index=False))
    print(table.to_string(index=False))
    return table


def benchmark(out: str | Path, tasks: list[str]) -> pd.DataFrame:
    """Two steps of each paper preset at batch 1 on full-size phantoms: does it fit, and how fast is it?

    Writes paper_presets.csv with machine, date and command in its first lines.
    """
    out = Path(out)
    rows = []
    for task in list(tasks) or list(TASKS):
        folder = out / task
        clear(folder)
        write_phantoms(
            task, folder / "data", {"segmentation": 6, "classification": 12}[get_task(task).kind], size="full"
        )
        small = {
            "steps": 2,
            "warmup_steps": 1,
            "batch_size": 1,
            "log_every": 1,
            "num_workers": 0,
            "val_every": 0,
            "cache_rate": 0.0,
        }
        for stage in ("pretrain", "finetune"):
            if stage == "pretrain":
                run = pretrain(
                    task, folder / "data", folder / stage, "paper", {**small, "train_on_val": True}
                )
            else:
                run = finetune(
                    task,
                    folder / "data",
                    folder / stage,
                    folder / "pretrain",
                    "paper",
                    {**small, "train_on_val": True, "select": "last"},
                )
            log = run.read_log()
            settings = run.config["settings"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
            rows.append(
                {
                    "task": task,
                    "stage": stage,
                    "input": "x".join(map(str, settings["crop_size"])),
                    "crops": settings["crops_per_scan"],
                    "precision": run.config["precision"],
                    "device": run.config["device"],
                    "step_s": round(log[-1]["seconds"] - log[-2]["seconds"], 1),
                    "peak_gb_so_far": round(peak, 1),
                }
            )
    table = pd.DataFrame(rows)
    source = provenance()
    made = f"{source['machine']}, {source['date']}, commit {source['commit']}"
    head = f"# python -m tools benchmark\n# {made}, torch {source['packages']['torch']}\n"
    write_text(out / "paper_presets.csv", head + table.to_csv(index=False))
    print(table.to_string(index=False))
    return table
