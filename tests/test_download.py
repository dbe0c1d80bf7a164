"""A download happens only when asked for by name, is whole or not there, and is said in one line when it
fails. Against a server on loopback.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from medmnist.info import INFO
from monai.apps import DecathlonDataset
from PIL import Image

from smae_utils.cli import main
from smae_utils.data import download as module
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError

NAME = "Task04_Hippocampus"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@contextmanager
def served(file: Path) -> Iterator[str]:
    """Address of a file on a loopback server that runs meanwhile."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(file.parent)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/{file.name}"
    http.shutdown()
    http.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback server with a small archive in the Decathlon's layout; MONAI's address and checksum point to
    it.
    """
    source = tmp_path / "server" / NAME
    entries = []
    for folder in ("imagesTr", "labelsTr"):
        (source / folder).mkdir(parents=True)
    for i in range(8):
        files = [f"./{folder}/hippocampus_{i:03d}.nii.gz" for folder in ("imagesTr", "labelsTr")]
        for file, values in zip(
            files, (np.random.default_rng(i).integers(0, 900, (9, 10, 11)), np.ones((9, 10, 11)))
        ):
            nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), source / file)
        entries.append({"image": files[0], "label": files[1]})
    (source / "dataset.json").write_text(
        json.dumps({"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "training": entries})
    )
    archive = tmp_path / "server" / f"{NAME}.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(source, NAME)
    with served(archive) as address:
        monkeypatch.setitem(DecathlonDataset.resource, NAME, address)
        monkeypatch.setitem(DecathlonDataset.md5, NAME, hashlib.md5(archive.read_bytes()).hexdigest())
        yield archive


def test_a_download_is_checked_unpacked_and_read_as_the_task_it_is(server, tmp_path, capsys):
    out = tmp_path / "data"
    assert main(["download", "hippocampus", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "MB" in told and "check hippocampus" in told
    assert [p.name for p in out.iterdir()] == [NAME]
    splits = get_task("hippocampus").read_splits(out, 0, 0)
    assert {part: len(cases) for part, cases in splits.items()} == {"train": 5, "val": 1, "test": 2}
    assert (
        main(["download", "hippocampus", "--out", str(out)]) == 0
        and "already there" in capsys.readouterr().out
    )


def test_the_test_cases_are_the_same_for_every_seed(server, tmp_path):
    module.download("hippocampus", tmp_path / "data", report=[].append)
    made = [get_task("hippocampus").read_splits(tmp_path / "data", seed, 0) for seed in range(4)]
    assert len({tuple(c["case"] for c in s["test"]) for s in made}) == 1
    assert len({tuple(c["case"] for c in s["val"]) for s in made}) > 1


def test_an_archive_that_is_not_whole_leaves_nothing(server, tmp_path):
    server.write_bytes(server.read_bytes()[:-4000])
    with pytest.raises(UserError, match="not whole"):
        module.download("hippocampus", tmp_path / "data", report=[].append)
    assert list((tmp_path / "data").iterdir()) == []


def test_what_an_interrupted_download_left_is_begun_anew(server, tmp_path):
    (tmp_path / "data" / f"{NAME}.part").mkdir(parents=True)
    (tmp_path / "data" / f"{NAME}.part" / f"{NAME}.tar").write_bytes(b"half")
    module.download("hippocampus", tmp_path / "data", report=[].append)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [NAME]


def test_too_little_space_and_no_network_are_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="GB are needed"):
        module.download("hippocampus", tmp_path / "data", report=[].append)
    monkeypatch.setitem(DecathlonDataset.resource, NAME, "http://127.0.0.1:1/x.tar")
    with pytest.raises(UserError, match="does not answer"):
        module.download("hippocampus", tmp_path / "data", report=[].append)
    with pytest.raises(UserError, match="expected hippocampus, brats or chestmnist"):
        module.download("livers", Path("x"))


def test_monai_still_knows_the_addresses_and_checksums():
    for folder in module.DECATHLON.values():
        assert (
            DecathlonDataset.resource[folder].endswith(f"{folder}.tar")
            and len(DecathlonDataset.md5[folder]) == 32
        )


@pytest.fixture
def chest(tmp_path, monkeypatch):
    """A loopback server with a ChestMNIST of twelve images."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 6), ("val", 2), ("test", 4)):
        arrays |= {
            f"{part}_images": rng.integers(0, 256, (n, 64, 64), np.uint8),
            f"{part}_labels": rng.integers(0, 2, (n, 14), np.uint8),
        }
    source = tmp_path / "server"
    source.mkdir()
    np.savez(source / "chestmnist_64.npz", **arrays)
    file = source / "chestmnist_64.npz"
    with served(file) as address:
        monkeypatch.setitem(INFO["chestmnist"], "url_64", f"{address}?download=1")
        monkeypatch.setitem(INFO["chestmnist"], "MD5_64", hashlib.md5(file.read_bytes()).hexdigest())
        yield arrays


def test_chestmnist_becomes_a_list_with_its_official_split(chest, tmp_path, capsys):
    out = tmp_path / "data"
    assert main(["download", "chestmnist", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    task = get_task(str(out / "chestmnist_64" / "list.json"))
    assert (
        f"check {out / 'chestmnist_64' / 'list.json'}" in told
        and len(task.classes) == 14
        and task.kind == "classification"
    )
    splits = task.read_splits(Path(""), 0, 0)
    assert {part: len(cases) for part, cases in splits.items()} == {"train": 6, "val": 2, "test": 4}
    for part, cases in splits.items():
        for case, image, label in zip(cases, chest[f"{part}_images"], chest[f"{part}_labels"]):
            assert np.array_equal(np.asarray(Image.open(case["image"])), image) and np.array_equal(
                case["label"], label
            )
    assert [p.name for p in out.iterdir()] == ["chestmnist_64"]
    assert (
        main(["download", "chestmnist", "--out", str(out)]) == 0
        and "already there" in capsys.readouterr().out
    )
    assert main(["check", str(out / "chestmnist_64" / "list.json")]) == 0


def test_chestmnist_of_another_size_or_broken_is_one_line(chest, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="64, 128 or 224"):
        module.download("chestmnist", tmp_path / "data", size=28)
    monkeypatch.setitem(INFO["chestmnist"], "MD5_64", "0" * 32)
    with pytest.raises(UserError, match="not whole"):
        module.download("chestmnist", tmp_path / "data", report=[].append)
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setitem(sys.modules, "medmnist.info", None)
    with pytest.raises(UserError, match="pip install"):
        module.download("chestmnist", tmp_path / "data", report=[].append)


def test_medmnist_still_knows_the_addresses_and_checksums():
    for size in (64, 128, 224):
        assert (
            f"chestmnist_{size}.npz" in INFO["chestmnist"][f"url_{size}"]
            and len(INFO["chestmnist"][f"MD5_{size}"]) == 32
        )
