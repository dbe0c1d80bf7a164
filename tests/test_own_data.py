"""Own scans from a list file: what is read is what the list says, and what is predicted lies where the scan
lies.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from smae_utils import predict_files as predict
from smae_utils.cli import main
from smae_utils.data.tasks import get_task
from smae_utils.work import check as checking
from smae_utils.work import check_report
from smae_utils.work.build import build_splits, build_transform
from smae_utils.work.estimate import estimate
from smae_utils.work.finetune import finetune
from smae_utils.work.metrics import dsc
from smae_utils.work.predictor import Predictor
from smae_utils.work.presets import resolve
from smae_utils.work.rebuild import load_finetuned
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings

SHAPE, SPACING = (20, 18, 16), (3.0, 3.5, 4.0)
LABELS = {"0": "background", "1": "liver", "2": "tumour"}
ORIENTATIONS = [
    np.array(list(zip(axes, signs)), float)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def quiet(line: str) -> None:
    pass


@pytest.fixture
def smae(capsys):
    """Call the command line in this process: (exit code, standard output, standard error)."""

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(w) for w in words])
        return (code, *capsys.readouterr())

    return call


def phantom(seed: int = 0, shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """A body with two organs, alike in no mirror: (image, label)."""
    rng = np.random.default_rng(seed)
    at = np.stack(
        np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    )
    label = np.zeros(shape, np.uint8)
    label[((at - np.array([0.35, 0.2, 0.25]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 0.2] = 1
    label[((at - np.array([-0.4, -0.3, -0.2]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 0.1] = 2
    body = (at**2).sum(0) < 2.5
    image = (body * (200 + rng.normal(0, 10, shape)) + 150.0 * label).astype(np.float32)
    return image, label


def write(
    path: Path, values: np.ndarray, affine: np.ndarray | None = None, units: tuple = ("mm", "sec")
) -> str:
    image = nib.Nifti1Image(values, np.diag([*SPACING, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units(*units)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path.name


def write_list(folder: Path, n: int = 4, n_test: int = 2, **more) -> Path:
    """A list of phantoms with labels in the style of the Decathlon."""
    entries = []
    for i in range(n + n_test):
        image, label = phantom(i)
        write(folder / "images" / f"p{i}.nii.gz", image)
        write(folder / "labels" / f"p{i}.nii.gz", label)
        entries.append({"image": f"images/p{i}.nii.gz", "label": f"labels/p{i}.nii.gz"})
    content = {
        "name": "abdomen",
        "labels": LABELS,
        "modality": {"0": "MRI"},
        "spacing_mm": [3, 3, 3],
        "training": entries[:n],
        "test": entries[n:],
    }
    file = folder / "list.json"
    file.write_text(json.dumps({**content, **more}))
    return file


@pytest.fixture(scope="module")
def small(tiny) -> dict:
    """The smallest settings in the shape of a list's `settings`."""
    drop = ("spacing_mm",)
    return {
        stage: {k: v for k, v in tiny["brats", stage].items() if k not in drop} | {"steps": 2}
        for stage in ("pretrain", "finetune")
    }


@pytest.fixture(scope="module")
def trained(small, bare, tmp_path_factory) -> Path:
    """A run that was fine-tuned on a list."""
    folder = tmp_path_factory.mktemp("own")
    finetune(str(write_list(folder, settings=small)), "", folder / "run", preset=bare, report=quiet)
    return folder / "run"


@pytest.mark.slow
def test_a_json_list_trains_evaluates_and_predicts_with_its_own_settings(smae, small, bare, tmp_path):
    file, runs = write_list(tmp_path / "data", settings=small), tmp_path / "runs"
    content = json.loads(file.read_text())
    write(tmp_path / "data" / "images" / "more.nii.gz", phantom(9)[0])
    content["training"].append({"image": "images/more.nii.gz"})
    file.write_text(json.dumps(content))
    assert smae("pretrain", "--task", file, "--preset", bare, "--out", runs / "pre")[0] == 0
    code, out, err = smae(
        "finetune",
        "--task",
        file,
        "--preset",
        bare,
        "--out",
        runs / "fine",
        "--init",
        runs / "pre",
        "--set",
        "seed=1",
    )
    assert code == 0 and "loaded" in out and "no label" in out, err
    pre, fine = (yaml_of(runs / name) for name in ("pre", "fine"))
    assert (
        pre["settings"]["embed_dim"] == small["pretrain"]["embed_dim"]
        and pre["settings"]["base_lr"] == small["pretrain"]["base_lr"]
    )
    assert (
        fine["settings"]["feature_size"] == small["finetune"]["feature_size"]
        and fine["settings"]["seed"] == 1
    )
    # What has no label serves pre-training only.
    everywhere = set(sum(pre["cases"].values(), []))
    assert "more" in everywhere and everywhere - {"more"} == set(sum(fine["cases"].values(), []))
    assert smae("evaluate", runs / "fine")[0] == 0
    assert set(pd.read_csv(runs / "fine" / "metrics.csv")["class"]) == {"liver", "tumour"}
    image = tmp_path / "data" / "images" / "more.nii.gz"
    assert smae("predict", runs / "fine", image, file, "--out", tmp_path / "out", "--probabilities")[0] == 0
    names = {p.name for p in (tmp_path / "out").glob("*.nii.gz")}
    # The scan stands in the list too: both results have names of their own.
    assert (
        len(names) == 2 * 8
        and all(f"p{i}.nii.gz" in names for i in range(6))
        and {"001_more.nii.gz"} <= names
    )
    stored = nib.load(tmp_path / "out" / "p0_probabilities.nii.gz")
    assert stored.shape == (*SHAPE, 3)
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["2"] == "tumour"
    assert (tmp_path / "out" / "p0.png").stat().st_size > 5000


