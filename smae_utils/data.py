"""Case lists to batches. What a batch holds is a function of the seed and the step alone, so that any run can be repeated and resumed."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import Compose
from torch.utils.data import DataLoader, Dataset, Sampler

from smae_utils.errors import UserError
from smae_utils.settings import Settings
from smae_utils.tasks import Case, Splits, Task


def read_splits(task: Task, data_dir: str | Path, settings: Settings) -> Splits:
    """Train, validation and test cases of a data folder; `train_on_val` gives the validation cases back to the training ones."""
    splits = task.read_splits(Path(data_dir), settings.split_seed, settings.fold)
    if settings.train_on_val:
        names = {c["case"] for c in splits["val"]}
        train = sorted(splits["train"] + splits["val"], key=lambda c: c["case"])
        splits = {"train": train, "val": [], "test": [c for c in splits["test"] if c["case"] not in names]}
    return splits


def derive_seed(*parts: int) -> int:
    """One seed from several numbers, well mixed."""
    return int(np.random.SeedSequence([p % 2**32 for p in parts]).generate_state(1)[0])


def read_case(transform: Callable[[dict], Any], case: Case) -> Any:
    """Apply a deterministic transform to a case.

    Raises:
        UserError: naming the file, whatever the reader raised.
    """
    try:
        return transform(dict(case))
    except Exception as error:
        root = error
        while root.__cause__ or root.__context__:
            if isinstance(root, UserError):
                break
            root = root.__cause__ or root.__context__
        if isinstance(root, UserError):
            raise UserError(str(root)) from None
        if isinstance(root, OSError) and root.errno == errno.ENOSPC:  # no fault of the case
            raise
        line = " ".join(str(root).split())[:200] or type(root).__name__
        files = " or ".join(str(case[key]) for key in ("image", "label") if isinstance(case.get(key), str))
        raise UserError(f"cannot read case {case['case']} ({files}): {line}. The file may be cut short: copy or unpack it again") from error


class Scans(Dataset):
    """Cases after the deterministic transforms; the first `cache_rate` of them stay in memory once read."""

    def __init__(self, cases: list[Case], transform: Compose, cache_rate: float = 0.0):
        self.cases, self.transform = cases, transform
        self.cached: dict[int, dict] = {}
        self.limit = round(cache_rate * len(cases))

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.cached:
            return self.cached[index]
        item = read_case(self.transform, self.cases[index])
        item = {k: v.as_tensor() if isinstance(v, MetaTensor) else v for k, v in item.items()}
        if index < self.limit:
            self.cached[index] = item
        return item


@contextmanager
def untracked() -> Iterator[None]:
    """MONAI transforms without a record of what they did: a third of their time, and a crop for training is never mapped back."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


class Crops(Dataset):
    """Crop number `sample` of an endless shuffled stream: which scan, which crop and which augmentation follow from (seed, sample)."""

    def __init__(self, scans: Scans, augment: Compose, seed: int):
        self.scans, self.augment, self.seed = scans, augment, seed

    def scan_index(self, sample: int) -> int:
        """Every scan once an epoch, in an order of the epoch's own."""
        epoch, place = divmod(sample, len(self.scans))
        return int(np.random.default_rng([self.seed, epoch]).permutation(len(self.scans))[place])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        scan = self.scans[self.scan_index(sample)]
        seed = derive_seed(self.seed, 1, sample)
        self.augment.set_random_state(seed=seed)
        with untracked():
            crops = self.augment(dict(scan))
        crops = crops if isinstance(crops, list) else [crops]
        out = {"case": [c["case"] for c in crops], "noise_seed": [derive_seed(seed, i) for i in range(len(crops))]}
        for key in ("image", "label"):
            if key in crops[0]:
                out[key] = torch.stack([torch.as_tensor(c[key]) for c in crops])
                if isinstance(out[key], MetaTensor):
                    out[key] = out[key].as_tensor()
        return out


def join(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Crops of several scans -> one batch: image (B, C, *spatial), label, case names, noise seeds."""
    return {k: torch.cat([i[k] for i in items]) if torch.is_tensor(items[0][k]) else sum((i[k] for i in items), []) for k in items[0]}


class Steps(Sampler):
    """Sample numbers of each step from `start` to `stop`, this process's share of them."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1):
        self.start, self.stop, self.batch_size, self.rank, self.world = start, stop, batch_size, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield list(range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world))


class Batches(DataLoader):
    """A loader whose processes leave Ctrl-C to the training loop, and whose errors stay one line."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except UserError as error:
            # torch wraps the error of a loading process into its whole traceback; the message is its last line.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")) from None


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_loader(scans: Scans, augment: Compose, settings: Settings, start: int, stop: int, rank: int = 0, world: int = 1) -> DataLoader:
    """Batches for steps `start` .. `stop` - 1.

    Raises:
        UserError: when a step wants more scans than there are, or fewer than there are processes.
    """
    if settings.batch_size > len(scans):
        raise UserError(f"batch_size {settings.batch_size} is larger than the {len(scans)} training scans: use --set batch_size={len(scans)} or less")
    if settings.batch_size < world:
        raise UserError(f"batch_size {settings.batch_size} is smaller than the {world} processes: use --set batch_size={world} or more")
    steps = Steps(start, stop, settings.batch_size, rank, world)
    workers = settings.num_workers
    return Batches(
        Crops(scans, augment, settings.seed),
        batch_sampler=steps,
        collate_fn=join,
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
