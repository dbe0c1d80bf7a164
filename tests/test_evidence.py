"""The study on real scans: its splits, its statistic, its controls, and that the one command runs through,
goes on and changes nothing when run again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from sklearn.metrics import roc_auc_score

from smae_utils.data.batches import derive_seed
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.save import save_weights
from smae_utils.work.build import build_model, build_optimizer
from smae_utils.work.finetune import finetune
from smae_utils.work.settings import FinetuneSettings, make_settings
from tools.__main__ import main
from tools.study import tables
from tools.study.cases import all_cases, draw_labelled, parts
from tools.study.plan import read_study
from tools.study.run import Job, spread
from tools.study.unit import Place, Unit

STUDY = """
title: dots
task: {table: labels.csv, image: Image Index, folder: images, patient: Patient ID, classes: [bright, odd]}
metric: mauc
seeds: [101, 102]
dev_seed: 77
folds: 3
labelled: ["50%", "100%"]
tune_row: "50%"
crops: 4
all: {crop_size: [16, 16], patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2, precision: fp32}
pretrain: {steps: 30, warmup_steps: 2, lr: 1.0e-3,
  decoder_embed_dim: 16, decoder_depth: 1, decoder_num_heads: 2}
finetune: {steps: 20, warmup_steps: 2, pool: mean, drop_path: 0.0}
pretrainings: {self: {images: labelled}, self_all: {images: all}}
arms:
  scratch: {}
  self: {init: self, tuned_as: self_all}
  self_all: {init: self_all}
  scratch_equal_compute: {tuned_as: scratch, equal_compute: self_all, rows: ["50%"]}
  scratch_scaled: {init: scaled, like: self_all, tuned_as: self_all, rows: ["50%"]}
grids:
  scratch: [{lr: 1.0e-3}, {lr: 1.0e-2}]
  self_all: [{lr: 1.0e-3, encoder_lr: 1.0}, {lr: 1.0e-2, encoder_lr: 0.1}]