def yaml_of(run: Path) -> dict:
    return Run(run).config


def test_labels_of_the_decathlon_and_of_nnunet_mean_the_same(tmp_path):
    def task(labels):
        return get_task(str(write_list(tmp_path, 2, 0, labels=labels)))

    for labels in (
        LABELS,
        {"background": 0, "liver": 1, "tumour": 2},
        {"tumour": 2, "liver": 1, "background": 0},
    ):
        made = task(labels)
        assert (made.classes, made.regions, made.exclusive, made.channels) == (
            ("liver", "tumour"),
            None,
            True,
            ("MRI",),
        )
    made = task({"background": 0, "whole": [1, 2], "core": [2]})
    assert (made.classes, made.regions, made.exclusive, made.label_values) == (
        ("whole", "core"),
        ((1, 2), (2,)),
        False,
        3,
    )
    masks = made.class_masks(np.array([0, 1, 2]))
    assert [m.tolist() for m in masks] == [[False, True, True], [False, False, True]]


def test_channels_in_several_files_give_the_array_of_the_file_with_four(brats, tmp_path):
    record = get_task("brats")
    case = build_splits(record, brats, FinetuneSettings())["train"][0]
    stored = nib.load(case["image"])
    names = []
    for channel in range(4):
        names.append(f"case_{channel:04d}.nii.gz")
        nib.save(
            nib.Nifti1Image(np.asarray(stored.dataobj)[..., channel], stored.affine, stored.header),
            tmp_path / names[-1],
        )
    shutil.copy(case["label"], tmp_path / "label.nii.gz")
    labels = {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": 3}
    content = {
        "labels": labels,
        "channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"},
        "spacing_mm": [4, 4, 4],
    }
    content["training"] = [{"image": names, "label": "label.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps(content))
    own = get_task(str(tmp_path / "list.json"))
    assert (own.channels, own.regions, own.classes) == (record.channels, record.regions, record.classes)
    settings = replace(FinetuneSettings(), crop_size=(16, 16, 16), spacing_mm=(4.0, 4.0, 4.0))
    theirs = build_transform(record, settings, with_label=True)(dict(case))
    ours = build_transform(own, replace(settings, spacing_mm=()), with_label=True)(
        own.read_splits(Path(""), 0, 0)["train"][0]
    )
    for key in ("image", "label"):
        assert np.array_equal(np.asarray(ours[key]), np.asarray(theirs[key]))


def test_like_gives_the_presets_of_a_task_and_the_lists_own_settings_count_more(tmp_path):
    own = get_task(
        str(
            write_list(
                tmp_path,
                2,
                0,
                like="brats",
                modality={},
                settings={"flip_prob": 0.4, "finetune": {"overlap": 0.1}},
            )
        )
    )
    assert own.classes == ("liver", "tumour") and own.regions is None
    for stage in ("pretrain", "finetune"):
        theirs, ours = resolve(get_task("brats"), stage, "demo"), resolve(own, stage, "demo")
        different = {k for k in vars(theirs) if getattr(theirs, k) != getattr(ours, k)}
        assert different == {"flip_prob", "spacing_mm"} | ({"overlap"} if stage == "finetune" else set())
        assert ours.flip_prob == 0.4 and ours.spacing_mm == (3, 3, 3)
    # Without labels of its own a list has the classes of the task it is like.
    content = json.loads((tmp_path / "list.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps({k: v for k, v in content.items() if k != "labels"}))
    assert get_task(str(tmp_path / "list.json")).regions == get_task("brats").regions


def pictures(folder: Path, n: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / f"i{i:02d}.png")
    return [f"i{i:02d}.png" for i in range(n)]


def write_csv(
    file: Path, header: list[str], rows: list[list], encoding: str = "utf-8", newline: str = "\n"
) -> Path:
    with file.open("w", newline="", encoding=encoding) as handle:
        csv.writer(handle, lineterminator=newline).writerows([header, *rows])
    return file


def test_csv_with_a_class_column_with_zeros_and_ones_and_from_windows_say_the_same(tmp_path):
    names = pictures(tmp_path, 4)
    words, ones = ["mass | nodule", "No Finding", "nodule", "mass"], [[1, 1], [0, 0], [0, 1], [1, 0]]
    files = [
        write_csv(tmp_path / "class.csv", ["image", "class"], [[n, w] for n, w in zip(names, words)]),
        write_csv(tmp_path / "ones.csv", ["image", "mass", "nodule"], [[n, *o] for n, o in zip(names, ones)]),
        write_csv(
            tmp_path / "windows.csv",
            ["image", "class"],
            [[n, w] for n, w in zip(names, words)],
            "utf-8-sig",
            "\r\n",
        ),
    ]
    for file in files:
        task = get_task(str(file))
        assert (task.kind, task.classes, task.in_chans) == ("classification", ("mass", "nodule"), 1)
        cases = {c["case"]: c for part in task.read_splits(Path(""), 0, 0).values() for c in part}
        assert [cases[n[:-4]]["label"].tolist() for n in names] == ones


def test_csv_says_the_split_and_the_patient_of_each_image(tmp_path):
    names = pictures(tmp_path, 6)
    splits, patients = ["train", "Training", "val", "valid", "test", "testing"], list("aabbcc")
    file = write_csv(
        tmp_path / "list.csv",
        ["image", "class", "split", "patient"],
        [[n, "x", s, p] for n, s, p in zip(names, splits, patients)],
    )
    made = get_task(str(file)).read_splits(Path(""), 0, 0)
    for part, patient, two in (("train", "a", names[:2]), ("val", "b", names[2:4]), ("test", "c", names[4:])):
        assert [(Path(c["image"]).name, c["patient"]) for c in made[part]] == [(n, patient) for n in two]


def test_csv_of_masks_names_their_values_in_the_header(tmp_path):
    write_list(tmp_path, 3, 0)
    file = write_csv(
        tmp_path / "list.csv",
        ["image", "label=liver|tumour"],
        [[f"images/p{i}.nii.gz", f"labels/p{i}.nii.gz"] for i in range(3)],
    )
    task = get_task(str(file))
    assert (task.kind, task.classes) == ("segmentation", ("liver", "tumour"))
    made = task.read_splits(Path(""), 0, 0)
    assert (
        all(Path(c["label"]).is_file() for part in made.values() for c in part)
        and sum(map(len, made.values())) == 3
    )


def test_a_tenth_of_the_patients_is_held_out_where_the_list_has_no_validation(tmp_path):
    names = pictures(tmp_path, 40)
    rows = [[n, "x" if i % 2 else "y", f"patient{i // 2}"] for i, n in enumerate(names)]
    made = get_task(str(write_csv(tmp_path / "list.csv", ["image", "class", "patient"], rows))).read_splits(
        Path(""), 0, 0
    )
    held, rest = ({c["patient"] for c in made[part]} for part in ("val", "train"))
    assert len(held) == 2 and len(rest) == 18 and not held & rest
    assert len(made["val"]) == 4 and len(made["train"]) == 36


@pytest.mark.slow
def test_a_csv_list_of_radiographs_trains_evaluates_and_predicts(smae, tiny, bare, cxr14, tmp_path):
    found = sorted(cxr14.rglob("*.png"))[:20]
    for file in found:
        shutil.copy(file, tmp_path / file.name)
    rows = [
        [f.name, i % 2, f.name.split("_")[0], "test" if i >= 14 else "train"] for i, f in enumerate(found)
    ]
    patients = {r[2] for r in rows if r[3] == "test"}
    rows = [r for r in rows if r[3] == "test" or r[2] not in patients]
    file = write_csv(tmp_path / "list.csv", ["image", "big heart", "patient", "split"], rows)
    for stage, more in (("pretrain", []), ("finetune", ["--init", tmp_path / "pretrain"])):
        settings = [f"{k}={v}" for k, v in {**tiny["cxr14", stage], "steps": 2}.items()]
        code, _, err = smae(
            stage, "--task", file, "--preset", bare, "--out", tmp_path / stage, *more, "--set", *settings
        )
        assert code == 0, err
    assert smae("evaluate", tmp_path / "finetune")[0] == 0
    assert (
        smae("predict", tmp_path / "finetune", found[0], found[15], "--out", tmp_path / "out", "--occlusion")[
            0
        ]
        == 0
    )
    table = pd.read_csv(tmp_path / "out" / "probabilities.csv")
    assert (
        list(table.columns) == ["case", "big heart", "image"]
        and len(table) == 2
        and list(table.image) == [str(found[0]), str(found[15])]
        and table["big heart"].between(0, 1).all()
    )
    scored = pd.read_csv(tmp_path / "finetune" / "metrics.csv").set_index("case").score
    assert table.iloc[1]["big heart"] == pytest.approx(scored[found[15].stem], abs=1e-3)
    assert (tmp_path / "out" / f"{found[0].stem}_occlusion.png").is_file()


@pytest.fixture
def perfect(monkeypatch, trained):
    """Predict with a network that knows the labels: they are prepared as the scan is, and go back as a
    prediction does.
    """

    def call(pairs: list[tuple[Path, Path]], out: Path, run: Path = trained) -> pd.DataFrame:
        _, task, settings = load_finetuned(Run(run))
        left = iter(pairs)

        def known(*_) -> torch.Tensor:
            image, label = next(left)
            prepared = build_transform(task, settings, with_label=True)(
                {"case": "c", "image": str(image), "label": str(label)}
            )["label"][0]
            return (
                torch.nn.functional.one_hot(prepared.as_tensor().long(), len(task.classes) + 1)
                .movedim(-1, 0)
                .float()
            )

        monkeypatch.setattr(Predictor, "probabilities", known)
        return predict.predict(run, [image for image, _ in pairs], out, report=quiet)

    return call


def on_the_grid_of(mask: Path, image: Path) -> np.ndarray:
    """The mask's voxels, after the checks that every viewer relies on."""
    ours, theirs = nib.load(mask), nib.load(image)
    assert ours.shape == theirs.shape[:3]
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    assert ours.header.get_xyzt_units()[0] == theirs.header.get_xyzt_units()[0]
    assert np.issubdtype(ours.get_data_dtype(), np.integer)
    return np.asarray(ours.dataobj)


def volumes_fit(table: pd.DataFrame, case: str, mask: Path, names=("liver", "tumour")) -> None:
    stored = nib.load(mask)
    voxel = np.prod(nib.affines.voxel_sizes(stored.affine)) / 1000
    row = table.set_index("case").loc[case]
    for value, name in enumerate(names, start=1):
        assert row[f"{name} (ml)"] == pytest.approx(
            (np.asarray(stored.dataobj) == value).sum() * voxel, abs=6e-4
        )


@pytest.mark.slow
def test_masks_lie_on_the_scans_own_grid_for_all_48_orientations(perfect, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "_picture", lambda *_: None)  # 48 pictures would take most of the time
    image, label = phantom()
    affine = nib.affines.from_matvec(np.diag(SPACING), [-30, 12, 55])
    pairs, codes = [], set()
    for number, orientation in enumerate(ORIENTATIONS):
        pair = []
        for kind, values in (("image", image), ("label", label)):
            turned = nib.Nifti1Image(values, affine).as_reoriented(orientation)
            pair.append(tmp_path / kind / f"s{number:02d}.nii.gz")
            write(pair[-1], np.asarray(turned.dataobj), turned.affine)
        codes.add(nib.aff2axcodes(turned.affine))
        pairs.append(tuple(pair))
    assert len(codes) == 48
    perfect(pairs, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "volumes.csv")
    for scan, truth in pairs:
        mask = on_the_grid_of(tmp_path / "out" / scan.name, scan)
        expected = np.asarray(nib.load(truth).dataobj)
        assert min(dsc(mask == v, expected == v) for v in (1, 2)) > 0.9, scan.name
        volumes_fit(table, scan.name[:3], tmp_path / "out" / scan.name)


def turned_affine() -> np.ndarray:
    a, b = 0.35, 0.2
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return nib.affines.from_matvec(about_z @ about_x @ np.diag(SPACING), [10, -20, 5])


@pytest.mark.parametrize(
    ("shape", "affine", "least"),
    [
        (SHAPE, turned_affine(), 0.85),
        ((20, 18, 1), None, 0.85),
        ((1, 18, 16), None, 0.85),
        ((5, 5, 5), None, 0.6),
    ],
    ids=["oblique", "one slice", "one sagittal slice", "tiny"],
)
def test_masks_of_odd_scans_lie_on_their_own_grid(perfect, tmp_path, shape, affine, least):
    image, label = phantom(shape=shape)
    write(tmp_path / "scan.nii.gz", image, affine)
    write(tmp_path / "label" / "scan.nii.gz", label, affine)
    table = perfect([(tmp_path / "scan.nii.gz", tmp_path / "label" / "scan.nii.gz")], tmp_path / "out")
    mask = on_the_grid_of(tmp_path / "out" / "scan.nii.gz", tmp_path / "scan.nii.gz")
    present = [v for v in (1, 2) if (label == v).any()]
    assert present and min(dsc(mask == v, label == v) for v in present) > least
    volumes_fit(table, "scan", tmp_path / "out" / "scan.nii.gz")


def test_units_that_a_header_does_not_give_stay_unknown(trained, tmp_path):
    image, _ = phantom()
    write(tmp_path / "scan.nii.gz", image, units=(None, None))
    predict.predict(trained, [tmp_path / "scan.nii.gz"], tmp_path / "out", report=quiet)
    on_the_grid_of(tmp_path / "out" / "scan.nii.gz", tmp_path / "scan.nii.gz")


def test_tumour_masks_hold_the_labels_of_the_challenge_and_their_regions_are_nested(
    brats, tiny, bare, tmp_path, monkeypatch
):
    run = finetune(
        "brats",
        brats,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["brats", "finetune"], "steps": 1},
        report=quiet,
    )
    cases = build_splits(get_task("brats"), brats, FinetuneSettings())["test"]
    generator = torch.Generator().manual_seed(0)

    def noise(model, image, *_) -> torch.Tensor:  # regions that contradict each other everywhere
        coarse = torch.rand(1, 3, 4, 4, 4, generator=generator)
        return torch.nn.functional.interpolate(coarse, size=image.shape[1:], mode="trilinear")[0]

    monkeypatch.setattr(Predictor, "probabilities", noise)
    table = predict.predict(
        run.path, [c["image"] for c in cases], tmp_path / "out", probabilities=True, report=quiet
    ).set_index("case")
    for case in cases:
        mask = on_the_grid_of(tmp_path / "out" / f"{case['case']}.nii.gz", Path(case["image"]))
        assert set(np.unique(mask)) == {0, 1, 2, 3}
        sure = np.asarray(nib.load(tmp_path / "out" / f"{case['case']}_probabilities.nii.gz").dataobj) > 0.5
        whole = sure[..., 0]
        core = whole & sure[..., 1]
        regions = {"WT": whole, "TC": core, "ET": core & sure[..., 2]}
        voxel = np.prod(nib.affines.voxel_sizes(nib.load(case["image"]).affine)) / 1000
        for (name, expected), values in zip(regions.items(), ((1, 2, 3), (2, 3), (3,))):
            assert np.array_equal(np.isin(mask, values), expected)
            assert table.loc[case["case"], f"{name} (ml)"] == pytest.approx(expected.sum() * voxel, abs=6e-4)


@pytest.fixture(scope="module")
def classifier(cxr14, tiny, bare, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "run"
    finetune(
        "cxr14", cxr14, out, preset=bare, overrides={**tiny["cxr14", "finetune"], "steps": 8}, report=quiet
    )
    return out


def test_probabilities_of_radiographs_are_those_of_the_classifier(classifier, cxr14, tmp_path):
    model, task, settings = load_finetuned(Run(classifier))
    predictor = Predictor.of(model, task, settings)
    cases = build_splits(task, cxr14, settings)["test"]
    predict.predict(classifier, [c["image"] for c in cases], tmp_path / "out", report=quiet)
    written = pd.read_csv(tmp_path / "out" / "probabilities.csv")
    expected = predictor.classify(predictor.scans(cases))
    assert list(written.columns[1:-1]) == list(task.classes)
    np.testing.assert_allclose(written[list(task.classes)].to_numpy(), expected, atol=1e-3)
    assert np.ptp(expected, axis=0).max() > 1e-3  # else any order of the images would pass


def test_a_radiograph_of_16_bits_gives_the_probabilities_of_its_8_bit_twin(classifier, cxr14, tmp_path):
    source = next(iter(sorted(cxr14.rglob("*.png"))))
    values = np.asarray(Image.open(source).convert("L"), np.float64)
    values = (values - values.min()) / np.ptp(values)
    Image.fromarray((values * 255).round().astype(np.uint8)).save(tmp_path / "eight.png")
    # 12 bits in 16, as detectors give.
    Image.fromarray((values * 4095).round().astype(np.uint16)).save(tmp_path / "sixteen.png")
    assert Image.open(tmp_path / "sixteen.png").mode.startswith("I")
    table = predict.predict(
        classifier, [tmp_path / "eight.png", tmp_path / "sixteen.png"], tmp_path / "out", report=quiet
    )
    numbers = table.drop(columns=["case", "image"]).to_numpy(float)
    assert np.abs(numbers[0] - numbers[1]).max() < 0.02


def test_nothing_is_written_into_a_folder_that_is_not_empty_nor_for_a_scan_that_cannot_be_read(
    smae, trained, tmp_path
):
    image, _ = phantom()
    write(tmp_path / "scan.nii.gz", image)
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "scan.nii.gz").read_bytes()[:2000])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, err = smae("predict", trained, tmp_path / "scan.nii.gz", "--out", tmp_path / "out")
    assert code == 2 and "not empty" in err and [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    code, _, err = smae(
        "predict", trained, tmp_path / "scan.nii.gz", tmp_path / "cut.nii.gz", "--out", tmp_path / "new"
    )
    assert code == 2 and "cut.nii.gz" in err and not (tmp_path / "new").exists()


def test_check_of_a_clean_list_names_every_case_and_gives_zero(smae, small, tmp_path):
    code, out, err = smae("check", write_list(tmp_path, settings=small))
    assert code == 0 and err == ""
    assert all(sum(line.split()[1:2] == [f"p{i}"] for line in out.splitlines()) == 1 for i in range(6)), out
    assert "pretrain with preset small" in out and "no training case" not in out


def spoiled(name: str, folder: Path) -> str:
    """Damage one file of a list; its path."""
    image, label = phantom(1)
    target, mask = folder / "images" / "p1.nii.gz", folder / "labels" / "p1.nii.gz"
    if name == "cut":
        target.write_bytes(target.read_bytes()[:1000])
    if name == "nan":
        image[0, 0, 0] = np.nan
        write(target, image)
    if name == "constant":
        write(target, image * 0)
    if name == "singular":
        broken = nib.load(target)
        broken.header.set_sform(np.diag([3.0, 0, 4, 1]), 1)
        broken.header.set_qform(None, 0)
        nib.save(nib.Nifti1Image(image, None, broken.header), target)
    if name == "channels":
        write(target, np.stack([image, image], -1))
    if name == "flat":
        write(target, image[:, :, 0])
    if name == "moved":
        write(mask, label, np.array([[3.0, 0, 0, 30], [0, 3.5, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]]))
        return str(mask)
    if name == "values":
        write(mask, label * 9)
        return str(mask)
    if name == "shape":
        write(mask, label[:-2])
        return str(mask)
    return str(target)


@pytest.mark.parametrize(
    "name", ["cut", "nan", "constant", "singular", "channels", "flat", "moved", "values", "shape"]
)
def test_check_gives_each_fault_a_line_that_names_the_file(smae, monkeypatch, tmp_path, name):
    monkeypatch.setattr(check_report, "estimate", lambda *_, **__: [])  # measures the machine for seconds
    file = write_list(tmp_path)
    path = spoiled(name, tmp_path)
    code, out, err = smae("check", file)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and path in err, err
    assert "1 errors" in out and "p0" in out  # the other cases are looked at all the same


def test_check_names_every_file_that_is_not_there(smae, tmp_path):
    file = write_list(tmp_path)
    for name in ("images/p1.nii.gz", "labels/p2.nii.gz", "labels/p4.nii.gz"):
        (tmp_path / name).unlink()
    code, _, err = smae("check", file)
    assert code == 2 and err.count("\n") == 1 and "do not exist" in err
    assert [name in err for name in ("images/p1", "labels/p2", "labels/p4", "images/p2")] == [
        True,
        True,
        True,
        False,
    ]


def contradictory(path: Path, image: np.ndarray, affine: np.ndarray, sizes) -> str:
    """A NIfTI whose affine is in its sform alone, beside voxel sizes that say otherwise."""
    header = nib.Nifti1Header()
    header.set_data_shape(image.shape)
    header["pixdim"][1:4] = sizes
    header.set_sform(affine, 1)
    nib.save(nib.Nifti1Image(image, None, header), path)
    return str(path)


def test_a_header_that_contradicts_itself_is_told_and_read_by_its_affine_as_viewers_do(
    trained, monkeypatch, tmp_path
):
    monkeypatch.setattr(check_report, "estimate", lambda *_, **__: [])
    image, _ = phantom(3)
    affine = np.array([[-3.0, 0, 0, 20], [0, -3.5, 0, 30], [0, 0, 4, -7], [0, 0, 0, 1]])
    odd = contradictory(tmp_path / "odd.nii.gz", image, affine, (3, 3.7, 4))
    write(tmp_path / "even.nii.gz", image, affine)
    write(tmp_path / "other.nii.gz", phantom(4)[0], affine)
    (tmp_path / "list.json").write_text(json.dumps({"training": ["odd.nii.gz", "other.nii.gz"]}))
    made = checking.check(str(tmp_path / "list.json"), say=quiet)
    assert made.problems == [] and any(
        "odd.nii.gz: voxel sizes 3x3.7x4 mm, by its affine 3x3.5x4" in line for line in made.remarks
    )
    assert not any("other.nii" in line for line in made.remarks) and set(made.table.orientation) == {"LPS"}
    predict.predict(trained, [odd, str(tmp_path / "even.nii.gz")], tmp_path / "out", report=quiet)
    one, other = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in ("odd", "even"))
    np.testing.assert_allclose(one.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))


def test_check_names_a_qform_that_lies_elsewhere_than_the_sform(tmp_path, monkeypatch):
    monkeypatch.setattr(check_report, "estimate", lambda *_, **__: [])
    scan = nib.Nifti1Image(phantom()[0], np.diag([*SPACING, 1.0]))
    scan.set_qform(np.array([[3.0, 0, 0, 12], [0, 3.5, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]]), 1)
    nib.save(scan, tmp_path / "a.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": ["a.nii.gz"]}))
    assert any(
        "qform lies up to 12 mm away" in line
        for line in checking.check(str(tmp_path / "list.json"), say=quiet).remarks
    )


