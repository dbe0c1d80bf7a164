"""One list, four kinds of task: masks or classes of 2D images or 3D scans, from checking to prediction."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from smae_utils.cli import main
from smae_utils.data.tasks import get_task

pytestmark = pytest.mark.slow  # each kind of task is checked, trained twice, evaluated and predicted
AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])
NET = {
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "precision": "fp32",
    "steps": 3,
    "batch_size": 2,
    "log_every": 1,
    "base_lr": 0.1,
}
SETTINGS = {
    "pretrain": {**NET, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2},
    "finetune": {**NET, "feature_size": 2, "overlap": 0.0, "drop_path": 0.0},
}
KINDS = [(2, "segmentation"), (2, "classification"), (3, "segmentation"), (3, "classification")]


def write_list(folder: Path, dims: int, kind: str, n: int = 8) -> Path:
    """A list of `n` images with two structures or two classes; two validate and three test."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (40, 30) if dims == 2 else (18, 20, 16)
    entries = []
    for i in range(n):
        rng = np.random.default_rng(i)
        mask = np.zeros(shape, np.uint8)
        # 4: mask values need not follow one another.
        mask[(slice(4, 12),) * dims], mask[(slice(12, 16),) * dims] = (1, 4)
        values = rng.integers(20, 60, shape) + 30 * mask
        image, label = (
            f"i{i}.png" if dims == 2 else f"i{i}.nii.gz",
            f"m{i}.png" if dims == 2 else f"m{i}.nii.gz",
        )
        for name, array in ((image, values.astype(np.uint8)), (label, mask)):
            if dims == 2:
                Image.fromarray(array).save(folder / name)
            else:
                nib.save(nib.Nifti1Image(array, AFFINE), folder / name)
        entries.append(
            {"image": image, "label": label if kind == "segmentation" else ("sick" if i % 2 else "well")}
        )
    content = {
        "settings": {"crop_size": [16] * dims, **SETTINGS},
        "training": entries[: n - 5],
        "validation": entries[n - 5 : n - 3],
    }
    content |= (
        {"test": entries[n - 3 :], "labels": {"0": "background", "1": "liver", "4": "tumour"}}
        if kind == "segmentation"
        else {"test": entries[n - 3 :]}
    )
    if dims == 3:
        content["spacing_mm"] = [3, 3, 3]
    (folder / "list.json").write_text(json.dumps(content))
    return folder / "list.json"


@pytest.fixture(scope="module", params=KINDS, ids=lambda k: f"{k[0]}D {k[1]}")
def made(request, bare, tmp_path_factory):
    """A list of each kind, and its runs, evaluated and predicted."""
    dims, kind = request.param
    folder = tmp_path_factory.mktemp("kind")
    task = write_list(folder / "data", dims, kind)
    scan = folder / "data" / ("i5.png" if dims == 2 else "i5.nii.gz")
    commands = [
        ["check", task, "--preset", bare],
        ["pretrain", "--task", task, "--preset", bare, "--out", folder / "pre"],
        ["finetune", "--task", task, "--preset", bare, "--out", folder / "run", "--init", folder / "pre"],
        ["evaluate", folder / "run"],
        ["predict", folder / "run", scan, "--out", folder / "new"],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 0, command[0]
    return dims, kind, folder


def stored(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)) if path.suffix == ".png" else np.asarray(nib.load(path).dataobj)


def test_the_task_is_what_the_list_looks_like(made):
    dims, kind, folder = made
    task = get_task(str(folder / "data" / "list.json"))
    assert (task.spatial_dims, task.kind) == (dims, kind)
    assert task.classes == (("liver", "tumour") if kind == "segmentation" else ("sick", "well"))


def test_scores_are_those_computed_apart_on_the_files_that_were_written(made):
    dims, kind, folder = made
    table = pd.read_csv(folder / "run" / "metrics.csv")
    assert len(table) == 3 * 2
    if kind == "classification":
        mean = json.loads((folder / "run" / "metrics.json").read_text())["mean"]["mauc"]
        aucs = [roc_auc_score(rows.target, rows.score) for _, rows in table.groupby("class")]
        assert mean == pytest.approx(np.mean(aucs)) and set(table.target) == {0, 1}
        return
    assert ("hd95_px" if dims == 2 else "hd95_mm") in table
    for row in table.itertuples():
        ending = ".png" if dims == 2 else ".nii.gz"
        value = {"liver": 1, "tumour": 4}[row._2]
        predicted, label = (
            stored(folder / "run" / "predictions" / f"{row.case}{ending}"),
            stored(folder / "data" / f"m{row.case[1:]}{ending}"),
        )
        assert set(np.unique(predicted)) <= {0, 1, 4}
        p, t = predicted == value, label == value
        assert row.dsc == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))


