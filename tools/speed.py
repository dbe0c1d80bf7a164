"""How fast against what people would use instead: MONAI's networks and inference, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai import transforms as mt
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNETR as MonaiUNETR
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn

from smae_utils.data.crops import CropByClasses, CropForeground, slab_counts
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.patches import patchify
from smae_utils.method.unetr import UNETR
from smae_utils.whole import write_text
from smae_utils.work.devices import memory_format
from smae_utils.work.predictor import Predictor
from smae_utils.work.provenance import provenance

VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12}
COLUMNS = ["work", "subject", "peer", "ratio_median", "ratio_min", "ratio_max", "subject_s", "peer_s"]


@dataclass
class Work:
    """Something to do, by this package and by another."""

    name: str
    peer: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def step_of(
    model: nn.Module, image: Tensor, loss_of: Callable[[nn.Module, Tensor], Tensor]
) -> Callable[[], float]:
    """Forward, backward and AdamW, as one call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
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
        channels, size, patch, hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12, masking_ratio=ratio,
        decoder_hidden_size=384, decoder_mlp_dim=1536, decoder_num_layers=8, decoder_num_heads=12,
        spatial_dims=len(size), qkv_bias=True,
    )  # fmt: skip
    image = torch.randn(1 if len(size) == 3 else 8, channels, *size)
    form = memory_format(len(size))
    name = f"mae_step_vit_b_{'x'.join(map(str, size))}_c{channels}_mask{ratio}"
    mine = step_of(ours.to(memory_format=form), image.to(memory_format=form), lambda model, x: model(x).loss)
    return Work(
        name, "MONAI MaskedAutoEncoderViT", mine, step_of(theirs, image, monai_mae_loss((patch,) * len(size)))
    )


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
    predictor = Predictor(ours, task, size, task.spacing_mm, overlap=0.25, precision="fp32")

    def monai() -> Tensor:
        with torch.inference_mode():
            return sliding_window_inference(image[None], size, 1, theirs, overlap=0.25, mode="gaussian")

    return Work(
        f"sliding_window_{'x'.join(map(str, scan))}", "MONAI UNETR and sliding_window_inference",
        lambda: predictor.probabilities(image), monai,
    )  # fmt: skip


def crops_work(scan: tuple[int, ...], size: tuple[int, ...], stage: str) -> Work:
    """Two crops of a scan in memory, of fine-tuning (13 organs of about 10,000 voxels) or of pre-training."""
    generator = torch.Generator().manual_seed(0)
    image, label = torch.rand(1, *scan, generator=generator), torch.zeros(1, *scan, dtype=torch.uint8)
    for organ in range(1, 14):
        corner = [int(torch.randint(0, n - 25, (1,), generator=generator)) for n in scan]
        label[(0, *(slice(o, o + 22) for o in corner))] = organ
    how = {"spatial_size": size, "num_samples": 2}
    if stage == "finetune":
        balanced = {**how, "label_key": "label", "num_classes": 14, "warn": False}
        ours: Any = CropByClasses(["image", "label"], **balanced)
        theirs: Any = mt.RandCropByLabelClassesd(["image", "label"], **balanced)
        sample = {"image": image, "label": label}
        mine = {**sample, "class_counts": slab_counts(label)}
    else:
        ours, theirs = CropForeground(size, 2), mt.RandWeightedCropd("image", w_key="foreground", **how)
        mine = {"image": image}
        sample = {**mine, "foreground": (image != 0).float()}
    peer = f"MONAI {type(theirs).__name__}"
    return Work(f"crops_{stage}_{'x'.join(map(str, scan))}", peer, lambda: ours(mine), lambda: theirs(sample))


WORKS: dict[str, Callable[[], Work]] = {
    "mae 96^3 x 1, mask .75": lambda: mae_work((96, 96, 96), 1, 16, 0.75),
    "mae 96^3 x 1, mask .125": lambda: mae_work((96, 96, 96), 1, 16, 0.125),
    "crops of fine-tuning": lambda: crops_work((200, 170, 150), (96, 96, 96), "finetune"),
    "crops of pre-training": lambda: crops_work((200, 170, 150), (96, 96, 96), "pretrain"),
    "mae 128^3 x 4, mask .75": lambda: mae_work((128, 128, 128), 4, 16, 0.75),
    "mae 224^2 x 1, mask .75": lambda: mae_work((224, 224), 1, 16, 0.75),
    "unetr 96^3 x 1": lambda: unetr_work((96, 96, 96), 1, 14),
    "unetr 128^3 x 4": lambda: unetr_work((128, 128, 128), 4, 4),
    "sliding window 192 x 192 x 96": lambda: window_work((192, 192, 96), (96, 96, 96)),
}


def seconds(act: Callable[[], object]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def benchmark_speed(out: str | Path, repeats: int = 5, only: str = "") -> pd.DataFrame:
    """Measure each work by turns, this package then the peer, after one call of each to warm up; writes speed.csv.

    Args:
        repeats: pairs of calls.
        only: works whose name begins so.

    Returns:
        A row a work; a ratio is the peer's time over this package's, of neighbouring calls.

    Raises:
        UserError: where no work is called so.
    """
    chosen = {name: make for name, make in WORKS.items() if name.startswith(only)}
    if not chosen or repeats < 1:
        raise UserError(
            f"no work begins with {only!r}, or repeats {repeats} < 1: expected some of {', '.join(WORKS)}"
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    source = provenance()
    facts = [
        f"python -m tools benchmark --what speed --repeats {repeats}{f' --only {only!r}' if only else ''}",
        f"{source['machine']}, {torch.get_num_threads()} threads, fp32 on both sides, {source['date']}, "
        f"commit {source['commit']}, torch {source['packages']['torch']}, monai {source['packages']['monai']}",
    ]
    rows = []
    for make in chosen.values():
        work = make()
        seconds(work.ours), seconds(work.theirs)
        pairs = np.array([(seconds(work.ours), seconds(work.theirs)) for _ in range(repeats)])
        ratios = pairs[:, 1] / pairs[:, 0]
        middle = [statistics.median(column) for column in pairs.T]
        figures = [statistics.median(ratios), ratios.min(), ratios.max(), *middle]
        rows.append((work.name, "smae_utils", work.peer, *(round(float(v), 3) for v in figures)))
        print(*rows[-1], flush=True)
        table = pd.DataFrame(rows, columns=COLUMNS)
        text = "".join(f"# {fact}\n" for fact in facts) + table.to_csv(index=False)
        write_text(Path(out) / "speed.csv", text)  # after each, since the last ones take minutes
    return table
