"""The evidence study: its statistic, its controls, and that the one command runs through, resumes and changes nothing when run again."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from smae_utils.build import build_model
from smae_utils.cli import main
from smae_utils.data import derive_seed
from smae_utils.errors import UserError
from smae_utils.evidence import arms, run, study, tables
from smae_utils.evidence.arms import MAIN, Condition
from smae_utils.evidence.study import Setup, Unit
from smae_utils.patches import patchify, shuffle_patches
from smae_utils.phantoms import MODULES, patient_latents
from smae_utils.runs import Run
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


def test_equal_compute_counts_pretraining_as_fine_tuning_steps(tmp_path):
    for task in arms.TASKS:
        unit = Unit(Setup(tmp_path), task, 101)
        assert 1.5 * unit.steps("finetune") < unit.finetune_steps(1, 1) < 6 * unit.steps("finetune")


def test_arms_of_the_main_comparison_differ_in_their_start_and_tuning_only(tmp_path):
    unit = Unit(Setup(tmp_path), "btcv", 101)
    tuned = {"scratch": (1.0, 1.0), "self": (2.0, 0.75), "cnn": (1.0, 1.0)}
    scratch, own = (unit.arm_settings(arm, tuned) for arm in MAIN[:2])
    assert {k for k in scratch if scratch[k] != own[k]} == {"base_lr", "layer_decay"}
    assert own["base_lr"] == 2 * scratch["base_lr"]


@pytest.mark.parametrize("task", ["cxr14", "brats"])
def test_the_whole_study_runs_and_is_not_done_twice(task, tmp_path, capsys):
    words = ["evidence", "--task", task, "--out", tmp_path / "out", "--results", tmp_path / "res", "--seeds", 101, 102, "--quick", 40]
    words = [
        str(w)
        for w in [*words, "--part", "tune", "gates", "main", "controls", *({"brats": ["scans"], "cxr14": ["longer", "context", "finetune4x"]}[task])]
    ]
    assert main(words) == 0, capsys.readouterr().err
    table = tables.read(tmp_path / "res" / "main.csv")
    assert set(table.arm) == {"scratch", "self", "scratch_equal_compute", "cnn"} and set(table.seed) == {101, 102}
    controls = {"shuffled_patches", "permuted_weights", "shuffled_labels", "probe_random", "probe_pretrained"}
    assert set(tables.read(tmp_path / "res" / "controls.csv").arm) == controls
    twins, swept = {"scratch", "self"}, tables.read(tmp_path / "res" / "sweeps.csv").groupby("condition").arm.agg(set).to_dict()
    few = dict.fromkeys(("6scans", "12scans"), twins | {"self_all_images"})
    others = {
        "": {"steps_x0.25", "steps_x4", "raw_pixels_x4"},
        "context0.0": twins,
        "context0.5": twins,
        "finetune4x": twins | {"steps_x4", "raw_pixels_x4", "scratch_equal_compute"},
    }
    assert swept == {"brats": few, "cxr14": others}[task]
    assert {"0", "b", "c"} == set(tables.read(tmp_path / "res" / "gates.csv").gate.astype(str))
    made = Run.open(tmp_path / f"out/quick40/{task}/seed101/scratch").config["provenance"]
    head = (tmp_path / "res" / "main.csv").read_text().splitlines()[:2]
    assert datetime.fromisoformat(made["date"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M") in head[1] and made["commit"] in head[1]
    assert "python -m smae_utils evidence" in head[0] and "mean nothing" in head[0] and "commit" in head[1]
    assert (tmp_path / "res" / "main.png").stat().st_size > 5000
    assert (tmp_path / "res" / "longer.png").is_file() == (task == "cxr14")
    if task == "cxr14":  # the same pre-training, four times the steps of both
        names = ("self", "finetune4x/self", "finetune4x/scratch", "finetune4x/scratch_equal_compute")
        runs = {name: Run.open(tmp_path / "out/quick40/cxr14/seed101" / name).config for name in names}
        steps = {name: run["settings"]["steps"] for name, run in runs.items()}
        # A quick run divides 350, 1400 and 1400 + 4 * 587 by 40.
        assert list(steps.values()) == [8, 35, 35, 93]
        assert runs["finetune4x/self"]["init"] == runs["self"]["init"] and runs["finetune4x/self"]["cases"] == runs["self"]["cases"]
    assert sum(line.startswith("#") for line in (tmp_path / "res" / "main.csv").read_text().splitlines()) == 2  # one command, each seed's rows
    folder = tmp_path / f"out/quick40/{task}/seed101"
    learned, permuted = load_file(folder / "pretrain-self/model.safetensors"), load_file(folder / "permuted.safetensors")
    moved = {name for name, value in permuted.items() if not torch.equal(value, learned[name])}
    assert all(torch.equal(value.flatten().sort().values, learned[name].flatten().sort().values) for name, value in permuted.items())
    assert "encoder.pos_embed" in set(permuted) - moved and "encoder.blocks.0.mlp.fc1.weight" in moved  # scratch has the position table too
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    some = [*words[: words.index("--part")], "--results", str(tmp_path / "few"), "--part", "main", "--arm", "self"]
    shutil.copytree(tmp_path / "res", tmp_path / "few", ignore=shutil.ignore_patterns("main*"))
    assert main(some) == 0 and set(tables.read(tmp_path / "few" / "main.csv").arm) == {"self"}
    assert main(words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    assert tables.read(tmp_path / "res" / "main.csv").equals(table)


def test_a_result_file_names_every_command_its_rows_came_from(tmp_path):
    rows = pd.DataFrame({"task": ["btcv"], "arm": ["self"], "seed": [1], "metric": ["dsc"], "value": [0.5]})
    for seed, command in ((1, "--seeds 1"), (2, "--seeds 2"), (1, "--seeds 1")):
        tables.Writer(tmp_path, command).part("main")(rows.assign(seed=seed))
    lines = (tmp_path / "main.csv").read_text().splitlines()
    assert [line.split("evidence ")[1] for line in lines[:4:2]] == ["--seeds 2", "--seeds 1"] and all("commit" in line for line in lines[1:4:2])
    assert len(tables.read(tmp_path / "main.csv")) == 2


def test_shuffled_labels_are_other_patients_on_the_own_grid(tmp_path):
    folder = study.phantom_folder(tmp_path, "btcv", 6, 1)
    entries = [
        {"case": p.name[3:7], "image": str(p), "label": str(p).replace("img", "label")} for p in sorted((folder / "RawData/Training/img").glob("*"))
    ]
    shuffled = study.shuffled_labels(entries, 5, tmp_path / "labels")
    assert [e["image"] for e in shuffled] == [e["image"] for e in entries]
    places = []
    for entry in entries + shuffled:
        image, label = nib.load(entry["image"]), nib.load(entry["label"])
        assert label.shape == image.shape and np.allclose(label.affine, image.affine)
        values = np.asarray(nib.as_closest_canonical(label).dataobj)
        places.append([np.argwhere(values == organ).mean(0) / values.shape for organ in (2, 6, 8)])  # kidney, liver, aorta
    own, other = np.array(places[:6]), np.array(places[6:])
    far = np.abs(own[None] - other[:, None]).max((2, 3))  # (shuffled, patient)
    nearest = far.argmin(1)
    assert far.min(1).max() < 0.03 and sorted(nearest) == list(range(6)) and (nearest != np.arange(6)).all()
    vectors = [{"case": str(i), "label": [i]} for i in range(5)]
    assert sorted(e["label"][0] for e in study.shuffled_labels(vectors, 5, tmp_path)) == list(range(5))
    assert all(e["label"] != [i] for i, e in enumerate(study.shuffled_labels(vectors, 5, tmp_path)))


def test_conditions_draw_their_own_data_and_share_the_test_scans(tmp_path):
    plain = Unit(Setup(tmp_path, quick=2), "btcv", 101)
    few, none = plain.under(Condition("6scans", n_train=6)), plain.under(Condition("context0", context=0))
    lists = [json.loads(Path(u.list_file()).read_text()) for u in (plain, few, none)]
    assert lists[0]["test"] == lists[1]["test"] != lists[2]["test"]
    assert [len(part["training"]) for part in lists] == [9, 6, 9]
    assert few.steps("pretrain") == plain.steps("pretrain")  # fewer scans, not less training
    assert [len({e["image"] for e in part["training"]} & {e["image"] for e in lists[0]["test"]}) for part in lists] == [0, 0, 0]
    with pytest.raises(UserError, match="no meaning with --data"):
        Unit(Setup(tmp_path, data="x"), "btcv", 101, Condition("c", context=0))


def test_patient_latents_are_what_the_phantoms_are_drawn_from():
    for task, module in MODULES.items():
        values = patient_latents(task, 3, 7)
        assert values.shape == (12,) and np.abs(values).max() <= 1 and not np.array_equal(values, patient_latents(task, 3, 8)), module
    # The same patient's size can be seen: the body of a large one covers more.
    from smae_utils.phantoms import ct

    sizes = {case: patient_latents("btcv", 3, case)[0] for case in range(1, 9)}
    cover = {case: (ct.make_case(3, case).image_hu > -500).sum() * np.prod(ct.make_case(3, case).spacing_mm) for case in sizes}
    assert stats.spearmanr(list(sizes.values()), list(cover.values()))[0] > 0.6


def test_sweeps_hold_the_arms_of_the_protocol():
    made = {part: [(a.condition.name, a.name) for a in arms.sweep(part, "btcv")] for part in ("masking", "longer", "context", "scans", "finetune4x")}
    assert made["longer"] == [("", "steps_x0.25"), ("", "steps_x4"), ("", "raw_pixels_x4"), ("", "samples_x16")] and len(made["masking"]) == 5
    assert [a.name for a in arms.sweep("longer", "cxr14")] == ["steps_x0.25", "steps_x4", "raw_pixels_x4"]  # a radiograph gives one crop a step
    assert made["finetune4x"] == [("finetune4x", a) for a in ("scratch", "self", "steps_x4", "raw_pixels_x4", "scratch_equal_compute")]
    assert made["context"] == [(c, a) for c in ("context0.0", "context0.5") for a in ("scratch", "self")]
    assert [a for a in made["scans"] if a[1] == "self_all_images"] == [("6scans", "self_all_images"), ("12scans", "self_all_images")]


def test_on_real_data_no_arm_wants_phantoms_and_a_part_that_only_has_such_arms_is_refused_at_once(tmp_path, capsys):
    for part in ("main", "controls", *run.SWEEPS):
        assert all(not arm.condition.draws for arm in run.arms_of(part, "btcv", real=True)), part
    assert len(run.arms_of("finetune4x", "btcv", real=True)) == 5 and run.arms_of("context", "btcv", real=True) == ()
    assert {a.name for a in run.arms_of("controls", "btcv", real=True)} == {"shuffled_patches", "permuted_weights"}
    words = ["evidence", "--task", "btcv", "--data", str(tmp_path), "--results", str(tmp_path / "r"), "--part", "main", "context"]
    assert main(words) == 2 and "context draws phantoms" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_on_real_data_rates_are_chosen_on_validation_cases_and_arms_scored_on_test_cases(cxr14, tmp_path, capsys):
    words = ["evidence", "--task", "cxr14", "--data", cxr14, "--out", tmp_path / "out", "--results", tmp_path / "res", "--seeds", 101, "--quick", 40]
    assert main([str(w) for w in [*words, "--part", "tune", "gates", "main", "--arm", "scratch", "self"]]) == 0, capsys.readouterr().err
    table = tables.read(tmp_path / "res/real-cxr14/main.csv")
    assert set(table.arm) == {"scratch", "self"} and set(table.seed) == {101}
    splits = {seed: set() for seed in (77, 101)}
    for file in (tmp_path / "out/real-cxr14/quick40/cxr14").rglob("metrics*.json"):
        seed = int(file.parents[1].name.removeprefix("seed"))
        splits[seed].add(json.loads(file.read_text())["split"])
    assert splits == {77: {"val"}, 101: {"test"}}
    chosen = Run.open(tmp_path / "out/real-cxr14/quick40/cxr14/seed77/pretrain-self").config["cases"]
    assert chosen["val"] and not set(chosen["train"]) & set(chosen["val"])
    # A copy of the data is the same data; the same command on other data is told that these runs are of the first.
    other = shutil.copytree(cxr14, tmp_path / "other")
    assert main([str(w) for w in [*words, "--data", other, "--part", "main", "--arm", "scratch"]]) == 0
    trained = Run.open(tmp_path / "out/real-cxr14/quick40/cxr14/seed101/scratch").config["cases"]["train"]
    next(other.rglob(trained[0])).unlink()
    assert main([str(w) for w in [*words, "--data", other, "--part", "main", "--arm", "scratch"]]) == 2
    assert "was started with" in capsys.readouterr().err


def test_another_preset_has_folders_of_its_own_and_its_own_lengths(tmp_path, capsys):
    preset, res = tmp_path / "other.yaml", tmp_path / "res" / "other-demo"
    preset.write_text(Path("tests/tiny.yaml").read_text().replace("steps: 6,", "steps: 20,"))
    res.mkdir(parents=True)
    (res / "tuning.csv").write_text("task,arm,lr_factor,layer_decay,score\n" + "".join(f"btcv,{arm},1,1,.5\n" for arm in ("scratch", "self", "cnn")))
    words = ["evidence", "--task", "btcv", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "res"), "--seeds", "101", "--quick", "10"]
    assert main([*words, "--preset", str(preset), "--part", "main", "longer", "--arm", "scratch", "self", "samples_x16"]) == 0
    assert set(tables.read(res / "main.csv").arm) == {"scratch", "self"} and not (tmp_path / "res/main.csv").exists()
    assert f"--preset {preset}" in (res / "main.csv").read_text()
    runs = [
        Run.open(tmp_path / "out/other-demo/quick10/btcv/seed101" / name).config["settings"] for name in ("pretrain-self", "pretrain-samples_x16")
    ]
    # Four times the steps with four times the crops, divided by the quick run.
    assert [(s["steps"], s["crops_per_scan"], s["embed_dim"]) for s in runs] == [(2, 1, 24), (8, 4, 24)]
    small = Unit(Setup(tmp_path, preset="small", size="full"), "btcv", 101)
    assert small.setup.name == "small-full" and Setup(tmp_path).name == ""
    rates = [small.arm_settings(arm, {"scratch": (1.0, 1.0), "self": (1.0, 0.75)})["base_lr"] for arm in MAIN[:2]]
    assert rates == [resolve(small.record, "finetune", "small", arm).base_lr for arm in ("scratch", "self")] and rates[0] != rates[1]
    capsys.readouterr()
    for wrong in (["--preset", "smal"], ["--size", "ful"]):
        assert main([*words[:3], "--results", str(tmp_path / "r"), "--part", "main", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 2 and not (tmp_path / "r").exists()


def test_unknown_words_are_refused(tmp_path, capsys):
    assert main(["evidence", "--task", "btvc", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert main(["evidence", "--part", "mian", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert main(["evidence", "--data", "x", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert main(["evidence", "--part", "main", "--arm", "slef", "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    for wrong in (["--jobs", "0"], ["--quick", "-1"]):
        assert main(["evidence", "--part", "main", *wrong, "--out", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err.count("\n") == 6 and not (tmp_path / "r").exists()
