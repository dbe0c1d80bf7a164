"""A fine-tuned network that takes scans: `Predictor.from_run("runs/self")("new.nii.gz")`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import Compose
from torch import Tensor, nn

from smae_utils.data import out_of_core
from smae_utils.data.batches import Scans, in_order, read_case, whole_images
from smae_utils.data.case import Case, case_of, without_label
from smae_utils.data.pictures import ReadRadiograph
from smae_utils.data.reading import CheckCase, ReadScan
from smae_utils.data.tasks import Task
from smae_utils.data.transforms import ResizeRadiograph, prepare
from smae_utils.work import devices
from smae_utils.work.grids import activate, label_map, slabs, to_scan_grid, windows
from smae_utils.work.progress import Say, say
from smae_utils.work.rebuild import load_finetuned
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings

Progress = Callable[[int, int], None]  # windows done, windows in all


class Segmented(NamedTuple):
    """A prediction on the scan's own grid.

    Attributes:
        labels: (X, Y, Z) or (H, W) uint8, the task's label numbers.
        affine: (4, 4) of that grid, in mm, RAS+; None of 2D images.
        probabilities: (out_chans, *labels.shape) float32 when they were asked for.
    """

    labels: np.ndarray
    affine: np.ndarray | None
    probabilities: np.ndarray | None


@dataclass(frozen=True)
class Predictor:
    """A network and how it looks at scans.

    Attributes:
        model: the network, in eval mode and on its device.
        task: what it predicts.
        crop_size: its input, in voxels or pixels.
        spacing_mm: voxel size that 3D scans are resampled to; empty: the task's own.
        overlap: of neighbouring windows, as a share of one.
        precision: "fp32" or "bf16"; "": whatever computes around it, as in training.
        num_workers: processes that read whole images ahead of the network; 0: none.
    """

    model: nn.Module
    task: Task
    crop_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] = ()
    overlap: float = 0.5
    precision: str = ""
    num_workers: int = 0

    @classmethod
    def of(cls, model: nn.Module, task: Task, settings: FinetuneSettings, precision: str = "") -> Predictor:
        """With the windows that a fine-tuning's settings say."""
        return cls(
            model,
            task,
            settings.crop_size,
            settings.spacing_mm,
            settings.overlap,
            precision,
            settings.num_workers,
        )

    @classmethod
    def from_run(
        cls, run: str | Path | Run, device: torch.device | None = None, report: Say = say
    ) -> Predictor:
        """The network of a fine-tuning run, on `device` or the best there is, in the run's precision where
        that computes it.

        `report` is told when it does not.

        Raises:
            UserError: for a folder that is no finished fine-tuning run.
        """
        run = run if isinstance(run, Run) else Run.open(run, stage="finetune")
        run.need_finished()
        model, task, settings = load_finetuned(run)
        device = device or devices.best_device()
        precision, note = devices.usable_precision(run.config.get("precision", "auto"), device)
        model.to(device, memory_format=devices.memory_format(task.spatial_dims))  # type: ignore[call-overload]  # torch's types leave it out
        if note:
            report(note)
        return cls.of(model, task, settings, precision)

    def __call__(self, scan: str | Path | Sequence[str | Path]) -> Segmented | dict[str, float]:
        """A scan by its file, its DICOM folder, or the files of its channels -> labels on its own grid; of a
        classifier class -> probability.

        Raises:
            UserError: for a scan that cannot be read or is not what the network was trained with.
        """
        case = case_of([scan] if isinstance(scan, (str, Path)) else scan)
        if self.task.kind == "classification":
            return dict(zip(self.task.classes, map(float, self.classify(self.scans([case]))[0])))
        self.check(case)
        return self.segment(case)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _computing(self) -> AbstractContextManager[None]:
        return (
            devices.inference_context(self.device, self.precision)
            if self.precision
            else torch.inference_mode()
        )

    def prepared(self) -> Compose:
        """What is done with a scan before the network sees it, see `data.transforms.prepare`."""
        return prepare(self.task, False, self.spacing_mm, self.crop_size)

    def scans(self, cases: Sequence[Case]) -> Scans:
        """Cases as the network sees them, read when they are asked for."""
        return Scans(list(cases), self.prepared())

    def check(self, case: Case) -> None:
        """Refuse a scan that cannot be predicted, before anything is.

        Raises:
            UserError: naming the file.
        """
        if self.task.spatial_dims == 2:
            read_case(ReadRadiograph(self.task.in_chans), without_label(case))
            return
        read = Compose([ReadScan(["image"]), CheckCase(self.task, with_label=False)])
        look = out_of_core.look_through
        read_case(
            lambda scan: look(scan, self.task) if out_of_core.is_large(scan) else read(scan),
            without_label(case),
        )

    def segment(self, case: Case, keep: bool = False, progress: Progress | None = None) -> Segmented:
        """Predict a scan on its own grid; with `keep` also the probabilities there.

        Probabilities, not labels, are carried back, so that edges stay smooth; block by block, so that memory
        stays at a few volumes of `out_of_core.CHANNEL_VOXELS`. Outside the resampled body everything is
        background.
        """
        if self.task.spatial_dims == 2:
            return self._segment_flat(case, keep)
        scan = read_case(self._read_scan, without_label(case))
        probs = self.probabilities(scan.image, progress)
        labels = out_of_core.zeros(scan.shape, np.uint8)
        kept = out_of_core.zeros((len(probs), *scan.shape)) if keep else None
        for box in out_of_core.blocks(scan.shape, len(probs), np.linalg.inv(scan.affine) @ scan.scan_affine):
            size = [s.stop - s.start for s in box]
            values = to_scan_grid(probs, scan.affine, size, scan.scan_affine @ out_of_core.start_of(box))
            labels[box] = label_map(values, self.task)
            if kept is not None:
                kept[(slice(None), *box)] = values.numpy()
        return Segmented(labels, scan.scan_affine, kept)

    def probabilities(self, image: Tensor, progress: Progress | None = None) -> Tensor:
        """Prepared scan (C, *spatial) of any size -> class probabilities (out_chans, *spatial) on the CPU, by
        Gaussian-weighted windows.

        A scan too large for `out_of_core.CHANNEL_VOXELS` is run in slabs along the last axis, so that its
        class volumes need not be in memory at once; the values are those of one run, kept in half precision.
        """
        sizes, window = tuple(image.shape[1:]), self.crop_size
        planes = out_of_core.CHANNEL_VOXELS // (math.prod(sizes[:2]) * self.task.out_chans)
        pieces = list(slabs(sizes[2], window[2], self.overlap, planes))
        total = sum(windows((*sizes[:2], stop - start), window, self.overlap) for start, stop, *_ in pieces)
        out: np.ndarray | None = None
        at_a_time = 1 if self.device.type == "cpu" else 4  # several only fill a CPU's caches
        done = 0

        def counted(crops: Tensor) -> Tensor:
            nonlocal done
            logits = self.model(crops.contiguous(memory_format=devices.memory_format(3)))
            done += len(crops)
            if progress:
                progress(done, total)
            return logits

        for start, stop, first, last in pieces:
            part = image[None, ..., start:stop].to(self.device)
            with self._computing():
                logits = sliding_window_inference(
                    part, window, at_a_time, counted, overlap=self.overlap, mode="gaussian", device="cpu"
                )[0]
                probs = activate(logits.float(), self.task)
            if len(pieces) == 1:
                return probs
            if out is None:
                out = out_of_core.zeros((len(probs), *sizes), np.float16)
            out[..., first:last] = probs[..., first - start : last - start].numpy()
        return torch.from_numpy(out)

    def classify(self, scans: Scans) -> np.ndarray:
        """Probabilities (cases, classes) of whole images at the model's input size."""
        together = partial(whole_images, size=self.crop_size)
        batch_size = 64 if self.task.spatial_dims == 2 else 4
        rows = []
        for images in in_order(scans, together, batch_size, self.num_workers):
            with self._computing():
                rows.append(self.model(images.to(self.device)).float().sigmoid().cpu())
        return torch.cat(rows).numpy()

    def occlusion_map(self, case: Case, patch: int, finding: int) -> np.ndarray:
        """(grid) fall of the probability of a finding when one patch is replaced by the image's mean (Zeiler
        and Fergus, arXiv 1311.2901).
        """
        image = ResizeRadiograph(self.crop_size)(read_case(self.prepared(), case))["image"]
        grid = tuple(n // patch for n in self.crop_size)
        covered = image.repeat(math.prod(grid), 1, 1, 1)
        for i, (row, column) in enumerate(np.ndindex(*grid)):
            covered[i, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = (
                0  # 0 is the mean: images are standardised
            )
        batch = torch.cat([image[None], covered])
        with self._computing():
            scores = torch.cat(
                [
                    self.model(part.to(self.device)).float().sigmoid()[:, finding].cpu()
                    for part in batch.split(64)
                ]
            )
        return (scores[0] - scores[1:]).reshape(grid).numpy()

    def _read_scan(self, case: Mapping[str, Any]) -> out_of_core.Prepared:
        if out_of_core.is_large(case):
            return out_of_core.prepare_large(case, self.task, self.spacing_mm, self.crop_size)
        image = self.prepared()(case)["image"]
        shape = tuple(int(n) for n in image.meta["spatial_shape"])[:3]
        return out_of_core.Prepared(
            image.as_tensor(),
            np.asarray(image.affine, float),
            shape,
            np.asarray(image.meta["original_affine"], float),
        )

    def _segment_flat(self, case: Case, keep: bool) -> Segmented:
        """A 2D image is seen whole at the network's input size; its probabilities are brought back to its own
        pixels linearly.
        """
        data = read_case(self.prepared(), without_label(case))
        width, height = data["image"].size
        with self._computing():
            logits = (
                self.model(ResizeRadiograph(self.crop_size)(data)["image"][None].to(self.device))[0]
                .float()
                .cpu()
            )
        probs = activate(logits, self.task)
        with torch.autocast("cpu", enabled=False):
            probs = nn.functional.interpolate(
                probs[None], size=(height, width), mode="bilinear", align_corners=False
            )[0]
        return Segmented(label_map(probs, self.task), None, probs.numpy() if keep else None)
