"""A batch of notebook runs: planned whole, gone on with after any kill, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from smae_utils.batch import slurm
from smae_utils.batch.collect import collect, status
from smae_utils.batch.plan import Planned, read_batch
from smae_utils.batch.run import run_batch
from smae_utils.batch.runs import Batch, execute, reason
from smae_utils.errors import UserError
from smae_utils.locks import held

# Writes a line when it begins and one when it is through, so that a test can count.
CODE = """
import os, time
def note(word):
    with open(where, "a") as file:
        given = [os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]
        file.write(f"{name} {seed} {word} {given[0]} {given[1]}\\n")
note("begin")
time.sleep(seconds)
if fail and not os.path.exists(fail):
    raise ValueError("no luck")
note("end")
"""


@pytest.fixture
def notebook(tmp_path):
    cells = [
        nbformat.v4.new_code_cell(
            'where: str = ""\nname: str = ""\nseed: int = 0\nseconds: float = 0.0\nfail: str = ""',
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(CODE),
    ]
    file = tmp_path / "note.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
    return file


@pytest.fixture
def write(tmp_path, notebook):
    """Write a batch file: text with NOTE for the notebook and WHERE for the file that it writes to."""

    def make(text):
        file = tmp_path / "batch.yaml"
        file.write_text(text.replace("NOTE", str(notebook)).replace("WHERE", str(tmp_path / "said.txt")))
        return file

    return make


def said(tmp_path):
    file = tmp_path / "said.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


TWO = """
parameters: {where: WHERE}
cross: {seed: [0, 1]}
runs:
  second: {notebook: NOTE, parameters: {name: b}, after: first}
  first: {notebook: NOTE, parameters: {name: a}}
