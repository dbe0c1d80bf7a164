"""A batch as jobs of a real SLURM, which is started on this machine where it is installed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from slurm_cluster import NotUp, cluster, free_ports, why_not

from smae_utils.batch.run import run_batch
from smae_utils.batch.runs import Batch
from smae_utils.cli import main
from smae_utils.errors import UserError
from smae_utils.work.run_folder import Run

ROOT = Path(__file__).resolve().parent.parent

# The first time it takes long, as a training that is cut off; the second time it is soon through.
CODE = """
import time
from pathlib import Path
begun = Path(folder) / str(seed)
times = len(begun.read_text()) if begun.exists() else 0
begun.write_text("x" * (times + 1))
time.sleep(0 if times or seed == 0 else 300)
"""


def squeue(*words):
    return subprocess.run(["squeue", *words], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_jobs_that_are_cancelled_or_run_out_of_time_are_finished(tmp_path):
    cells = [
        nbformat.v4.new_code_cell('folder: str = ""\nseed: int = 0', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CODE),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "wait.ipynb")
    file, out = tmp_path / "batch.yaml", tmp_path / "out"
    spec = f"notebook: {tmp_path}/wait.ipynb, parameters: {{folder: {tmp_path}}}"
    file.write_text(f"runs: {{wait: {{{spec}, cross: {{seed: [0, 1, 2]}}}}}}", encoding="utf-8")

    def cancel_the_second():
        while not (tmp_path / "1").exists():
            time.sleep(0.5)
        names = squeue("-h", "-r", "-o", "%i").split()
        subprocess.run(["scancel", next(name for name in names if name.endswith("_1"))], check=True)

    def too_long(number, frame):
        raise TimeoutError(f"no job came to its end in ten minutes: {squeue()}")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(600)  # a cluster that starts no job shall not hold up all other tests
    try:
        with cluster():
            # Two minutes at most; a job is told a minute before, and puts itself back into the queue.
            parameters = {"timeout_min": 2, "slurm_signal_delay_s": 60, "cpus_per_task": 1}
            thread = threading.Thread(target=cancel_the_second, daemon=True)
            thread.start()
            states = run_batch(file, out, backend="slurm", slurm=parameters)
            thread.join()
    except NotUp as error:
        pytest.skip(f"SLURM is installed and does not start here: {error}")
    finally:
        signal.alarm(0)
    assert set(states.values()) == {"done"} == set(Batch.open(out).states().values())
    begun = [len((tmp_path / str(seed)).read_text()) for seed in range(3)]
    assert begun[0] >= 1 and begun[1] >= 2 and begun[2] >= 2  # a machine that is busy may need one more


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_script_of_the_documentation_trains_on_two_nodes(tmp_path, cxr14):
    text = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
    script = re.search(r"```bash\n(#!/bin/bash.*?)```", text, re.S).group(1)
    settings = ["batch_size=4", "steps=6", "log_every=1", "save_every=3", "precision=fp32"]
    own = f"--task cxr14 --data {cxr14} --preset {ROOT}/tests/tiny.yaml --set {' '.join(settings)}"
    script = script.replace("--task my_scans.json --preset small", own)
    for old, new in (
        ("torchrun", f"{sys.executable} -m torch.distributed.run"),
        ("runs/pretrain", f"{tmp_path}/two"),
        (":29500", f":{free_ports(1)}"),
    ):
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "two_nodes.sh").write_text(script, encoding="utf-8")
    own_environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        with cluster(nodes=2) as folder:
            job = ["sbatch", "--wait", f"--output={tmp_path}/job.txt", str(tmp_path / "two_nodes.sh")]
            environment = {**own_environment, "SLURM_CONF": os.environ["SLURM_CONF"]}
            try:
                done = subprocess.run(job, env=environment, timeout=300, capture_output=True, text=True)
            except subprocess.TimeoutExpired:
                told = [tmp_path / "job.txt", *folder.glob("*.log")]
                pytest.fail("".join(f"{p}:\n{p.read_text()[-2000:]}\n" for p in told if p.exists()))
    except NotUp as error:
        pytest.skip(f"SLURM is installed and does not start here: {error}")
    said = (tmp_path / "job.txt").read_text()
    assert done.returncode == 0, said + done.stderr
    assert said.count("6 steps of 4 scans") == 1 and Run(tmp_path / "two").config["processes"] == 2
    words = [w.replace(f"{tmp_path}/two", f"{tmp_path}/one") for w in script.split("smae_utils")[1].split()]
    assert main(words) == 0
    one, two = ([line["loss"] for line in Run(tmp_path / name).read_log()] for name in ("one", "two"))
    assert len(two) == 6 and two == pytest.approx(one, abs=1e-4)


def test_a_backend_or_a_parameter_that_is_not_there_is_told(tmp_path, monkeypatch):
    file = tmp_path / "batch.yaml"
    file.write_text("runs: {look: {notebook: 01_masking}}", encoding="utf-8")
    with pytest.raises(UserError, match="unknown backend 'slum'"):
        run_batch(file, tmp_path / "out", backend="slum")
    monkeypatch.setenv("PATH", str(Path("/nowhere")))
    with pytest.raises(UserError, match="SLURM cannot be used so"):
        run_batch(file, tmp_path / "out", backend="slurm")
