"""What `tools.speed` times: steps of networks, prediction, and crops, by this package and by MONAI."""

from __future__ import annotations

import atexit
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import PersistentDataset
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNETR as MonaiUNETR
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn

from smae_utils.data.batches import Crops
from smae_utils.data.crops import CountClasses, CountForeground, CropByClasses, CropForeground
from smae_utils.data.tasks import get_task
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.patches import patchify
from smae_utils.method.unetr import UNETR
from smae_utils.work.build import build_augmentation, build_scans
from smae_utils.work.devices import memory_format
from smae_utils.work.predictor import Predictor
from smae_utils.work.settings import FinetuneSettings, make_settings

VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12}


AS_IT_COMES = "as it comes"  # a peer's network in fp32 with torch's own choice of an AdamW
Act = Callable[[str], object]  # what is timed: "fp32" or "bf16", both with a fused AdamW, or AS_IT_COMES


@dataclass
class Work:
    """Something to do, by this package and by another."""

    name: str
    peer: str
    ours: Act
    theirs: Act
    precisions: tuple[str, ...] = ("fp32", "bf16")  # that the peer computes in; none: it multiplies nothing
    at_most: int = 0  # repeats of what takes minutes; 0: as many as are wanted

    def pairs(self, auto: str) -> list[tuple[str, str]]:
        """In what this package and the peer compute: the peer as it comes, then both in one precision.

        Args:
            auto: the precision this package computes in on this machine.
        """
        pairs = [(auto, AS_IT_COMES)]
        if self.precisions:
            pairs.append((auto, auto) if auto in self.precisions else ("fp32", "fp32"))
        return pairs


def autocast(precision: str) -> torch.autocast:
    """Networks within it compute in "fp32" or "bf16", as they do when this package trains."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def step_of(model: nn.Module, image: Tensor, loss_of: Callable[[nn.Module, Tensor], Tensor]) -> Act:
    """Forward, backward and AdamW, as one call."""
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4)
    fused = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # as this package trains

    def step(precision: str) -> float:
        optimizer = plain if precision == AS_IT_COMES else fused
        with autocast(precision):
            loss = loss_of(model, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def monai_mae_loss(patch: tuple[int, ...]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The normalised target of the paper for MONAI's network, which gives predictions and mask alone."""

    def loss_of(model: nn.Module, image: Tensor) -> Tensor:
        pred, mask = model(image)
        target = patchify(image, patch)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True, unbiased=False)
        error = (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean(-1)
        return (error * mask).sum() / mask.sum()

    return loss_of


def mae_work(size: tuple[int, ...], channels: int, patch: int, ratio: float) -> Work:
    """A step of self pre-training of ViT-B, decoder 384 x 8, normalised target."""
    torch.manual_seed(0)
    ours = MaskedAutoencoder(
        size, patch, channels, **VIT_B, decoder_embed_dim=384, decoder_depth=8, decoder_num_heads=12,
        mask_ratio=ratio,
    )  # fmt: skip
    theirs = MaskedAutoEncoderViT(
        channels, size, patch, hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12,
        masking_ratio=ratio,
        decoder_hidden_size=384, decoder_mlp_dim=1536, decoder_num_layers=8, decoder_num_heads=12,
        spatial_dims=len(size), qkv_bias=True,
    )  # fmt: skip
    image = torch.randn(1 if len(size) == 3 else 8, channels, *size)
    form = memory_format(len(size))
    name = f"mae_step_vit_b_{'x'.join(map(str, size))}_c{channels}_mask{ratio}"
    mine = step_of(ours.to(memory_format=form), image.to(memory_format=form), lambda model, x: model(x).loss)
    other = step_of(theirs, image, monai_mae_loss((patch,) * len(size)))
    precisions = ("fp32",)  # it fails under autocast on a CPU
    return Work(name, "MONAI MaskedAutoEncoderViT", mine, other, precisions)


def monai_unetr(size: tuple[int, ...], channels: int, classes: int) -> nn.Module:
    """MONAI's UNETR at its defaults, ViT-B."""
    return MonaiUNETR(channels, classes, size, feature_size=16, norm_name="instance")


def unetr_work(size: tuple[int, ...], channels: int, classes: int) -> Work:
    """A step of fine-tuning of UNETR with cross entropy."""
    torch.manual_seed(0)
    ours = UNETR(size, 16, channels, **VIT_B, out_chans=classes).to(memory_format=memory_format(3))
    image = torch.randn(1, channels, *size)
    label = torch.randint(classes, (1, *size))

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), label)

    mine = step_of(ours, image.to(memory_format=memory_format(3)), loss_of)
    theirs = step_of(monai_unetr(size, channels, classes), image, loss_of)
    return Work(f"unetr_step_{'x'.join(map(str, size))}_c{channels}", "MONAI UNETR", mine, theirs)


