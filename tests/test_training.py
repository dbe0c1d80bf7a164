"""Training: exact resume, arms that differ in nothing but their start, no label and no test image in
pre-training, no silent failure.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from smae_utils import timm_library
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.work import finetune as finetuning
from smae_utils.work import loop
from smae_utils.work import pretrain as pretraining
from smae_utils.work.build import build_model, build_optimizer, build_splits
from smae_utils.work.finetune import finetune
from smae_utils.work.loop import Loop
from smae_utils.work.pretrain import pretrain
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, make_settings

ROOT = Path(__file__).parents[1]


def quiet(line: str) -> None:
    pass


def curve(run: Run | Path) -> list[dict]:
    """The log without the clock."""
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in Run(run.path if isinstance(run, Run) else run).read_log()
    ]


def tensors(run: Run | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file((run.path if isinstance(run, Run) else run) / "model.safetensors")


def assert_same_run(a: Run | Path, b: Run | Path) -> None:
    assert curve(a) == curve(b)
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def command(*words) -> list[str]:
    return [sys.executable, "-m", "smae_utils", *map(str, words)]


def as_set(overrides: dict) -> list[str]:
    return [f"{k}={v}" for k, v in overrides.items()]


@pytest.mark.slow
def test_a_killed_pretraining_goes_on_as_if_nothing_had_happened(btcv, tiny, bare, tmp_path):
    overrides = {
        **tiny["btcv", "pretrain"],
        "steps": 120,
        "save_every": 7,
        "val_every": 10,
        "warmup_steps": 20,
    }
    whole = pretrain("btcv", btcv, tmp_path / "whole", bare, overrides, report=quiet)

    words = command(
        "pretrain",
        "--task",
        "btcv",
        "--data",
        btcv,
        "--preset",
        bare,
        "--out",
        tmp_path / "killed",
        "--set",
        *as_set(overrides),
    )
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "killed" / "log.jsonl", time.monotonic() + 90
    while process.poll() is None and not (log.is_file() and log.read_text(encoding="utf-8").count("\n") >= 9):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = Run(tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
    assert not killed.finished and len(killed.read_log()) >= 9

    done = subprocess.run([*words, "--resume"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed_after = int(done.stdout.split("going on after step ")[1].split()[0])
    assert 7 <= resumed_after < 120 and resumed_after % 7 == 0
    assert [line["step"] for line in curve(killed)] == list(range(1, 121))
    assert len({line["loss"] for line in curve(killed)}) == 120
    assert_same_run(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["brats", "cxr14"])
def test_an_interrupted_finetuning_with_drop_path_goes_on_as_if_nothing_had_happened(
    task, data, tiny, bare, tmp_path
):
    overrides = {
        **tiny[task, "finetune"],
        "steps": 9,
        "drop_path": 0.5,
        "log_every": 2,
        "val_every": 4,
        "intensity_prob": 0.5,
    }

    def stop(line: str) -> None:
        if line.startswith("step      6/"):
            raise KeyboardInterrupt

    whole = finetune(task, data[task], tmp_path / "whole", preset=bare, overrides=overrides, report=quiet)
    with pytest.raises(KeyboardInterrupt):
        finetune(task, data[task], tmp_path / "stopped", preset=bare, overrides=overrides, report=stop)
    assert curve(tmp_path / "stopped")[-1]["step"] == 6
    finetune(
        task, data[task], tmp_path / "stopped", preset=bare, overrides=overrides, resume=True, report=quiet
    )
    assert_same_run(whole, tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["update", "validation"])
def test_ctrl_c_in_the_middle_of_a_step_leaves_an_exact_state(
    where, brats, tiny, bare, tmp_path, monkeypatch
):
    overrides = {**tiny["brats", "finetune"], "steps": 6, "val_every": 2}
    whole = finetune("brats", brats, tmp_path / "whole", preset=bare, overrides=overrides, report=quiet)
    calls = []

    def interrupting(function):
        def inner(*args, **kwargs):
            out = function(*args, **kwargs)
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return out

        return inner

    with monkeypatch.context() as patch:
        if where == "update":
            patch.setattr(torch.optim.AdamW, "step", interrupting(torch.optim.AdamW.step))
        else:
            patch.setattr(finetuning, "score_cases", interrupting(finetuning.score_cases))
        with pytest.raises(KeyboardInterrupt):
            finetune("brats", brats, tmp_path / "stopped", preset=bare, overrides=overrides, report=quiet)
    finetune(
        "brats", brats, tmp_path / "stopped", preset=bare, overrides=overrides, resume=True, report=quiet
    )
    assert_same_run(whole, tmp_path / "stopped")


def test_same_seed_same_run_and_another_seed_another(brats, tiny, bare, tmp_path):
    runs = [
        pretrain(
            "brats", brats, tmp_path / name, bare, {**tiny["brats", "pretrain"], "seed": seed}, report=quiet
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert_same_run(runs[0], runs[1])
    assert curve(runs[0]) != curve(runs[2])


def test_a_loss_that_is_not_finite_stops_with_step_and_cases(btcv, tiny, bare, tmp_path):
    overrides = {**tiny["btcv", "pretrain"], "base_lr": 1e30, "steps": 20}
    with pytest.raises(UserError, match=r"at step \d+ with cases img00") as error:
        pretrain("btcv", btcv, tmp_path / "run", bare, overrides, report=quiet)
    assert "lower lr" in str(error.value) and "\n" not in str(error.value)
    assert not Run(tmp_path / "run").finished
    assert all(math.isfinite(line["loss"]) for line in curve(tmp_path / "run"))


def test_both_arms_see_the_same_crops_in_the_same_order_and_differ_in_the_encoder(
    brats, tiny, bare, tmp_path, monkeypatch
):
    weights = pretrain("brats", brats, tmp_path / "mae", bare, tiny["brats", "pretrain"], report=quiet)
    seen, starts = {}, {}
    gradients = Loop._gradients

    def spy(self, accelerator, model, batch):
        if self.config["init"] not in starts:
            starts[self.config["init"]] = {k: v.clone() for k, v in self.model.state_dict().items()}
        seen.setdefault(self.config["init"], []).append(
            (batch["case"], batch["image"].clone(), batch["label"].clone())
        )
        return gradients(self, accelerator, model, batch)

    monkeypatch.setattr(Loop, "_gradients", spy)
    for name, init in (("scratch", "scratch"), ("self", weights.path)):
        finetune("brats", brats, tmp_path / name, init, bare, tiny["brats", "finetune"], report=quiet)
    a, b = seen["scratch"], seen[str(weights.path)]
    assert len(a) == len(b) == 4
    assert not torch.equal(a[0][1], a[1][1])
    for one, two in zip(a, b):
        assert one[0] == two[0] and torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])

    scratch, own, mae = starts["scratch"], starts[str(weights.path)], tensors(weights)
    encoder = [k for k in own if k.startswith("encoder.")]
    assert encoder and all(torch.equal(own[k], mae[k]) for k in encoder)
    assert all(torch.equal(own[k], scratch[k]) for k in own if not k.startswith("encoder."))
    assert not torch.equal(
        own["encoder.blocks.0.attn.qkv.weight"], scratch["encoder.blocks.0.attn.qkv.weight"]
    )


def test_each_epoch_shows_every_scan_once(btcv, tiny, bare, tmp_path, monkeypatch):
    cases, gradients = [], Loop._gradients

    def spy(self, accelerator, model, batch):
        cases.append(batch["case"])
        return gradients(self, accelerator, model, batch)

    monkeypatch.setattr(Loop, "_gradients", spy)
    overrides = {**tiny["btcv", "pretrain"], "train_on_val": True, "crops_per_scan": 2, "steps": 6}
    run = pretrain("btcv", btcv, tmp_path / "run", bare, overrides, report=quiet)
    train = run.config["cases"]["train"]
    assert len(train) == 6 and all(len(c) == 4 for c in cases)
    flat = [c for batch in cases for c in batch[::2]]
    assert sorted(flat[:6]) == sorted(flat[6:]) == train
    assert flat[:6] != flat[6:]


@pytest.mark.parametrize("task", ["btcv", "brats", "cxr14"])
def test_pretraining_reads_no_label_and_no_test_image(task, data, spoil, tiny, bare, tmp_path):
    folder = spoil(data[task])
    overrides = {**tiny[task, "pretrain"], "val_every": 2}
    settings = make_settings(PretrainSettings, overrides, where="test")
    splits = build_splits(get_task(task), folder, settings)
    assert all(splits.values())
    for case in splits["test"]:
        Path(case["image"]).write_bytes(b"unreadable")
    if get_task(task).kind == "segmentation":
        for case in (c for part in splits.values() for c in part):
            Path(case["label"]).write_bytes(b"unreadable")
        with pytest.raises(UserError, match="cannot read"):  # whoever opens a label notices
            finetune(
                task, folder, tmp_path / "fine", preset=bare, overrides=tiny[task, "finetune"], report=quiet
            )
    spoiled = pretrain(task, folder, tmp_path / "spoiled", bare, overrides, report=quiet)
    clean = pretrain(task, data[task], tmp_path / "clean", bare, overrides, report=quiet)
    assert_same_run(spoiled, clean)


def test_finetuning_reads_no_test_image(btcv, spoil, tiny, bare, tmp_path):
    folder = spoil(btcv)
    for case in build_splits(get_task("btcv"), folder, FinetuneSettings())["test"]:
        Path(case["image"]).write_bytes(b"unreadable")
        Path(case["label"]).write_bytes(b"unreadable")
    overrides = {**tiny["btcv", "finetune"], "val_every": 2, "select": "best", "ce_weight_power": 0.5}
    assert finetune("btcv", folder, tmp_path / "run", preset=bare, overrides=overrides, report=quiet).finished


def test_the_learning_rate_warms_up_and_falls_as_a_cosine_from_base_lr_times_batch_over_256(
    brats, tiny, bare, tmp_path
):
    total, warm, peak = 12, 4, 0.32 * 2 / 256
    overrides = {**tiny["brats", "pretrain"], "steps": total, "warmup_steps": warm, "base_lr": 0.32}
    run = pretrain("brats", brats, tmp_path / "run", bare, overrides, report=quiet)
    for line in run.read_log():
        s = line["step"]
        # The rate reaches 0 where the step after the last would be.
        expected = (
            peak * s / warm
            if s < warm
            else peak / 2 * (1 + math.cos(math.pi * (s - warm) / (total - warm + 1)))
        )
        assert line["lr"] == pytest.approx(expected, abs=1e-9), s


def test_no_step_is_taken_with_a_learning_rate_of_zero(brats, tiny, bare, tmp_path):
    for steps, warm in ((1, 0), (2, 1), (4, 0)):
        overrides = {**tiny["brats", "pretrain"], "steps": steps, "warmup_steps": warm}
        run = pretrain("brats", brats, tmp_path / f"{steps}-{warm}", bare, overrides, report=quiet)
        assert all(line["lr"] > 0 for line in run.read_log())


@pytest.mark.parametrize("task", ["btcv", "cxr14"])
def test_layer_decay_scales_the_lr_of_each_block_as_timm_does(task, tiny):
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    settings = make_settings(FinetuneSettings, tiny[task, "finetune"], where="test")
    model = build_model(get_task(task), settings)
    ours = {
        id(p): g["lr_scale"] for g in build_optimizer(model, settings, 0.75).param_groups for p in g["params"]
    }
    assert len(ours) == sum(p.requires_grad for p in model.parameters())
    scale = {name: ours[id(p)] for name, p in model.named_parameters() if p.requires_grad}

    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=settings.depth, num_heads=2, num_classes=3
    )
    theirs = {
        id(p): g["lr_scale"] for g in param_groups_layer_decay(vit, layer_decay=0.75) for p in g["params"]
    }
    expected = {f"encoder.{name}": theirs[id(p)] for name, p in vit.named_parameters()}
    compared = [
        n
        for n in scale
        if n in expected
        and n.startswith(
            ("encoder.blocks.", "encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")
        )
    ]
    assert len(compared) > 12 * settings.depth
    assert {n: scale[n] for n in compared} == pytest.approx({n: expected[n] for n in compared})
    assert scale["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.75**settings.depth)
    assert all(v == 1 for n, v in scale.items() if not n.startswith("encoder."))


def test_layer_decay_reaches_the_learning_rates_of_the_run(cxr14, tiny, bare, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append({round(g["lr_scale"], 6): g["lr"] for g in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    overrides = {**tiny["cxr14", "finetune"], "layer_decay": 0.5, "base_lr": 0.256}
    finetune("cxr14", cxr14, tmp_path / "run", preset=bare, overrides=overrides, report=quiet)
    assert sorted(rates[0]) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    for group in rates:
        assert all(lr == pytest.approx(scale * group[1.0]) for scale, lr in group.items())
    assert rates[0][1.0] > rates[-2][1.0] > 0


def test_norms_biases_and_tokens_are_not_decayed_and_the_rest_is(tiny):
    settings = make_settings(
        FinetuneSettings, {**tiny["btcv", "finetune"], "weight_decay": 0.3}, where="test"
    )
    model = build_model(get_task("btcv"), settings)
    decay = {
        id(p): g["weight_decay"] for g in build_optimizer(model, settings).param_groups for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or "pos_embed" in name or "cls_token" in name
            assert decay[id(parameter)] == (0 if plain else 0.3), name


@pytest.mark.parametrize("left", ["last.new", "last.old", "last.new last.old"])
def test_a_kill_between_two_renames_of_the_state_loses_nothing(left, brats, tiny, bare, tmp_path):
    pretrain("brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], report=quiet)
    run = Run(tmp_path / "run")
    for name in left.split():
        shutil.copytree(run.path / "last", run.path / name)
    shutil.rmtree(run.path / "last")
    assert run.state() == run.path / "last" and (run.path / "last" / "state.json").is_file()


def test_a_setting_newer_than_the_run_does_not_stop_its_resuming(brats, tiny, bare, tmp_path):
    overrides = {**tiny["brats", "pretrain"], "steps": 4, "save_every": 1}

    def stop(line: str) -> None:
        if line.startswith("step      2/"):
            raise KeyboardInterrupt

    whole = pretrain("brats", brats, tmp_path / "whole", bare, overrides, report=quiet)
    with pytest.raises(KeyboardInterrupt):
        pretrain("brats", brats, tmp_path / "run", bare, overrides, report=stop)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    # One that may change between sittings, one that may not.
    del (config["settings"]["keep_every"], config["settings"]["mask_ratio"])
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = []
    run = pretrain("brats", brats, tmp_path / "run", bare, overrides, resume=True, report=lines.append)
    assert any("going on after step" in line for line in lines) and run.finished
    assert_same_run(whole, run)
    # What an older run does not say counts as the default, and another value is refused.
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(UserError, match="mask_ratio"):
        pretrain(
            "brats",
            brats,
            tmp_path / "run",
            bare,
            {**overrides, "mask_ratio": 0.5},
            resume=True,
            report=quiet,
        )


def test_a_finished_run_is_not_trained_again(brats, tiny, bare, tmp_path, monkeypatch):
    run = pretrain("brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], report=quiet)
    before = {p.name: p.read_bytes() for p in run.path.iterdir() if p.is_file()}
    monkeypatch.setattr(Loop, "_gradients", lambda *a: pytest.fail("trained again"))
    said = []
    pretrain(
        "brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], resume=True, report=said.append
    )
    assert any("already finished" in line for line in said)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain("brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], report=quiet)
    assert {p.name: p.read_bytes() for p in run.path.iterdir() if p.is_file()} == before


def test_a_folder_that_holds_something_else_is_not_written_into(brats, tiny, bare, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(UserError, match=str(tmp_path)):
            pretrain("brats", brats, tmp_path, bare, tiny["brats", "pretrain"], resume=resume, report=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_resuming_with_other_settings_is_refused_by_name(brats, tiny, bare, tmp_path):
    overrides = tiny["brats", "pretrain"]
    pretrain("brats", brats, tmp_path / "run", bare, overrides, report=quiet)
    with pytest.raises(UserError, match="mask_ratio=0.75, now 0.5"):
        pretrain(
            "brats",
            brats,
            tmp_path / "run",
            bare,
            {**overrides, "mask_ratio": 0.5},
            resume=True,
            report=quiet,
        )


def test_validation_uses_the_same_crops_and_masks_each_time(btcv, tiny, bare, tmp_path):
    # Weights stay as they are.
    overrides = {**tiny["btcv", "pretrain"], "lr": 0.0, "base_lr": 0.0, "val_every": 2, "steps": 6}
    log = pretrain("btcv", btcv, tmp_path / "run", bare, overrides, report=quiet).read_log()
    scores = [line["val_loss"] for line in log if "val_loss" in line]
    assert len(scores) == 3 and len(set(scores)) == 1 and scores[0] > 0
    assert len({line["loss"] for line in log}) == 6


def test_validation_does_not_disturb_training(btcv, tiny, bare, tmp_path):
    runs = [
        pretrain(
            "btcv", btcv, tmp_path / str(n), bare, {**tiny["btcv", "pretrain"], "val_every": n}, report=quiet
        )
        for n in (1, 3)
    ]
    assert [line["loss"] for line in curve(runs[0])] == [line["loss"] for line in curve(runs[1])]
    assert [("val_loss" in line) for line in curve(runs[1])] == [False, False, True, True]


def test_the_best_weights_on_validation_are_kept_when_asked(cxr14, tiny, bare, tmp_path, monkeypatch):
    scores, kept = iter([0.3, 0.9, 0.5, 0.4]), []

    def score(predictor, *_):
        kept.append({k: v.clone() for k, v in predictor.model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(finetuning, "score_cases", score)
    overrides = {**tiny["cxr14", "finetune"], "select": "best", "val_every": 1}
    run = finetune("cxr14", cxr14, tmp_path / "run", preset=bare, overrides=overrides, report=quiet)
    final = tensors(run)
    assert all(torch.equal(final[k], kept[1][k]) for k in final)
    assert not all(torch.equal(final[k], kept[3][k]) for k in final)


def test_validation_every_0_steps_is_never(btcv, tiny, bare, tmp_path, monkeypatch):
    run = pretrain(
        "btcv", btcv, tmp_path / "run", bare, {**tiny["btcv", "pretrain"], "val_every": 0}, report=quiet
    )
    assert run.finished and run.config["cases"]["val"]
    assert not any("val_loss" in line for line in curve(run))
    overrides = {**tiny["btcv", "finetune"], "select": "best", "val_every": 0}
    with pytest.raises(UserError, match="select=best needs validation.*val_every"):
        finetune("btcv", btcv, tmp_path / "fine", preset=bare, overrides=overrides, report=quiet)
    assert not (tmp_path / "fine").exists()


def draws() -> tuple:
    """The next number of each global generator."""
    return torch.rand(1).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_the_global_generators_as_they_were(fails, cxr14, tiny, bare, tmp_path):
    def report(line: str) -> None:
        if fails and line.startswith("step"):
            raise UserError("stop")

    def seed_all() -> None:
        torch.manual_seed(5), np.random.seed(5), random.seed(5)

    seed_all()
    expected = draws()
    overrides = {**tiny["cxr14", "finetune"], "rand_augment": "rand-m9-mstd0.5-inc1", "drop_path": 0.5}
    seed_all()
    with pytest.raises(UserError) if fails else nullcontext():
        pretrain("cxr14", cxr14, tmp_path / "pre", bare, tiny["cxr14", "pretrain"], report=report)
    with pytest.raises(UserError) if fails else nullcontext():
        finetune("cxr14", cxr14, tmp_path / "run", preset=bare, overrides=overrides, report=report)
    assert draws() == expected


def test_notes_of_a_task_are_told_at_the_start_of_both_stages(brats, tiny, bare, tmp_path, monkeypatch):
    record = dataclasses.replace(get_task("brats"), notes=("the column 'age' is not used",))
    for module in (pretraining, finetuning):
        monkeypatch.setattr(module, "get_task", lambda name: record)
    for stage, train in (("pretrain", pretrain), ("finetune", finetune)):
        said = []
        train(
            "brats",
            brats,
            tmp_path / stage,
            preset=bare,
            overrides={**tiny["brats", stage], "steps": 1},
            report=said.append,
        )
        assert said[0] == "note: the column 'age' is not used"


def test_a_batch_that_the_processes_cannot_share_equally_is_refused_before_any_folder_is_made(
    brats, tiny, bare, tmp_path, monkeypatch
):
    check = loop.check_batch
    monkeypatch.setattr(loop, "check_batch", lambda scans, size, processes: check(scans, size, 2))
    with pytest.raises(UserError, match=r"batch_size 3 .*2 processes"):
        pretrain(
            "brats",
            brats,
            tmp_path / "run",
            bare,
            {**tiny["brats", "pretrain"], "batch_size": 3},
            report=quiet,
        )
    assert not (tmp_path / "run").exists()


def test_pretraining_goes_on_from_the_encoder_and_decoder_of_another(
    brats, tiny, bare, tmp_path, monkeypatch
):
    first = pretrain("brats", brats, tmp_path / "first", bare, tiny["brats", "pretrain"], report=quiet)
    starts, gradients = [], Loop._gradients

    def spy(self, *args):
        starts.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return gradients(self, *args)

    monkeypatch.setattr(Loop, "_gradients", spy)
    said = []
    overrides = {**tiny["brats", "pretrain"], "decoder_depth": 2}
    more = pretrain("brats", brats, tmp_path / "more", bare, overrides, report=said.append, init=first.path)
    learned = tensors(first)
    # Of the deeper decoder the first block.
    assert all(torch.equal(starts[0][k], v) for k, v in learned.items())
    assert any("loaded" in line for line in said) and more.config["init"] == str(first.path)
    with pytest.raises(UserError, match="no weights"):
        pretrain("brats", brats, tmp_path / "typo", bare, overrides, report=quiet, init=tmp_path / "nowhere")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("how", ["folder", "file", "kept", "copy", "chain"])
def test_weights_that_have_seen_test_cases_are_refused_by_whatever_path_they_come(
    how, brats, tiny, bare, tmp_path
):
    overrides = {**tiny["brats", "pretrain"], "keep_every": 2}
    run = pretrain("brats", brats, tmp_path / "pre", bare, overrides, report=quiet)
    init = run.path
    if how == "file":
        init = run.path / "model.safetensors"
    if how == "kept":
        init = run.checkpoints()[0][1]
    if how == "copy":
        init = Path(shutil.copy(run.path / "model.safetensors", tmp_path / "mine.safetensors"))
    if how == "chain":  # seen two pre-trainings ago
        said = []
        init = pretrain(
            "brats", brats, tmp_path / "b", bare, {**overrides, "fold": 1}, report=said.append, init=init
        ).path
        assert any(line.startswith("note: ") and "test cases" in line for line in said)
    with pytest.raises(UserError, match="test cases"):
        finetune(
            "brats",
            brats,
            tmp_path / "run",
            init,
            bare,
            {**tiny["brats", "finetune"], "fold": 1},
            report=quiet,
        )
    if how != "chain":
        assert finetune(
            "brats", brats, tmp_path / "run", init, bare, tiny["brats", "finetune"], report=quiet
        ).finished


def test_choosing_the_best_without_validation_cases_is_refused(btcv, tiny, bare, tmp_path):
    overrides = {**tiny["btcv", "finetune"], "select": "best", "train_on_val": True}
    with pytest.raises(UserError, match="select=best"):
        finetune("btcv", btcv, tmp_path / "run", preset=bare, overrides=overrides, report=quiet)


def test_wrong_weights_are_an_error_before_any_folder_is_made(brats, tiny, bare, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    narrow = pretrain(
        "brats",
        brats,
        tmp_path / "narrow",
        bare,
        {**tiny["brats", "pretrain"], "embed_dim": 16, "steps": 1},
        report=quiet,
    )
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for init, words in ((tmp_path / "nowhere", "no weights"), (unfinished, "no finished weights"),
                        (tmp_path / "half.safetensors", "half.safetensors"),
                        (narrow.path, "does not fit")):  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            finetune("brats", brats, tmp_path / "run", init, bare, tiny["brats", "finetune"], report=quiet)
        assert str(init) in str(error.value)
        assert not (tmp_path / "run").exists()


def test_a_run_remembers_everything_needed_to_repeat_it(brats, tiny, bare, tmp_path):
    run = pretrain("brats", brats, tmp_path / "run", bare, tiny["brats", "pretrain"], report=quiet)
    config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert config["stage"] == "pretrain" and config["data"] == str(brats) and config["precision"] == "fp32"
    assert config["settings"]["base_lr"] == 0.1 and config["settings"]["mask_ratio"] == 0.75
    assert {"torch", "monai", "timm"} <= set(config["provenance"]["packages"])
    again = pretrain(
        config["task"], config["data"], tmp_path / "again", bare, config["settings"], report=quiet
    )
    assert_same_run(run, again)


def test_a_batch_larger_than_the_data_is_refused_before_any_folder_is_made(brats, tiny, bare, tmp_path):
    with pytest.raises(UserError, match="batch_size 20 is larger than the"):
        pretrain(
            "brats",
            brats,
            tmp_path / "run",
            bare,
            {**tiny["brats", "pretrain"], "batch_size": 20},
            report=quiet,
        )
    assert not (tmp_path / "run").exists()


def test_the_strongest_random_augmentation_of_timm_does_not_stop_a_training():
    """At a magnitude of 10 and more timm's posterize asks for 0 bits, which Pillow refuses."""
    augment = timm_library.rand_augment_transform(
        "rand-m10-n8-inc1", {"translate_const": 5, "img_mean": (128,)}
    )
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    random.seed(0)
    drawn = [np.asarray(augment(picture)) for _ in range(60)]
    assert all(image.shape == (16, 16) for image in drawn) and len({image.tobytes() for image in drawn}) > 30
