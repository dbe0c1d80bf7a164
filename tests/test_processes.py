"""Two processes that train together do what one does; each case is scored once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import MODEL, STAGE, TASK

TINY = Path(__file__).parent / "tiny.yaml"
ROOT = TINY.parent.parent


TINY_3D = {**TASK["brats"], **MODEL, **STAGE["finetune"], "steps": 2}
# The command line, with a fault at the fifth step of a training, in one of the processes or in all.
FAULTY = """
import os, sys
from smae_utils.cli import main
from smae_utils.errors import UserError
from smae_utils.work.loop import Loop
gradients, taken = Loop._gradients, []
def faulty(self, accelerator, model, batch):
    taken.append(1)
    if len(taken) == 5 and os.environ.get("RANK", "0") in os.environ["FAULTY"].split():
        raise UserError("a fault of the fifth step")
    return gradients(self, accelerator, model, batch)
Loop._gradients = faulty
sys.exit(main(sys.argv[1:]))
"""


def smae(processes, *words, faulty=""):
    """The command line in so many processes: exit code and print. Processes of rank `faulty` fail."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(FAULTY)
        file.flush()
        program = [file.name] if faulty else ["-m", "smae_utils"]
        command = [sys.executable, *(launch if processes > 1 else []), *program, *map(str, words)]
        own = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "FAULTY": faulty,
        }
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own}, timeout=600)
    return done.returncode, done.stdout + done.stderr


def losses(run):
    return [
        line["loss"]
        for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def words(cxr14):
    """A command's words about data and settings, for a training of 8 steps that is saved after 4."""
    # fp32: where a processor has bf16, its rounding alone is above 1e-4
    own = ["batch_size=4", "precision=fp32", "log_every=1", "steps=8", "save_every=4", "val_every=4"]
    return ["--task", "cxr14", "--data", cxr14, "--preset", TINY, "--set", *own]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_either_goes_on_with_the_others_run(words, tmp_path):
    for count in (1, 2):
        code, text = smae(count, "pretrain", *words, "--out", tmp_path / f"whole{count}")
        assert code == 0, text
    alone = losses(tmp_path / "whole1")
    assert len(alone) == 8 and losses(tmp_path / "whole2") == pytest.approx(alone, abs=1e-4)
    for first, then in ((1, 2), (2, 1)):
        out = ["--out", tmp_path / f"from{first}to{then}"]
        code, text = smae(first, "pretrain", *words, *out, faulty="0" if first == 1 else "1")
        assert code != 0 and text.count("error: a fault of the fifth step") == 1, text
        code, text = smae(then, "pretrain", *words, *out, "--resume")
        assert code == 0 and "going on after step 4" in text, text
        assert losses(out[1]) == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
def test_two_processes_fine_tune_and_score_each_case_once(words, tmp_path):
    tables, run = [], tmp_path / "run"
    code, text = smae(2, "finetune", *words, "--out", run)
    assert code == 0, text
    for count in (1, 2):
        code, text = smae(count, "evaluate", run)
        assert code == 0 and text.count("test cases") == 1, text
        tables.append(pd.read_csv(run / "metrics.csv"))
    one, two = tables
    assert list(one.case) == list(two.case) and not two.duplicated(["case", "class"]).any()
    assert two.score.to_numpy() == pytest.approx(one.score.to_numpy(), abs=1e-6)


@pytest.mark.slow
def test_two_processes_predict_what_one_does(words, cxr14, brats, bare, tmp_path):
    images = sorted(cxr14.rglob("*.png"))[:5]
    code, text = smae(1, "finetune", *words, "--out", tmp_path / "flat")
    assert code == 0, text
    tiny = [f"{k}={v}" for k, v in TINY_3D.items()]
    own = ["--task", "brats", "--data", brats, "--preset", bare, "--set", *tiny, "--out", tmp_path / "deep"]
    code, text = smae(1, "finetune", *own)
    assert code == 0, text
    scans = sorted(brats.rglob("imagesTr/BRATS*.nii.gz"))[:3]
    for kind, given, more in (
        ("flat", images, "--occlusion"),
        ("deep", scans, "--probabilities"),
        ("deep", scans[:1], ""),
    ):
        outs = [tmp_path / f"{kind}{len(given)}-{count}" for count in (1, 2)]
        for count, out in zip((1, 2), outs):
            code, text = smae(
                count, "predict", tmp_path / kind, *given, *([more] if more else []), "--out", out
            )
            assert code == 0 and text.count("wrote the results") == 1, text
            if kind == "deep":  # how many scans the process that reports has for itself
                assert f"(1/{-(-len(given) // count)})" in text, text
        one, two = ({f.name: f.read_bytes() for f in sorted(out.iterdir())} for out in outs)
        assert one.keys() == two.keys() and len(one) > len(given)
        same = [name for name in one if name.endswith((".nii.gz", ".csv", ".json"))]
        assert same and all(one[name] == two[name] for name in same)
    code, text = smae(
        2, "predict", tmp_path / "deep", *scans, scans[0].with_name("none.nii.gz"), "--out", tmp_path / "no"
    )
    assert code != 0 and "none.nii.gz does not exist" in text and not list(tmp_path.glob("no*"))