def test_check_looks_at_the_headers_of_masks_and_of_each_channel_and_survives_a_qform_that_is_no_rotation(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(check_report, "estimate", lambda *_, **__: [])
    image, label = phantom()
    affine = np.diag([*SPACING, 1.0])
    write(tmp_path / "a.nii.gz", image, affine)
    contradictory(tmp_path / "b.nii.gz", image, affine, (1, 1, 1))
    odd = nib.Nifti1Image(label, affine)
    odd.set_qform(affine, 1)
    odd.header["quatern_b"], odd.header["quatern_c"] = 0.9, 0.9
    nib.save(nib.Nifti1Image(label, None, odd.header), tmp_path / "mask.nii.gz")
    (tmp_path / "list.json").write_text(
        json.dumps(
            {"labels": LABELS, "training": [{"image": ["a.nii.gz", "b.nii.gz"], "label": "mask.nii.gz"}]}
        )
    )
    made = checking.check(str(tmp_path / "list.json"), say=quiet)
    assert made.problems == []
    told = next(line for line in made.remarks if "contradict" in line)
    assert (
        "b.nii.gz: voxel sizes 1x1x1" in told
        and "mask.nii.gz: its qform is no rotation" in told
        and "a.nii.gz: " not in told
    )


@pytest.mark.slow
def test_check_estimates_the_memory_of_scans_that_are_kept_by_their_own_size(smae, small, tmp_path):
    file = write_list(tmp_path, 4, 0, settings={**small, "spacing_mm": [3, 3, 3]})
    write(tmp_path / "images" / "p0.nii.gz", phantom(0)[0])
    table = checking.check(str(file), preset="demo", say=quiet).table
    voxels = check_report._prepared_voxels(table, get_task(str(file)), "demo")
    assert voxels == pytest.approx(np.prod(SHAPE) * np.prod(SPACING) / 27)
    more, less = (estimate(get_task(str(file)), 4, "demo", v)[0] for v in (1e9, 1.0))
    assert "16.0 GB for scans" in more and "0.0 GB for scans" in less


def test_check_proposes_the_spacing_in_the_order_of_axes_that_training_uses(tmp_path):
    image, label = phantom()
    turned = nib.Nifti1Image(image, np.diag([*SPACING, 1.0])).as_reoriented(
        np.array([[2, -1], [0, 1], [1, -1]], float)
    )
    write(tmp_path / "a.nii.gz", np.asarray(turned.dataobj), turned.affine)
    (tmp_path / "list.json").write_text(json.dumps({"training": ["a.nii.gz"]}))
    made = checking.check(str(tmp_path / "list.json"), say=quiet)
    assert nib.aff2axcodes(turned.affine) != ("R", "A", "S") and made.proposal["spacing_mm"] == list(SPACING)


def test_check_tells_class_one_from_class_eleven(tmp_path, monkeypatch):
    monkeypatch.setattr(check_report, "estimate", lambda *_, **__: [])
    file = write_list(tmp_path, 1, 0, labels={str(i): f"organ{i}" for i in range(1, 12)})
    write(tmp_path / "labels" / "p0.nii.gz", np.where(phantom(0)[1] == 1, 11, 0).astype(np.uint8))
    remarks = " ".join(checking.check(str(file), say=quiet).remarks)
    assert "'organ1' occurs in no train" in remarks and "'organ11'" not in remarks


def test_a_scan_whose_header_counts_in_micrometres_is_refused(tmp_path):
    import nibabel as nib

    from smae_utils.data.reading import ReadScan
    from smae_utils.errors import UserError

    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "micro.nii.gz")
    with pytest.raises(UserError, match="micro.nii.gz counts in micrometres"):
        ReadScan(["image"])({"image": str(tmp_path / "micro.nii.gz")})


