"""Settings of a run: their defaults, what they mean, and which values make sense. `work.presets` says where a
run's values come from.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from smae_utils.errors import UserError
from smae_utils.yaml_text import read_yaml

STAGES = ("pretrain", "finetune")
ARMS = ("scratch", "self")


def option(
    default: Any,
    text: str,
    unit: str = "",
    least: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
) -> Any:
    """A setting: its default, what it does in one line, its unit, and what makes sense: the smallest and
    largest number (of each, in a list), or the words to choose from.
    """
    metadata = {"help": text, "unit": unit, "least": least, "most": most, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What pre-training and fine-tuning have in common. A batch counts **scans**; each gives `crops_per_scan`
    crops.
    """

    # The encoder: the same in both stages, or the weights do not fit.
    crop_size: tuple[int, ...] = option((96, 96, 96), "size of the network's input", "voxels or pixels", 1)
    patch_size: int = option(16, "edge of a patch; UNETR needs 4, 8, 16, ...", "voxels or pixels", 1)
    embed_dim: int = option(768, "width of the encoder", least=1)
    depth: int = option(12, "blocks of the encoder", least=1)
    num_heads: int = option(12, "attention heads of the encoder", least=1)
    class_token: bool = option(True, "give the encoder a class token, which stands for the whole image")
    positions: str = option(
        "sincos",
        "sincos: a fixed table in pre-training, trained in fine-tuning; learned: trained in both stages",
        choices=("sincos", "learned"),
    )
    norm_eps: float = option(1e-6, "epsilon of the layer norms; MONAI has 1e-5", "", 0)
    # The data.
    spacing_mm: tuple[float, ...] = option((), "voxel size to resample to; empty: the task's own", "mm", 1e-3)
    split_seed: int = option(
        0, "random seed of the split alone: runs that differ only in seed share their test cases", least=0
    )
    fold: int = option(
        0,
        "number of the fold that is held out: of a task as its test part, of a list as its validation part",
        least=0,
    )
    test_share: float = option(
        0.0,
        "share of the labelled patients held out for testing, where a list names no labelled test cases",
        "",
        0,
        0.9,
    )
    train_on_val: bool = option(
        False, "train on the validation cases too; no weights can be selected on them then"
    )
    cache_rate: float = option(1.0, "share of the training scans kept in memory after resampling", "", 0, 1)
    store: str = option(
        "",
        "folder in which prepared 3D scans are kept, for all runs; "
        "a training reads only its crops from there, and cache_rate has no effect",
    )
    num_workers: int = option(0, "processes that load data; 0: the training process itself", least=0)
    flip_prob: float = option(0.2, "probability of a flip, for each axis", "", 0, 1)
    mirror: bool = option(
        False,
        "also mirror left-right where labels have sides, as left and right kidney; else that is always done",
    )
    crop_area: tuple[float, ...] = option(
        (0.08, 1.0), "share of a 2D image that a random crop covers, from and to", "", 1e-3, 1
    )
    # The optimiser.
    seed: int = option(
        0, "random seed of the first weights, the order of scans, augmentation and masks", least=0
    )
    steps: int = option(0, "updates of the weights; 0: as many as epochs say", least=0)
    epochs: int = option(0, "passes over the training scans; 0: as many as steps say", least=0)
    warmup_steps: int = option(0, "first steps, in which the learning rate rises to lr", least=0)
    warmup_epochs: int = option(0, "the same in epochs", least=0)
    batch_size: int = option(6, "scans of a step, of all processes together", "scans", 1)
    accumulate: int = option(
        1, "compute a batch in so many parts, one after the other: less memory for the same step", least=1
    )
    crops_per_scan: int = option(1, "crops of each scan", least=1)
    lr: float = option(
        1.5e-4, "learning rate at the end of the warm-up; from there it falls as a cosine", "", 0
    )
    base_lr: float = option(
        0.0,
        "another way to give lr, as in the MAE papers: lr = base_lr * batch_size / 256; 0: take lr",
        "",
        0,
    )
    weight_decay: float = option(
        0.05, "weight decay of AdamW; norms, biases, tokens and positions have none", "", 0
    )
    betas: tuple[float, ...] = option(
        (0.9, 0.95), "AdamW's decay of its running means of the gradient and of its square", "", 0, 0.999999
    )
    clip_grad: float = option(1.0, "gradients of a larger norm are scaled down to it; 0: never", "", 0)
    precision: str = option(
        "auto", "auto: bf16 where the device computes in it, else fp32", choices=("auto", "fp32", "bf16")
    )
    track: tuple[str, ...] = option(
        (), "also log to these, where they are installed: tensorboard (in the run folder), wandb, mlflow"
    )
    log_every: int = option(50, "between two lines of progress", "steps", 1)
    save_every: int = option(500, "between two saves of the state that --resume goes on from", "steps", 1)
    val_every: int = option(0, "between two validations; 0: none", "steps", 0)
    keep_every: int = option(
        0, "between weights that are kept, to watch a network learn; 0: only the last", "steps", 0
    )


