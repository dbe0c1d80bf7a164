"""Prepared scans in files: the same crops, made once, and of a scan nothing but the crop is read."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import MODEL, STAGE, TASK

from smae_utils.data.batches import Crops, Steps, in_order, training_loader
from smae_utils.data.store import Store
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.work import estimate as estimates
from smae_utils.work.build import build_augmentation, build_scans, build_splits
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, make_settings

KINDS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings}


def scans_of(stage, data, **more):
    task = get_task("btcv")
    settings = make_settings(KINDS[stage], {**TASK["btcv"], **MODEL, **STAGE[stage], **more}, "test")
    keys = ("case", "patient", "image", *(["label"] if stage == "finetune" else []))
    cases = [{key: case[key] for key in keys} for case in build_splits(task, data, settings)["train"]]
    return build_scans(task, settings, cases), build_augmentation(task, settings)


def drawn(scans, augment, count=8):
    crops = Crops(scans, augment, seed=3)
    return [crops[i] for i in range(count)]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_crops_are_those_of_scans_in_memory_and_scans_are_prepared_once(stage, btcv, tmp_path, monkeypatch):
    plain = drawn(*scans_of(stage, btcv))
    for again in (False, True):
        scans, augment = scans_of(stage, btcv, store=str(tmp_path / "store"))
        if again:
            monkeypatch.setattr(scans, "_prepared", lambda case: pytest.fail("prepared a second time"))
        stored = drawn(scans, augment)
        for one, other in zip(plain, stored, strict=True):
            assert one["case"] == other["case"] and torch.equal(one["image"], other["image"])
            assert ("label" in one) == (stage == "finetune") == ("label" in other)
            assert stage == "pretrain" or torch.equal(one["label"], other["label"])
    files = sorted(p.suffix for p in (tmp_path / "store").iterdir())
    assert files == [".pt"] * len(scans)


def test_another_preparation_and_a_changed_file_are_made_anew(btcv, tmp_path):
    own = {"store": str(tmp_path)}
    names = {scans.store.file(scans.cases[0]) for scans in (
        scans_of("pretrain", btcv, **own)[0],
        scans_of("pretrain", btcv, **own, lr=0.1)[0],
        scans_of("finetune", btcv, **own)[0],
        scans_of("pretrain", btcv, **own, spacing_mm=[4.0, 4.0, 4.0])[0],
    )}  # fmt: skip
    assert len(names) == 3  # a rate is no part of it
    file = tmp_path / "scan.nii"
    file.write_bytes(b"1")
    store, case = Store(tmp_path, {}), {"case": "scan", "patient": "", "image": str(file)}
    before = store.file(case)
    os.utime(file, ns=(1, 1))
    assert store.file(case) != before
    pair = {"case": "pair", "patient": "", "image": str(tmp_path / "scan.mhd")}
    for ending in ("mhd", "raw"):
        (tmp_path / f"scan.{ending}").write_bytes(b"1")
    before = store.file(pair)
    (tmp_path / "scan.raw").write_bytes(b"22")  # the header alone says nothing of the voxels
    assert store.file(pair) != before
    folder = tmp_path / "dicom"
    folder.mkdir()
    case["image"] = f"{folder}#1.2"
    before = store.file(case)
    (folder / "new.dcm").write_bytes(b"1")
    assert store.file(case) != before and store.file({**case, "image": f"{folder}#1.3"}) != store.file(case)
    folder = folder.rename(tmp_path / "dicom#2")
    case["image"] = f"{folder}#1.2"
    before = store.file(case)
    (folder / "more.dcm").write_bytes(b"1")
    assert store.file(case) != before


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells a process's memory so")
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_of_a_stored_scan_only_the_crop_is_read(stage, btcv, tmp_path):
    scans, augment = scans_of(stage, btcv, store=str(tmp_path / "store"))
    scans.cases = scans.cases[:1]

    def large(case):
        image = torch.rand(1, 320, 320, 320)  # 131 MB
        label = torch.zeros(image.shape, dtype=torch.uint8)
        label[0, 100:200, 100:200, 100:200] = 1
        made = {**case, "image": image, **({"label": label} if stage == "finetune" else {})}
        return scans.transform.transforms[-1](made)

    scans._prepared = large
    scans[0]
    scans.cached.clear()
    before = resident_mb()
    crops = drawn(scans, augment, 1)
    assert crops[0]["image"].shape[-1] < 64
    assert resident_mb() - before < 40, "more was read than the crop and a slab or two"


def test_whoever_comes_at_the_same_time_waits_for_the_first(tmp_path):
    file = tmp_path / "scan.nii"
    file.write_bytes(b"1")
    case = {"case": "scan", "patient": "", "image": str(file)}
    made = []

    def make(case):
        made.append(case)
        return {"image": torch.arange(1000.0)}

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: Store(tmp_path / "store", {}).get(case, make), range(8)))
    assert len(made) == 1 and all(torch.equal(one["image"], torch.arange(1000.0)) for one in got)
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_a_full_disk_and_a_broken_file_are_told(tmp_path, monkeypatch):
    file = tmp_path / "scan.nii"
    file.write_bytes(b"1")
    store, case = Store(tmp_path / "store", {}), {"case": "scan", "patient": "", "image": str(file)}

    def full(what, where):
        Path(where).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space", str(where))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"no room for a prepared scan of 4 MB in .*store=FOLDER"):
            store.get(case, lambda case: {"image": torch.zeros(1_000_000)})
    assert list((tmp_path / "store").iterdir()) == []
    store.get(case, lambda case: {"image": torch.zeros(10)})
    store.file(case).write_bytes(b"half")
    with pytest.raises(UserError, match="is no prepared scan .*delete it"):
        store.get(case, lambda case: {})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_no_folder_is_told_in_one_line_also_by_a_loading_process(workers, btcv, tmp_path):
    (tmp_path / "file").write_text("")
    scans, augment = scans_of("pretrain", btcv, store=str(tmp_path / "file"))
    with pytest.raises(FileExistsError) as told:
        next(iter(training_loader(scans, augment, 0, Steps(0, 1, 1), workers)))
    assert str(tmp_path / "file") in str(told.value) and "\n" not in str(told.value)


def test_scans_that_do_not_fit_into_memory_are_told_of_the_store(monkeypatch):
    monkeypatch.setattr(estimates, "machine_memory", lambda: 16e9)
    small, large = (estimates.estimate(get_task("btcv"), n, "small", 1e7) for n in (30, 3000))
    assert not any("store=" in line for line in small) and any("store=FOLDER" in line for line in large)
    stored = estimates.estimate(get_task("btcv"), 3000, "small", 1e7, {"store": "somewhere"})
    assert any("0.0 GB for scans that are kept" in line for line in stored) and "FOLDER" not in " ".join(
        stored
    )


def test_scans_that_are_kept_are_read_once_and_others_in_their_order_by_loading_processes(btcv):
    kept, _ = scans_of("finetune", btcv)
    prepared, made = kept._prepared, []
    kept._prepared = lambda case: made.append(case["case"]) or prepared(case)
    names = [case["case"] for case in kept.cases]
    for _ in range(2):
        assert [batch[0]["case"] for batch in in_order(kept, list, num_workers=2)] == names
    assert made == names
    before = torch.get_rng_state()
    others, _ = scans_of("finetune", btcv, cache_rate=0.0)
    assert [batch[0]["case"] for batch in in_order(others, list, num_workers=2)] == names
    assert torch.equal(torch.get_rng_state(), before)