def test_a_run_means_the_same_after_its_list_was_changed_or_moved_away(tmp_path, tiny, bare):
    import json

    import nibabel as nib

    from smae_utils.predict_files import predict
    from smae_utils.work.finetune import finetune
    from smae_utils.work.rebuild import load_finetuned
    from smae_utils.work.run_folder import Run

    rng = np.random.default_rng(0)
    for i in range(4):
        nib.save(
            nib.Nifti1Image(
                rng.uniform(-200, 200, (20, 20, 20)).astype(np.float32), np.eye(4) * [8, 8, 8, 1]
            ),
            tmp_path / f"{i}.nii.gz",
        )
        nib.save(
            nib.Nifti1Image(rng.integers(0, 2, (20, 20, 20)).astype(np.uint8), np.eye(4) * [8, 8, 8, 1]),
            tmp_path / f"{i}_l.nii.gz",
        )
    content = {
        "labels": {"1": "lesion"}, "window": [-100, 100], "spacing_mm": [8, 8, 8], "modality": {"0": "CT"},
        "training": [{"image": f"{i}.nii.gz", "label": f"{i}_l.nii.gz"} for i in range(4)],
    }  # fmt: skip
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps(content))
    values = {k: v for k, v in tiny["btcv", "finetune"].items() if k != "spacing_mm"}
    run = finetune(str(listing), "", tmp_path / "run", preset=bare, overrides=values, report=[].append)
    before = predict(run.path, [tmp_path / "0.nii.gz"], tmp_path / "a", report=[].append)
    listing.write_text(json.dumps({**content, "window": [-1000, 3000], "labels": {"1": "spleen"}}))
    assert predict(run.path, [tmp_path / "0.nii.gz"], tmp_path / "b", report=[].append).equals(before)
    listing.unlink()
    assert load_finetuned(Run(run.path))[1].window == (-100.0, 100.0)
    assert predict(run.path, [tmp_path / "0.nii.gz"], tmp_path / "c", report=[].append).equals(before)