@dataclass(frozen=True)
class PretrainSettings(Settings):
    """Masked-autoencoder pre-training."""

    mask_ratio: float = option(0.75, "share of the patches that are hidden", "", 0, 1)
    mask_ratio_range: tuple[float, ...] = option(
        (),
        "draw the mask ratio of each step between these two; empty: always mask_ratio, as in validation",
        "",
        1e-3,
        0.99,
    )
    norm_pix_loss: bool = option(
        True,
        "predict each patch normalised by its own mean and deviation; false: intensities as they are",
    )
    air_loss: bool = option(
        True,
        "false: hidden patches of one single value, such as air around the body, do not count in the loss",
    )
    decoder_embed_dim: int = option(384, "width of the decoder", least=1)
    decoder_depth: int = option(8, "blocks of the decoder", least=1)
    decoder_num_heads: int = option(12, "attention heads of the decoder", least=1)


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """Fine-tuning of the whole network, from scratch or from a pre-trained encoder."""

    network: str = option(
        "vit",
        "vit: UNETR or the ViT classifier; cnn: a small U-Net or DenseNet of MONAI, for comparison",
        choices=("vit", "cnn"),
    )
    encoder: str = option(
        "trained",
        "frozen: the encoder keeps its first weights, only the decoder or head is trained",
        choices=("trained", "frozen"),
    )
    labelled: int = option(
        0, "fine-tune on so many of the labelled training cases, drawn by seed; 0: on all", "cases", 0
    )
    feature_size: int = option(16, "UNETR's channels at full resolution", least=1)
    image_skip: bool = option(
        True, "keep UNETR's skip connection from the image itself, which goes past the encoder"
    )
    norm_skips: bool = option(
        False,
        "layer-normalise the hidden states that UNETR's decoder reads: "
        "those of a pre-trained encoder are larger than those of a random one",
    )
    pool: str = option(
        "cls",
        "what the classifier reads. cls: the class token; mean: the mean of the patch tokens",
        choices=("cls", "mean"),
    )
    drop_path: float = option(
        0.1,
        "stochastic depth: probability that a crop skips the last block; less for earlier blocks",
        "",
        0,
        0.99,
    )
    encoder_lr: float = option(1.0, "factor on the learning rate, for the encoder alone", "", 0, 1)
    layer_decay: float = option(
        1.0, "factor on the learning rate from each block to the one below; 1: the same everywhere", "", 0, 1
    )
    ce_weight_power: float = option(
        0.0,
        "power p of the class weights frequency ** -p in the cross-entropy; 0: all classes weigh alike",
        "",
        0,
    )
    select: str = option(
        "last",
        "which weights are kept: those of the last step, or the best on the validation cases",
        choices=("last", "best"),
    )
    rotate_prob: float = option(
        0.2, "probability of quarter turns in the axial plane, where crops are square there", "", 0, 1
    )
    intensity_prob: float = option(
        0.1, "probability that intensities are scaled, and that they are shifted", "", 0, 1
    )
    intensity_scale: float = option(0.1, "largest relative change when intensities are scaled", "", 0)
    intensity_shift: float = option(
        0.1, "largest change when intensities are shifted, after normalisation", "", 0
    )
    rand_augment: str = option(
        "", "RandAugment of 2D images, as timm writes it, for example rand-m9-mstd0.5-inc1; empty: none"
    )
    overlap: float = option(
        0.5, "overlap of neighbouring windows in prediction, as a share of a window", "", 0, 0.99
    )


StageSettings = PretrainSettings | FinetuneSettings
STAGE_SETTINGS: dict[str, type[PretrainSettings] | type[FinetuneSettings]] = {
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
}
Asked = TypeVar("Asked", bound=Settings)


