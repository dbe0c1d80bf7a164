"""Settings of a run, and the presets that fill them: the one place where YAML and `--set` become named arguments.

A preset is a YAML file that holds only what differs from the defaults below, in sections that are applied in this order:
`all`, `TASK`, each with the sub-sections `pretrain` and `finetune`, and inside `finetune` an arm: `scratch` or `self`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smae_utils.environment import shipped
from smae_utils.errors import UserError
from smae_utils.tasks import Task, get_task

STAGES = ("pretrain", "finetune")
# A float of YAML 1.2. PyYAML reads 1.1, to which 1e-4 and 1.5e3 are words: there a dot and a signed exponent are needed.
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
ARMS = ("scratch", "self")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that everybody writes."""


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what `_Loader` would not read as text: a case called 018 stays one."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def write_yaml(values: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text; 1e-4 is a number.

    Raises:
        yaml.YAMLError: if it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # a number or date by its form that is none, as 2024-02-31
        raise yaml.YAMLError(str(error)) from None


@dataclass(frozen=True)
class Settings:
    """What pre-training and fine-tuning have in common. A batch counts **scans**; each gives `crops_per_scan` crops."""

    # The encoder: the same in both stages, or the weights do not fit.
    crop_size: tuple[int, ...] = (96, 96, 96)  # input of the model in voxels (pixels)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    class_token: bool = True
    positions: str = "sincos"  # sincos: a fixed table while pre-training, learned from there on; learned: learned in both stages
    norm_eps: float = 1e-6  # of the layer norms; MONAI has 1e-5
    # The data.
    spacing_mm: tuple[float, ...] = ()  # voxel size to resample to; empty: the task's own
    split_seed: int = 0  # which cases are held out; apart from `seed`, so that seeds share their test cases
    fold: int = 0  # which fold is the test part, where a task has folds; of a list with folds the validation part
    test_share: float = 0.0  # share of the labelled patients held out as test cases, where a list has no labelled ones
    train_on_val: bool = False  # give the validation cases back for training; nothing can be selected then
    cache_rate: float = 1.0  # share of the training scans kept in memory after resampling
    num_workers: int = 0
    flip_prob: float = 0.2  # per axis
    mirror: bool = False  # also mirror left-right where labels have sides; elsewhere that is always done
    crop_area: tuple[float, ...] = (0.08, 1.0)  # share of a radiograph that a random crop covers
    # The optimiser: lr = base_lr * batch_size / 256.
    seed: int = 0
    steps: int = 0  # 0: take `epochs`
    epochs: int = 0
    warmup_steps: int = 0
    warmup_epochs: int = 0
    batch_size: int = 6  # scans a step, over all processes
    crops_per_scan: int = 1
    base_lr: float = 6.4e-3
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.95)
    clip_grad: float = 1.0  # largest gradient norm; 0: no clipping
    precision: str = "auto"  # auto, fp32 or bf16
    log_every: int = 50
    save_every: int = 500
    val_every: int = 0  # 0: never
    keep_every: int = 0  # also keep the weights of every N-th step, to watch a network learn; 0: only the last


@dataclass(frozen=True)
class PretrainSettings(Settings):
    """Masked-autoencoder pre-training."""

    mask_ratio: float = 0.75
    mask_ratio_range: tuple[float, ...] = ()  # draw the ratio of each step between these two instead; validation keeps mask_ratio
    norm_pix_loss: bool = True
    air_loss: bool = True  # False: hidden patches of one single value, as air around a body, do not count
    decoder_embed_dim: int = 384
    decoder_depth: int = 8
    decoder_num_heads: int = 12


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """Fine-tuning of the whole network, from scratch or from a pre-trained encoder."""

    network: str = "vit"  # vit: UNETR or the ViT classifier; cnn: a small U-Net or DenseNet of MONAI, for comparison
    encoder: str = "trained"  # trained, or frozen: it stays as it started and the decoder or head learns alone
    feature_size: int = 16  # UNETR's channels at full resolution
    pool: str = "cls"  # what the classifier reads: cls or mean
    drop_path: float = 0.1
    encoder_lr: float = 1.0  # factor on the learning rate of the encoder alone; the decoder or head learns at the full rate
    labelled: int = 0  # fine-tune on so many of the labelled training cases, drawn by `seed`; 0: all
    image_skip: bool = True  # UNETR's connection from the image to the last stage, past the encoder
    layer_decay: float = 1.0  # lr of a block is multiplied by this for each block above it; 1: the same lr everywhere
    ce_weight_power: float = 0.0  # cross-entropy weighs a class by frequency ** -power, counted once over the training labels; 0: all alike
    select: str = "last"  # last, or best on the validation cases
    rotate_prob: float = 0.2  # quarter turns in the axial plane, where crops are square there
    intensity_prob: float = 0.1
    intensity_scale: float = 0.1
    intensity_shift: float = 0.1
    rand_augment: str = ""  # timm policy for radiographs, as "rand-m9-mstd0.5-inc1"; empty: none
    overlap: float = 0.5  # of the sliding window


