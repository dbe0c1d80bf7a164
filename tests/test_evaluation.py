"""Evaluation: on each scan's own grid, by independent arithmetic, with nothing left out in silence."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.inferers import sliding_window_inference
from scipy.spatial import cKDTree
from sklearn.metrics import f1_score, roc_auc_score

from smae_utils.data import out_of_core
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.work.build import build_splits, build_transform
from smae_utils.work.comparison import compare
from smae_utils.work.evaluation import evaluate, summarise
from smae_utils.work.finetune import finetune
from smae_utils.work.grids import region_labels
from smae_utils.work.metrics import dsc
from smae_utils.work.predictor import Predictor, Segmented
from smae_utils.work.pretrain import pretrain
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def runs(data, tiny, bare, tmp_path_factory) -> dict:
    """One tiny fine-tuned run a task, evaluated: task -> (run, table)."""
    out = {}
    for task in ("btcv", "brats", "cxr14"):
        folder = tmp_path_factory.mktemp("runs") / task
        run = finetune(
            task,
            data[task],
            folder,
            preset=bare,
            overrides={**tiny[task, "finetune"], "steps": 8},
            report=quiet,
        )
        out[task] = (run, evaluate(folder, report=quiet))
    return out


def nearest_hd95(pred: np.ndarray, label: np.ndarray, spacing) -> float:
    """From each surface voxel to the nearest of the other mask; a surface voxel has a face neighbour
    outside."""

    def surface(mask):
        padded = np.pad(mask, 1)
        inner = padded.copy()
        for axis in range(mask.ndim):
            inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
        return (np.argwhere(padded & ~inner) - 1) * np.asarray(spacing)

    a, b = surface(pred), surface(label)
    return max(np.percentile(cKDTree(there).query(here)[0], 95) for here, there in ((a, b), (b, a)))


def blocks(predictor, image, *_) -> torch.Tensor:
    """Probabilities in blocks of 4 voxels, drawn anew for each scan of another size: masks with something of
    every class everywhere.
    """
    rng, task = np.random.default_rng(image.shape[1]), predictor.task
    coarse = torch.from_numpy(
        rng.random((task.out_chans, *(-(-n // 4) for n in image.shape[1:]))).astype(np.float32)
    )
    for axis in (1, 2, 3):
        coarse = coarse.repeat_interleave(4, axis)
    return coarse[(slice(None), *(slice(n) for n in image.shape[1:]))]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["btcv", "brats"])
def test_written_masks_lie_on_the_scans_own_grid_and_give_the_reported_figures(task, runs, data, monkeypatch):
    # A tiny network may find nothing at all, and then there would be nothing to compare.
    run = runs[task][0]
    monkeypatch.setattr(Predictor, "probabilities", blocks)
    table = evaluate(run.path, report=quiet)
    record = get_task(task)
    cases = {c["case"]: c for c in build_splits(record, data[task], FinetuneSettings())["test"]}
    assert set(table.case) == set(cases) and len(table) == len(cases) * len(record.classes)
    checked = 0
    for name, case in cases.items():
        ours, truth = nib.load(run.path / "predictions" / f"{name}.nii.gz"), nib.load(case["label"])
        assert ours.shape == truth.shape
        np.testing.assert_allclose(ours.affine, truth.affine)
        assert ours.header.get_xyzt_units() == truth.header.get_xyzt_units()
        spacing = nib.affines.voxel_sizes(truth.affine)
        a, b = np.asarray(ours.dataobj), np.asarray(truth.dataobj)
        for row in table[table.case == name].itertuples():
            index = record.classes.index(row[2])
            values = record.regions[index] if record.regions else (index + 1,)
            pred, label = np.isin(a, values), np.isin(b, values)
            assert (row.predicted, row.labelled) == (pred.any(), label.any())
            if label.any() and pred.any():
                assert row.dsc == pytest.approx(f1_score(label.ravel(), pred.ravel()))
                assert row.hd95_mm == pytest.approx(nearest_hd95(pred, label, spacing), rel=1e-4)
                checked += 1
    assert checked >= len(table) / 2  # a class may be absent in some scans


@pytest.mark.parametrize("task", ["btcv", "brats"])
def test_a_perfect_model_scores_near_one_on_every_scan_whatever_its_orientation(
    task, runs, data, tiny, monkeypatch
):
    """The label itself, resampled and cropped as the image is, goes back through the inversion that
    predictions take.
    """
    record = get_task(task)
    spacing = {"btcv": (5.0, 5.0, 5.0), "brats": (3.0, 3.0, 3.0)}[task]
    settings = replace(FinetuneSettings(), crop_size=(16, 16, 16), spacing_mm=spacing)
    with_label, orientations = build_transform(record, settings, with_label=True), set()
    for case in sum(build_splits(record, data[task], FinetuneSettings()).values(), []):
        label = with_label(dict(case))["label"].as_tensor()[0].numpy()
        masks = [torch.from_numpy(m).float() for m in record.class_masks(label)]
        if record.exclusive:
            masks = [1 - sum(masks), *masks]
        monkeypatch.setattr(Predictor, "probabilities", lambda *_, masks=masks: torch.stack(masks))
        predicted = Predictor.of(torch.nn.Linear(1, 1), record, settings).segment(case).labels
        stored = nib.load(case["label"])
        orientations.add(nib.aff2axcodes(stored.affine))
        scores = [
            dsc(p, t)
            for p, t in zip(record.class_masks(predicted), record.class_masks(np.asarray(stored.dataobj)))
        ]
        assert np.nanmean(scores) > 0.8 and np.nanmin(scores) > 0.55, case["case"]
    assert len(orientations) > 1


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_slabs_of_windows_give_what_one_run_gives(overlap, monkeypatch):
    """Class volumes too large for memory are worked out some planes at a time: the same figures, from MONAI's
    windows over the whole scan.
    """
    torch.manual_seed(0)
    task, settings = get_task("btcv"), replace(FinetuneSettings(), crop_size=(8, 8, 8), overlap=overlap)
    net, image = torch.nn.Conv3d(1, task.out_chans, 3, padding=1), torch.rand(1, 11, 8, 61)
    predictor = Predictor.of(net, task, settings)
    with torch.inference_mode():
        whole = predictor.probabilities(image)
        expected = sliding_window_inference(image[None], (8, 8, 8), 1, net, overlap=overlap, mode="gaussian")[
            0
        ].softmax(0)
        monkeypatch.setattr(out_of_core, "CHANNEL_VOXELS", 11 * 8 * 14 * 20)
        told = []
        parts = predictor.probabilities(image, lambda *n: told.append(n))
    assert torch.allclose(whole, expected, atol=1e-5)
    assert parts.dtype == torch.float16 and torch.allclose(parts.float(), whole, atol=1e-3)
    assert told[-1][0] == told[-1][1] == max(n for n, _ in told)


def test_room_for_a_large_volume_is_zeros_in_a_file_and_a_full_disk_is_told_at_once(monkeypatch):
    assert type(out_of_core.zeros((4, 5))) is np.ndarray
    monkeypatch.setattr(out_of_core, "CHANNEL_VOXELS", 10)
    made = out_of_core.zeros((4, 5), np.float16)
    assert isinstance(made, np.memmap) and made.dtype == np.float16 and not made.any()
    made[2] = 3
    assert made.sum() == 15

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        out_of_core.zeros((4, 5))


def test_a_mask_that_is_not_brought_back_to_the_scans_grid_is_noticed(
    btcv, tiny, bare, tmp_path, monkeypatch
):
    run = finetune(
        "btcv",
        btcv,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["btcv", "finetune"], "steps": 1},
        report=quiet,
    )
    monkeypatch.setattr(
        Predictor, "segment", lambda *_, **__: Segmented(np.zeros((3, 3, 3), np.uint8), np.eye(4), None)
    )
    with pytest.raises(UserError, match="must lie on one grid"):
        evaluate(run.path, report=quiet)


def test_the_classifiers_table_gives_scikit_learns_auc_and_leaves_out_classes_that_cannot_be_scored(
    runs, data
):
    run, table = runs["cxr14"]
    said = json.loads((run.path / "metrics.json").read_text())
    expected = {}
    for name, rows in table.groupby("class"):
        if 0 < rows.target.sum() < len(rows):
            expected[name] = roc_auc_score(rows.target, rows.score)
    assert len(expected) > 5
    assert said["mean"]["mauc"] == pytest.approx(np.mean(list(expected.values())))
    for name, values in said["classes"].items():
        assert values["auc"] == (pytest.approx(expected[name]) if name in expected else None)
    assert (
        said["cases"]
        == table.case.nunique()
        == len(build_splits(get_task("cxr14"), data["cxr14"], FinetuneSettings())["test"])
    )


def rows(*entries) -> pd.DataFrame:
    return pd.DataFrame(entries, columns=["case", "class", "dsc", "hd95_mm", "labelled", "predicted"])


def test_summary_counts_missed_structures_and_leaves_out_what_is_absent_in_both():
    task = replace(get_task("btcv"), classes=("spleen", "liver"), subset=())
    nan = float("nan")
    table = rows(
        ("a", "spleen", 0.8, 10.0, True, True), ("b", "spleen", 0.0, 500.0, True, False),
        ("c", "spleen", nan, nan, False, False),
        ("a", "liver", 0.6, 20.0, True, True), ("b", "liver", 0.4, 30.0, True, True),
        ("c", "liver", 0.0, 500.0, False, True),
    )  # fmt: skip
    made = summarise(table, task)
    spleen, liver = made["classes"]["spleen"], made["classes"]["liver"]
    assert spleen == pytest.approx(
        {"dsc": 0.4, "hd95_mm": 255.0, "hd95_mm_detected": 10.0, "miss_rate": 0.5, "n": 2, "n_labelled": 2}
    )
    assert liver == pytest.approx(
        {
            "dsc": 1 / 3,
            "hd95_mm": 550 / 3,
            "hd95_mm_detected": 25.0,
            "miss_rate": 0.0,
            "n": 3,
            "n_labelled": 2,
        }
    )
    assert made["mean"]["dsc"] == pytest.approx((0.4 + 1 / 3) / 2)


def test_a_class_that_no_case_has_is_left_out_of_the_mean():
    task = replace(get_task("btcv"), classes=("spleen", "liver"), subset=())
    nan = float("nan")
    made = summarise(
        rows(("a", "spleen", 0.8, 10.0, True, True), ("a", "liver", nan, nan, False, False)), task
    )
    assert np.isnan(made["classes"]["liver"]["dsc"]) and made["mean"]["dsc"] == 0.8


def test_tumour_regions_become_labels_and_come_back():
    task = get_task("brats")
    label = np.random.default_rng(0).integers(0, 4, (6, 6, 6))
    assert np.array_equal(region_labels(task.class_masks(label), task), label)
    conflicting = [np.array([False, True, True]), np.array([True, False, True]), np.array([True, True, True])]
    # Outside the whole tumour nothing is tumour.
    assert region_labels(conflicting, task).tolist() == [0, 1, 3]


@pytest.mark.slow
def test_compare_subtracts_and_refuses_what_cannot_be_compared(btcv, brats, runs, tiny, bare, tmp_path):
    overrides = {**tiny["brats", "finetune"], "steps": 8}
    scratch = runs["brats"][0]
    other = finetune(
        "brats", brats, tmp_path / "other", preset=bare, overrides={**overrides, "base_lr": 0.2}, report=quiet
    )
    with pytest.raises(UserError, match="evaluate"):
        compare(scratch.path, other.path)
    evaluate(other.path, report=quiet)
    table = compare(scratch.path, other.path).set_index(["class", "metric"])
    a, b = (json.loads((r.path / "metrics.json").read_text()) for r in (scratch, other))
    assert table.loc[("WT", "dsc"), "difference"] == pytest.approx(
        b["classes"]["WT"]["dsc"] - a["classes"]["WT"]["dsc"]
    )
    assert table.loc[("mean", "hd95_mm"), "scratch"] == pytest.approx(a["mean"]["hd95_mm"])
    longer = finetune(
        "brats", brats, tmp_path / "longer", preset=bare, overrides={**overrides, "steps": 9}, report=quiet
    )
    fold = finetune(
        "brats", brats, tmp_path / "fold", preset=bare, overrides={**overrides, "fold": 1}, report=quiet
    )
    for run, word in ((longer, "steps"), (fold, "cases"), (runs["btcv"][0], "task")):
        with pytest.raises(UserError, match=word):
            compare(scratch.path, run.path)


def test_evaluation_of_what_is_no_finished_fine_tuning_run_is_refused(brats, tiny, bare, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        evaluate(tmp_path / "nowhere", report=quiet)
    mae = pretrain("brats", brats, tmp_path / "mae", bare, tiny["brats", "pretrain"], report=quiet)
    with pytest.raises(UserError, match="a finetune run was expected"):
        evaluate(mae.path, report=quiet)
    run = finetune(
        "brats",
        brats,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["brats", "finetune"], "steps": 1},
        report=quiet,
    )
    with pytest.raises(UserError, match="split must be test or val, got 'tset'"):
        evaluate(run.path, split="tset", report=quiet)
    (run.path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not finished"):
        evaluate(Run(run.path).path, report=quiet)
