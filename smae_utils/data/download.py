"""Data sets that anyone may download, fetched only when the user asks by name.

MONAI and medmnist know the addresses and checksums.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from smae_utils.errors import UserError

# Tasks of the Medical Segmentation Decathlon (Antonelli et al., arXiv 2106.05735; CC BY-SA 4.0).
DECATHLON = {"hippocampus": "Task04_Hippocampus", "brats": "Task01_BrainTumour"}
CHEST = "chestmnist"  # of MedMNIST (CC BY 4.0)
TIMEOUT = 30.0


def download(name: str, out: str | Path, report: Callable[[str], None] = print, size: int = 64) -> Path:
    """Fetch a data set into the folder `out` and unpack it there.

    What comes is checked against its MD5 and removed once it is unpacked. What is interrupted starts anew. A
    data set that is there is left alone.

    Args:
        size: pixels of ChestMNIST's images: 64, 128 or 224.

    Returns:
        The folder to give as `--data`; of chestmnist the list to give as `--task`.

    Raises:
        UserError: for an unknown name or size, too little space, no network, or a file that is not whole.
    """
    if name == CHEST:
        return _chestmnist(Path(out), size, report)
    if name not in DECATHLON:
        raise UserError(f"unknown data set {name!r}: expected {', '.join(DECATHLON)} or {CHEST}")
    from monai.apps import DecathlonDataset

    folder = DECATHLON[name]
    out = Path(out)
    if there := next((place for place in (out / folder, out) if (place / "dataset.json").is_file()), None):
        report(f"{there} is already there")
        return out
    _free_place(out / folder)
    with _fetched(
        f"{name} ({folder})",
        DecathlonDataset.resource[folder],
        DecathlonDataset.md5[folder],
        out,
        f"{folder}.tar",
        report,
    ) as archive:
        from monai.apps import extractall

        made = archive.parent / "made"
        extractall(archive, made, has_base=False)
        if not (made / folder / "dataset.json").is_file():
            raise UserError(
                f"the archive of {name} holds no {folder}/dataset.json: "
                "it is not what was expected; nothing was kept"
            )
        (made / folder).rename(out / folder)
    report(f"unpacked to {out / folder}")
    return out


def _chestmnist(out: Path, size: int, report: Callable[[str], None]) -> Path:
    """ChestMNIST's one file of arrays -> a PNG an image, and a list with the official split.

    The split is by patients, who are not named.
    """
    if size not in (64, 128, 224):
        raise UserError(f"{CHEST} comes at 64, 128 or 224 pixels, got {size}")
    try:
        from medmnist.info import INFO
    except ImportError:
        raise UserError(
            f"downloading {CHEST} needs the package medmnist: pip install 'smae-utils[medmnist]'"
        ) from None
    folder = out / f"{CHEST}_{size}"
    target = folder / "list.json"
    if target.is_file():
        report(f"{folder} is already there")
        return target
    _free_place(folder)
    info = INFO[CHEST]
    with _fetched(
        f"{CHEST} at {size} pixels",
        info[f"url_{size}"],
        info[f"MD5_{size}"],
        out,
        f"{CHEST}_{size}.npz",
        report,
    ) as file:
        content = {
            "title": f"ChestMNIST, {size} pixels",
            "classes": [info["label"][str(i)] for i in range(len(info["label"]))],
            "sided": True,
        }
        content |= {
            "spatial_dims": 2,
            "reference": "MedMNIST v2 (Yang et al., Scientific Data 2023), "
            "from ChestX-ray14 (Wang et al., CVPR 2017)",
        }
        made = file.parent / "made"
        with np.load(file) as arrays:
            for part, key in (("train", "training"), ("val", "validation"), ("test", "test")):
                content[key] = list(_pictures(arrays[f"{part}_images"], arrays[f"{part}_labels"], made, part))
                report(f"wrote {len(content[key])} {part} images")
        (made / "list.json").write_text(json.dumps(content), encoding="utf-8")
        made.rename(folder)
    report(f"unpacked to {folder}")
    return target


def _free_place(folder: Path) -> None:
    """Refuse a place that is taken, before anything is fetched.

    Raises:
        UserError: where something lies that is not the whole data set.
    """
    if folder.exists():
        raise UserError(
            f"{folder} is there and is not a whole data set: move it away, or choose another --out"
        )


def _pictures(images: np.ndarray, labels: np.ndarray, folder: Path, part: str) -> Iterator[dict]:
    """Images (N, H, W) as PNG files in folders of 10,000; yields their entries of a list."""
    for number, (image, label) in enumerate(zip(images, labels)):
        file = Path("images") / f"{part}{number // 10000:02d}" / f"{part}_{number:06d}.png"
        (folder / file.parent).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / file)
        yield {"image": file.as_posix(), "label": [int(value) for value in label]}


@contextlib.contextmanager
def _fetched(
    what: str, url: str, md5: str, out: Path, name: str, report: Callable[[str], None]
) -> Iterator[Path]:
    """The file behind `url`, whole, in a folder of its own that is removed afterwards, whatever happens.

    Raises:
        UserError: for too little space, no network, or another checksum.
    """
    from monai.apps import download_url
    from monai.apps.utils import HashCheckError

    size = _size(url)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    report(f"downloading {what}, {size / 1e6:.0f} MB, from {url}")
    if free < 2.2 * size:  # the file and what it holds
        raise UserError(
            f"{out} has {free / 1e9:.1f} GB free, {2.2 * size / 1e9:.1f} GB are needed: choose another --out"
        )
    part = out / f"{Path(name).stem}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # progress is no result
                download_url(url, part / name, hash_val=md5, hash_type="md5")
        except HashCheckError as error:
            raise UserError(
                f"the download of {what} is not whole or was changed on its way "
                "(MD5): nothing was kept; try again"
            ) from error
        except (urllib.error.URLError, ConnectionError, TimeoutError, RuntimeError) as error:
            raise UserError(
                f"{what} could not be downloaded from {url}: {error}. Check the network and try again"
            ) from error
        yield part / name
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _size(url: str) -> int:
    """Bytes that the server announces.

    Raises:
        UserError: when it does not answer.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{url} does not answer: {error}. Downloads need a network; everything else works without one"
        ) from error