design_rows: ["50%"]
designs: {chosen: {}, deeper: {depth: 3}}
recipe_rows: ["50%"]
recipes: {base: {pretrain: {steps: 10}}, learned: {pretrain: {steps: 10, positions: learned}}}
"""


@pytest.fixture(scope="module")
def dots(tmp_path_factory) -> tuple[Path, Path]:
    """(study file, data folder): 36 images of 18 patients."""
    folder = tmp_path_factory.mktemp("dots")
    (folder / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(36):
        bright = number % 4 < 2
        image = rng.integers(0, 120, (16, 16)) + 100 * bright
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{number:03d}.png")
        rows.append(
            {
                "Image Index": f"{number:03d}.png",
                "Patient ID": f"{number // 2:04d}",
                "bright": int(bright),
                "odd": number % 2,
            }
        )
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    (folder / "study.yaml").write_text(STUDY)
    return folder / "study.yaml", folder


def smae(study: Path, data: Path, tmp_path: Path, *words: str) -> int:
    return main(
        [
            "study",
            str(study),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "out"),
            "--results",
            str(tmp_path / "res"),
            *words,
        ]
    )


@pytest.mark.parametrize("name", ["hippocampus", "cxr14_64px"])
def test_the_shipped_studies_are_whole_and_compare_alike(name):
    study = read_study(name)
    assert {"scratch", "self", "self_all", "scratch_equal_compute", "cnn", "scratch_scaled", "frozen"} <= set(
        study.arms
    )
    assert len({len(grid) for grid in study.grids.values()}) == 1 and study.dev_seed not in study.seeds
    assert len(study.units()) >= 5 and study.tune_row in (2, "25%")
    assert read_study(name).grids["scratch"] == study.grids["self_all"]


def test_no_case_is_tested_that_was_trained_or_chosen_on(dots):
    study = read_study(str(dots[0]))
    pool, test, _ = all_cases(study, str(dots[1]))
    dev_train, dev_scored = parts(study, pool, test, study.dev_seed, 0)
    dev = {c["patient"] for c in dev_scored}
    assert dev and not dev & {c["patient"] for c in dev_train}
    tested = []
    for fold in range(study.folds):
        training, scored = parts(study, pool, test, 101, fold)
        assert not {c["patient"] for c in training} & {c["patient"] for c in scored}
        assert dev <= {c["patient"] for c in training} and len(training) + len(scored) == len(pool)
        tested += [c["case"] for c in scored]
    assert sorted(tested) == sorted(c["case"] for c in pool if c["patient"] not in dev)  # each once


def test_fewer_labelled_cases_are_a_part_of_more_and_keep_patients_together(dots):
    pool, _, _ = all_cases(read_study(str(dots[0])), str(dots[1]))
    drawn = [{c["case"] for c in draw_labelled(pool, row, 5)} for row in ("20%", "50%", "100%")]
    assert drawn[0] < drawn[1] < drawn[2] and len(drawn[2]) == len(pool)
    assert len({c["patient"] for c in draw_labelled(pool, "50%", 5)}) * 2 == len(drawn[1])
    numbers = [[c["case"] for c in draw_labelled(pool, n, 5)] for n in (1, 3, 9)]
    assert [len(n) for n in numbers] == [1, 3, 9] and set(numbers[0]) < set(numbers[1]) < set(numbers[2])
    with pytest.raises(UserError, match="there are 36"):
        draw_labelled(pool, 99, 5)


def test_pre_training_gets_images_without_labels(dots, tmp_path):
    unit = Unit(read_study(str(dots[0])), Place(str(dots[1]), tmp_path), 101)
    content = json.loads(Path(unit.list_of(None)).read_text())
    assert len(content["training"]) == len(unit.training) and not any(
        "label" in entry for entry in content["training"]
    )
    few = json.loads(Path(unit.list_of("50%")).read_text())
    assert 0 < len(few["training"]) < len(unit.training) and all(
        "label" in entry for entry in few["training"]
    )


def test_the_rate_that_a_grid_says_is_the_rate_of_training(dots, tmp_path):
    unit = Unit(read_study(str(dots[0])), Place(str(dots[1]), tmp_path), 101)
    values = unit.values("finetune", "50%", {"lr": 0.01})
    settings = make_settings(FinetuneSettings, values, "test")
    assert (
        build_optimizer(torch.nn.Linear(1, 1), settings).param_groups[0]["lr"] == pytest.approx(0.01)
        and settings.batch_size * settings.crops_per_scan == 4
    )


def test_intervals_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.1, 5), rng.normal(0.7, 0.1, 5)
    rows = [
        ("2", arm, seed, 0, "dsc", v)
        for arm, values in (("scratch", a), ("self", b))
        for seed, v in enumerate(values)
    ]
    rows.append(("2", "self", 9, 0, "dsc", 5.0))  # without its twin
    made = tables.intervals(
        pd.DataFrame(rows, columns=["labelled", "arm", "seed", "fold", "metric", "value"])
    ).iloc[0]
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (made.low, made.high) == pytest.approx((expected.low, expected.high))
    assert made.difference == pytest.approx((b - a).mean()) and made.units == 5
    assert made.above == (b > a).sum()


def test_patients_are_resampled_as_rows_repeated_would_be():
    rng = np.random.default_rng(1)
    score, target, weights = rng.integers(0, 6, 40) / 5, rng.integers(0, 2, 40), rng.integers(0, 4, (3, 40))
    for got, row in zip(tables._weighted_auc(score, target, weights), weights):
        assert got == pytest.approx(roc_auc_score(np.repeat(target, row), np.repeat(score, row)))


def test_an_arm_that_ranks_every_patient_right_gains_with_certainty_and_a_twin_gains_nothing():
    rng = np.random.default_rng(2)
    rows = []
    for seed in (1, 2):
        for number in range(60):
            target = number % 2
            noise = rng.random()
            base = {
                "labelled": "10%",
                "seed": seed,
                "fold": 0,
                "patient": f"p{number // 2}",
                "case": f"c{number}",
                "class": "x",
                "target": target,
            }
            rows += [
                {**base, "arm": arm, "score": score}
                for arm, score in (("scratch", noise), ("self", target + noise / 2), ("twin", noise))
            ]
    cases = pd.DataFrame(rows)
    middle, low, high = tables.patient_interval(cases, "10%", "self", draws=200)
    assert 0.2 < low <= middle <= high
    assert tables.patient_interval(cases, "10%", "twin", draws=200) == (0, 0, 0)


def test_scaled_weights_have_the_learned_spread_and_scratch_s_positions(dots, tmp_path):
    study = read_study(str(dots[0]))
    unit = Unit(study, Place(str(dots[1]), tmp_path), 101)
    settings = make_settings(FinetuneSettings, unit.values("finetune", "50%", {"lr": 1e-3}), "test")
    made = load_file(unit.scaled("self_all", "50%", settings))
    learned = load_file(unit.pretrained("self_all", "50%") / "model.safetensors")
    torch.manual_seed(derive_seed(101, 20))
    fresh = build_model(get_task(unit.list_of("50%")), settings).state_dict()
    assert torch.equal(made["encoder.pos_embed"], fresh["encoder.pos_embed"])
    key = "encoder.blocks.0.mlp.fc1.weight"
    assert float(made[key].std()) == pytest.approx(float(learned[key].std()), rel=1e-3) and float(
        made[key].mean()
    ) == pytest.approx(float(learned[key].mean()), abs=1e-6)
    vectors = [weights[key].flatten().numpy() for weights in (made, fresh, learned)]
    correlation = np.corrcoef(vectors)
    # Only size and spread are the learned ones.
    assert correlation[0, 1] > 0.999 and correlation[0, 2] == pytest.approx(correlation[1, 2], abs=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_zero_steps_equals_scratch_bit_by_bit(brats, tiny, bare, tmp_path):
    overrides = tiny["brats", "finetune"]
    settings = make_settings(FinetuneSettings, overrides, where="test")
    torch.manual_seed(derive_seed(settings.seed, 20))
    save_weights(build_model(get_task("brats"), settings), tmp_path / "zero.safetensors")
    losses = []
    for name, init in (("scratch", "scratch"), ("zero", tmp_path / "zero.safetensors")):
        run = finetune("brats", brats, tmp_path / name, init, bare, overrides, report=[].append)
        losses.append(
            [line["loss"] for line in map(json.loads, (run.path / "log.jsonl").read_text().splitlines())]
        )
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_one_command_runs_goes_on_and_changes_nothing_when_run_again(dots, tmp_path, capsys):
    study, data = dots
    assert smae(study, data, tmp_path, "--quick", "10") == 2
    assert "run --part tune first" in capsys.readouterr().err
    few = ["--quick", "10", "--seeds", "101"]
    assert (
        smae(study, data, tmp_path, *few, "--part", "room", "recipe", "tune", "main", "--labelled", "50%")
        == 0
    )
    folder = tmp_path / "res" / "study"
    first = {file.name: pd.read_csv(file, comment="#") for file in folder.glob("*.csv")}
    assert {
        "room.csv",
        "recipe.csv",
        "tune.csv",
        "main.csv",
        "cases.csv",
        "patients.csv",
        "intervals.csv",
    } == set(first) and (folder / "main.png").is_file()
    assert set(first["room.csv"].design) == {"chosen", "deeper"} and set(first["recipe.csv"].recipe) == {
        "base",
        "learned",
    }
    assert len(first["tune.csv"]) == 4 and set(first["main.csv"].fold) == {0, 1, 2}
    arms = ["scratch", "scratch_equal_compute", "scratch_scaled", "self", "self_all"]
    assert sorted(first["main.csv"].arm.unique()) == arms and first["main.csv"].value.between(0, 1).all()
    # Figures are those of the predictions that are kept.
    cases, row = first["cases.csv"], first["main.csv"].iloc[0]
    kept = cases[(cases.arm == row.arm) & (cases.fold == row.fold)]
    assert row.value == pytest.approx(
        np.mean([roc_auc_score(p.target, p.score) for _, p in kept.groupby("class")]), abs=1e-4
    )
    head = (folder / "main.csv").read_text().splitlines()[:2]
    assert "tools study" in head[0] and "mean nothing" in head[0] and "commit" in head[1] and "UTC" in head[1]
    capsys.readouterr()
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix == ".csv"}
    assert smae(study, data, tmp_path, *few, "--labelled", "50%") == 0
    assert capsys.readouterr().out == "" and all(
        file.read_bytes() == content for file, content in before.items()
    )
    more = ["--quick", "10", "--seeds", "102", "--labelled", "50%", "--arm", "scratch", "--jobs", "2"]
    assert smae(study, data, tmp_path, *more) == 0  # rows are added, by runs of a batch
    assert len(list((tmp_path / "out" / "study" / "batch-main").glob("102-*/result.json"))) == 3
    assert len(pd.read_csv(folder / "main.csv", comment="#")) == len(first["main.csv"]) + 3
    assert smae(study, data, tmp_path, "--seeds", "101", "--labelled", "100%", "--arm", "scratch") == 2
    assert "quick run" in capsys.readouterr().err


def test_a_run_that_spends_the_compute_of_pre_training_takes_more_steps(dots, tmp_path):
    study = read_study(str(dots[0]))
    unit = Unit(study, Place(str(dots[1]), tmp_path), 101)
    tuned = {"lr": 1e-3}
    plain, longer = (
        unit.arm_values(study.arms[name], "50%", tuned)["steps"]
        for name in ("scratch", "scratch_equal_compute")
    )
    assert plain == 20 and longer == round(20 * (1 + unit.relative_cost("self_all", "50%", tuned))) > 20


def test_a_unit_makes_its_pre_training_first_beside_what_needs_none():
    study = read_study("hippocampus")
    jobs = [Job({}, {"arm": arm, "seed": 1}) for arm in study.arms for _ in range(2)]
    order = [job.call["arm"] for job in spread(study, jobs)]
    assert order[:2] == ["self", "self_all"] or order[0] == "self"
    assert order.index("scratch") > order.index("self_all") and order.index("cnn") < len(order) - 1 - order[
        ::-1
    ].index("self_all")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{lr: 1.0e-2}]", "{lr: 1.0e-2}, {lr: 1.0e-1}]", "of one size"),
        ("tuned_as: scratch,", "", "no grid"),
        ("self_all: {init: self_all}", "self_all: {init: selfall}", "selfall"),
        ("folds: 3", "foldz: 3", "foldz"),
        ("  scratch: {}\n", "", "no arm scratch"),
        ("equal_compute: self_all", "equal_compute: all", "no pre-training"),
        ("title: dots", "title: [dots", "no study"),
    ],
)
def test_a_study_file_that_cannot_be_understood_is_one_line(dots, tmp_path, capsys, old, new, words):
    text = (dots[0]).read_text()
    assert old in text
    (tmp_path / "bad.yaml").write_text(text.replace(old, new))
    assert smae(tmp_path / "bad.yaml", dots[1], tmp_path) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and len(said.splitlines()) == 1 and not (tmp_path / "res").exists()


def test_wrong_words_and_wrong_data_are_one_line(dots, tmp_path, capsys):
    study, data = dots
    for words in (["--part", "mian"], ["--arm", "slef"], ["--labelled", "7"], ["--jobs", "0"]):
        assert (
            smae(study, data, tmp_path, *words) == 2
            and len(capsys.readouterr().err.strip().splitlines()) == 1
        )
    assert smae(Path("hippocampos"), data, tmp_path) == 2 and "hippocampus" in capsys.readouterr().err
    assert smae(study, tmp_path, tmp_path) == 2 and "labels.csv" in capsys.readouterr().err
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    assert smae(study, tmp_path, tmp_path) == 2 and "no column" in capsys.readouterr().err


def test_rows_of_another_set_up_are_not_taken_for_this_one_s(dots, tmp_path, capsys):
    study, data = dots
    few = ["--quick", "10", "--seeds", "101", "--labelled", "50%", "--arm", "scratch"]
    assert smae(study, data, tmp_path, *few, "--part", "tune", "main") == 0
    (tmp_path / "study.yaml").write_text(study.read_text().replace("steps: 20", "steps: 40"))
    capsys.readouterr()
    assert smae(tmp_path / "study.yaml", data, tmp_path, *few) == 2
    assert "run --part tune first" in capsys.readouterr().err
    assert (
        smae(study, data, tmp_path, "--quick", "10", "--seeds", "77") == 2
        and "development seed" in capsys.readouterr().err
    )


def test_a_list_that_is_there_and_says_something_else_is_refused(dots, tmp_path):
    study = read_study(str(dots[0]))
    Unit(study, Place(str(dots[1]), tmp_path), 101).list_of("50%")
    other = Unit(dataclasses.replace(study, split_seed=1), Place(str(dots[1]), tmp_path), 101)
    with pytest.raises(UserError, match="choose another --out"):
        other.list_of("50%")


def test_arms_that_share_no_unit_yet_give_no_interval():
    rows = [("10%", "scratch", 1, 0, "mauc", 0.5), ("10%", "self", 1, 1, "mauc", 0.6)]
    assert tables.intervals(
        pd.DataFrame(rows, columns=["labelled", "arm", "seed", "fold", "metric", "value"])
    ).empty
    base = {
        "labelled": "10%",
        "seed": 1,
        "patient": "p",
        "case": "c",
        "class": "x",
        "target": 1,
        "score": 0.5,
    }
    cases = pd.DataFrame([{**base, "arm": "scratch", "fold": 0}, {**base, "arm": "self", "fold": 1}])
    assert np.isnan(tables.patient_interval(cases, "10%", "self")).all()
