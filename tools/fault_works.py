"""What `tools.faults` disturbs: the works, how one is started, and a digest of what it leaves."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
from safetensors import safe_open

from smae_utils.errors import UserError

TINY = """
all:
  {crop_size: [24, 24, 24], spacing_mm: [7.0, 7.0, 7.0], patch_size: 8, embed_dim: 48, depth: 3, num_heads: 2}
pretrain: {decoder_embed_dim: 24, decoder_depth: 1, decoder_num_heads: 2, steps: 30, batch_size: 2}
finetune: {feature_size: 4, steps: 20, batch_size: 2, overlap: 0.25}
"""
STAGES = ["log_every=1", "save_every=2", "val_every=5"]
NOTEBOOK = """
from smae_utils import pretrain
changes = {"seed": seed, "save_every": 2, "val_every": 5}
pretrain(task, data_dir, f"{run_dir}/pretrain", preset, changes, resume=True)
"""
PATIENCE = 300.0  # seconds that a work may take
PARAMETERS = 'task: str = ""\ndata_dir: str = ""\nrun_dir: str = ""\npreset: str = ""\nseed: int = 0'


@dataclass(frozen=True)
class Work:
    """Something that may be killed.

    Attributes:
        words: of the command line, with PLACE for the folder that it writes to.
        before: what has to be in that folder, copied there.
        result: digest of what came out.
        forks: whether it is one process, started as a fork of this one.
    """

    words: list[str]
    result: Callable[[Path], str]
    before: Path | None = None
    forks: bool = True


def prepare(out: Path) -> dict[str, Work]:
    """Phantoms, a preset, a notebook, and a run to evaluate and to predict with."""
    data, preset, notebook = out / "data", out / "tiny.yaml", out / "train.ipynb"
    # Also imports what the forks need. No training in this process: forks of one that has trained would hang.
    from smae_utils.phantoms import write_phantoms

    write_phantoms("brats", data, 8, 0, "demo", 1.0)
    preset.write_text(_preset(), encoding="utf-8")
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(NOTEBOOK),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    batch = f"""
parameters: {{task: brats, data_dir: "{data}", preset: "{preset}", run_dir: "PLACE/runs-{{seed}}"}}
cross: {{seed: [0, 1]}}
runs: {{train: {{notebook: "{notebook}"}}}}
"""
    (out / "batch.yaml").write_text(batch, encoding="utf-8")
    shared = ["--task", "brats", "--data", str(data), "--preset", str(preset)]
    goes_on = ["--out", "PLACE/run", "--resume", "--set", *STAGES]
    scans = [str(f) for f in sorted((data / "Task01_BrainTumour" / "imagesTr").glob("BRATS_*.nii.gz"))[:3]]
    tuned = out / "tuned"
    works = {
        "pretrain": Work(["pretrain", *shared, *goes_on, "num_workers=1"], weights),
        "finetune": Work(["finetune", *shared, *goes_on], weights),
    }
    if end(start(works["finetune"], tuned)) != 0:
        raise UserError(f"the fine-tuning that is evaluated failed: {last_line(tuned)}")
    works["evaluate"] = Work(["evaluate", "PLACE/run"], scores, before=tuned / "run")
    works["predict"] = Work(
        ["predict", str(tuned / "run"), *scans, "--probabilities", "--out", "PLACE/out"], masks
    )
    works["batch"] = Work(
        ["batch", str(out / "batch.yaml"), "--jobs", "2", "--out", "PLACE/batch"], weights, forks=False
    )
    return works


def _preset() -> str:
    """The tiny settings with those of a stage below `all`, where presets have them."""
    import yaml

    said = yaml.safe_load(TINY)
    return yaml.safe_dump({"all": {**said.pop("all"), **said}})


def _digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(
        repr([(k, hashlib.sha256(v).hexdigest()) for k, v in sorted(files.items())]).encode()
    ).hexdigest()


def _contents(place: Path, pattern: str) -> dict[str, bytes]:
    out = {}
    for file in place.rglob(pattern):
        content = file.read_bytes()
        out[str(file.relative_to(place))] = gzip.decompress(content) if file.suffix == ".gz" else content
    return out


def weights(place: Path) -> str:
    """Final weights, bit by bit, with what the files say of them, and the losses of each step."""
    content = {
        str(f.parent.relative_to(place)): str(
            pd.read_json(f, lines=True).drop(columns="seconds", errors="ignore").to_dict("list")
        ).encode()
        for f in place.rglob("log.jsonl")
    }
    for file in place.rglob("model.safetensors"):
        # The order of entries in the file is not its content.
        with safe_open(file, framework="np") as handle:
            tensors = {key: handle.get_tensor(key).tobytes() for key in sorted(handle.keys())}  # noqa: SIM118
            said = sorted((handle.metadata() or {}).items())
        content[str(file.relative_to(place))] = repr((_digest(tensors), said)).encode()
    return _digest(content)


def scores(place: Path) -> str:
    return _digest(
        {**_contents(place, "metrics.csv"), **_contents(place / "run" / "predictions", "*.nii.gz")}
    )


def masks(place: Path) -> str:
    return _digest({**_contents(place, "*.nii.gz"), **_contents(place, "volumes.csv")})


def start(work: Work, place: Path) -> int:
    """Start a work in a session of its own; it writes to PLACE/../NAME.log. Returns its process id."""
    place.mkdir(parents=True, exist_ok=True)
    if work.before and not (place / work.before.name).exists():
        shutil.copytree(work.before, place / work.before.name)
    words = [w.replace("PLACE", str(place)) for w in work.words]
    if work.words[0] == "batch":
        file = place.with_name(place.name + ".yaml")
        file.write_text(
            Path(words[1]).read_text(encoding="utf-8").replace("PLACE", str(place)), encoding="utf-8"
        )
        words[1] = str(file)
    log = os.open(place.with_name(place.name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if not work.forks:
        return subprocess.Popen(
            [sys.executable, "-m", "smae_utils", *words], stdout=log, stderr=log, start_new_session=True
        ).pid
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            import torch

            from smae_utils.cli import main

            torch.set_num_threads(1)
            code = main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(log)
    return pid


def end(pid: int) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGALRM


def last_line(place: Path) -> str:
    log = place.with_name(place.name + ".log")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else ""
