"""Readers: official splits, patients kept together, left and right where they are, and errors that name the
path.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from smae_utils.data.pictures import ReadRadiograph
from smae_utils.data.tasks import get_task
from smae_utils.data.transforms import ResizeRadiograph
from smae_utils.errors import UserError
from smae_utils.work.build import build_splits, build_transform
from smae_utils.work.settings import Settings

# TransUNet's lists, which the paper used.
TRAIN = {5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40}
TEST = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}


@pytest.fixture
def thirty(tmp_path):
    """The 30 BTCV names, with empty files."""
    for part in ("img", "label"):
        (tmp_path / "RawData/Training" / part).mkdir(parents=True)
        for i in TRAIN | TEST:
            (tmp_path / "RawData/Training" / part / f"{part}{i:04d}.nii.gz").touch()
    return tmp_path


def numbers(cases) -> set[int]:
    return {int(c["case"][3:]) for c in cases}


def parts(task: str, folder: Path, **settings):
    return build_splits(get_task(task), folder, Settings(**settings))


def touch_radiographs(folder: Path, table: str, train: list[str], test: list[str]) -> Path:
    (folder / "images_001/images").mkdir(parents=True)
    for name in train + test:
        (folder / "images_001/images" / name).touch()
    (folder / "Data_Entry_2017.csv").write_bytes(table.encode())
    (folder / "train_val_list.txt").write_text("\n".join(train) + "\n")
    (folder / "test_list.txt").write_text("\n".join(test) + "\n")
    return folder


HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def row(name: str, findings: str) -> str:
    return f"{name},{findings},0,{int(name[:8])},58,M,PA,2682,2749,0.143,0.143,"


def test_btcv_split_is_that_of_the_paper_18_and_12(thirty):
    splits = parts("btcv", thirty)
    assert numbers(splits["train"]) | numbers(splits["val"]) == TRAIN
    assert numbers(splits["test"]) == TEST
    assert len(splits["val"]) == 3 and not numbers(splits["train"]) & numbers(splits["val"])


def test_btcv_validation_cases_are_given_back_by_train_on_val(thirty):
    splits = parts("btcv", thirty, train_on_val=True)
    assert numbers(splits["train"]) == TRAIN and len(splits["train"]) == 18
    assert splits["val"] == []
    assert numbers(splits["test"]) == TEST


def test_the_held_out_cases_follow_split_seed_and_nothing_else(thirty):
    chosen = [numbers(parts("btcv", thirty, split_seed=s)["val"]) for s in range(4)]
    assert len(set(map(frozenset, chosen))) > 1
    assert numbers(parts("btcv", thirty, split_seed=0, seed=99)["val"]) == chosen[0]


@pytest.mark.parametrize("layout", ["RawData/Training", "Training", "."])
def test_btcv_is_found_from_any_of_the_usual_folders(layout, thirty, tmp_path_factory):
    root = tmp_path_factory.mktemp("moved")
    target = root / layout
    target.parent.mkdir(parents=True, exist_ok=True)
    if layout == ".":
        root.rmdir()
    (thirty / "RawData/Training").rename(target)
    assert len(parts("btcv", root)["test"]) == 12


def test_junk_beside_btcv_scans_is_not_a_case(thirty):
    (thirty / "RawData/Training/img/._img0001.nii.gz").write_bytes(b"junk")
    (thirty / "RawData/Training/img/.DS_Store").write_bytes(b"junk")
    assert sum(map(len, parts("btcv", thirty).values())) == 30


def test_cxr14_follows_the_official_lists(cxr14):
    splits = parts("cxr14", cxr14)
    train, test = ((cxr14 / f).read_text().split() for f in ("train_val_list.txt", "test_list.txt"))
    assert [c["case"] for c in splits["test"]] == test
    assert sorted(c["case"] for p in ("train", "val") for c in splits[p]) == sorted(train)
    assert all(Path(c["image"]).name == c["case"] for p in splits.values() for c in p)


@pytest.mark.parametrize("seed", range(3))
def test_no_radiograph_patient_is_in_two_parts(cxr14, seed):
    splits = parts("cxr14", cxr14, split_seed=seed)
    patients = [{c["case"][:8] for c in splits[p]} for p in ("train", "val", "test")]
    assert all(patients) and sum(map(len, patients)) == len(set.union(*patients))
    assert sum(len(p) for p in splits.values()) > len(set.union(*patients))  # some have more than one image


def test_radiograph_labels_are_14_zeros_and_ones_in_the_official_order(tmp_path):
    table = "\n".join(
        [
            HEADER,
            row("00000001_000.png", "Cardiomegaly|Emphysema"),
            row("00000002_000.png", "No Finding"),
            row("00000003_000.png", "Hernia"),
            "",
        ]
    )
    names = [f"0000000{i}_000.png" for i in (1, 2, 3)]
    splits = parts("cxr14", touch_radiographs(tmp_path, table, names[:2], names[2:]))
    labels = {c["case"]: c["label"] for p in splits.values() for c in p}
    assert np.flatnonzero(labels[names[0]]).tolist() == [1, 10]
    assert labels[names[1]].tolist() == [0] * 14
    assert np.flatnonzero(labels[names[2]]).tolist() == [13]


@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_a_table_with_bom_or_windows_line_ends_is_read_alike(mark, end, tmp_path):
    names = [f"0000000{i}_000.png" for i in (1, 2, 3)]
    table = mark + end.join([HEADER, *(row(n, "Mass|Nodule") for n in names), ""])
    folder = touch_radiographs(tmp_path, table, names[:2], names[2:])
    for file, listed in (("train_val_list.txt", names[:2]), ("test_list.txt", names[2:])):
        (folder / file).write_bytes((mark + end.join(listed)).encode())
    splits = parts("cxr14", folder)
    cases = [c for p in splits.values() for c in p]
    assert sorted(c["case"] for c in cases) == names
    assert {tuple(np.flatnonzero(c["label"])) for c in cases} == {(4, 5)}
    assert sorted(c["patient"] for c in cases) == ["1", "2", "3"]


def test_the_2020_table_is_read_too(cxr14, spoil):
    folder = spoil(cxr14)
    old = folder / "Data_Entry_2017.csv"
    (folder / "Data_Entry_2017_v2020.csv").write_text(
        old.read_text().replace("Patient Gender", "Patient Sex")
    )
    old.unlink()
    assert [c["case"] for c in parts("cxr14", folder)["test"]] == [
        c["case"] for c in parts("cxr14", cxr14)["test"]
    ]


def test_brats_folds_are_disjoint_cover_all_and_hold_validation_out_of_training(brats):
    seen = []
    for fold in range(5):
        splits = parts("brats", brats, fold=fold)
        names = {p: {c["case"] for c in cases} for p, cases in splits.items()}
        assert len(names["train"]) + len(names["val"]) + len(names["test"]) == 8
        assert len(set.union(*names.values())) == 8 and all(names.values())
        seen += sorted(names["test"])
    assert sorted(seen) == [f"BRATS_{i:03d}" for i in range(1, 9)]


def test_brats_reads_the_list_and_not_the_folder(brats, spoil):
    folder = spoil(brats)
    image = folder / "Task01_BrainTumour/imagesTr/BRATS_001.nii.gz"
    (image.parent / "BRATS_999.nii.gz").write_bytes(image.read_bytes())
    cases = {c["case"] for p in parts("brats", folder).values() for c in p}
    assert cases == {f"BRATS_{i:03d}" for i in range(1, 9)}  # neither BRATS_999 nor ._BRATS_001


@pytest.mark.parametrize("task", ["btcv", "cxr14", "brats", "example4d", "mni152"])
def test_a_missing_folder_and_a_wrong_folder_are_named(task, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=str(folder)) as error:
            parts(task, folder)
        assert "\n" not in str(error.value)


def test_a_missing_btcv_label_is_named(thirty):
    label = thirty / "RawData/Training/label/label0021.nii.gz"
    label.unlink()
    with pytest.raises(UserError, match=str(label)):
        parts("btcv", thirty)


def test_a_missing_brats_image_is_named(brats, spoil):
    image = spoil(brats) / "Task01_BrainTumour/imagesTr/BRATS_003.nii.gz"
    image.unlink()
    with pytest.raises(UserError, match=str(image)):
        parts("brats", image.parent.parent)


@pytest.mark.parametrize(
    "content", ["not json", "[]", json.dumps({"test": []}), json.dumps({"training": [{"image": "a"}]})]
)
def test_a_broken_brats_list_is_named(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "dataset.json")):
        parts("brats", tmp_path)


def test_a_fold_that_does_not_exist_is_refused(brats):
    with pytest.raises(UserError, match="fold must be 0 .. 4, got 5"):
        parts("brats", brats, fold=5)


def test_an_unknown_finding_is_named_with_its_image(tmp_path):
    names = [f"0000000{i}_000.png" for i in (1, 2, 3)]
    table = "\n".join([HEADER, *(row(n, "Mass") for n in names[:2]), row(names[2], "Cardiomegalie")])
    folder = touch_radiographs(tmp_path, table, names[:2], names[2:])
    with pytest.raises(UserError, match="Cardiomegalie") as error:
        parts("cxr14", folder)
    assert names[2] in str(error.value) and str(folder / "Data_Entry_2017.csv") in str(error.value)


def test_lists_that_share_a_patient_are_refused(tmp_path):
    names = ["00000001_000.png", "00000002_000.png", "00000001_001.png"]
    folder = touch_radiographs(
        tmp_path, "\n".join([HEADER, *(row(n, "Mass") for n in names)]), names[:2], names[2:]
    )
    with pytest.raises(UserError, match="patient 1"):
        parts("cxr14", folder)


def test_a_table_without_its_images_is_refused(cxr14, spoil):
    folder = spoil(cxr14)
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=str(folder)):
        parts("cxr14", folder)


def test_the_right_kidney_lies_at_the_patients_right_in_every_stored_orientation(btcv):
    codes = set()
    for path in sorted((btcv / "RawData/Training/label").iterdir()):
        stored = nib.load(path)
        values = np.asarray(stored.dataobj)
        if not ((values == 2).any() and (values == 3).any()):
            continue
        right, left = (
            nib.affines.apply_affine(stored.affine, np.argwhere(values == v)).mean(0)[0] for v in (2, 3)
        )
        assert right > left + 30, path.name  # nibabel's world x grows towards the patient's right
        codes.add(nib.aff2axcodes(stored.affine))
    assert len(codes) >= 3


def test_prepared_scans_keep_the_right_kidney_right_whatever_the_stored_orientation(btcv):
    task = get_task("btcv")
    transform = build_transform(
        task, Settings(crop_size=(16, 16, 16), spacing_mm=(10.0, 10.0, 10.0)), with_label=True
    )
    checked = 0
    for case in (c for p in parts("btcv", btcv).values() for c in p):
        label = transform(dict(case))["label"][0].numpy()
        if (label == 2).any() and (label == 3).any():
            # Axis 0 grows to the right.
            assert np.argwhere(label == 2)[:, 0].mean() > np.argwhere(label == 3)[:, 0].mean() + 3
            checked += 1
    assert checked >= 8


def test_rows_and_columns_of_a_radiograph_stay_where_they_are(tmp_path):
    pixels = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) * 4
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = ReadRadiograph()({"image": str(tmp_path / "a.png")})
    assert np.array_equal(np.array(read["image"]), pixels)
    assert read["mean"] == pytest.approx(pixels.mean() / 255) and read["std"] == pytest.approx(
        pixels.std() / 255
    )
    tensor = ResizeRadiograph((6, 9))(read)["image"]
    assert tensor.shape == (1, 6, 9)
    assert np.allclose(tensor[0].numpy(), (pixels - pixels.mean()) / pixels.std(), atol=1e-4)


def test_an_rgba_radiograph_is_read_as_the_grey_one(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "rgba.png")
    grey, rgba = (ReadRadiograph()({"image": str(tmp_path / f)}) for f in ("grey.png", "rgba.png"))
    assert np.array_equal(np.array(grey["image"]), np.array(rgba["image"]))
    assert (grey["mean"], grey["std"]) == (rgba["mean"], rgba["std"])