def window_work(scan: tuple[int, ...], size: tuple[int, ...]) -> Work:
    """A scan through windows that overlap by a quarter, each side with its own UNETR."""
    torch.manual_seed(0)
    task = get_task("btcv")
    ours = UNETR(size, 16, 1, **VIT_B, out_chans=14).eval().to(memory_format=memory_format(3))
    theirs = monai_unetr(size, 1, 14).eval()
    image = torch.rand(1, *scan)
    predictors = {
        precision: Predictor(ours, task, size, task.spacing_mm, overlap=0.25, precision=precision)
        for precision in ("fp32", "bf16")
    }

    def monai(precision: str) -> Tensor:
        with torch.inference_mode(), autocast(precision):
            return sliding_window_inference(image[None], size, 1, theirs, overlap=0.25, mode="gaussian")

    return Work(
        f"sliding_window_{'x'.join(map(str, scan))}", "MONAI UNETR and sliding_window_inference",
        lambda precision: predictors[precision].probabilities(image), monai, at_most=2,
    )  # fmt: skip


def organs(scan: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A mask (X, Y, Z) of 13 organs, cubes of about 10,000 voxels anywhere."""
    label = np.zeros(scan, np.uint8)
    for organ in range(1, 14):
        corner = [int(rng.integers(0, n - 25)) for n in scan]
        label[tuple(slice(o, o + 22) for o in corner)] = organ
    return label


def crops_work(scan: tuple[int, ...], size: tuple[int, ...], stage: str) -> Work:
    """Two crops of a scan in memory, of fine-tuning or of pre-training.

    This package counts voxels beforehand, as it does in training.
    """
    rng = np.random.default_rng(0)
    image, label = (torch.from_numpy(v[None]) for v in (rng.random(scan, np.float32), organs(scan, rng)))
    how = {"spatial_size": size, "num_samples": 2}
    if stage == "finetune":
        balanced = {**how, "label_key": "label", "num_classes": 14, "warn": False}
        ours: Any = CropByClasses(["image", "label"], **balanced)
        theirs: Any = mt.RandCropByLabelClassesd(["image", "label"], **balanced)
        sample = {"image": image, "label": label}
        mine = CountClasses()(sample)
    else:
        ours, theirs = CropForeground(size, 2), mt.RandWeightedCropd("image", w_key="foreground", **how)
        mine = CountForeground(size)({"image": image})
        sample = {"image": image, "foreground": (image != 0).float()}
    peer = f"MONAI {type(theirs).__name__}"
    name = f"crops_{stage}_{'x'.join(map(str, scan))}"
    return Work(name, peer, lambda _: ours(mine), lambda _: theirs(sample), ())


def disk_work(scan: tuple[int, ...], size: tuple[int, ...], count: int) -> Work:
    """Two crops for fine-tuning of the next of `count` scans, which each side keeps prepared on disk."""
    folder = Path(tempfile.mkdtemp(prefix="speed_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng, cases = np.random.default_rng(0), []
    for i in range(count):
        files = {}
        for kind, values in (
            ("image", rng.integers(-100, 200, scan, np.int16)),
            ("label", organs(scan, rng)),
        ):
            files[kind] = str(folder / f"{kind}{i}.nii")
            nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.5, 2.0, 1.0])), files[kind])
        cases.append({"case": str(i), "patient": str(i), **files})
    task = get_task("btcv")
    values = {"crop_size": size, "crops_per_scan": 2, "store": str(folder / "store")}
    settings = make_settings(FinetuneSettings, values, "benchmark")
    crops = Crops(build_scans(task, settings, cases), build_augmentation(task, settings), seed=0)
    keys = ["image", "label"]
    peer = PersistentDataset(
        cases,
        mt.Compose(
            [
                mt.LoadImaged(keys, ensure_channel_first=True),
                mt.Orientationd(keys, axcodes="RAS"),
                mt.Spacingd(keys, pixdim=task.spacing_mm, mode=["bilinear", "nearest"]),
                mt.ScaleIntensityRanged("image", *task.window, 0.0, 1.0, clip=True),
                mt.CropForegroundd(keys, source_key="image"),
                mt.EnsureTyped(keys, dtype=[torch.float32, torch.uint8]),
                mt.RandCropByLabelClassesd(keys, label_key="label", spatial_size=size,
                                            num_classes=14, num_samples=2, warn=False),
            ]
        ),
        folder / "monai",
    )  # fmt: skip
    numbers = {"ours": itertools.count(), "theirs": itertools.count()}
    for i in range(count):
        crops[i], peer[i]
    return Work(
        f"crops_from_disk_{'x'.join(map(str, scan))}", "MONAI PersistentDataset",
        lambda _: crops[next(numbers["ours"])], lambda _: peer[next(numbers["theirs"]) % count], (),
    )  # fmt: skip


def import_work() -> Work:
    """A new Python that imports all that training needs, or the libraries that it stands on."""

    def imported(line: str) -> Act:
        return lambda _: subprocess.run([sys.executable, "-c", line], check=True, capture_output=True)

    # Beside some builds of torch, timm can only be imported after `timm_library`.
    theirs = "import torch, monai, smae_utils.timm_library, timm"
    ours = imported("import smae_utils; smae_utils.pretrain, smae_utils.finetune, smae_utils.Predictor")
    return Work("import", "torch, monai and timm", ours, imported(theirs), ())
