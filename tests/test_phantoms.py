"""Phantoms are drop-ins: the layouts of the real downloads, the same bytes from the same seed."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.phantoms import write_phantoms

# https://nihcc.app.box.com/v/ChestXray-NIHCC: the header as it is, with brackets that hold commas and a comma
# at the end.
CXR_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
BTCV_TEST = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize(("task", "n"), [("btcv", 2), ("cxr14", 5), ("brats", 2)])
def test_same_seed_same_bytes_and_another_seed_other_images(task, n, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        images = write_phantoms(task, tmp_path / name, n, seed=seed)
        assert len(images) == n and all(p.is_file() for p in images)
    a, b, c = (checksums(tmp_path / name) for name in "abc")
    assert a == b
    paths = [str(p.relative_to(tmp_path / "c")) for p in images]
    assert all(a.get(path) != c[path] for path in paths)


def test_a_case_does_not_depend_on_how_many_are_written(tmp_path, btcv):
    write_phantoms("btcv", tmp_path / "two", 2, seed=0)
    few, many = checksums(tmp_path / "two"), checksums(btcv)
    assert len(few) == 4
    assert few.items() <= many.items()


def test_btcv_layout_is_that_of_the_synapse_download(btcv):
    images = sorted(p.name for p in (btcv / "RawData" / "Training" / "img").iterdir())
    labels = sorted(p.name for p in (btcv / "RawData" / "Training" / "label").iterdir())
    numbers = [int(name[3:7]) for name in images]
    assert images == [f"img{i:04d}.nii.gz" for i in numbers]
    assert labels == [f"label{i:04d}.nii.gz" for i in numbers]
    assert set(numbers) <= {*range(1, 11), *range(21, 41)}
    assert len(set(numbers) & BTCV_TEST) == 4 and len(numbers) == 10


def test_btcv_scans_are_int16_hu_with_labels_on_the_same_grid_in_several_orientations(btcv):
    codes, oblique = set(), 0
    for path in sorted((btcv / "RawData/Training/img").iterdir()):
        image, label = (
            nib.load(path),
            nib.load(path.parent.parent / "label" / path.name.replace("img", "label")),
        )
        assert image.get_data_dtype() == np.int16
        assert image.shape == label.shape and np.allclose(image.affine, label.affine)
        hu, values = np.asarray(image.dataobj), np.asarray(label.dataobj)
        assert hu.min() < -900 and 200 < hu.max() <= 3071
        assert set(np.unique(values)) <= set(range(14))
        codes.add(nib.aff2axcodes(image.affine))
        oblique += bool((np.sort(np.abs(image.affine[:3, :3]), axis=0)[1] > 1e-3).any())
    assert len(codes) >= 3
    assert 0 < oblique < 10


def test_organs_of_a_group_cannot_be_told_apart_by_their_hu():
    from smae_utils.phantoms.ct import make_case
    from smae_utils.phantoms.ct_anatomy import ORGANS

    groups = (
        ("liver", "spleen"),
        ("right kidney", "left kidney"),
        ("aorta", "inferior vena cava", "portal and splenic veins"),
    )
    for case in (1, 2, 3):
        phantom = make_case(5, case, clean=True)
        hu = {
            name: np.median(phantom.image_hu[phantom.label == i])
            for i, name in enumerate(ORGANS, start=1)
            if (phantom.label == i).any()
        }
        spread = [np.ptp([hu[name] for name in group if name in hu]) for group in groups]
        assert max(spread) <= 12, (case, hu)
        assert abs(hu["liver"] - hu["aorta"]) > 20 or abs(hu["liver"] - hu["left kidney"]) > 20


def test_every_organ_covers_150_voxels_of_7_mm_where_it_is_present(btcv):
    absent = 0
    for path in sorted((btcv / "RawData/Training/label").iterdir()):
        label = nib.load(path)
        voxel = math.prod(float(z) for z in label.header.get_zooms()) / 7**3
        counts = np.bincount(np.asarray(label.dataobj).ravel(), minlength=14)[1:]
        absent += int((counts == 0).sum())
        present = counts[counts > 0] * voxel
        assert present.min() >= 150, f"{path.name}: {(counts * voxel).round()}"
    assert absent <= 4  # at most one organ in one patient of ten, on average


def test_cxr14_header_and_rows_are_those_of_the_nih_table(cxr14):
    raw = (cxr14 / "Data_Entry_2017.csv").read_text()
    assert raw.splitlines()[0] == CXR_HEADER
    rows = list(csv.reader(raw.splitlines()[1:]))
    # Nine names, two of them split, and the unnamed one.
    assert len(rows) == 60 and {len(r) for r in rows} == {12}
    known = {*get_task("cxr14").classes, "No Finding"}
    for name, findings, follow_up, patient, *_ in rows:
        assert name == f"{int(patient):08d}_{int(follow_up):03d}.png"
        assert set(findings.split("|")) <= known
        assert findings == "No Finding" or "No Finding" not in findings


def test_cxr14_lists_name_each_image_once_and_share_no_patient(cxr14):
    train, test = ((cxr14 / f).read_text().split() for f in ("train_val_list.txt", "test_list.txt"))
    files = {p.name: p for p in cxr14.rglob("*.png")}
    assert sorted(train + test) == sorted(files)
    assert train and test and not {n[:8] for n in train} & {n[:8] for n in test}
    assert all(
        p.parent.name == "images" and p.parent.parent.name.startswith("images_") for p in files.values()
    )
    modes = [Image.open(p).mode for p in files.values()]
    assert set(modes) == {"L", "RGBA"} and modes.count("L") > 50


def test_brats_layout_is_that_of_the_decathlon_with_its_junk_file(brats):
    folder = brats / "Task01_BrainTumour"
    index = json.loads((folder / "dataset.json").read_text())
    assert index["modality"]["0"] == "FLAIR" and index["labels"]["3"].startswith("enhancing")
    assert [Path(e["image"]).name for e in index["training"]] == [
        f"BRATS_{i:03d}.nii.gz" for i in range(1, 9)
    ]
    assert (folder / "imagesTr" / "._BRATS_001.nii.gz").is_file()
    for entry in index["training"]:
        image, label = nib.load(folder / entry["image"]), nib.load(folder / entry["label"])
        assert image.ndim == 4 and image.shape[3] == 4 and image.shape[:3] == label.shape
        assert np.allclose(image.affine, label.affine)
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2, 3}


def test_mri_background_is_exactly_zero_in_all_channels_and_holds_no_tumour(brats):
    for path in sorted((brats / "Task01_BrainTumour/imagesTr").glob("BRATS_*.nii.gz")):
        image = np.asarray(nib.load(path).dataobj)
        label = np.asarray(nib.load(path.parent.parent / "labelsTr" / path.name).dataobj)
        empty = (image == 0).all(-1)
        assert 0.3 < empty.mean() < 0.95
        corners = image[[0, 0, 0, 0, -1, -1, -1, -1]][:, [0, 0, -1, -1, 0, 0, -1, -1]][:, :, [0, -1]]
        assert (corners == 0).all()
        assert not label[empty].any()
        assert label.any()


def test_every_tumour_region_occurs(brats):
    found = {
        v
        for p in (brats / "Task01_BrainTumour/labelsTr").glob("BRATS*")
        for v in np.unique(np.asarray(nib.load(p).dataobj))
    }
    assert found == {0, 1, 2, 3}


def test_prevalence_of_each_finding_lies_between_10_and_25_percent():
    from smae_utils.phantoms.shapes import case_rng
    from smae_utils.phantoms.xray_findings import draw_findings

    drawn = [draw_findings(case_rng(0, patient, 1), case_rng(0, patient, 2)) for patient in range(1500)]
    names = get_task("cxr14").classes
    assert {name for found in drawn for name in found} == set(names)
    for name in names:
        share = sum(name in found for found in drawn) / len(drawn)
        assert 0.10 <= share <= 0.25, f"{name} in {share:.1%}"


def test_the_table_says_what_was_drawn(cxr14):
    """Prevalences in the written table, over 60 images, are of the order that was promised."""
    with (cxr14 / "Data_Entry_2017.csv").open() as handle:
        found = [row[1].split("|") for row in list(csv.reader(handle))[1:]]
    shares = [sum(name in f for f in found) / len(found) for name in get_task("cxr14").classes]
    assert min(shares) > 0.01 and max(shares) < 0.5
    assert 0.05 < sum(shares) / 14 < 0.35


@pytest.mark.parametrize(
    ("change", "word"),
    [({"task": "mni152"}, "btcv"), ({"size": "huge"}, "huge"), ({"n": 0}, "n=0"), ({"context": 1.5}, "1.5")],
)
def test_a_wrong_argument_is_refused_by_name(change, word, tmp_path):
    arguments = {"task": "btcv", "n": 1, "size": "demo", "context": 1.0, **change}
    with pytest.raises(UserError, match=word):
        write_phantoms(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path)):
        write_phantoms("btcv", tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
