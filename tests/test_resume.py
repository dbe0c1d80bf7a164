"""Going on with a run: what may change, what may not, who may do it, and where data and run lie by then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from smae_utils.errors import UserError
from smae_utils.work import devices, loop, provenance
from smae_utils.work.devices import inference_context, pick_precision, usable_precision
from smae_utils.work.finetune import finetune
from smae_utils.work.loop import Loop
from smae_utils.work.pretrain import pretrain
from smae_utils.work.run_data import find_data
from smae_utils.work.run_folder import FREE_SETTINGS, LOCK, SCHEMA, Run, absolute, only_process

ROOT = Path(__file__).parents[1]


def quiet(line: str) -> None:
    pass


def steps(run: Run) -> list[int]:
    return [line["step"] for line in run.read_log()]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.read_log()]


class Stop(Exception):
    """What ends a sitting in these tests."""


def stopped_at(step: int):
    """A receiver of progress that ends the run there."""

    def report(line: str) -> None:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) == step:
            raise Stop

    return report


@pytest.fixture
def interrupted(brats, tiny, bare, tmp_path):
    """A pre-training of six steps that ended after the fourth, and a function that goes on with it."""
    overrides = {**tiny["brats", "pretrain"], "steps": 6, "save_every": 2}
    with pytest.raises(Stop):
        # Of step 4 the state was not yet saved: the run goes on after step 2.
        pretrain("brats", brats, tmp_path / "run", bare, overrides, report=stopped_at(4))

    def go_on(report=quiet, out=tmp_path / "run", data=brats, **more) -> Run:
        return pretrain("brats", data, out, bare, {**overrides, **more}, resume=True, report=report)

    return go_on


def rewrite(run: Path, **entries) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config = {k: v for k, v in {**config, **entries}.items() if v is not None}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.slow
def test_what_changes_nothing_of_the_result_may_change(interrupted, brats, tiny, bare, tmp_path):
    new = {"num_workers": 1, "log_every": 2, "save_every": 3, "cache_rate": 0.0, "keep_every": 5}
    new |= {"track": ["tensorboard"], "store": str(tmp_path / "store")}
    assert set(new) == set(FREE_SETTINGS)
    run = interrupted(**new)
    assert {k: run.config["settings"][k] for k in new} == new
    assert steps(run) == [1, 2, 4, 6] and [step for step, _ in run.checkpoints()] == [5]
    whole = pretrain(
        "brats",
        brats,
        tmp_path / "whole",
        bare,
        {**tiny["brats", "pretrain"], "steps": 6, "log_every": 2},
        report=quiet,
    )
    assert losses(run)[2:] == losses(whole)[1:]


@pytest.mark.parametrize(
    "change", [{"mask_ratio": 0.5}, {"seed": 1}, {"base_lr": 0.2}, {"steps": 7}, {"precision": "auto"}]
)
def test_what_decides_the_result_may_not(interrupted, change, tmp_path):
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    ((name, value),) = change.items()
    with pytest.raises(
        UserError, match="lr=.*now 0.0015625" if name == "base_lr" else f"{name}=.*now {value!r}"
    ):
        interrupted(**change)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_each_sitting_is_recorded(interrupted):
    run = interrupted(num_workers=1)
    first, second = run.config["segments"]
    assert (first["step"], first["num_workers"], second["step"], second["num_workers"]) == (0, 0, 2, 1)
    assert set(first) == {"step", "date", "device", "precision", "processes", "commit", "num_workers"}
    assert run.config["schema"] == SCHEMA


def test_a_run_of_an_older_version_goes_on_and_keeps_what_it_said(interrupted, tmp_path):
    run = tmp_path / "run"
    rewrite(run, schema=None, segments=None, data_from_run=None, data="elsewhere")
    made = interrupted()
    first, second = made.config["segments"]
    assert (
        first["step"] == 0
        and first["precision"] == "fp32"
        and first["date"] == made.config["provenance"]["date"]
    )
    assert second["step"] == 2 and made.config["schema"] == SCHEMA


@pytest.mark.parametrize("schema", [SCHEMA + 1, "three"])
def test_a_run_of_a_newer_version_is_refused_by_name(interrupted, schema, tmp_path):
    rewrite(tmp_path / "run", schema=schema)
    with pytest.raises(UserError, match=f"schema {schema!r}.*newer"):
        interrupted()
    with pytest.raises(UserError, match="schema"):
        Run.open(tmp_path / "run", "pretrain")


def test_the_precision_of_the_first_sitting_is_kept_where_the_device_has_it(
    interrupted, tmp_path, monkeypatch
):
    asked = []
    make = devices.make_accelerator
    monkeypatch.setattr(loop.devices, "make_accelerator", lambda p, *more: asked.append(p) or make("fp32"))
    rewrite(tmp_path / "run", precision="bf16")
    monkeypatch.setattr(devices, "computes_bf16", lambda device: True)
    said = []
    with pytest.raises(Stop):
        interrupted(report=lambda line: said.append(line) or stopped_at(3)(line))
    assert asked == ["bf16"] and not [line for line in said if line.startswith("note")]
    monkeypatch.setattr(devices, "computes_bf16", lambda device: False)
    run = interrupted(report=said.append)
    assert (
        asked == ["bf16", "fp32"]
        and len([line for line in said if line.startswith("note") and "bf16" in line]) == 1
    )
    assert run.config["precision"] == "bf16" and run.config["segments"][-1]["precision"] == "fp32"


def test_the_recorded_precision_is_used_only_where_the_device_computes_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "computes_bf16", lambda device: False)
    assert usable_precision("fp32", cpu) == ("fp32", "") and usable_precision("auto", cpu) == ("fp32", "")
    precision, line = usable_precision("bf16", cpu)
    assert precision == "fp32" and "bf16" in line and "cpu" in line and "\n" not in line
    monkeypatch.setattr(devices, "computes_bf16", lambda device: True)
    assert usable_precision("bf16", cpu) == usable_precision("auto", cpu) == ("bf16", "")
    assert pick_precision("auto", cpu) == "bf16"
    with pytest.raises(UserError, match="fp8"):
        usable_precision("fp8", cpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_computes_in_the_precision_it_is_told_and_records_no_gradient(precision):
    layer, x = torch.nn.Linear(4, 4), torch.rand(1, 4)
    with inference_context(torch.device("cpu"), precision):
        y = layer(x)
    assert y.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision] and y.is_inference()
    assert layer(x).requires_grad


@pytest.mark.slow
def test_of_two_processes_that_go_on_with_one_run_one_is_refused_and_the_run_stays_whole(
    interrupted, brats, bare, tiny, tmp_path
):
    values = [f"{k}={v}" for k, v in {**tiny["brats", "pretrain"], "steps": 6, "save_every": 2}.items()]
    words = [
        "pretrain",
        "--task",
        "brats",
        "--data",
        brats,
        "--preset",
        bare,
        "--out",
        tmp_path / "run",
        "--resume",
        "--set",
        *values,
    ]
    command = [sys.executable, "-m", "smae_utils", *map(str, words)]
    with only_process(tmp_path / "run"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "another process" in done.stderr and done.stderr.count("\n") == 1
        with pytest.raises(UserError, match="another process"):
            interrupted()
        assert (tmp_path / "run" / LOCK).exists()  # the refused ones did not take it away
    assert not (tmp_path / "run" / LOCK).exists()
    assert steps(interrupted()) == [1, 2, 3, 4, 5, 6] and not (tmp_path / "run" / LOCK).exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_the_lock_of_a_killed_process_does_not_stop_the_next(tmp_path):
    code = "import sys, time; from smae_utils.work.run_folder import only_process\n"
    code += "with only_process(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="another process"), only_process(tmp_path / "run"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with only_process(tmp_path / "run"):
        pass
    assert not any((tmp_path / "run").iterdir())


def test_a_lock_that_a_kill_left_does_not_make_a_folder_count_as_used(brats, tiny, bare, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_bytes(b"")
    assert pretrain("brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], report=quiet).finished


def test_a_finished_run_is_found_again_where_nothing_can_be_written(brats, tiny, bare, tmp_path, monkeypatch):
    run = pretrain("brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], report=quiet)
    monkeypatch.setattr(loop, "only_process", lambda path: pytest.fail("wrote into a finished run"))
    assert pretrain(
        "brats", brats, run.path, bare, tiny["brats", "pretrain"], resume=True, report=quiet
    ).finished


def test_a_run_that_was_moved_goes_on_there_with_data_that_were_moved(interrupted, brats, tmp_path):
    new = tmp_path / "m\u00fc r" / "run 2"
    new.parent.mkdir()
    (tmp_path / "run").rename(new)
    shutil.copytree(brats, tmp_path / "data 2")
    run = interrupted(out=new, data=tmp_path / "data 2")
    assert steps(run) == [1, 2, 3, 4, 5, 6] and run.config["data"] == str(tmp_path / "data 2")


def test_the_weights_a_run_started_from_may_be_moved_but_not_be_others(brats, tiny, bare, tmp_path):
    made = [
        pretrain(
            "brats",
            brats,
            tmp_path / f"pre{seed}",
            bare,
            {**tiny["brats", "pretrain"], "seed": seed},
            report=quiet,
        )
        for seed in (0, 1)
    ]
    overrides = {**tiny["brats", "finetune"], "save_every": 1}
    with pytest.raises(Stop):
        finetune("brats", brats, tmp_path / "run", made[0].path, bare, overrides, report=stopped_at(2))
    moved = shutil.copy(made[0].path / "model.safetensors", tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="init"):
        finetune("brats", brats, tmp_path / "run", made[1].path, bare, overrides, resume=True, report=quiet)
    with pytest.raises(UserError, match="init"):
        finetune("brats", brats, tmp_path / "run", "scratch", bare, overrides, resume=True, report=quiet)
    assert finetune(
        "brats", brats, tmp_path / "run", moved, bare, overrides, resume=True, report=quiet
    ).finished


# Where data lie


def radiographs(folder: Path, name: str = "list.json", data: Path | None = None) -> Path:
    """A list of twelve small radiographs with two findings; the images lie in `data`, or beside it."""
    rng, data = np.random.default_rng(0), data or folder
    folder.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(data / f"i{i}.png")
        entries.append({"image": f"i{i}.png", "label": [["mass"], ["nodule"], []][i % 3]})
    content = {
        "classes": ["mass", "nodule"],
        "training": entries[:6],
        "validation": entries[6:9],
        "test": entries[9:],
    }
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / name


@pytest.fixture
def train(tiny, bare, tmp_path):
    """Pre-train on a list; the run folder is `runs/run`."""

    def call(task, data="", **more) -> Run:
        overrides = {**tiny["cxr14", "pretrain"], "steps": 1}
        return pretrain(str(task), data, tmp_path / "runs" / "run", bare, overrides, report=quiet, **more)

    return call


def test_places_are_kept_absolute_and_links_as_they_are(train, tmp_path, monkeypatch):
    store = tmp_path / "store" / "ab"
    real = radiographs(store, "cdef0123.json")
    (tmp_path / "data").mkdir()
    for file in store.glob("*.png"):
        (tmp_path / "data" / file.name).symlink_to(file)
    real = real.rename(store / "cdef0123")  # the name of the content, without an ending
    (tmp_path / "data" / "list.json").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    run = train("data/list.json")
    assert run.config["task"] == str(tmp_path / "data" / "list.json") and run.config["data"] == str(
        tmp_path / "data"
    )
    assert (
        run.config["task_from_run"] == "../../data/list.json" and run.config["data_from_run"] == "../../data"
    )
    monkeypatch.chdir("/")
    assert find_data(run) == (run.config["task"], run.config["data"])


def test_a_list_and_its_run_that_were_moved_together_are_found(train, tmp_path):
    train(radiographs(tmp_path / "data"))
    (tmp_path / "new").mkdir()
    for name in ("data", "runs"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    moved = Run(tmp_path / "new" / "runs" / "run")
    assert find_data(moved) == (str(tmp_path / "new" / "data" / "list.json"), str(tmp_path / "new" / "data"))
    (tmp_path / "new" / "data").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="--data NEW") as error:
        find_data(moved)
    for place in (tmp_path / "data" / "list.json", tmp_path / "new" / "data" / "list.json"):
        assert str(place) in str(error.value)


def test_data_of_a_list_can_be_said_as_the_list_its_folder_or_the_folder_of_its_paths(train, tmp_path):
    run = train(radiographs(tmp_path / "data"))
    recorded = str(tmp_path / "data" / "list.json")
    other = radiographs(tmp_path / "other", "renamed.json")
    same = radiographs(tmp_path / "same")
    images = tmp_path / "images"
    shutil.copytree(tmp_path / "data", images, ignore=shutil.ignore_patterns("*.json"))
    assert find_data(run, other) == (str(other), str(other.parent))
    assert find_data(run, same.parent) == (str(same), str(same.parent))
    assert find_data(run, images) == (recorded, str(images))
    (tmp_path / "data").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="--data NEW"):
        find_data(run, images)


def test_a_list_with_a_data_folder_of_its_own_is_not_mistaken_for_one_that_lies_there(train, tmp_path):
    listing = radiographs(tmp_path / "lists", "dataset.json", data=tmp_path / "images")
    # Of the download, another thing.
    (tmp_path / "images" / "dataset.json").write_text("{}", encoding="utf-8")
    run = train(listing, tmp_path / "images")
    expected = (str(listing), str(tmp_path / "images"))
    assert find_data(run) == find_data(run, tmp_path / "images") == expected


def test_data_of_a_known_task_are_found_where_they_were_or_where_one_says(brats, tiny, bare, tmp_path):
    shutil.copytree(brats, tmp_path / "data")
    overrides = {**tiny["brats", "pretrain"], "steps": 1}
    run = pretrain("brats", tmp_path / "data", tmp_path / "runs" / "run", bare, overrides, report=quiet)
    assert find_data(run) == ("brats", str(tmp_path / "data")) and find_data(run, brats) == (
        "brats",
        str(brats),
    )
    (tmp_path / "data").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="data folder .*--data NEW"):
        find_data(run)


def test_a_list_may_be_moved_or_renamed_between_two_sittings_but_not_be_changed(
    train, tiny, tmp_path, monkeypatch
):
    listing = radiographs(tmp_path / "data")
    gradients = Loop._gradients
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Loop, "_gradients", lambda *a: (_ for _ in ()).throw(Stop))
        train(listing)
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    (tmp_path / "other" / "list.json").rename(tmp_path / "other" / "mine.json")
    content = json.loads(listing.read_text(encoding="utf-8"))
    listing.write_text(json.dumps({**content, "training": content["training"][1:]}), encoding="utf-8")
    with pytest.raises(UserError, match="train="):
        train(listing, resume=True)
    run = train(tmp_path / "other" / "mine.json", resume=True)
    assert run.finished and run.config["task"] == str(tmp_path / "other" / "mine.json")
    assert Loop._gradients is gradients


def test_a_path_through_a_link_and_up_is_not_shortened(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert os.path.samefile(absolute(tmp_path / "link" / ".." / "x"), tmp_path / "a" / "x")
    assert absolute(tmp_path / "a" / ".." / "a" / "x") == str(tmp_path / "a" / "x")


# Which code made it


def test_a_commit_is_told_only_by_the_repository_that_tracks_this_package(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    package = tmp_path / "project" / "venv" / "smae_utils"
    package.mkdir(parents=True)
    (package / "work").mkdir()
    for name in ("errors.py", "work/run_folder.py"):
        shutil.copy(provenance.PACKAGE / name, package / name)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert provenance.commit() == "unknown"  # no repository
    git("init")
    (tmp_path / "theirs.txt").write_text("theirs", encoding="utf-8")
    git("add", "theirs.txt")
    git("commit", "-m", "theirs")
    assert provenance.commit() == "unknown"  # another project's, in whose folder the environment lies
    git("add", ".")
    git("commit", "-m", "ours")
    assert len(provenance.commit()) == 12
    (package / "work" / "run_folder.py").write_text("# changed", encoding="utf-8")
    assert provenance.commit().endswith("-dirty")