"""


def test_a_grid_becomes_runs_that_wait_for_those_of_their_own_seed(write):
    runs = {run.name: run for run in read_batch(write(TWO))}
    assert set(runs) == {"first-seed0", "first-seed1", "second-seed0", "second-seed1"}
    assert runs["second-seed1"].after == ("first-seed1",) and runs["first-seed1"].after == ()
    assert runs["second-seed1"].parameters["seed"] == 1 and runs["second-seed1"].parameters["name"] == "b"
    names = list(runs)
    assert all(names.index(a) < names.index(run.name) for run in runs.values() for a in run.after)


def test_notebooks_of_the_package_run_in_folders_that_are_told_apart(write):
    text = "parameters: {task: btcv, run_dir: 'runs/{task}-{preset}', preset: demo}\ncross: {seed: [0, 1]}\n"
    runs = "runs: {pretrain: {notebook: 02_self_pretraining}}"
    with pytest.raises(UserError, match="pretrain-seed0 and pretrain-seed1 would both train in .*btcv-demo"):
        read_batch(write(text + runs))
    apart = read_batch(write(text.replace("{preset}", "{preset}-{seed}") + runs))
    assert [run.trains_in.name for run in apart] == ["btcv-demo-0", "btcv-demo-1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs: {a: {notebook: NOTE}}\nparameter: {}", "no 'parameter'.*did you mean 'parameters'"),
        ("runs: {a: {notbook: NOTE}}", "no 'notbook'.*did you mean 'notebook'"),
        ("runs: {a: {parameters: {}}}", "run a names no 'notebook'"),
        ("runs: {a: {notebook: nowhere}}", "run a: no notebook nowhere"),
        ("runs: {a: {notebook: NOTE, parameters: {sed: 1}}}", "no parameter 'sed'"),
        ("runs: {a: {notebook: NOTE, parameters: {seed: one}}}", "seed"),
        ("runs: {a: {notebook: NOTE, cross: {seed: 3}}}", "must be a list of different values"),
        ("runs: {a: {notebook: NOTE, cross: {seed: [3, 3]}}}", "must be a list of different values"),
        ("runs: {a: {notebook: NOTE, cross: {seed: [1]}, parameters: {seed: 2}}}", "keep one"),
        ("runs: {a: {notebook: NOTE, after: b}}", "waits for 'b'"),
        ("runs: {a: {notebook: NOTE, after: b}, b: {notebook: NOTE, after: a}}", "in a circle"),
        ("runs: {a: {notebook: NOTE}, A: {notebook: NOTE}}", "two runs would be called"),
        ("runs: {a: {notebook: NOTE, parameters: {name: '{who}'}}}", "which is no other parameter"),
        ("runs: {a: {notebook: NOTE, parameters: {name: '{seed.x}'}}}", "which is no other parameter"),
        ("runs: {a: {notebook: 3}}", "expected a path or a name, got 3"),
        ("runs: {a: {notebook: NOTE, after: 3}}", "waits for '3'"),
        ("runs: {a: {notebook: NOTE}, a: {notebook: NOTE}}", "'a' stands twice"),
        ("runs: {../x: {notebook: NOTE}}", "cannot be the name of a run's folder"),
        ("runs: {batch.json: {notebook: NOTE}}", "cannot be the name of a run's folder"),
        ("runs: []", "is no batch"),
        ("runs: [", "is no YAML file"),
        (
            "runs: {a: {notebook: NOTE, cross: {seed: [1]}, after: b}, b: "
            "{notebook: NOTE, cross: {seed: [2]}}}",
            "of which none has its",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(write, tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        run_batch(write(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"jobs": 0}, "at least 1"),
        ({"backend": "cloud"}, "unknown backend 'cloud'"),
        ({"gpus": ["-1"]}, "'-1' is no GPU"),
        ({"gpus": ["0", "0"]}, "names a GPU twice"),
        ({"slurm": {"timeout_min": 1}}, "--slurm for --backend slurm"),
    ],
)
def test_a_place_that_cannot_execute_is_refused(write, tmp_path, how, words):
    with pytest.raises(UserError, match=words):
        run_batch(write("runs: {a: {notebook: NOTE}}"), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_a_second_runner_of_one_folder_is_refused(write, tmp_path):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="is being run by another process"):
        run_batch(write("runs: {a: {notebook: NOTE}}"), tmp_path / "out")
    assert not (tmp_path / "out" / "batch.json").exists()


def test_a_batch_runs_once_shares_cores_and_gpus_and_is_collected(write, tmp_path, capsys):
    text = TWO.replace("where: WHERE", "where: WHERE, seconds: 1")
    states = run_batch(write(text), tmp_path / "out", jobs=2, gpus=["4", "5"])
    assert set(states.values()) == {"done"}
    lines = said(tmp_path)
    assert len(lines) == 8 and {line[4] for line in lines} == {"4", "5"}
    assert {line[3] for line in lines} == {
        os.environ.get("OMP_NUM_THREADS") or str(max(1, os.cpu_count() // 2))
    }
    for seed in ("0", "1"):
        of = [line[0] + line[2] for line in lines if line[1] == seed]
        assert of == ["abegin", "aend", "bbegin", "bend"]
    run_batch(write(text), tmp_path / "out", jobs=2)
    assert len(said(tmp_path)) == 8  # nothing is done twice
    run_batch(write(text.replace("name: b", "name: c")), tmp_path / "out", jobs=2)
    assert [line[0] for line in said(tmp_path)[8:]] == ["c"] * 4  # other parameters are other runs
    assert set(status(tmp_path / "out").state) == {"done"}
    assert collect(tmp_path / "out").empty and "4 of 4 runs" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_a_run_that_fails_keeps_its_reason_and_gets_another_chance(write, tmp_path):
    text = TWO.replace("name: a", f"name: a, fail: {tmp_path / 'luck'}")
    with pytest.raises(UserError, match="4 of 4 runs are not done.*first-seed0 failed: .*no luck"):
        run_batch(write(text), tmp_path / "out", jobs=2)
    table = status(tmp_path / "out").set_index("run")
    assert table.state["second-seed0"] == "blocked" and "waits for first-seed0" in table.note["second-seed0"]
    assert (tmp_path / "out" / "first-seed0" / "first-seed0.ipynb").is_file()
    (tmp_path / "luck").touch()
    assert set(run_batch(write(text), tmp_path / "out", jobs=2).values()) == {"done"}


def wait_for(what, seconds=240):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def alive(text):
    """Processes whose command line holds a text."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if text in (place / "cmdline").read_text():
                found.append(int(place.name))
        except (OSError, UnicodeDecodeError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("victim", ["runner", "run"])
def test_a_kill_leaves_no_orphan_and_the_next_start_finishes(write, tmp_path, victim):
    file, out = write(TWO.replace("where: WHERE", "where: WHERE, seconds: 3")), tmp_path / "out"
    command = [sys.executable, "-m", "smae_utils", "batch", str(file), "--out", str(out)]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: said(tmp_path))
    except AssertionError:
        runner.kill()
        raise
    if victim == "runner":
        runner.kill()
        runner.wait()
        wait_for(lambda: not alive(str(out)))
        assert json.loads((out / "first-seed0" / "run.json").read_text()).get("end_time") is None
        assert status(out).state[0] == "stopped"
        assert subprocess.run(command, capture_output=True).returncode == 0
    else:  # the runner starts it again by itself
        for pid in alive(f"smae_utils.batch\0{out}"):
            os.kill(pid, signal.SIGKILL)
        assert runner.wait(timeout=300) == 0
    ends = [tuple(line[:2]) for line in said(tmp_path) if line[2] == "end"]
    assert set(ends) == {("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")}
    assert set(Batch.open(out).states().values()) == {"done"}
    assert not [f for kind in (".part_*", "*.part", ".lock") for f in out.rglob(kind)]


