"""What the tests share: tiny phantom downloads, an empty preset, and the smallest settings at which
everything still runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from smae_utils.phantoms import write_phantoms

COUNTS = {"btcv": 10, "cxr14": 60, "brats": 8}

MODEL = {
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "precision": "fp32",
    "log_every": 1,
    "save_every": 1000,
    "steps": 4,
}
STAGE = {
    "pretrain": {
        "decoder_embed_dim": 24,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "base_lr": 0.1,
        "batch_size": 2,
    },
    "finetune": {"feature_size": 2, "overlap": 0.0, "base_lr": 0.1, "batch_size": 2, "drop_path": 0.0},
}
TASK = {
    "btcv": {"crop_size": [16, 16, 16], "spacing_mm": [14.0, 14.0, 14.0]},
    "brats": {"crop_size": [16, 16, 16], "spacing_mm": [8.0, 8.0, 8.0]},
    "cxr14": {"crop_size": [32, 32]},
}
TINY = {(task, stage): {**MODEL, **STAGE[stage], **TASK[task]} for task in TASK for stage in STAGE}


@pytest.fixture(scope="session")
def tiny() -> dict[tuple[str, str], dict]:
    """Overrides by (task, stage): every size is given, so no shipped preset matters."""
    return TINY


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> str:
    """A preset that says nothing."""
    path = tmp_path_factory.mktemp("preset") / "bare.yaml"
    path.write_text("")
    return str(path)


def _phantoms(tmp_path_factory, task: str) -> Path:
    folder = tmp_path_factory.mktemp(f"{task}_data")
    write_phantoms(task, folder, COUNTS[task], seed=0)
    return folder


@pytest.fixture(scope="session")
def btcv(tmp_path_factory) -> Path:
    """Download folder of ten CT phantoms. Tests that change files copy it first."""
    return _phantoms(tmp_path_factory, "btcv")


@pytest.fixture(scope="session")
def cxr14(tmp_path_factory) -> Path:
    """Download folder of 60 radiograph phantoms."""
    return _phantoms(tmp_path_factory, "cxr14")


@pytest.fixture(scope="session")
def brats(tmp_path_factory) -> Path:
    """Download folder of eight MRI phantoms."""
    return _phantoms(tmp_path_factory, "brats")


@pytest.fixture(scope="session")
def data(btcv, cxr14, brats) -> dict[str, Path]:
    """The three download folders by task."""
    return {"btcv": btcv, "cxr14": cxr14, "brats": brats}


@pytest.fixture
def spoil(tmp_path):
    """A copy of a download folder, to be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"{folder.name}_copy"))

    return copy
