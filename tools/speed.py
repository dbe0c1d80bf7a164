"""How fast against what people would use instead: MONAI's networks and inference, interleaved in one process."""

from __future__ import annotations

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
from smae_utils.work.devices import memory_format, pick_precision
from smae_utils.work.predictor import Predictor
from smae_utils.work.provenance import provenance

VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12}
COLUMNS = ["work", "subject", "peer", "ratio_median", "ratio_min", "ratio_max", "subject_s", "peer_s"]


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
        channels, size, patch, hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12, masking_ratio=ratio,
        decoder_hidden_size=384, decoder_mlp_dim=1536, decoder_num_layers=8, decoder_num_heads=12,
        spatial_dims=len(size), qkv_bias=True,
    )  # fmt: skip
    image = torch.randn(1 if len(size) == 3 else 8, channels, *size)
    form = memory_format(len(size))
    name = f"mae_step_vit_b_{'x'.join(map(str, size))}_c{channels}_mask{ratio}"
    mine = step_of(ours.to(memory_format=form), image.to(memory_format=form), lambda model, x: model(x).loss)
    other = step_of(theirs, image, monai_mae_loss((patch,) * len(size)))
    return Work(
        name, "MONAI MaskedAutoEncoderViT", mine, other, ("fp32",)
    )  # it fails under autocast on a CPU


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
        lambda precision: predictors[precision].probabilities(image), monai,
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
    name = f"crops_{stage}_{'x'.join(map(str, scan))}"
    return Work(name, peer, lambda _: ours(mine), lambda _: theirs(sample), ())


WORKS: dict[str, Callable[[], Work]] = {
    "mae 96^3 x 1, mask .75": lambda: mae_work((96, 96, 96), 1, 16, 0.75),
    "mae 96^3 x 1, mask .125": lambda: mae_work((96, 96, 96), 1, 16, 0.125),
    "crops of fine-tuning": lambda: crops_work((200, 170, 150), (96, 96, 96), "finetune"),
    "crops of pre-training": lambda: crops_work((200, 170, 150), (96, 96, 96), "pretrain"),
    "mae 128^3 x 4, mask .75": lambda: mae_work((128, 128, 128), 4, 16, 0.75),
    "mae 224^2 x 1, mask .75": lambda: mae_work((224, 224), 1, 16, 0.75),
    "unetr 96^3 x 1": lambda: unetr_work((96, 96, 96), 1, 14),
    "unetr 128^3 x 4": lambda: unetr_work((128, 128, 128), 4, 4),
    "sliding window 512 x 512 x 150": lambda: window_work((512, 512, 150), (96, 96, 96)),
}


def seconds(act: Act, precision: str) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    act(precision)
    return time.perf_counter() - begin


def compare(work: Work, auto: str, repeats: int) -> list[tuple]:
    """Rows of a work: the peer as it comes, and both in one precision; after one call of each to warm up, by
    turns.

    Args:
        auto: the precision this package computes in on this machine.
    """
    pairs = [(auto, AS_IT_COMES)]  # of this package, of the peer
    if work.precisions:
        pairs.append((auto, auto) if auto in work.precisions else ("fp32", "fp32"))
    acts = {("smae_utils", mine): work.ours for mine, _ in pairs}
    acts |= {(work.peer, other): work.theirs for _, other in pairs}
    for (_, precision), act in acts.items():
        act(precision)
    times = [{key: seconds(act, key[1]) for key, act in acts.items()} for _ in range(repeats)]
    rows = []
    for mine, other in pairs:
        own, peer = (
            np.array([turn[key] for turn in times]) for key in (("smae_utils", mine), (work.peer, other))
        )
        ratios = peer / own
        figures = [np.median(ratios), ratios.min(), ratios.max(), np.median(own), np.median(peer)]
        names = (
            (f"smae_utils {mine}", f"{work.peer} {other}") if work.precisions else ("smae_utils", work.peer)
        )
        rows.append((work.name, *names, *(float(f"{v:.4g}") for v in figures)))
    return rows


def benchmark_speed(out: str | Path, repeats: int = 5, only: str = "") -> pd.DataFrame:
    """Measure each work as `compare` does, and write speed.csv.

    Args:
        repeats: calls of each side.
        only: works whose name begins so.

    Returns:
        One or two rows a work; a ratio is the peer's time over this package's, of neighbouring calls.

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
        f"{source['machine']}, {torch.get_num_threads()} threads, {source['date']}, "
        f"commit {source['commit']}, torch {source['packages']['torch']}, monai {source['packages']['monai']}",
    ]
    rows = []
    auto = pick_precision("auto", torch.device("cpu"))
    for make in chosen.values():
        for row in compare(make(), auto, repeats):
            rows.append(row)
            print(*row, flush=True)
        table = pd.DataFrame(rows, columns=COLUMNS)
        text = "".join(f"# {fact}\n" for fact in facts) + table.to_csv(index=False)
        write_text(Path(out) / "speed.csv", text)  # after each, since the last ones take minutes
    return table
