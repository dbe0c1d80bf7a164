"""A scan that is not held in memory is prepared, refused and predicted as any other. What is large is made
small for these tests.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from smae_utils.cli import main
from smae_utils.data import out_of_core
from smae_utils.data.tasks import get_task
from smae_utils.work.build import build_transform
from smae_utils.work.finetune import finetune
from smae_utils.work.settings import FinetuneSettings

SHAPE = (29, 33, 21)
OBLIQUE = nib.affines.from_matvec(
    Rotation.from_euler("xyz", [0.3, -0.4, 0.5]).as_matrix() @ np.diag([-2.0, 2.5, 3.0]), [30, -20, 10]
)
TURNED = np.array([[0, 0, -3.0, 40], [2.0, 0, 0, -10], [0, -2.5, 0, 60], [0, 0, 0, 1]])


def scan(seed: int = 0, channels: int = 1) -> np.ndarray:
    """(X, Y, Z[, C]): a body that touches one side only, in air."""
    rng = np.random.default_rng(seed)
    values = np.full((*SHAPE, channels), -1000, np.float32)
    values[4:22, 6:, 3:18] = rng.normal(40, 60, (18, 27, 15, channels))
    return values[..., 0] if channels == 1 else values


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine), path)
    return str(path)


@pytest.fixture
def tiny_memory(monkeypatch):
    """Blocks of 8 voxels a side, and everything in temporary files."""
    monkeypatch.setattr(out_of_core, "CHANNEL_VOXELS", 1000)


@pytest.mark.parametrize(
    "affine", [np.diag([2.0, 2.5, 3.0, 1]), TURNED, OBLIQUE], ids=["straight", "turned", "oblique"]
)
@pytest.mark.parametrize("crop", [(16, 16, 16), (80, 16, 16)], ids=["inside", "padded"])
@pytest.mark.parametrize("kind", ["window", "zscore4d", "zscore_files", "packed"])
def test_a_scan_prepared_block_by_block_is_the_scan_prepared_as_a_whole(
    kind, crop, affine, tmp_path, tiny_memory
):
    task = get_task("btcv")
    image = save(
        tmp_path / ("a.nii.gz" if kind == "packed" else "a.nii"),
        scan(channels=4 if kind == "zscore4d" else 1),
        affine,
    )
    if kind.startswith("zscore"):
        task = replace(get_task("brats"), window=None)
        if kind == "zscore_files":
            image = [save(tmp_path / f"{i}.nii", np.maximum(scan(i), 0), affine) for i in range(4)]
    # No target voxel lies on a plane of the scan: whether its neighbour there counts would be a matter of the
    # last digit.
    settings = replace(FinetuneSettings(), crop_size=crop, spacing_mm=(2.2347, 2.4153, 2.8719))
    case = {"case": "a", "image": image}
    whole = build_transform(task, settings, with_label=False)(dict(case))["image"]
    assert out_of_core.is_large(case)
    made = out_of_core.prepare_large(case, task, settings.spacing_mm, settings.crop_size)
    np.testing.assert_allclose(made.affine, whole.affine, atol=1e-5)
    np.testing.assert_allclose(made.image, whole.as_tensor(), atol=2e-4)
    assert made.shape == SHAPE and np.allclose(made.scan_affine, affine, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9, 30), (8, 8, 8), (1, 17, 40)])
def test_blocks_fill_a_grid_once(shape, tiny_memory):
    seen = np.zeros(shape, int)
    for box in out_of_core.blocks(shape, 3):
        seen[box] += 1
        assert seen[box].size <= 8**3
    assert (seen == 1).all()


def test_blocks_are_smaller_where_they_are_filled_from_a_finer_grid(monkeypatch):
    monkeypatch.setattr(out_of_core, "CHANNEL_VOXELS", 8 * 64**3)
    sides = [
        next(out_of_core.blocks((100, 100, 100), 1, to_other))[0].stop
        for to_other in (None, np.diag([0.5, 0.5, 0.5, 1]), np.diag([4.0, 4, 4, 1]))
    ]
    assert sides == [64, 64, 16]


def test_what_a_box_touches_holds_the_places_of_all_its_voxels():
    box = (slice(2, 7), slice(0, 4), slice(5, 9))
    to_other = (
        nib.affines.from_matvec(np.eye(3), [100, 100, 100])
        @ np.linalg.inv(OBLIQUE)
        @ TURNED
        @ np.diag([0.3, 0.4, 0.5, 1])
    )
    found = out_of_core.source_box(box, to_other, (1000, 1000, 1000))
    places = np.array(
        [(to_other @ [*(s.start + v for s, v in zip(box, voxel)), 1])[:3] for voxel in np.ndindex(5, 4, 4)]
    )
    assert (places > [s.start for s in found]).all() and (places < [s.stop - 1 for s in found]).all()
    assert max(s.stop - s.start for s in found) < 12  # no more than needed
    away = nib.affines.from_matvec(np.eye(3), [500, 0, -500])
    assert out_of_core.source_box(box, away, (10, 10, 10)) is None
    # Where the edge goes on, its nearest planes are read and no more.
    assert out_of_core.source_box(box, away, (10, 10, 10), edge=True) == (
        slice(9, 10),
        slice(0, 5),
        slice(0, 1),
    )


@pytest.fixture(scope="module")
def trained(tiny, bare, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    label = (scan() > 60).astype(np.uint8)
    for i in range(4):
        save(folder / f"s{i}.nii", scan(i), TURNED)
        save(folder / f"l{i}.nii", label, TURNED)
    entries = [{"image": f"s{i}.nii", "label": f"l{i}.nii"} for i in range(4)]
    content = {
        "labels": {"1": "dense"},
        "modality": {"0": "CT"},
        "window": [-200, 200],
        "spacing_mm": [3, 3, 3],
        "training": entries,
    }
    (folder / "list.json").write_text(json.dumps(content))
    settings = {**tiny["btcv", "finetune"], "steps": 20, "spacing_mm": [3, 3, 3]}
    finetune(
        str(folder / "list.json"),
        "",
        folder / "run",
        preset=bare,
        overrides=settings,
        report=lambda line: None,
    )
    return folder / "run"


@pytest.mark.parametrize("affine", [TURNED, OBLIQUE], ids=["turned", "oblique"])
def test_a_large_scan_is_predicted_as_a_small_one(trained, affine, tmp_path, monkeypatch):
    image = save(tmp_path / "new.nii.gz", scan(7), affine)
    assert main(["predict", str(trained), image, "--out", str(tmp_path / "small"), "--probabilities"]) == 0
    monkeypatch.setattr(out_of_core, "CHANNEL_VOXELS", 6000)
    assert main(["predict", str(trained), image, "--out", str(tmp_path / "large"), "--probabilities"]) == 0
    masks, chances = (
        [nib.load(tmp_path / size / f"new{name}.nii.gz") for size in ("small", "large")]
        for name in ("", "_probabilities")
    )
    small, big = (np.asarray(m.dataobj) for m in masks)
    one, other = (c.get_fdata() for c in chances)
    np.testing.assert_allclose(one, other, atol=4e-3)
    # Only a voxel at one half may go either way: halves of a precision are kept of a large scan.
    assert 0 < small.sum() < small.size and (abs(one[..., 1] - one[..., 0])[small != big] < 8e-3).all()
    np.testing.assert_allclose(masks[1].affine, affine, atol=1e-5)
    volumes = [pd.read_csv(tmp_path / size / "volumes.csv")["dense (ml)"][0] for size in ("small", "large")]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.01)
    assert volumes[1] == pytest.approx((big == 1).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000, abs=1e-3)
    assert (tmp_path / "large" / "new.png").stat().st_size > 5000
    assert not list(tmp_path.glob(".part_*"))


def spoil(name: str, path: Path) -> None:
    values, affine = scan(1), np.diag([2.0, 2.5, 3.0, 1])
    if name == "nan":
        values[0, 0, 0] = np.nan
    header = nib.Nifti1Image(values, affine).header
    if name == "micrometres":
        header.set_xyzt_units("micron")
    if name == "channels":
        values = np.stack([values, values], -1)
    if name == "singular":
        affine = np.diag([2.0, 0, 3.0, 1])
        header.set_qform(None, 0)
        header.set_sform(affine, 1)
        affine = None
    nib.save(nib.Nifti1Image(values, affine, header), path)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nan", "NaN"),
        ("micrometres", "micrometres"),
        ("channels", "2 channels"),
        ("singular", "singular affine"),
        ("cut", "cut short"),
    ],
)
def test_a_large_scan_that_cannot_be_used_gives_one_line_and_leaves_nothing(
    trained, name, says, tmp_path, tiny_memory, capsys
):
    spoil(name, tmp_path / "new.nii.gz")
    capsys.readouterr()
    assert main(["predict", str(trained), str(tmp_path / "new.nii.gz"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and "new.nii.gz" in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["new.nii.gz"]


def test_a_full_disk_is_no_fault_of_the_scan(trained, tmp_path, tiny_memory, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    image = save(tmp_path / "new.nii", scan(7), TURNED)
    monkeypatch.setattr(out_of_core.os, "posix_fallocate", full, raising=False)
    assert main(["predict", str(trained), image, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and "cut short" not in err and not (tmp_path / "out").exists()


def test_what_is_not_nifti_is_never_large(tmp_path, tiny_memory):
    assert not out_of_core.is_large({"image": str(tmp_path)}) and not out_of_core.is_large({"image": "x.png"})
    assert torch.equal(
        torch.from_numpy(out_of_core.start_of((slice(3, 4), slice(0, 1), slice(2, 9)))[:3, 3]),
        torch.tensor([3.0, 0, 2]).double(),
    )
