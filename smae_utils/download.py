"""Data sets that may be downloaded by anyone, only when the user asks by name; through MONAI, which knows the addresses and checksums."""

from __future__ import annotations

import contextlib
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from smae_utils.errors import UserError

# Tasks of the Medical Segmentation Decathlon (Antonelli et al., arXiv 2106.05735; CC BY-SA 4.0).
DECATHLON = {"hippocampus": "Task04_Hippocampus", "brats": "Task01_BrainTumour"}
TIMEOUT = 30.0


def download(name: str, out: str | Path, report: Callable[[str], None] = print) -> Path:
    """Fetch a data set into the folder `out` and unpack it there.

    The archive is checked against its MD5 and removed; what is interrupted starts anew. A data set that is there is left alone.

    Returns:
        The folder to give as `--data`.

    Raises:
        UserError: for an unknown name, too little space, no network, or an archive that is not whole.
    """
    if name not in DECATHLON:
        raise UserError(f"unknown data set {name!r}: expected {' or '.join(DECATHLON)}")
    from monai.apps import DecathlonDataset, download_and_extract
    from monai.apps.utils import HashCheckError

    folder = DECATHLON[name]
    out = Path(out)
    if there := next((place for place in (out / folder, out) if (place / "dataset.json").is_file()), None):
        report(f"{there} is already there")
        return out
    url, md5 = DecathlonDataset.resource[folder], DecathlonDataset.md5[folder]
    size = _size(url)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    report(f"downloading {name} ({folder}, {size / 1e6:.0f} MB) from {url}")
    if free < 2.2 * size:  # the archive and what it holds
        raise UserError(f"{out} has {free / 1e9:.1f} GB free, {2.2 * size / 1e9:.1f} GB are needed: choose another --out")
    part = out / f"{folder}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # progress is no result
            download_and_extract(url, part / f"{folder}.tar", part, hash_val=md5, hash_type="md5")
        if not (part / folder / "dataset.json").is_file():
            raise UserError(f"the archive of {name} holds no {folder}/dataset.json: it is not what was expected; nothing was kept")
        (part / folder).rename(out / folder)
    except HashCheckError as error:
        raise UserError(f"the download of {name} is not whole or was changed on its way (MD5): nothing was kept; try again") from error
    except (urllib.error.URLError, ConnectionError, TimeoutError, RuntimeError) as error:
        raise UserError(f"{name} could not be downloaded from {url}: {error}. Check the network and try again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    report(f"unpacked to {out / folder}")
    return out


def _size(url: str) -> int:
    """Bytes that the server announces.

    Raises:
        UserError: when it does not answer.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError) as error:
        raise UserError(f"{url} does not answer: {error}. Downloads need a network; everything else works without one") from error
