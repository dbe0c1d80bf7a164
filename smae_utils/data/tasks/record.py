"""What a task is: one record, which everything else asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smae_utils.data.case import IGNORE, Splits


@dataclass(frozen=True)
class Task:
    """One record of what a task is; everything else asks this record and never the task's name.

    Attributes:
        name: how the command line calls it; of a list file its path.
        title: in words.
        kind: "segmentation" or "classification".
        spatial_dims: 2 or 3.
        channels: names of the image channels.
        classes: what is reported: organs, tumour regions, findings.
        read_splits: (data folder, seed, fold) -> {"train": [...], "val": [...], "test": [...]} of cases, see
            `Case`. Cases hold paths only; nothing is read.
        spacing_mm: voxel size that scans are resampled to; of 2D images the pixel size, where it is known.
        window: intensity range mapped to 0..1 (HU for CT). None: each channel's non-zero voxels as z-scores.
        regions: label numbers that make up each class, when classes overlap: each then has its own sigmoid.
            None: class i has label number i + 1, and classes exclude each other (softmax with background).
        stored_labels: which values in mask files mean label number 0, 1, ...; the first of each is what
            predictions are written with. Empty: number i is stored as i.
        ignored_labels: values in mask files that neither loss nor scores look at.
        real_train: training scans of the real data set, for counting what a recipe costs there.
        sided: labels tell left from right, so images are not mirrored left-right.
        subset: classes of which the mean is reported too (the 8 organs of the paper).
        packaged: for scans that come inside a Python package: where they lie.
        source: where the data come from.
        like: for a task made from a list: the task whose sections of the presets it takes.
        settings: what such a task wants differently, shaped like a preset's section.
        notes: what was assumed or left unused when a list was read, a sentence each.
    """

    name: str
    title: str
    kind: str
    spatial_dims: int
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    read_splits: Callable[[Path, int, int], Splits]
    spacing_mm: tuple[float, ...] = ()
    window: tuple[float, float] | None = None
    regions: tuple[tuple[int, ...], ...] | None = None
    stored_labels: tuple[tuple[int, ...], ...] = ()
    ignored_labels: tuple[int, ...] = ()
    real_train: int = 0
    sided: bool = False
    subset: tuple[str, ...] = ()
    packaged: Callable[[], Path] | None = None
    source: str = ""
    like: str = ""
    settings: dict = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return len(self.channels)

    @property
    def exclusive(self) -> bool:
        """Whether a voxel has one class at most."""
        return self.kind == "segmentation" and self.regions is None

    @property
    def out_chans(self) -> int:
        """Channels of the network's output: the classes, and the background if they exclude each other."""
        return len(self.classes) + (1 if self.exclusive else 0)

    @property
    def whole(self) -> bool:
        """Whether the network sees the whole image, resized; else it sees windows of a fixed voxel size."""
        return self.spatial_dims == 2 or self.kind == "classification"

    @property
    def distance(self) -> str:
        """Name of the surface distance: `hd95_mm`, or `hd95_px` of 2D images whose pixel size nobody said."""
        return "hd95_mm" if self.spatial_dims == 3 or self.spacing_mm else "hd95_px"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the mean figures that a run is judged by, the main one first."""
        return ("mauc",) if self.kind == "classification" else ("dsc", self.distance)

    @property
    def class_metric(self) -> str:
        """Name of the main figure of a single class."""
        return "auc" if self.kind == "classification" else "dsc"

    @property
    def label_values(self) -> int:
        """How many label numbers there are: 0 .. label_values - 1."""
        return len(self.classes) + 1 if self.regions is None else max(map(max, self.regions)) + 1

    @property
    def class_values(self) -> tuple[tuple[int, ...], ...]:
        """The label numbers that make up each class."""
        return self.regions or tuple((i + 1,) for i in range(len(self.classes)))

    @property
    def label_numbers(self) -> dict[int, int]:
        """Value in a mask file -> label number, or `IGNORE`."""
        stored = self.stored_labels or tuple((i,) for i in range(self.label_values))
        numbers = {value: number for number, values in enumerate(stored) for value in values}
        return {0: 0, **numbers, **dict.fromkeys(self.ignored_labels, IGNORE)}

    @property
    def written_labels(self) -> np.ndarray:
        """(label_values,): for each label number the value that predictions are written with.

        Its type is the smallest integer type that holds all.
        """
        values = [of[0] for of in self.stored_labels] or list(range(self.label_values))
        low, high = min(values), max(values)
        kind = next(
            t
            for t in (np.uint8, np.int16, np.uint16, np.int32)
            if np.iinfo(t).min <= low and high <= np.iinfo(t).max
        )
        return np.array(values, kind)

    @property
    def label_names(self) -> tuple[str, ...]:
        """What label numbers 1, 2, ... mean: a class, or the regions that hold it."""
        if self.exclusive:
            return self.classes
        inside = [
            [name for name, of in zip(self.classes, self.class_values) if number in of]
            for number in range(1, self.label_values)
        ]
        return tuple(" + ".join(names) for names in inside)

    def class_masks(self, label: np.ndarray) -> list[np.ndarray]:
        """Label numbers (*spatial) -> one boolean mask (*spatial) a class."""
        return [np.isin(label, values) for values in self.class_values]
