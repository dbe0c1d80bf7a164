"""Settings and task -> cases, transforms, network, optimiser: here settings become arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from monai.networks.nets import DenseNet, UNet
from monai.transforms import Compose, Transform
from torch import nn

from smae_utils.data.batches import Scans
from smae_utils.data.case import Case, Splits
from smae_utils.data.crops import CountClasses, CountForeground
from smae_utils.data.splits import read_splits
from smae_utils.data.store import Store
from smae_utils.data.tasks import Task
from smae_utils.data.tasks.from_run import record_of
from smae_utils.data.transforms import augment_finetune, augment_pretrain, prepare
from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.masking import visible_count
from smae_utils.method.unetr import UNETR
from smae_utils.method.vit import ViTClassifier
from smae_utils.work.optimizer import adamw
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, Settings, learning_rate


def build_splits(task: Task, data_dir: str | Path, settings: Settings) -> Splits:
    """Train, validation and test cases, see `data.splits.read_splits`."""
    values = {name: getattr(settings, name) for name in ("split_seed", "fold", "test_share", "train_on_val")}
    return read_splits(task.read_splits, data_dir, **values)


def build_transform(task: Task, settings: Settings, with_label: bool) -> Compose:
    """What is done with every scan alike, see `data.transforms.prepare`."""
    return prepare(task, with_label, settings.spacing_mm, settings.crop_size)


def build_scans(task: Task, settings: Settings, cases: Sequence[Case], kept: bool = True) -> Scans:
    """Cases as the crops of a stage are cut from them: masks are read for the fine-tuning of a segmentation
    alone.

    Args:
        kept: in memory or in the store, as the settings say.
    """
    finetuning = isinstance(settings, FinetuneSettings)
    with_label = finetuning and task.kind == "segmentation"
    steps: list[Transform] = [build_transform(task, settings, with_label)]
    if with_label:
        steps.append(CountClasses())
    elif not finetuning and task.spatial_dims == 3 and not task.whole:
        steps.append(CountForeground(settings.crop_size))
    store = None
    if kept and settings.store and task.spatial_dims == 3:
        sizes = {"spacing_mm": settings.spacing_mm, "crop_size": settings.crop_size}
        record = {name: value for name, value in record_of(task).items() if name not in ("title", "settings")}
        store = Store(settings.store, {**record, **sizes, "masks": with_label})
    return Scans(list(cases), Compose(steps), settings.cache_rate if kept else 0.0, store)


def build_augmentation(task: Task, settings: Settings) -> Compose:
    """What is drawn anew for each crop of a stage, see `data.transforms`."""
    names = ["crop_size", "crops_per_scan", "flip_prob", "mirror", "crop_area"]
    if isinstance(settings, FinetuneSettings):
        names += ["rotate_prob", "intensity_prob", "intensity_scale", "intensity_shift", "rand_augment"]
        return augment_finetune(task, **{name: getattr(settings, name) for name in names})
    return augment_pretrain(task, **{name: getattr(settings, name) for name in names})


def _encoder_args(task: Task, settings: Settings) -> dict:
    if len(settings.crop_size) != task.spatial_dims:
        raise UserError(
            f"crop_size {settings.crop_size} has {len(settings.crop_size)} axes, task {task.name} is "
            f"{task.spatial_dims}D"
        )
    return {
        "img_size": settings.crop_size,
        "patch_size": settings.patch_size,
        "in_chans": task.in_chans,
        "embed_dim": settings.embed_dim,
        "depth": settings.depth,
        "num_heads": settings.num_heads,
        "class_token": settings.class_token,
        "norm_eps": settings.norm_eps,
        **({"learn_positions": True} if settings.positions == "learned" else {}),
    }


def build_mae(task: Task, settings: PretrainSettings) -> MaskedAutoencoder:
    """The masked autoencoder of a task."""
    model = MaskedAutoencoder(
        **_encoder_args(task, settings),
        decoder_embed_dim=settings.decoder_embed_dim,
        decoder_depth=settings.decoder_depth,
        decoder_num_heads=settings.decoder_num_heads,
        mask_ratio=settings.mask_ratio,
        norm_pix_loss=settings.norm_pix_loss,
        air_loss=settings.air_loss,
    )
    for ratio in settings.mask_ratio_range:  # said now, not at the step that happens to draw it
        visible_count(model.encoder.pos_embed.shape[1], ratio)
    return model


def build_model(task: Task, settings: FinetuneSettings) -> nn.Module:
    """The network that is fine-tuned: a ViT classifier or a UNETR; with `network=cnn` a small DenseNet or
    U-Net of MONAI.
    """
    if not task.classes:
        raise UserError(f"task {task.name} has images and no labels: it can be pre-trained, not fine-tuned")
    if settings.network == "cnn":
        return build_cnn(task)
    model = _build_vit(task, settings)
    if settings.encoder == "frozen":
        model.encoder.requires_grad_(False)
    return model


def build_cnn(task: Task) -> nn.Module:
    """The plain convolutional network that a transformer has to be compared with, about as large as the
    demo's transformers.
    """
    dims, given, wanted = task.spatial_dims, task.in_chans, task.out_chans
    if task.kind == "classification":
        return DenseNet(dims, given, wanted, init_features=32, growth_rate=16, block_config=(4, 6, 8))
    return UNet(
        dims, given, wanted, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="instance"
    )


def _build_vit(task: Task, settings: FinetuneSettings) -> ViTClassifier | UNETR:
    common = {**_encoder_args(task, settings), "drop_path": settings.drop_path}
    if task.kind == "classification":
        return ViTClassifier(**common, num_classes=len(task.classes), pool=settings.pool)
    return UNETR(
        **common,
        out_chans=task.out_chans,
        feature_size=settings.feature_size,
        use_image=settings.image_skip,
        norm_skips=settings.norm_skips,
    )


def build_optimizer(model: nn.Module, settings: Settings, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW with the rates of a stage, see `work.optimizer`."""
    encoder_lr = settings.encoder_lr if isinstance(settings, FinetuneSettings) else 1.0
    return adamw(
        model,
        lr=learning_rate(settings),
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        depth=settings.depth,
        layer_decay=layer_decay,
        encoder_lr=encoder_lr,
    )
