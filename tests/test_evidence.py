"""The evidence study: its statistic, its controls, and that the one command runs through, resumes and changes nothing when run again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from smae_utils.build import build_model
from smae_utils.cli import main
from smae_utils.data import derive_seed
from smae_utils.evidence import study, tables
from smae_utils.evidence.study import MAIN, Unit
from smae_utils.patches import patchify, shuffle_patches
from smae_utils.settings import FinetuneSettings, make_settings, resolve
from smae_utils.tasks import get_task
from smae_utils.training import finetune
from smae_utils.weights import save_weights


def test_intervals_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.1, 5), rng.normal(0.7, 0.1, 5)
    rows = [("btcv", arm, seed, "dsc", v) for arm, values in (("scratch", a), ("self", b)) for seed, v in enumerate(values)]
    made = tables.intervals(pd.DataFrame(rows, columns=["task", "arm", "seed", "metric", "value"])).iloc[0]
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (made.low, made.high) == pytest.approx((expected.low, expected.high))
    assert made.difference == pytest.approx((b - a).mean()) and made.seeds == 5


def test_a_seed_without_its_twin_does_not_count():
    rows = [("btcv", "scratch", 1, "dsc", 0.5), ("btcv", "scratch", 2, "dsc", 0.6), ("btcv", "self", 2, "dsc", 0.7), ("btcv", "self", 3, "dsc", 0.1)]
    made = tables.intervals(pd.DataFrame(rows, columns=["task", "arm", "seed", "metric", "value"])).iloc[0]
    assert made.seeds == 1 and made.difference == pytest.approx(0.1) and np.isnan(made.low)


def test_shuffling_moves_patches_and_changes_none():
    image = torch.rand(2, 3, 8, 12)
    shuffled = shuffle_patches(image, (4, 4), [1, 2])
    rows = [sorted(map(tuple, patchify(x, (4, 4))[0].tolist())) for x in (image[:1], shuffled[:1])]
    assert rows[0] == rows[1] and not torch.equal(image, shuffled)
    assert torch.equal(shuffled[1:], shuffle_patches(image[1:], (4, 4), [2]))  # an image's order is its own


def test_a_checkpoint_of_zero_steps_equals_scratch_bit_by_bit(brats, tiny, bare, tmp_path):
    overrides = tiny["brats", "finetune"]
    settings = make_settings(FinetuneSettings, overrides, where="test")
    save_weights(build_model_seeded(settings), tmp_path / "zero.safetensors")
    quiet = [].append
    runs = [
        finetune("brats", brats, tmp_path / name, init, bare, overrides, report=quiet)
        for name, init in (("a", "scratch"), ("b", tmp_path / "zero.safetensors"))
    ]
    one, two = (load_file(r.path / "model.safetensors") for r in runs)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert [line["loss"] for line in runs[0].read_log()] == [line["loss"] for line in runs[1].read_log()]


def build_model_seeded(settings):
    torch.manual_seed(derive_seed(settings.seed, 20))
    return build_model(get_task("brats"), settings)


@pytest.mark.parametrize("encoder", ["frozen", "zeroed"])
def test_a_frozen_encoder_stays_and_a_zeroed_one_says_nothing(encoder, brats, tiny, bare, tmp_path):
    overrides = {**tiny["brats", "finetune"], "encoder": encoder}
    settings = make_settings(FinetuneSettings, overrides, where="test")
    start = build_model_seeded(settings)
    run = finetune("brats", brats, tmp_path / "run", preset=bare, overrides=overrides, report=[].append)
    end = load_file(run.path / "model.safetensors")
    same = [torch.equal(end[k], v) for k, v in start.state_dict().items() if k.startswith("encoder.blocks.") and k.endswith("weight")]
    if encoder == "frozen":
        assert all(same)
    else:
        tokens, taken = start.encoder(torch.rand(1, 4, 16, 16, 16), (0,))
        assert not tokens.any() and not taken[0].any()


def test_permuted_weights_hold_the_same_numbers_elsewhere(tmp_path):
    values = torch.arange(64.0).reshape(8, 8)
    permuted = study._permute(values, np.random.default_rng(0))
    assert permuted.shape == values.shape and not torch.equal(permuted, values)
    assert torch.equal(permuted.flatten().sort().values, values.flatten())


def test_equal_compute_counts_pretraining_as_fine_tuning_steps():
    for task in study.TASKS:
        steps = resolve(get_task(task), "finetune", study.PRESET).steps
        assert 1.5 * steps < study.equal_compute_steps(task) < 6 * steps


def test_arms_of_the_main_comparison_differ_in_their_start_and_tuning_only(tmp_path):
    unit = Unit(tmp_path, "btcv", 101)
    tuned = {"scratch": (1.0, 1.0), "self": (2.0, 0.75), "cnn": (1.0, 1.0)}
    scratch, own = (unit.arm_settings(arm, tuned) for arm in MAIN[:2])
    assert {k for k in scratch if scratch[k] != own[k]} == {"base_lr", "layer_decay"}
    assert own["base_lr"] == 2 * scratch["base_lr"]


@pytest.mark.parametrize("task", ["cxr14", "brats"])
def test_the_whole_study_runs_and_is_not_done_twice(task, tmp_path, capsys):
    words = ["evidence", "--task", task, "--out", tmp_path / "out", "--results", tmp_path / "res", "--seeds", 101, 102, "--quick", 40]
    words = [str(w) for w in [*words, "--part", "tune", "gates", "main", "controls"]]
    assert main(words) == 0, capsys.readouterr().err
    table = tables.read(tmp_path / "res" / "main.csv")
    assert set(table.arm) == {"scratch", "self", "scratch_equal_compute", "cnn"} and set(table.seed) == {101, 102}
    assert set(tables.read(tmp_path / "res" / "controls.csv").arm) == {"shuffled_patches", "permuted_weights", "probe_random", "probe_pretrained"}
    assert {"0", "b", "c"} == set(tables.read(tmp_path / "res" / "gates.csv").gate.astype(str))
    head = (tmp_path / "res" / "main.csv").read_text().splitlines()[:2]
    assert "python -m smae_utils evidence" in head[0] and "mean nothing" in head[0] and "commit" in head[1]
    assert (tmp_path / "res" / "main.png").stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    assert main(words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    assert tables.read(tmp_path / "res" / "main.csv").equals(table)


def test_unknown_words_are_refused(tmp_path, capsys):
    assert main(["evidence", "--task", "btvc", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert main(["evidence", "--part", "mian", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert main(["evidence", "--data", "x", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err.count("\n") == 3 and not (tmp_path / "r").exists()
