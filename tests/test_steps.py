"""What a step may be made of and told to: parts of a batch, and trackers."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from smae_utils.cli import main
from smae_utils.errors import UserError
from smae_utils.work import devices
from smae_utils.work.finetune import finetune
from smae_utils.work.pretrain import pretrain


def losses(run):
    return [line["loss"] for line in run.read_log()]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_batch_in_parts_takes_the_steps_of_a_whole_one(stage, cxr14, tiny, bare, tmp_path):
    values = {**tiny["cxr14", stage], "steps": 5, "batch_size": 6, "crops_per_scan": 1}
    curves = []
    for parts in (1, 2, 3):
        words = {"preset": bare, "overrides": {**values, "accumulate": parts}, "report": [].append}
        if stage == "pretrain":
            run = pretrain("cxr14", cxr14, tmp_path / f"{parts}", **words)
        else:
            run = finetune("cxr14", cxr14, tmp_path / f"{parts}", "scratch", **words)
        curves.append(losses(run))
    assert len(curves[0]) == 5 and len({round(loss, 3) for loss in curves[0]}) > 1
    assert curves[1] == pytest.approx(curves[0], abs=1e-4) and curves[2] == pytest.approx(curves[0], abs=1e-4)


def test_a_step_waits_for_the_device_once(cxr14, tiny, bare, tmp_path, monkeypatch):
    waits = []

    def counted(name):
        function = getattr(torch.Tensor, name)

        def inner(self, *args):
            if "smae_utils" in sys._getframe(1).f_code.co_filename:
                waits.append(name)
            return function(self, *args)

        return inner

    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    counts = []
    for steps in (3, 8):
        waits.clear()
        values = {**tiny["cxr14", "pretrain"], "steps": steps, "log_every": 100, "val_every": 0}
        pretrain("cxr14", cxr14, tmp_path / f"{steps}", bare, values, report=[].append)
        counts.append(len(waits))
    assert counts[1] - counts[0] == 5, waits


def test_parts_that_do_not_divide_the_batch_are_refused(cxr14, tiny, bare, tmp_path):
    values = {**tiny["cxr14", "pretrain"], "batch_size": 6, "accumulate": 4}
    with pytest.raises(UserError, match="accumulate=4 must divide the 6 scans"):
        pretrain("cxr14", cxr14, tmp_path / "run", bare, values)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_figures_of_the_log(cxr14, tiny, bare, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {**tiny["cxr14", "pretrain"], "steps": 4, "val_every": 2}
    words = ["--task", "cxr14", "--data", str(cxr14), "--preset", bare, "--out", str(tmp_path / "run")]
    words += ["--set", *(f"{k}={v}" for k, v in values.items())]
    assert main(["pretrain", *words, "--track", "tensorboard"]) == 0
    files = [f.parent for f in (tmp_path / "run").rglob("events.out.tfevents*")]
    events = EventAccumulator(str(next(f for f in files if f.name == "smae")))
    events.Reload()
    run = pretrain("cxr14", cxr14, tmp_path / "run", bare, values, resume=True, report=[].append)
    told = {(e.step, round(e.value, 5)) for e in events.Scalars("loss")}
    assert told == {(line["step"], round(line["loss"], 5)) for line in run.read_log()} and len(told) == 4
    assert [e.step for e in events.Scalars("val_loss")] == [2, 4]
    assert all(math.isfinite(e.value) for e in events.Scalars("lr"))


def test_a_tracker_that_is_not_there_is_told_before_anything_starts(cxr14, tiny, bare, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "get_available_trackers", lambda: [])
    for name, words in (
        ("wandb", "which is not installed: pip install wandb"),
        ("excel", "unknown tracker 'excel'"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain("cxr14", cxr14, tmp_path / "run", bare, {**tiny["cxr14", "pretrain"], "track": [name]})
    assert not (tmp_path / "run").exists()