def make_settings(cls: type[Asked], values: Mapping[str, Any], where: str | Mapping[str, str]) -> Asked:
    """A settings object from plain values, each checked against the type of its field.

    Args:
        where: who gave the values, of all or of each by its name; errors say it.
    """
    given_by = dict.fromkeys(values, where) if isinstance(where, str) else where
    said = {name: f"{name} ({given_by[name]})" for name in values}
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints), key=str)
    if unknown:
        raise UserError(
            f"unknown setting {unknown[0]!r} ({given_by[unknown[0]]}): {_meant(str(unknown[0]), hints)}"
        )
    made = {name: coerce(value, hints[name], said[name]) for name, value in values.items()}
    for name in ("betas", "crop_area", "mask_ratio_range"):
        if made.get(name) and (len(made[name]) != 2 or list(made[name]) != sorted(made[name])):
            raise UserError(f"{said[name]} must be two numbers, the smaller first, got {list(made[name])}")
    for name, value in made.items():
        known = cls.__dataclass_fields__[name].metadata
        low, high, choices = known["least"], known["most"], known["choices"]
        if choices and value not in choices:
            raise UserError(f"{said[name]} must be one of {', '.join(choices)}, got {value!r}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not low <= number <= high:
                shown = list(value) if isinstance(value, tuple) else value
                raise UserError(f"{said[name]} must be {_range(low, high)}, got {shown}")
    return cls(**made)


def _meant(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have been, or where it belongs, and all names there are."""
    if stage := next((s for s, other in STAGE_SETTINGS.items() if name in typing.get_type_hints(other)), ""):
        return f"it belongs to {stage} only. Here there are {', '.join(sorted(known))}"
    close = difflib.get_close_matches(name, known, 1)
    return (f"did you mean {close[0]}? " if close else "") + f"There are {', '.join(sorted(known))}"


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """["steps=20", "crop_size=[32,32,32]"] -> values, read as YAML, so that False is false."""
    out = {}
    for item in items:
        name, sep, text = item.partition("=")
        if not sep or not name:
            raise UserError(f"--set expects key=value, got {item!r}")
        out[name.strip()] = parse_value(text)
    return out


def parse_value(text: str) -> Any:
    """YAML scalar or list, see `read_yaml`; Python's True and False are YAML too. What is no YAML is text."""
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`, or an error that says what was expected.

    An int is fine for a float, a whole float for an int, a list for a tuple; nothing else is converted.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), name)
    if (origin or hint) in (tuple, list) and isinstance(value, (list, tuple)):
        return (origin or hint)(coerce(v, args[0], name) if args else v for v in value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and isinstance(value, str) and value.lower() in ("inf", "nan"):
        return float(value)
    if hint in (int, float) and _holds(hint, value):
        return hint(value)
    if hint is str and isinstance(value, str):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise UserError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")


def _holds(kind: type, value: Any) -> bool:
    """Whether an int or float is the same as the other kind: no int is inf or nan, no float is an int of 400
    digits.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return kind(value) == value
    except (OverflowError, ValueError):
        return False


def as_dict(settings: Settings) -> dict[str, Any]:
    """Plain values for YAML."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def learning_rate(settings: Settings) -> float:
    """The rate after the warm-up."""
    return rate(settings.lr, settings.base_lr, settings.batch_size)


def rate(lr: float, base_lr: float, batch_size: int) -> float:
    """A learning rate as given, or from `base_lr` by the rule of the MAE papers (Goyal et al., arXiv
    1706.02677).
    """
    return base_lr * batch_size / 256 if base_lr else lr


def describe(stages: Iterable[str] = STAGES) -> list[dict[str, str]]:
    """A row a setting: stage ("both" for what stages share), name, default, unit, bounds and what it does."""
    shared, rows = {f.name for f in dataclasses.fields(Settings)}, []
    for stage in ("both", *stages):
        for f in dataclasses.fields(STAGE_SETTINGS.get(stage, Settings)):
            if stage == "both" or f.name not in shared:
                least, most = f.metadata["least"], f.metadata["most"]
                bounds = ", ".join(f.metadata["choices"])
                if (least, most) != (-math.inf, math.inf):
                    bounds = _range(least, most)
                default = list(f.default) if isinstance(f.default, tuple) else f.default
                rows.append(
                    {
                        "stage": stage,
                        "setting": f.name,
                        "default": str(default).lower() if isinstance(default, bool) else str(default),
                    }
                )
                rows[-1] |= {"unit": f.metadata["unit"], "bounds": bounds, "what it does": f.metadata["help"]}
    return rows


def total_steps(settings: Settings, n_train: int) -> tuple[int, int]:
    """(steps, warm-up steps): as given, or from epochs over `n_train` scans."""
    per_epoch = max(1, -(-n_train // settings.batch_size))
    steps = settings.steps or settings.epochs * per_epoch
    if steps < 1:
        raise UserError("neither steps nor epochs is set: use --set steps=1000, for example")
    # A run cut short by --set steps=... keeps at most half of it for the warm-up.
    return steps, min(settings.warmup_steps or settings.warmup_epochs * per_epoch, steps // 2)