# The smallest value of a number (of each, in a list) that makes sense, and the largest; what is not named here may be any.
AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("crop_size", "patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"), 1),
    **dict.fromkeys(("feature_size", "batch_size", "crops_per_scan", "log_every", "save_every"), 1),
    **dict.fromkeys(("seed", "split_seed", "fold", "num_workers", "steps", "epochs", "warmup_steps", "warmup_epochs", "val_every", "keep_every"), 0),
    **dict.fromkeys(("base_lr", "weight_decay", "clip_grad", "betas", "layer_decay", "encoder_lr", "labelled", "ce_weight_power"), 0.0),
    **dict.fromkeys(("test_share", "cache_rate", "flip_prob", "rotate_prob", "intensity_prob", "intensity_scale", "drop_path", "overlap"), 0.0),
    **dict.fromkeys(("spacing_mm", "crop_area", "mask_ratio_range"), 1e-3),
}
AT_MOST: dict[str, float] = {
    **dict.fromkeys(("cache_rate", "flip_prob", "rotate_prob", "intensity_prob", "layer_decay", "encoder_lr", "crop_area"), 1.0),
    **dict.fromkeys(("drop_path", "overlap"), 0.99),
    "test_share": 0.9,
    "mask_ratio_range": 0.99,
    **dict.fromkeys(("betas",), 0.999999),
}

STAGE_SETTINGS: dict[str, type[Settings]] = {"pretrain": PretrainSettings, "finetune": FinetuneSettings}


def load_preset(name: str) -> dict[str, Any]:
    """A preset by name, or by the path of a YAML file; "" says nothing, so that the defaults stand."""
    if not name:
        return {}
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped("presets") / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in shipped("presets").glob("*.yaml"))
        raise UserError(f"unknown preset {name!r}: expected one of {', '.join(known)}, or the path of a YAML file")
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with sections all, TASK, got {type(content).__name__}")
    for name, section in content.items():
        if name != "all":
            _known_task(name, path)
        for where, part in (
            (name, section),
            *((f"{name}: {stage}", (section or {}).get(stage)) for stage in STAGES if isinstance(section, dict)),
        ):
            if part is not None and not isinstance(part, dict):
                raise UserError(f"section {where} of {path} must be a mapping of settings, got {part!r}")
            for arm in ARMS:
                if isinstance((part or {}).get(arm), (str, int, float, list)):
                    raise UserError(f"section {where}: {arm} of {path} must be a mapping of settings, got {part[arm]!r}")
    return content


def _known_task(name: str, path: Path) -> None:
    try:
        get_task(name)
    except UserError as error:
        raise UserError(f"{path} has a section {name!r}: {error}") from None


def resolve(task: Task, stage: str, preset: str, arm: str = "scratch", overrides: dict[str, Any] | None = None) -> Settings:
    """Defaults <- preset (all, then the task; general, then the stage, then the arm) <- a list file's own settings <- overrides.

    Raises:
        UserError: for an unknown key or a value of the wrong type, naming the right ones.
    """
    cls = STAGE_SETTINGS[stage]
    content = load_preset(preset)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    layers: list[tuple[str, dict]] = []
    sections = [*((f"preset {preset!r}", content.get(name) or {}) for name in ("all", task.like, task.name)), (f"list {task.name}", task.settings)]
    for where, section in sections:
        layers += [(where, section), (where, section.get(stage) or {})]
        if stage == "finetune":
            layers.append((where, (section.get(stage) or {}).get(arm) or {}))
    for where, layer in layers:
        found = {k: v for k, v in layer.items() if k not in (*STAGES, *ARMS)}
        values.update(found)
        origin.update(dict.fromkeys(found, where))
    given = dict(overrides or {})
    for name, other in (("epochs", "steps"), ("steps", "epochs"), ("warmup_steps", "warmup_epochs"), ("warmup_epochs", "warmup_steps")):
        if name in given and other not in given:  # the one that was asked for counts, also where the preset says the other
            values[other] = 0
            origin[other] = "--set"
    values.update(given)
    origin.update(dict.fromkeys(given, "--set"))
    return make_settings(cls, values, where=origin)


def make_settings(cls: type[Settings], values: dict[str, Any], where: str | dict[str, str]) -> Settings:
    """A settings object from plain values, each checked against the type of its field.

    Args:
        where: who gave the values, of all or of each by its name; errors say it.
    """
    given_by = dict.fromkeys(values, where) if isinstance(where, str) else where
    said = {name: f"{name} ({given_by[name]})" for name in values}
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints), key=str)
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r} ({given_by[unknown[0]]}): {_meant(str(unknown[0]), hints)}")
    made = {name: coerce(value, hints[name], said[name]) for name, value in values.items()}
    for name in ("betas", "crop_area", "mask_ratio_range"):
        if made.get(name) and (len(made[name]) != 2 or list(made[name]) != sorted(made[name])):
            raise UserError(f"{said[name]} must be two numbers, the smaller first, got {list(made[name])}")
    for name, value in made.items():
        low, high = AT_LEAST.get(name, -math.inf), AT_MOST.get(name, math.inf)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not low <= number <= high:
                raise UserError(f"{said[name]} must be {_range(low, high)}, got {list(value) if isinstance(value, tuple) else value}")
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
    """Whether an int or float is the same as the other kind: no int is inf or nan, no float is an int of 400 digits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return kind(value) == value
    except (OverflowError, ValueError):
        return False


def as_dict(settings: Settings) -> dict[str, Any]:
    """Plain values for YAML."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def total_steps(settings: Settings, n_train: int) -> tuple[int, int]:
    """(steps, warm-up steps): as given, or from epochs over `n_train` scans."""
    per_epoch = max(1, -(-n_train // settings.batch_size))
    steps = settings.steps or settings.epochs * per_epoch
    if steps < 1:
        raise UserError("neither steps nor epochs is set: use --set steps=1000, for example")
    # A run cut short by --set steps=... keeps at most half of it for the warm-up.
    return steps, min(settings.warmup_steps or settings.warmup_epochs * per_epoch, steps // 2)
