"""Pre-training and fine-tuning: what goes into the loop, and the run folder that comes out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smae_utils.data.batches import Crops, Scans, derive_seed, join, read_splits
from smae_utils.data.tasks import Case, Task, get_task
from smae_utils.data.tasks.lists import is_list, record_of
from smae_utils.data.transforms import augment_finetune, augment_pretrain, prepare
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import (
    hash_case,
    load_weights,
    seen_cases,
    weights_file,
)
from smae_utils.method.checkpoints.other_libraries import TIMM
from smae_utils.method.patches import mask_noise
from smae_utils.work.build import build_loss, build_mae, build_model, class_weights
from smae_utils.work.inference import score_cases
from smae_utils.work.loop import Loop, kept_generators
from smae_utils.work.progress import Say, say
from smae_utils.work.run_folder import Run, absolute, places, provenance
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, Settings, as_dict, resolve

# At most so many crops are scored, and kept in memory, for the validation loss of pre-training.
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
    """Self pre-training: a masked autoencoder on the images of the task's own training cases. Labels are never read.

    Args:
        task: which data set, or the path of a list file.
        data_dir: where its download lies; of a list what its paths are relative to, "" for the list's own folder.
        out: run folder to make.
        preset: name or YAML file of the settings, see `settings.resolve`.
        overrides: settings that count more than the preset's.
        resume: go on from the run folder's last state; the loss sequence equals an uninterrupted run's.
        report: receives each line of progress.
        init: "scratch", or weights to go on from: a run folder, a checkpoint file, or "timm:NAME". The whole encoder is
            taken from there, and of the decoder what fits.
        adapt: let weights of other channels or of 2D images be fitted, see `weights.load_weights`.

    Raises:
        UserError: if the data, the settings, the weights or the run folder cannot be used.
    """
    record = get_task(task)
    settings = resolve(record, "pretrain", preset, overrides=overrides)
    assert isinstance(settings, PretrainSettings)
    scratch = _is_scratch(init)
    splits = read_splits(record, data_dir, settings)
    images = {part: [{k: c[k] for k in ("case", "patient", "image")} for c in cases] for part, cases in splits.items()}
    _tell_notes(record, report)
    torch.manual_seed(derive_seed(settings.seed, 10))
    model = build_mae(record, settings)
    facts = _facts(record, settings, images["train"], init)
    if not scratch:
        if seen := _seen_of(init, images["test"]):
            report(
                f"note: {init} was trained on {len(seen)} of the test cases, {seen[0]} for one: "
                "what is fine-tuned from this run cannot be scored on them"
            )
        report(str(load_weights(model, init, adapt=adapt, expect=facts)))
    transform = prepare(record, settings, with_label=False)
    scans = Scans(images["train"], transform, settings.cache_rate)
    length = model.encoder.pos_embed.shape[1]
    fixed: list[dict] = []

    def loss_of(net: nn.Module, batch: dict) -> Tensor:
        noise = mask_noise(batch["noise_seed"], length).to(batch["image"].device)
        return net(batch["image"], noise, drawn_ratio(settings, batch["noise_seed"][0]) if net.training else None).loss

    def validate(net: nn.Module) -> dict[str, float]:
        # The same crops and the same masks every time, so that the curve shows the model and not the draw.
        if not fixed:
            crops = Crops(Scans(images["val"], transform), augment_pretrain(record, settings), seed=derive_seed(settings.split_seed, 11))
            wanted = min(len(images["val"]) * max(1, 4 // settings.crops_per_scan), max(1, VALIDATION_CROPS // settings.crops_per_scan))
            fixed.extend(join([crops[i]]) for i in range(wanted))
        losses = [loss_of(net, {**b, "image": b["image"].to(next(net.parameters()).device)}).item() for b in fixed]
        return {"val_loss": sum(losses) / len(losses)}

    config = _config("pretrain", task, record, data_dir, out, preset, settings, images, init, adapt)
    loop = Loop(config, out, model, scans, augment_pretrain(record, settings), settings, loss_of, report, facts=facts)
    return loop.run(resume, validate if images["val"] else None)


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
        data_dir: where its download lies; of a list what its paths are relative to, "" for the list's own folder.
        out: run folder to make.
        init: "scratch", or a pre-training run folder, a checkpoint file, or "timm:NAME". The two arms differ in the
            encoder's weights and in what the preset gives them as `scratch` and `self` (their learning rates); seed,
            data order and augmentation are the same.
        preset: name or YAML file of the settings, see `settings.resolve`.
        overrides: settings that count more than the preset's.
        resume: go on from the run folder's last state; the loss sequence equals an uninterrupted run's.
        report: receives each line of progress.
        adapt: let weights of other channels or of 2D images be fitted, see `weights.load_weights`.

    Raises:
        UserError: if the weights do not exist, do not fill the encoder or have seen test cases, or if the data, the
            settings or the run folder cannot be used.
    """
    record = get_task(task)
    scratch = _is_scratch(init)
    settings = resolve(record, "finetune", preset, "scratch" if scratch else "self", overrides)
    assert isinstance(settings, FinetuneSettings)
    splits = read_splits(record, data_dir, settings)
    if not scratch:
        _check_unseen(init, splits)
    _tell_notes(record, report)
    for part in splits:
        labelled = [c for c in splits[part] if "label" in c]
        if len(labelled) < len(splits[part]):
            report(f"{len(splits[part]) - len(labelled)} of {len(splits[part])} {part} cases have no label and are left out of fine-tuning")
        splits[part] = labelled
    if not splits["train"]:
        raise UserError(f"no training case of {task} has a label: fine-tuning needs labels, pre-training does not")
    if settings.labelled > len(splits["train"]):
        raise UserError(f"labelled={settings.labelled} is more than the {len(splits['train'])} labelled training cases: use --set labelled=0 for all")
    if settings.labelled:
        splits["train"] = few_labelled(splits["train"], settings.labelled, settings.seed)
    if settings.select not in ("last", "best"):
        raise UserError(f"select must be last or best, got {settings.select!r}")
    if settings.select == "best" and not splits["val"]:
        raise UserError("select=best needs labelled validation cases, there are none: use --set train_on_val=false, list some, or --set select=last")
    if settings.select == "best" and not settings.val_every:
        raise UserError(
            "select=best needs validation while training, and val_every=0 is never: use --set val_every=100, for example, or --set select=last"
        )
    torch.manual_seed(derive_seed(settings.seed, 20))
    model = build_model(record, settings)
    facts = _facts(record, settings, splits["train"], init)
    if not scratch:
        report(str(load_weights(model, init, adapt=adapt, expect=facts)))
    # A window of the whole scan is read again at test time; training needs labels on the same grid.
    scans = Scans(splits["train"], prepare(record, settings, with_label=record.kind == "segmentation"), settings.cache_rate)

    weights = None
    if record.exclusive and settings.ce_weight_power:
        weights = class_weights((scans[i]["label"] for i in range(len(scans))), record.out_chans, settings.ce_weight_power)
    criterion = build_loss(record, weights)

    def loss_of(net: nn.Module, batch: dict) -> Tensor:
        return criterion(net(batch["image"]), batch["label"])

    def validate(net: nn.Module) -> dict[str, float]:
        return {"val_score": score_cases(net, record, settings, splits["val"])}

    config = _config("finetune", task, record, data_dir, out, preset, settings, splits, init, adapt)
    augment = augment_finetune(record, settings)
    loop = Loop(config, out, model, scans, augment, settings, loss_of, report, settings.layer_decay, facts)
    return loop.run(resume, validate if splits["val"] else None, best=settings.select == "best")