def test_a_prediction_lies_on_the_images_own_grid_in_the_values_of_its_masks(made):
    dims, kind, folder = made
    out = folder / "new"
    if kind == "classification":
        table = pd.read_csv(out / "probabilities.csv")
        scored = pd.read_csv(folder / "run" / "metrics.csv").query("case == 'i5'").set_index("class").score
        for name in ("sick", "well"):
            assert table[name][0] == pytest.approx(scored[name], abs=1e-4)
        return
    mask = stored(out / ("i5_mask.png" if dims == 2 else "i5.nii.gz"))
    assert mask.shape == ((40, 30) if dims == 2 else (18, 20, 16)) and set(np.unique(mask)) <= {0, 1, 4}
    assert np.array_equal(
        mask, stored(folder / "run" / "predictions" / ("i5.png" if dims == 2 else "i5.nii.gz"))
    )
    assert (
        json.loads((out / "labels.json").read_text())["4"] == "tumour"
        and (out / "i5.png").stat().st_size > 2000
    )
    row = pd.read_csv(out / ("areas.csv" if dims == 2 else "volumes.csv")).iloc[0]
    for name, value in (("liver", 1), ("tumour", 4)):
        expected = (mask == value).sum() * (1 if dims == 2 else 36 / 1000)
        assert row[f"{name} ({'px' if dims == 2 else 'ml'})"] == pytest.approx(expected, abs=6e-4)


def test_the_explorer_opens_each_kind(made):
    from smae_utils.show.explorer import explore

    dims, kind, folder = made
    for widget, masked in (
        (explore(folder / "pre", finetuned=[folder / "run"]), True),
        (explore(folder / "run"), False),
    ):
        assert len(widget.images) == (3 if dims == 3 else 1)
        drawn = [bytes(view.value) for view in widget.images.values()]
        assert all(jpeg.startswith(b"\xff\xd8") and len(jpeg) > 500 for jpeg in drawn)
        assert ("hidden" in widget.text()) == masked
        if kind == "segmentation":
            assert "label" in widget.outlines.options and "liver" in widget.legend.value
        else:
            assert any(f"labelled: {name}" in widget.text() for name in ("sick", "well"))


def test_pixel_size_in_the_list_makes_millimetres(made, bare, tmp_path):
    dims, kind, folder = made
    if (dims, kind) != (2, "segmentation"):
        pytest.skip("only masks of 2D images have distances in pixels")
    content = json.loads((folder / "data" / "list.json").read_text())
    (folder / "data" / "mm.json").write_text(json.dumps({**content, "spacing_mm": [0.5, 0.5]}))
    main(
        [
            "finetune",
            "--task",
            str(folder / "data" / "mm.json"),
            "--preset",
            bare,
            "--out",
            str(tmp_path / "run"),
            "--init",
            str(folder / "pre"),
        ]
    )
    main(["evaluate", str(tmp_path / "run")])
    pixels, mm = (pd.read_csv(run / "metrics.csv") for run in (folder / "run", tmp_path / "run"))
    np.testing.assert_allclose(mm.hd95_mm, pixels.hd95_px / 2)


def test_a_network_learns_masks_of_2d_images_and_classes_of_3d_scans(bare, tmp_path):
    for dims, kind, key, least in ((2, "segmentation", "dsc", 0.93), (3, "classification", "mauc", 0.99)):
        folder = tmp_path / f"{dims}D"
        task = write_list(folder / "data", dims, kind, n=12)
        if kind == "classification":  # the sick have something bright in one corner
            for i in range(1, 12, 2):
                image = nib.load(folder / "data" / f"i{i}.nii.gz")
                values = np.asarray(image.dataobj).astype(np.float32)
                values[10:, 10:, 8:] += 150
                nib.save(nib.Nifti1Image(values, AFFINE), folder / "data" / f"i{i}.nii.gz")
        size = [32, 32] if dims == 2 else [16, 16, 16]
        more = [
            "crop_area=[0.7,1.0]",
            "steps=80",
            "base_lr=0.8",
            "feature_size=8",
            "batch_size=4",
            "log_every=20",
            f"crop_size={size}".replace(" ", ""),
        ]
        command = ["finetune", "--task", task, "--preset", bare, "--out", folder / "run", "--set", *more]
        assert main([str(w) for w in command]) == 0
        assert main(["evaluate", str(folder / "run")]) == 0
        assert json.loads((folder / "run" / "metrics.json").read_text())["mean"][key] > least