def test_a_list_of_dicom_radiographs_is_a_2d_task(tmp_path):
    from smae_utils.data.tasks import get_task

    (tmp_path / "list.csv").write_text("image,class,\na.dcm,sick,\nb.dcm,well,\n")
    task = get_task(str(tmp_path / "list.csv"))
    assert (task.spatial_dims, task.kind, task.classes) == (2, "classification", ("sick", "well"))


def test_a_full_disk_during_predict_leaves_nothing(brats, tiny, bare, tmp_path, monkeypatch):
    from smae_utils.data import writing as module
    from smae_utils.data.tasks import get_task
    from smae_utils.work.finetune import finetune
    from smae_utils.work.settings import FinetuneSettings

    run = finetune(
        "brats",
        brats,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["brats", "finetune"], "steps": 1},
        report=[].append,
    )
    scans = [c["image"] for c in build_splits(get_task("brats"), brats, FinetuneSettings())["train"][:2]]
    calls, save = [], module.save_nifti

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(module, "save_nifti", full)
    with pytest.raises(OSError, match="No space"):
        predict.predict(run.path, scans, tmp_path / "out", report=[].append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_files_of_one_name_in_folders_of_patients_get_the_folders_before_their_names(tmp_path):
    for folder in ("p1/a", "p2/a", "p2/b", "p3"):
        write(tmp_path / folder / "T1.nii.gz", phantom(len(folder))[0])
    write(tmp_path / "p3" / "other.nii.gz", phantom(9)[0])
    files = ["p1/a/T1.nii.gz", "p2/a/T1.nii.gz", "p2/b/T1.nii.gz", "p3/T1.nii.gz", "p3/other.nii.gz"]
    (tmp_path / "list.json").write_text(json.dumps({"training": files[:4], "test": files[4:]}))
    made = get_task(str(tmp_path / "list.json")).read_splits(Path(""), 0, 0)
    assert {c["case"] for part in made.values() for c in part} == {
        "p1_a_T1",
        "p2_a_T1",
        "b_T1",
        "p3_T1",
        "other",
    }


def listed(tmp_path: Path, n: int = 6, **more) -> Path:
    names = pictures(tmp_path, n)
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": name} for name in names], **more}))
    return tmp_path / "list.json"


def test_minus_one_is_unknown_and_never_a_class(tmp_path):
    names = pictures(tmp_path, 5)
    labels = [0, 1, 2, -1, {"0": 1, "1": -1, "2": 0}]
    (tmp_path / "list.json").write_text(
        json.dumps(
            {
                "training": [{"image": n, "label": v} for n, v in zip(names, labels)],
                "classes": ["0", "1", "2"],
            }
        )
    )
    for more in ({"classes": ["0", "1", "2"]}, {}):
        content = json.loads((tmp_path / "list.json").read_text())
        content.pop("classes", None)
        content["training"] = content["training"] if more else content["training"][:4]
        (tmp_path / "list.json").write_text(json.dumps({**content, **more}))
        task = get_task(str(tmp_path / "list.json"))
        assert task.classes == ("0", "1", "2")
        cases = {c["case"]: c for part in task.read_splits(Path(""), 0, 0).values() for c in part}
        assert "label" not in cases["i03"] and cases["i02"]["label"].tolist() == [0, 0, 1]
        assert not more or np.array_equal(cases["i04"]["label"], [1, np.nan, 0], equal_nan=True)


def test_check_and_predict_take_lists_whose_folds_start_at_one_or_whose_masks_are_elsewhere(
    smae, small, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(check_report, "estimate", lambda *_, **__: [])
    file = write_list(tmp_path, 4, 0, settings=small)
    content = json.loads(file.read_text())
    for i, entry in enumerate(content["training"]):
        entry["fold"] = 1 + i % 2
    file.write_text(json.dumps(content))
    assert smae("check", file)[0] == 0
    assert "no training entry has fold 0" in smae("finetune", "--task", file, "--out", tmp_path / "run")[2]
    shutil.rmtree(tmp_path / "labels")
    assert smae("predict", trained, file, "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 4


def test_a_window_is_refused_for_2d_images_and_so_are_labels_that_a_picture_cannot_hold(tmp_path):
    from smae_utils.errors import UserError

    with pytest.raises(UserError, match="'window' is for 3D scans"):
        get_task(str(listed(tmp_path, window=[0, 100])))
    entries = [{"image": "i00.png", "label": "i01.png"}]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries, "labels": {"1": "a", "70000": "b"}}))
    with pytest.raises(UserError, match="0 .. 65535"):
        get_task(str(tmp_path / "list.json"))


def test_a_run_on_a_list_like_a_known_task_keeps_the_mean_over_its_subset(tmp_path):
    from smae_utils.data.tasks.from_run import record_of, task_from_record

    file = write_list(tmp_path, 2, 0, like="btcv")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "labels"}))
    task = get_task(str(file))
    assert len(task.subset) == 8 and task_from_record(str(file), record_of(task)).subset == task.subset


def test_unknown_targets_and_ignored_voxels_are_drawn(tmp_path):
    from smae_utils.show import plots, result_plots

    figure = plots.show_cases([np.ones((8, 8, 8))], ["c"], [np.full((8, 8, 8), 255, np.uint8)], ("liver",))
    assert figure is not None
    name = pictures(tmp_path, 1)[0]
    task = replace(get_task("cxr14"), classes=("a", "b"))
    table = pd.DataFrame(
        {"case": "c", "class": ["a", "b"], "target": pd.array([1, None], dtype="Int64"), "score": [0.5, 0.5]}
    )
    drawn = result_plots.show_test_case(
        task, {"case": "c", "image": str(tmp_path / name)}, {}, {"self": table}, "c"
    )
    assert [t.get_text() for t in drawn.axes[1].get_yticklabels()] == ["> a", "b"]
