"""Settings and task -> cases, transforms, model, loss, optimiser: the one place where settings become
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from monai.losses import DiceLoss
from monai.networks.nets import DenseNet, UNet
from monai.transforms import Compose, Transform
from torch import Tensor, nn

from smae_utils.data.batches import Scans, read_splits
from smae_utils.data.case import IGNORE, Case, Splits
from smae_utils.data.crops import CountClasses, CountForeground
from smae_utils.data.store import Store
from smae_utils.data.tasks import Task
from smae_utils.data.tasks.from_run import record_of
from smae_utils.data.transforms import augment_finetune, augment_pretrain, prepare
from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.patches import visible_count
from smae_utils.method.unetr import UNETR
from smae_utils.method.vit import ViTClassifier
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, Settings, learning_rate


def build_splits(task: Task, data_dir: str | Path, settings: Settings) -> Splits:
    """Train, validation and test cases, see `data.batches.read_splits`."""
    values = {name: getattr(settings, name) for name in ("split_seed", "fold", "test_share", "train_on_val")}
    return read_splits(task, data_dir, **values)


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
    if settings.positions not in ("sincos", "learned"):
        raise UserError(f"positions must be sincos or learned, got {settings.positions!r}")
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
    if settings.network != "vit" or settings.encoder not in ("trained", "frozen"):
        raise UserError(
            f"expected network vit or cnn and encoder trained or frozen, got {settings.network!r} and "
            f"{settings.encoder!r}"
        )
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


def region_targets(label: Tensor, task: Task) -> Tensor:
    """Integer label (B, 1, *spatial) -> one channel a class (B, classes, *spatial), overlapping where regions
    do.
    """
    values = label.new_tensor
    return torch.cat([torch.isin(label, values(region)) for region in task.class_values], 1).float()


def build_loss(task: Task, class_weights: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, label) -> scalar: BCE (findings), Dice + CE (organs), Dice on sigmoids (regions), in fp32.

    Dice is summed over the batch and smoothed by one voxel on both sides: per sample and unsmoothed, a class
    that is absent from most crops pays most for being predicted at all and collapses to empty.

    Args:
        class_weights: (out_chans,) weights of the cross-entropy, see `class_weights`; None weighs all alike.
    """
    if task.kind == "classification":
        return known_bce
    if not task.exclusive:
        overlapping = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
        return lambda logits, label: overlapping(
            as_background(logits.float(), label, False), region_targets(label, task)
        )
    dice = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0
    )
    ce = nn.CrossEntropyLoss(weight=class_weights, ignore_index=IGNORE)

    def dice_ce(logits: Tensor, label: Tensor) -> Tensor:
        logits = logits.float()
        overlap = dice(as_background(logits, label, True), label.masked_fill(label == IGNORE, 0))
        if bool((label == IGNORE).all()):  # the mean over no voxels is NaN
            return overlap
        return overlap + ce.to(logits.device)(logits, label[:, 0].long())

    return dice_ce


def known_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy (B, classes) over what is known; NaN in the target is unknown."""
    known = torch.isfinite(target)
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits.float(), target.nan_to_num(), reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp(min=1)


def as_background(logits: Tensor, label: Tensor, exclusive: bool) -> Tensor:
    """Logits (B, K, *spatial) that say "nothing here" where the label (B, 1, *spatial) is `IGNORE`: no
    overlap counts there, and no gradient comes.
    """
    ignored = label == IGNORE
    if not bool(ignored.any()):
        return logits
    nothing = torch.full_like(logits, -1e4)
    if exclusive:
        nothing[:, 0] = 1e4
    return torch.where(ignored, nothing, logits)


def class_weights(counted: Iterable[Tensor], n_values: int, power: float) -> Tensor:
    """(n_values,) weights proportional to frequency ** -power over the training labels, with a voxel-weighted
    mean of 1.

    Args:
        counted: of each label, the voxels of its label numbers by slab, see `data.crops.slab_counts`.

    Power 0.5 kept every organ of the CT phantom alive where unweighted cross-entropy lost nine of thirteen
    within the same steps.
    """
    counts = torch.zeros(n_values, dtype=torch.double)
    for slabs in counted:
        own = slabs.sum(0)[:n_values]
        counts[: len(own)] += own
    counts = counts.clamp(min=1)
    weights = (counts.sum() / counts) ** power
    return (weights * counts.sum() / (weights * counts).sum()).float()


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter for layer decay: 0 embeddings, 1 .. depth blocks, depth + 1 all else (as in BEiT
    and MAE).
    """
    if name.startswith(("encoder.patch_embed", "encoder.pos_embed", "encoder.cls_token")):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def build_optimizer(model: nn.Module, settings: Settings, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW; biases, norms, tokens and positions are not decayed. Groups carry `lr_scale`, which timm's
    scheduler multiplies in.

    The encoder's share of the rate is `encoder_lr` of fine-tuning, on top of layer decay.
    """
    depth, encoder_lr = settings.depth, getattr(settings, "encoder_lr", 1.0)
    groups: dict[tuple[int, bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(("pos_embed", "cls_token", "mask_token"))
        layer = layer_of(name, depth) if layer_decay != 1 else depth + 1
        slow = encoder_lr != 1 and name.startswith("encoder.")
        scale = layer_decay ** (depth + 1 - layer) * (encoder_lr if slow else 1)
        group = groups.setdefault(
            (layer, plain, slow),
            {"params": [], "weight_decay": 0.0 if plain else settings.weight_decay, "lr_scale": scale},
        )
        group["params"].append(parameter)
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(list(groups.values()), lr=learning_rate(settings), betas=betas, fused=True)
