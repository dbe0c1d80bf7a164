"""Case lists to batches. What a batch holds is a function of the seed and the step alone, so that any run can
be repeated and resumed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from smae_utils.data.case import Case
from smae_utils.data.crops import plain
from smae_utils.data.store import Store
from smae_utils.data.transforms import ResizeRadiograph, middle, resize
from smae_utils.errors import UserError


def derive_seed(*parts: int) -> int:
    """One seed from several numbers, well mixed."""
    return int(np.random.SeedSequence([p % 2**32 for p in parts]).generate_state(1)[0])


def read_case(transform: Callable[[dict[str, Any]], Any], case: Mapping[str, Any]) -> Any:
    """Apply a deterministic transform to a case.

    Raises:
        UserError: as a reader said it, naming the file. Any other error is a mistake of this package, and
            stays what it is.
    """
    try:
        return transform(dict(case))
    except Exception as error:
        # MONAI wraps what a transform raised; the words for the user are inside.
        inside: BaseException | None = error
        while inside is not None and not isinstance(inside, UserError):
            inside = inside.__cause__ or inside.__context__
        if inside is None:
            raise
        raise UserError(str(inside)) from error


def read_middle(
    transform: Callable[[dict[str, Any]], Any], case: Mapping[str, Any], size: Sequence[int], whole: bool
) -> tuple[Tensor, Tensor | None]:
    """A prepared case at the network's input size: (C, *size) image, and (1, *size) label numbers where the
    transform reads a mask.

    Args:
        whole: the network sees whole images, which are resized; otherwise the middle is cut out.
    """
    sample = read_case(transform, case)
    label = sample["label"] if torch.is_tensor(sample.get("label")) else None
    if whole:
        resized = None if label is None else resize(label, size, label=True)
        return ResizeRadiograph(size)(sample)["image"], resized
    image, *masks = (middle(plain(x), size) for x in (sample["image"], label) if x is not None)
    return image, masks[0] if masks else None


class Scans(Dataset):
    """Cases after the deterministic transforms.

    Args:
        cache_rate: this share of them, the first, stay in memory once read.
        store: where prepared scans are kept in files instead; their tensors are then mapped, not read.
    """

    def __init__(
        self, cases: list[Case], transform: Compose, cache_rate: float = 0.0, store: Store | None = None
    ):
        self.cases, self.transform, self.store = cases, transform, store
        self.cached: dict[int, dict] = {}
        self.limit = len(cases) if store else round(cache_rate * len(cases))

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.cached:
            return self.cached[index]
        case = self.cases[index]
        item = self.store.get(case, self._prepared) if self.store else self._prepared(case)
        if index < self.limit:
            self.cached[index] = item
        return item

    def _prepared(self, case: Case) -> dict[str, Any]:
        item = read_case(self.transform, case)
        return {k: v.as_tensor() if isinstance(v, MetaTensor) else v for k, v in item.items()}


@contextmanager
def untracked() -> Iterator[None]:
    """MONAI transforms without a record of what they did: a third of their time, and a crop for training is
    never mapped back.
    """
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) the order of the scans in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class Crops(Dataset):
    """Crop number `sample` of an endless shuffled stream: which scan, which crop and which augmentation
    follow from (seed, sample).
    """

    def __init__(self, scans: Scans, augment: Compose, seed: int):
        self.scans, self.augment, self.seed = scans, augment, seed

    def scan_index(self, sample: int) -> int:
        """Every scan once an epoch, in an order of the epoch's own."""
        epoch, place = divmod(sample, len(self.scans))
        return int(epoch_order(self.seed, epoch, len(self.scans))[place])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        scan = self.scans[self.scan_index(sample)]
        seed = derive_seed(self.seed, 1, sample)
        self.augment.set_random_state(seed=seed)
        with untracked():
            crops = self.augment(dict(scan))
        crops = crops if isinstance(crops, list) else [crops]
        out = {
            "case": [c["case"] for c in crops],
            "noise_seed": [derive_seed(seed, i) for i in range(len(crops))],
        }
        for key in ("image", "label"):
            if key in crops[0]:
                out[key] = torch.stack([torch.as_tensor(c[key]) for c in crops])
                if isinstance(out[key], MetaTensor):
                    out[key] = out[key].as_tensor()
        return out


def join(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Crops of several scans -> one batch: image (B, C, *spatial), label, case names, noise seeds."""
    out: dict[str, Any] = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        out[key] = torch.cat(values) if torch.is_tensor(first) else list(chain(*values))
    return out


def whole_images(samples: list[dict[str, Any]], size: Sequence[int]) -> Tensor:
    """Prepared scans -> (B, C, *size), each resized whole."""
    resized = ResizeRadiograph(size)
    return torch.stack([torch.as_tensor(resized(sample)["image"]) for sample in samples])


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
    """A loader whose processes leave Ctrl-C to the training loop, and whose user errors stay one line."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except (UserError, OSError) as error:
            # torch wraps the error of a loading process into its whole traceback; the message is its last
            # line, after the error's name.
            lines = str(error).strip().splitlines()
            if len(lines) <= 1:
                raise
            raise type(error)(lines[-1].split(f"{type(error).__name__}: ", 1)[-1]) from None


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_batch(scans: int, batch_size: int, processes: int = 1) -> None:
    """Refuse a step that takes more scans than there are, or that does not divide by the processes.

    Raises:
        UserError: saying which size would do.
    """
    if not scans:
        raise UserError("there are no training cases: list some in 'training', or choose another fold")
    if batch_size > scans:
        raise UserError(
            f"batch_size {batch_size} is larger than the {scans} training scans: use --set "
            f"batch_size={scans} or less"
        )
    if batch_size % processes:
        raise UserError(
            f"batch_size {batch_size} does not divide by the {processes} processes, "
            "so some scans would count more than others: "
            f"use --set batch_size={-(-batch_size // processes) * processes}, for example"
        )


def training_loader(
    scans: Scans, augment: Compose, seed: int, steps: Steps, num_workers: int = 0
) -> DataLoader:
    """Batches of crops for a range of steps.

    Args:
        scans, augment, seed: what a crop is made of, see `Crops`.
        steps: which samples a step takes.
        num_workers: processes that load; 0: this one.
    """
    return Batches(
        Crops(scans, augment, seed),
        batch_sampler=steps,
        collate_fn=join,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupt,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def in_order(
    scans: Scans,
    collate: Callable[[list[dict[str, Any]]], Any],
    batch_size: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Every scan once, in the order of the cases; torch's random state stays as it is.

    Args:
        collate: `batch_size` samples -> what comes out.
        num_workers: processes that read ahead; 0: this one reads. It also does where scans are kept, which
            those processes could not hand back.
    """
    return Batches(
        scans,
        batch_size,
        collate_fn=collate,
        num_workers=0 if scans.limit or len(scans) <= batch_size else num_workers,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),
    )
