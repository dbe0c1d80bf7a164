"""Self pre-training: what goes into the loop, and the run folder that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smae_utils.data.batches import Crops, derive_seed, join
from smae_utils.data.case import Splits, without_label
from smae_utils.data.tasks import get_task
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.masking import mask_noise
from smae_utils.work.build import build_augmentation, build_mae, build_scans, build_splits
from smae_utils.work.loop import Loop, kept_generators
from smae_utils.work.presets import resolve
from smae_utils.work.progress import Say, say
from smae_utils.work.run_folder import Run
from smae_utils.work.start import config_of, facts_of, is_scratch, seen_of, tell_notes

# At most this many crops are scored, and kept in memory, for the validation loss.
VALIDATION_CROPS = 128


@kept_generators()
def pretrain(
    task: str,
    data_dir: str | Path,
    out: str | Path,
    preset: str = "demo",
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    report: Say = say,
    init: str | Path = "scratch",
    adapt: bool = False,
) -> Run:
    """Self pre-training: a masked autoencoder on the images of the task's own training cases, without labels.

    Args:
        task: which data set, or the path of a list file.
        data_dir: where its download lies; of a list what its paths are relative to, "" for its own folder.
        out: run folder to make.
        preset: name or YAML file of the settings, see `work.presets`.
        overrides: settings that count more than the preset's.
        resume: go on from the run folder's last state; the loss sequence equals an uninterrupted run's.
        report: receives each line of progress.
        init: "scratch", or weights to go on from: a run folder, a checkpoint file, or "timm:NAME". The whole
            encoder is taken from there, and of the decoder what fits.
        adapt: fit weights of other channels or of 2D images, see `method.checkpoints.load.load_weights`.

    Raises:
        UserError: if the data, the settings, the weights or the run folder cannot be used.
    """
    record = get_task(task)
    settings = resolve(record, "pretrain", preset, overrides=overrides)
    scratch = is_scratch(init)
    splits = build_splits(record, data_dir, settings)
    images: Splits = {part: list(map(without_label, cases)) for part, cases in splits.items()}
    tell_notes(record, report, settings.store)
    torch.manual_seed(derive_seed(settings.seed, 10))
    model = build_mae(record, settings)
    facts = facts_of(record, settings.spacing_mm, images["train"], init)
    if not scratch:
        if seen := seen_of(init, images["test"]):
            report(
                f"note: {init} was trained on {len(seen)} of the test cases, {seen[0]} for one: "
                "what is fine-tuned from this run cannot be scored on them"
            )
        report(str(load_weights(model, init, adapt=adapt, expect=facts)))
    scans = build_scans(record, settings, images["train"])
    length = model.encoder.pos_embed.shape[1]
    fixed: list[dict] = []

    def loss_of(net: nn.Module, batch: dict) -> Tensor:
        noise = mask_noise(batch["noise_seed"], length).to(batch["image"].device)
        return net(
            batch["image"],
            noise,
            drawn_ratio(settings.mask_ratio_range, batch["noise_seed"][0]) if net.training else None,
        ).loss

    def validate(net: nn.Module) -> dict[str, float]:
        # The same crops and the same masks every time, so that the curve shows the model and not the draw.
        if not fixed:
            crops = Crops(
                build_scans(record, settings, images["val"], kept=False),
                build_augmentation(record, settings),
                seed=derive_seed(settings.split_seed, 11),
            )
            wanted = min(
                len(images["val"]) * max(1, 4 // settings.crops_per_scan),
                max(1, VALIDATION_CROPS // settings.crops_per_scan),
            )
            fixed.extend(join([crops[i]]) for i in range(wanted))
        losses = [
            loss_of(net, {**b, "image": b["image"].to(next(net.parameters()).device)}).item() for b in fixed
        ]
        return {"val_loss": sum(losses) / len(losses)}

    config = config_of("pretrain", task, record, data_dir, out, preset, settings, images, init, adapt)
    loop = Loop(
        config,
        out,
        model,
        scans,
        build_augmentation(record, settings),
        settings,
        loss_of,
        report,
        facts=facts,
    )
    return loop.run(resume, validate if images["val"] else None)


def drawn_ratio(between: Sequence[float], seed: int) -> float | None:
    """The mask ratio of a step, uniform between two numbers and drawn from the step's own seed.

    None, the model's own ratio, where `between` is empty.
    """
    if not between:
        return None
    low, high = between
    return float(np.random.default_rng(int(seed) % 2**63).uniform(low, high))