@pytest.mark.slow
def test_trainings_of_a_batch_are_found_by_their_figures(tmp_path, write, cxr14, monkeypatch):
    preset = Path(__file__).parent / "tiny.yaml"
    text = f"""
parameters: {{task: cxr14, data_dir: "{cxr14}", preset: {preset}, run_dir: "runs/{{seed}}"}}
cross: {{seed: [3]}}
runs:
  pretrain: {{notebook: 02_self_pretraining}}
  finetune: {{notebook: 03_fine_tuning, after: pretrain}}
  evaluate: {{notebook: 04_evaluation, after: finetune}}
"""
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    run_batch(write(text), out)
    monkeypatch.chdir("/")  # where the batch was planned counts, not where it is asked for
    table = collect(out)
    assert (
        set(table.training) == {"scratch", "self"}
        and set(table.metric) == {"mauc"}
        and set(table.seed) == {3}
    )
    assert set(table.run) == {"evaluate-seed3"}
    assert "data:image/jpeg" in (out / "index.html").read_text()
    assert isinstance(pd.read_csv(out / "results.csv").value[0], float)
    assert execute(out, "evaluate-seed3") == "done"


def test_a_slurm_job_that_could_not_be_launched_is_taken_back_and_one_that_is_held_is_told_once(monkeypatch):
    class Job:
        def __init__(self, number):
            self.job_id, self.cancelled = f"7_{number}", False

        def cancel(self, check):
            self.cancelled = True

    queue = "7_0 RUNNING JobHeldAdmin\n7_1 PENDING launch failed requeued held\n7_2 PENDING JobHeldUser\n"
    queue += "7_3 PENDING Priority\n"
    answer = subprocess.CompletedProcess([], 0, stdout=queue)
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(slurm, "ASK_EVERY", 0.0)
    said, place = [], object.__new__(slurm.SlurmJobs)
    jobs = {name: Job(i) for i, name in enumerate(["runs", "broken", "held", "waits", "over"])}
    place.report, place.jobs, place.told, place.asked = said.append, dict(jobs), set(), 0.0
    assert place.ended() == ["broken", "over"] and place.ended() == []
    assert [name for name, job in jobs.items() if job.cancelled] == ["broken"]
    assert len(said) == 2 and "broken: taken back" in said[0] and "scontrol release 7_2" in said[1]


def test_the_reason_of_a_slurm_job_that_died_is_what_it_printed_last(tmp_path):
    batch = Batch(tmp_path, (Planned("train", None, {}, {}, function="os:getcwd"),))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"train": "7_1"}')
    (tmp_path / "slurm" / "7_1_0_log.err").write_text("slurmstepd: error: Detected 1 oom-kill event\n")
    assert "oom-kill" in reason(batch, "train") and "7_1_0_log.err" in reason(batch, "train")
