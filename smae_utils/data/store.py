"""Prepared scans in files, of which a training reads only its crops: memory stays flat."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import monai
import torch
from torch import Tensor

from smae_utils.atomic import new_file
from smae_utils.data.case import Case, files_of
from smae_utils.errors import UserError
from smae_utils.locks import held
from smae_utils.paths import split_series

HEADERS = (".hdr", ".img", ".mhd", ".nhdr")
LAYOUT = 1  # raise it when a prepared scan comes to mean something else


class Store:
    """A folder with a file for each prepared scan, for several runs and processes to share.

    A file is named by what it was made of: the scan's files (place, size and time) and how it was prepared.
    What is not there yet is made by the first that wants it, and nothing is ever replaced. The folder can be
    deleted at any time.

    Args:
        folder: made when it is first written to.
        how: plain values, of all that decides what a prepared scan holds.
    """

    def __init__(self, folder: str | Path, how: Mapping[str, Any]):
        self.folder, self.how = Path(folder).absolute(), {**how, "layout": LAYOUT, "monai": monai.__version__}

    def file(self, case: Case) -> Path:
        """Where a case is, or will be, kept."""
        label = case.get("label")
        files = files_of(case["image"]) + ([label] if isinstance(label, str) else [])
        said = json.dumps([self.how, [_fingerprint(file) for file in files]], sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.pt"

    def get(self, case: Case, make: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
        """The sample that `make` gives for a case.

        Its tensors are mapped from the file: what is not touched is not read.

        Raises:
            UserError: when there is no room for it, or the file is broken.
        """
        file = self.file(case)
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with held(file.with_suffix(".lock")):
                if not file.is_file():
                    self._write(file, make(case))
        try:
            tensors = torch.load(file, mmap=True, weights_only=True)
        except Exception as error:
            raise UserError(
                f"{file} is no prepared scan (cut short, or something else): delete it, it is then made again"
            ) from error
        return {**case, **tensors}

    def _write(self, file: Path, sample: Mapping[str, Any]) -> None:
        tensors = {key: value for key, value in sample.items() if isinstance(value, Tensor)}
        try:
            with new_file(file) as part:
                torch.save(tensors, part)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size = sum(value.numel() * value.element_size() for value in tensors.values())
            raise UserError(
                f"no room for a prepared scan of {size / 1e6:.0f} MB in "
                f"{self.folder}: make room, or name another "
                "folder with --set store=FOLDER (what is there stays usable)"
            ) from error


def _fingerprint(file: str) -> list[Any]:
    """Place, size and time of a file; of a folder, of what is in it."""
    path, series = split_series(file)
    if path.is_dir():
        inside = sorted(path.rglob("*"))
    elif path.suffix.lower() in HEADERS:  # voxels lie in a file beside it, of the same name
        inside = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    else:
        inside = [path]
    states = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in inside if p.is_file()]
    return [str(path.absolute()), series, states]
