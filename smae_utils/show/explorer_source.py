"""Where the explorer's images come from: a run's own cases, or arrays and files that are handed in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smae_utils.data.batches import read_middle
from smae_utils.data.case import IGNORE, case_of
from smae_utils.data.tasks import Task, task_of
from smae_utils.data.tasks.lists import is_list
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.paths import split_series
from smae_utils.work.build import build_splits, build_transform
from smae_utils.work.grids import activate, label_map
from smae_utils.work.rebuild import load_finetuned, load_pretrained, settings_of
from smae_utils.work.run_data import find_data
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings, Settings


class Source:
    """Images, one at a time, ready for a model: (C, *img_size).

    Attributes:
        model: masked autoencoder, or None when only labels and predictions are shown.
        finetuned: name -> (network, task, settings).
    """

    def __init__(
        self,
        model: MaskedAutoencoder | None,
        items: list,
        task: Task | None,
        settings: Settings | None,
        spacing_mm: Sequence[float] = (),
    ):
        self.model, self.items, self.task, self.settings = model, items, task, settings
        self.run: Run | None = None
        self.finetuned: dict[str, tuple] = {}
        self.size = tuple(model.encoder.img_size) if model is not None else tuple(settings.crop_size)
        self.ndim = len(self.size)
        patch = model.patch_size if model is not None else (settings.patch_size,) * self.ndim
        self.grid = tuple(n // p for n, p in zip(self.size, patch))
        own = (settings.spacing_mm or task.spacing_mm) if task and settings and not task.whole else ()
        self.spacing_mm = tuple(float(s) for s in (spacing_mm or own))
        chans = model.encoder.patch_embed.proj.weight.shape[1] if model is not None else task.in_chans
        self.channels = task.channels if task else tuple(f"channel {i + 1}" for i in range(chans))
        self.classes = task.classes if task and task.kind == "segmentation" else ()
        self.mask_ratio = model.mask_ratio if model is not None else 0.75
        self.used = ""

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """What a case is called."""
        item = self.items[index]
        return item["case"] if isinstance(item, dict) else f"image {index + 1}"

    def checkpoints(self) -> list[tuple[str, str]]:
        """(label, file) of the states that the run kept, oldest first, the last weights at the end."""
        kept = self.run.checkpoints() if self.run and self.model is not None else []
        return [(f"{step} steps", str(path)) for step, path in kept] + ([("last", "")] if kept else [])

    def use_checkpoint(self, file: str) -> None:
        """Load other weights of the same run into the model."""
        if self.run and file != self.used:
            load_weights(self.model, file or self.run.path, require="")
            self.used = file

    def load(self, index: int) -> tuple[Tensor, dict[str, np.ndarray], str]:
        """Image (C, *img_size), label images (*img_size) by name, and a sentence for classifiers.

        Label images hold integers; their names are "label" and those of the fine-tuned runs.
        """
        item = self.items[index]
        if not isinstance(item, dict):
            return self._checked(torch.as_tensor(np.asarray(item), dtype=torch.float32)), {}, ""
        image, label = self._read(item)
        labels = {} if label is None else {"label": label}
        verdict = []
        for name, (net, task, _) in self.finetuned.items():
            with torch.inference_mode():
                logits = net(image[None])[0].float()
            if task.kind == "classification":
                order = logits.sigmoid().argsort(descending=True)[:3]
                verdict.append(
                    f"{name}: " + ", ".join(f"{task.classes[i]} {logits[i].sigmoid():.2f}" for i in order)
                )
            else:
                labels[name] = region_index(label_map(activate(logits, task), task), task)
        if self.task.kind == "classification" and "label" in item:
            present = [n for n, v in zip(self.task.classes, item["label"]) if v == 1]
            verdict.insert(0, "labelled: " + (", ".join(present) or "no finding"))
        return image, labels, "; ".join(verdict)

    def _read(self, case: dict) -> tuple[Tensor, np.ndarray | None]:
        """The middle of a prepared scan at the model's input size, with its label where there is one."""
        labelled = isinstance(case.get("label"), str) and bool(self.classes)
        image, label = read_middle(
            build_transform(self.task, self.settings, with_label=labelled), case, self.size, self.task.whole
        )
        return image, None if label is None else region_index(label[0].numpy().astype(np.uint8), self.task)

    def _checked(self, image: Tensor) -> Tensor:
        expected = (len(self.channels), *self.size)
        if image.ndim == self.ndim:
            image = image[None]
        if tuple(image.shape) != expected:
            raise UserError(
                f"the model takes images of shape {expected} (channels first), got {tuple(image.shape)}: "
                "crop, pad or resample it first"
            )
        if not torch.isfinite(image).all():
            raise UserError("the image holds NaN or infinite values: repair it first")
        return image