def drawn_ratio(settings: PretrainSettings, seed: int) -> float | None:
    """The mask ratio of a step, uniform in `mask_ratio_range` and drawn from the step's own seed; None: the model's own ratio."""
    if not settings.mask_ratio_range:
        return None
    return float(np.random.default_rng(int(seed) % 2**63).uniform(*settings.mask_ratio_range))


def few_labelled(cases: list[Case], count: int, seed: int) -> list[Case]:
    """`count` of the cases, drawn by `seed`, in their old order; with the same seed fewer are a part of more."""
    order = np.random.default_rng([derive_seed(seed, 40)]).permutation(len(cases))[:count]
    return [cases[i] for i in sorted(order)]


def _check_unseen(init: str | Path, splits: dict[str, list[Case]]) -> None:
    """Refuse an encoder that has seen this run's test images, as one of another fold has.

    Weights carry the names of their cases, so it does not matter by which path they are given. Cases are compared by
    name, so only runs of the same data are.

    Raises:
        UserError: naming one of them.
    """
    if seen := _seen_of(init, splits["test"]):
        raise UserError(
            f"{init} was trained on {len(seen)} of this run's test cases, {seen[0]} for one: pre-train with the same split "
            "and fold (of other scans that have the same names, give each a 'case' of its own in a list)"
        )


def _seen_of(init: str | Path, cases: list[Case]) -> list[str]:
    """Names of the cases that weights were trained on, directly or by the weights that these started from."""
    seen = seen_cases(init)
    return sorted(c["case"] for c in cases if hash_case(c["case"]) in seen)


def _is_scratch(init: str | Path) -> bool:
    """Whether training starts from random weights.

    Raises:
        UserError: if other weights are named that do not exist.
    """
    if str(init) == "scratch":
        return True
    if not str(init).startswith(TIMM):
        weights_file(init)
    return False


def _tell_notes(record: Task, report: Say) -> None:
    for note in getattr(record, "notes", ()):
        report(f"note: {note}")


def _facts(record: Task, settings: Settings, train: list[Case], init: str | Path) -> dict[str, Any]:
    """What weights have to say of themselves when another run starts from them, see `weights.save_weights`."""
    earlier = set() if str(init) == "scratch" else seen_cases(init)
    z_score = "z-score of non-zero voxels" if record.spatial_dims == 3 else "z-score of all pixels"
    return {
        "channels": list(record.channels),
        "spacing_mm": list(settings.spacing_mm or record.spacing_mm),
        "window": list(record.window) if record.window else None,
        "normalisation": "window" if record.window else z_score,
        "seen": sorted(earlier | {hash_case(c["case"]) for c in train}),
    }


def _config(
    stage: str, task: str, record: Task, data_dir: str | Path, out: str | Path, preset: str, settings: Settings,
    splits: dict[str, list[Case]], init: str | Path, adapt: bool,
) -> dict[str, Any]:  # fmt: skip
    """Everything needed to repeat the run. Places are absolute, so that they hold from another folder too."""
    if is_list(task):
        own_folder = str(data_dir) in ("", ".")
        where = places(out, task=task, data=Path(absolute(task)).parent if own_folder else data_dir)
        said = {"task": where.pop("task"), "record": record_of(record), **where}
    else:
        said = {"task": record.name, **places(out, data=data_dir)}
    start: dict[str, Any] = {"init": str(init), "adapt": adapt}
    if str(init) != "scratch" and not str(init).startswith(TIMM):
        start["init"] = absolute(init)
        with weights_file(init).open("rb") as file:
            start["init_digest"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {
        "stage": stage,
        **said,
        "preset": preset,
        **start,
        "settings": as_dict(settings),
        "cases": {part: [c["case"] for c in cases] for part, cases in splits.items()},
        "provenance": provenance(),
    }
