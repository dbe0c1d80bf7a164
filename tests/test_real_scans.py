"""What a user does, on real labelled scans of four kinds: look, pre-train, fine-tune, score, predict. A few
steps: figures mean nothing here.

The scans are not part of the repository. They are looked for in the folder that SMAE_REAL_SCANS names, or
beside the clone, by these names: `hippocampus/` (Medical Segmentation Decathlon, Task04), `nih_cxr14_64px/`
(a part of ChestX-ray14 at 64 pixels), `brats2015/`, `totalsegmentator_example/`.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from smae_utils.cli import main

pytestmark = pytest.mark.slow  # each chain pre-trains, fine-tunes, scores and predicts real scans
ROOT = Path(__file__).parents[1]
NET = [
    "patch_size=8",
    "embed_dim=48",
    "depth=3",
    "num_heads=4",
    "batch_size=2",
    "warmup_steps=0",
    "log_every=5",
    "precision=fp32",
]


def folder(name: str) -> Path:
    """The folder of one of the data sets."""
    places = (
        [Path(os.environ["SMAE_REAL_SCANS"])]
        if "SMAE_REAL_SCANS" in os.environ
        else [*ROOT.parent.glob("*/data"), *ROOT.parent.glob("*")]
    )
    for place in places:
        if (place / name).is_dir():
            return place / name
    pytest.skip(f"no folder {name} with real scans beside the clone or in SMAE_REAL_SCANS")


def smae(capsys, *words) -> str:
    """Run a command that has to work; what it printed."""
    capsys.readouterr()
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def chain(capsys, task: Path, out: Path, scans: list[Path], more: list[str], data: list = ()) -> pd.DataFrame:
    """Pre-train, fine-tune from it, score, predict `scans`; the scores."""
    finetune = ["select=last"] if "crop_size=[64,64]" in more else ["feature_size=4", "overlap=0.25"]
    smae(capsys, "pretrain", "--task", task, *data, "--out", out / "pre", "--set", *NET, "steps=5", *more)
    told = smae(
        capsys,
        "finetune",
        "--task",
        task,
        *data,
        "--out",
        out / "run",
        "--init",
        out / "pre",
        "--set",
        *NET,
        "steps=10",
        *more,
        *finetune,
    )
    assert "loaded" in told
    smae(capsys, "evaluate", out / "run")
    smae(capsys, "predict", out / "run", *scans, "--out", out / "new")
    return pd.read_csv(out / "run" / "metrics.csv")


def test_hippocampus_in_the_layout_of_the_decathlon(capsys, tmp_path):
    source = folder("hippocampus")
    told = smae(capsys, "check", source / "dataset.json")
    assert (
        len(told.splitlines()) < 40
        and "0 errors" in told
        and '"spacing_mm": [1.0, 1.0, 1.0]' in told
        and "test_share" in told
    )
    scan = source / "imagesTr" / "hippocampus_001.nii.gz"
    more = [
        "crop_size=[32,48,32]",
        "spacing_mm=[1,1,1]",
        "test_share=0.03",
        "cache_rate=0",
        "train_on_val=false",
        "val_every=0",
    ]
    scores = chain(capsys, source / "dataset.json", tmp_path, [scan], more)
    assert (
        set(scores["class"]) == {"Anterior", "Posterior"}
        and scores.case.nunique() == 8
        and scores.dsc.between(0, 1).all()
    )
    mask, image = nib.load(tmp_path / "new" / "hippocampus_001.nii.gz"), nib.load(scan)
    assert (
        mask.shape == image.shape
        and np.allclose(mask.affine, image.affine)
        and set(np.unique(mask.dataobj)) <= {0, 1, 2}
    )


def test_radiographs_from_a_table_grouped_by_patient(capsys, tmp_path):
    source = folder("nih_cxr14_64px")
    with (source / "labels.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    lines = ["image,PatientID,split,Effusion,abnormal"]
    lines += [
        f"images/{r['Image Index']},{r['Patient ID']},{r['chexnet_split']},{r['Effusion']},{r['abnormal']}"
        for r in rows
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    told = smae(capsys, "check", tmp_path / "list.csv", "--data", source)
    assert (
        len(told.splitlines()) < 20
        and "725 train, 94 val, 181 test" in told
        and "Effusion 170" in told
        and "abnormal 500" in told
    )
    scan = source / "images" / "00000001_000.png"
    scores = chain(
        capsys,
        tmp_path / "list.csv",
        tmp_path,
        [scan],
        ["crop_size=[64,64]", "batch_size=16", "val_every=0"],
        ["--data", source],
    )
    truth = {r["Image Index"].removesuffix(".png"): int(r["Effusion"]) for r in rows}
    effusion = scores[scores["class"] == "Effusion"]
    assert len(effusion) == 181 and all(
        truth[case] == target for case, target in zip(effusion.case, effusion.target)
    )
    # Somebody who takes the split that mixes patients is told.
    (tmp_path / "leak.csv").write_text(
        "\n".join(
            lines[:1]
            + [line.replace(",train,", ",test,", 1) if i % 2 else line for i, line in enumerate(lines[1:40])]
        )
    )
    assert main(["check", str(tmp_path / "leak.csv"), "--data", str(source)]) == 2
    assert "is in train and in test" in capsys.readouterr().err


def test_tumours_of_two_channels_in_two_files_with_regions(capsys, tmp_path):
    source = folder("brats2015")
    entries = []
    for patient in sorted(p for p in source.iterdir() if p.is_dir()):
        files = [str(patient / f"{name}_subtrMeanDivStd.nii.gz") for name in ("Flair", "T1c")]
        entries.append({"case": patient.name, "image": files, "label": str(patient / "OTMultiClass.nii.gz")})
    labels = {"background": 0, "whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": [4]}
    content = {
        "channel_names": {"0": "FLAIR", "1": "T1c"},
        "labels": labels,
        "spacing_mm": [4, 4, 4],
        "sided": False,
    }
    content |= {"training": entries[:3], "validation": entries[3:4], "test": entries[4:5]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    assert "0 errors" in smae(capsys, "check", tmp_path / "list.json")
    (tmp_path / "new.json").write_text(
        json.dumps({**content, "training": entries[5:], "validation": [], "test": []})
    )
    more = ["crop_size=[32,32,32]", "val_every=0", "train_on_val=false", "spacing_mm=[4,4,4]"]
    scores = chain(capsys, tmp_path / "list.json", tmp_path, [tmp_path / "new.json"], more)
    predicted = np.asarray(
        nib.load(tmp_path / "run" / "predictions" / f"{entries[4]['case']}.nii.gz").dataobj
    )
    label = np.asarray(nib.load(entries[4]["label"]).dataobj)
    for name, values in list(labels.items())[1:]:
        p, t = np.isin(predicted, values), np.isin(label, values)
        assert scores.set_index("class").dsc[name] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
    volumes = pd.read_csv(tmp_path / "new" / "volumes.csv").iloc[0]
    assert volumes["whole (ml)"] >= volumes["core (ml)"] >= volumes["enhancing (ml)"]
    assert set(np.unique(predicted)) <= set(range(5))


def test_many_structures_whose_numbers_have_gaps(capsys, tmp_path):
    source = folder("totalsegmentator_example")
    scan, mask = source / "example_ct_sm.nii.gz", source / "example_seg.nii.gz"
    values = [int(v) for v in np.unique(nib.load(mask).dataobj) if v]
    assert values != list(range(1, len(values) + 1))
    half = np.asarray(nib.load(scan).dataobj)[::-1].copy()  # a second patient: the first in a mirror
    nib.save(nib.Nifti1Image(half, nib.load(scan).affine), tmp_path / "mirror.nii.gz")
    nib.save(
        nib.Nifti1Image(np.asarray(nib.load(mask).dataobj)[::-1].copy(), nib.load(mask).affine),
        tmp_path / "mirror_seg.nii.gz",
    )
    content = {
        "modality": {"0": "CT"},
        "labels": {"background": 0, **{f"structure {v}": v for v in values}},
        "window": [-175, 250],
        "spacing_mm": [6, 6, 6],
    }
    content |= {
        "training": [{"image": str(scan), "label": str(mask)}],
        "test": [{"image": "mirror.nii.gz", "label": "mirror_seg.nii.gz"}],
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    told = smae(capsys, "check", tmp_path / "list.json")
    assert "0 errors" in told and '"window": [-175.0, 250.0]' in told
    more = ["crop_size=[32,32,16]", "batch_size=1", "spacing_mm=[6,6,6]", "val_every=0"]
    scores = chain(capsys, tmp_path / "list.json", tmp_path, [scan], more)
    assert len(scores) == len(values)
    predicted = np.asarray(nib.load(tmp_path / "new" / "example_ct_sm.nii.gz").dataobj)
    assert predicted.shape == nib.load(scan).shape and set(np.unique(predicted)) <= {0, *values}
