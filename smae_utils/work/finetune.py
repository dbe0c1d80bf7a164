"""Fine-tuning: what goes into the loop, and the run folder that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from smae_utils.data.batches import derive_seed
from smae_utils.data.case import Case, Splits
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.work.build import build_augmentation, build_model, build_scans, build_splits
from smae_utils.work.evaluation import score_cases
from smae_utils.work.loop import Loop, kept_generators
from smae_utils.work.losses import build_loss, class_weights
from smae_utils.work.predictor import Predictor
from smae_utils.work.presets import resolve
from smae_utils.work.progress import Say, say
from smae_utils.work.run_folder import Run
from smae_utils.work.start import check_unseen, config_of, facts_of, is_scratch, tell_notes

Item = TypeVar("Item")


@kept_generators()
def finetune(
    task: str,
    data_dir: str | Path,
    out: str | Path,
    init: str | Path = "scratch",
    preset: str = "demo",
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    report: Say = say,
    adapt: bool = False,
) -> Run:
    """Fine-tune the whole network on the labelled training cases, nothing frozen.

    Args:
        task: which data set, or the path of a list file.
        data_dir: where its download lies; of a list what its paths are relative to, "" for the list's own
            folder.
        out: run folder to make.
        init: "scratch", or a pre-training run folder, a checkpoint file, or "timm:NAME". The two arms differ
            in the encoder's weights and in what the preset gives them as `scratch` and `self` (their learning
            rates); seed, data order and augmentation are the same.
        preset: name or YAML file of the settings, see `work.presets`.
        overrides: settings that count more than the preset's.
        resume: go on from the run folder's last state; the loss sequence equals an uninterrupted run's.
        report: receives each line of progress.
        adapt: let weights of other channels or of 2D images be fitted, see
            `method.checkpoints.load.load_weights`.

    Raises:
        UserError: if the weights do not exist, do not fill the encoder or have seen test cases, or if the
            data, the settings or the run folder cannot be used.
    """
    record = get_task(task)
    scratch = is_scratch(init)
    settings = resolve(record, "finetune", preset, "scratch" if scratch else "self", overrides)
    splits = build_splits(record, data_dir, settings)
    if not scratch:
        check_unseen(init, splits)
    tell_notes(record, report, settings.store)
    splits = _labelled_parts(splits, report)
    if not splits["train"]:
        raise UserError(
            f"no training case of {task} has a label: fine-tuning needs labels, pre-training does not"
        )
    if settings.labelled > len(splits["train"]):
        raise UserError(
            f"labelled={settings.labelled} is more than the {len(splits['train'])} labelled "
            "training cases: use --set labelled=0 for all"
        )
    if settings.labelled:
        splits["train"] = few_labelled(splits["train"], settings.labelled, settings.seed)
    if settings.select == "best":
        _check_selection(splits["val"], settings.val_every)
    torch.manual_seed(derive_seed(settings.seed, 20))
    model = build_model(record, settings)
    facts = facts_of(record, settings.spacing_mm, splits["train"], init)
    if not scratch:
        report(str(load_weights(model, init, adapt=adapt, expect=facts)))
    scans = build_scans(record, settings, splits["train"])
    val_scans = build_scans(record, settings, splits["val"])

    weights = None
    if record.exclusive and settings.ce_weight_power:
        weights = class_weights(
            (scans[i]["class_counts"] for i in range(len(scans))), record.out_chans, settings.ce_weight_power
        )
    criterion = build_loss(record, weights)

    def loss_of(net: nn.Module, batch: dict) -> Tensor:
        return criterion(net(batch["image"]), batch["label"])

    def validate(net: nn.Module) -> dict[str, float]:
        return {"val_score": score_cases(Predictor.of(net, record, settings), val_scans)}

    config = config_of("finetune", task, record, data_dir, out, preset, settings, splits, init, adapt)
    augment = build_augmentation(record, settings)
    loop = Loop(config, out, model, scans, augment, settings, loss_of, report, settings.layer_decay, facts)
    return loop.run(resume, validate if splits["val"] else None, best=settings.select == "best")


def _labelled_parts(splits: Splits, report: Say) -> Splits:
    """The cases with labels; `report` hears how many have none."""
    out = {}
    for part, cases in splits.items():
        out[part] = [case for case in cases if "label" in case]
        if without := len(cases) - len(out[part]):
            report(f"{without} of {len(cases)} {part} cases have no label and are left out of fine-tuning")
    return out


def _check_selection(val: list[Case], val_every: int) -> None:
    """Refuse to keep the best weights where nothing tells which are."""
    if not val:
        raise UserError(
            "select=best needs labelled validation cases, there are none: "
            "use --set train_on_val=false, list some, or --set select=last"
        )
    if not val_every:
        raise UserError(
            "select=best needs validation while training, and val_every=0 is never: use --set val_every=100, "
            "for example, or --set select=last"
        )


def few_labelled(items: list[Item], count: int, seed: int) -> list[Item]:
    """`count` of the cases (or of the patients), drawn by `seed`, in their old order; with the same seed
    fewer are a part of more."""
    order = np.random.default_rng([derive_seed(seed, 40)]).permutation(len(items))[:count]
    return [items[i] for i in sorted(order)]