def region_index(values: np.ndarray, task: Task) -> np.ndarray:
    """Label numbers -> number (1 ..) of the class that is drawn: the innermost region of the voxel."""
    if not task.regions:
        return np.where(values == IGNORE, 0, values).astype(np.uint8)
    out = np.zeros(values.shape, np.uint8)
    for number, mask in enumerate(task.class_masks(values), start=1):
        out[mask] = number
    return out


def open_source(
    model_or_run: MaskedAutoencoder | Run | str | Path,
    cases: Any,
    finetuned: Sequence[str | Path],
    data_dir: str | Path | None,
    spacing_mm: Sequence[float],
) -> Source:
    """A source from what `explore` was given.

    Raises:
        UserError: if there is nothing to show, or a run is not finished.
    """
    if isinstance(model_or_run, MaskedAutoencoder):
        if cases is None:
            raise UserError(
                "explore(model, image): a model has no images of its own; give an array (C, *img_size), or a "
                "run instead of the model"
            )
        items = list(cases) if isinstance(cases, (list, tuple)) else [cases]
        ndim = len(model_or_run.encoder.img_size)
        if not items or any(isinstance(item, (str, Path, dict)) for item in items):
            raise UserError(
                "explore(model, image) takes arrays (C, *img_size); files and cases need a run, which knows "
                "how they are prepared"
            )
        if spacing_mm and (len(spacing_mm) != ndim or min(spacing_mm) <= 0):
            raise UserError(f"spacing_mm must be {ndim} positive numbers, got {tuple(spacing_mm)}")
        return Source(model_or_run, items, None, None, spacing_mm)
    run = model_or_run if isinstance(model_or_run, Run) else Run.open(model_or_run)
    run.need_finished()
    stage = run.config["stage"]
    if stage == "finetune":
        task, settings = task_of(run.config), settings_of(run, FinetuneSettings)
        # The network of this run is loaded below, with the others.
        model, finetuned = None, [run.path, *finetuned]
    else:
        model, task, settings = load_pretrained(run)
    source = Source(
        model, _cases(cases, *_data_of(run, task, data_dir), settings, stage), task, settings, spacing_mm
    )
    source.run = run
    for path in finetuned:
        net, other, its = load_finetuned(Run.open(path, "finetune"))
        if (
            other.name != task.name
            or tuple(its.crop_size) != source.size
            or tuple(its.spacing_mm) != tuple(settings.spacing_mm)
        ):
            raise UserError(
                f"{path} is a run of {other.name} on {tuple(its.crop_size)} of spacing "
                f"{tuple(its.spacing_mm)}, expected {task.name} on {source.size} "
                f"of {tuple(settings.spacing_mm)}: use the same preset"
            )
        source.finetuned[Path(path).name] = (net, other, its)
    return source


def _data_of(run: Run, task: Task, data_dir: str | Path | None) -> tuple[Task, str]:
    """The run's task, reading its cases from where they lie now, and the folder of its data."""
    if not (run.config.get("data") or data_dir or is_list(task.name)):
        return task, ""
    where, folder = find_data(run, data_dir)
    return (task_of(run.config, where) if is_list(task.name) else task), folder


def _cases(cases: Any, task: Task, data_dir: str | Path, settings: Settings, stage: str) -> list:
    if cases is None:
        splits = build_splits(task, data_dir, settings)
        order = ("test", "val", "train") if stage == "finetune" else ("val", "train", "test")
        found = next((splits[part] for part in order if splits.get(part)), [])
        if not found:
            raise UserError(f"{data_dir} holds no cases to show")
        return found
    out = []
    for item in cases if isinstance(cases, (list, tuple)) else [cases]:
        if isinstance(item, (str, Path)):
            if not split_series(item)[0].exists():
                raise UserError(
                    f"{item} does not exist: expected an image file, a case of a split or an array"
                )
            item = case_of([item])
        out.append(item)
    return out
