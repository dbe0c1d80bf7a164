"""Handing weights over by name: what was loaded, what was not, and an error when the encoder is not whole.

All weights are written as safetensors, and beside them what the encoder is and was trained on (see
`save_weights`). Other people's checkpoints are read by `other_libraries`. Loading goes: read and convert,
compare with the model, put channels in order, fold class rows, fit, refuse or load.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from smae_utils.errors import UserError
from smae_utils.method.checkpoints.adapt import (
    adapt_patches,
    adapt_positions,
    as_convolution,
    fill_qkv_bias,
    fold_class_rows,
)
from smae_utils.method.checkpoints.facts import channels_of, compare_facts, listed
from smae_utils.method.checkpoints.other_libraries import (
    PATCHES,
    TABLES,
    TIMM,
    Checkpoint,
    read_file,
    read_header,
    read_timm,
)
from smae_utils.method.checkpoints.save import WEIGHTS, decoder_heads, encoder_arguments, grid_of, norm_eps
from smae_utils.yaml_text import read_yaml


@dataclass
class LoadReport:
    """Names of tensors by what became of them.

    `resized` and `adapted` ones are among the loaded. `notes` tell what else to mind.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def few(names: list[str]) -> str:
            parts = sorted({name.split(".")[0] for name in names})
            return f"{len(names)}" + (f" ({', '.join(parts)})" if parts else "")

        parts = {"loaded": self.loaded, "resized": self.resized, "adapted": self.adapted}
        parts |= {"new in this model": self.missing, "not used": self.unexpected}
        told = ", ".join(f"{what} {few(names)}" for what, names in parts.items())
        return f"weights from {self.source}: {told}" + "".join(f"; note: {note}" for note in self.notes)


def hash_case(name: str) -> str:
    """A case's name as weights keep it: it can be recognised and not read."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def seen_cases(source: str | Path) -> set[str]:
    """Hashes of the cases that weights were trained on; empty for checkpoints of others. Reads no tensor.

    Args:
        source: whatever `load_weights` takes.

    Raises:
        UserError: if the file does not exist or is damaged.
    """
    if str(source).startswith(TIMM):
        return set()
    file = weights_file(source)
    seen = (read_header(file).get("facts") or {}).get("seen")
    if seen is not None:
        return set(seen)
    # Weights of earlier versions, and the state of an unfinished run, lie in a run's folder or one below it.
    for config in (folder / "config.yaml" for folder in file.resolve().parents[:2]):
        if config.is_file():
            return {hash_case(name) for name in _training_cases(config)}
    return set()


def _training_cases(config: Path) -> list[str]:
    try:
        return [str(name) for name in read_yaml(config.read_text(encoding="utf-8"))["cases"]["train"]]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):  # a config.yaml that is no run's
        return []


def weights_file(source: str | Path) -> Path:
    """The safetensors file of a run folder, or the file itself.

    Raises:
        UserError: if there is none.
    """
    path = Path(source)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        unfinished = "the run folder has no finished weights: run pretrain first, or finish it with --resume"
        raise UserError(f"no weights at {file}: {unfinished if path.is_dir() else 'check the path'}")
    return file


def read_weights(source: str | Path) -> Checkpoint:
    """A checkpoint by this package's names; other people's are converted, see `other_libraries`."""
    if str(source).startswith(TIMM):
        return read_timm(str(source).removeprefix(TIMM))
    return read_file(weights_file(source))


def resize_positions(positions: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """(1, prod(old), D) -> (1, prod(new), D) by linear interpolation over the grid."""
    table = positions.transpose(1, 2).unflatten(2, old)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    resized = F.interpolate(table.float(), size=new, mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)


def load_weights(
    model: nn.Module,
    source: str | Path,
    require: str = "encoder.",
    adapt: bool = False,
    expect: dict[str, Any] | None = None,
) -> LoadReport:
    """Load by name whatever fits.

    Positions are resized when the patch grid differs; channels are put in the model's order.

    Args:
        model: any model with an `encoder` (MAE, classifier, UNETR), or one that `save_weights` wrote.
        source: a run folder, "timm:NAME" (downloaded by timm), or a file that `other_libraries` reads.
        require: every tensor of the model whose name starts so must be loaded; "" requires all (to evaluate).
        adapt: also fit a patch embedding of other channels or of 2D images, as of natural ones.
        expect: `channels`, `spacing_mm`, `window`, `normalisation` of the model's data; others are noted.

    Raises:
        UserError: if the file cannot be read, a required tensor is missing or has another shape, the file's
            encoder has parts that this one lacks, or it was made with another number of attention heads.
    """
    own = model.state_dict()
    report = LoadReport(str(source))
    checkpoint = read_weights(source)
    report.unexpected = [name for name in checkpoint.tensors if name not in own]
    _refuse_surplus(report)
    _compare_heads(checkpoint, model, report)
    if expect:
        report.notes += compare_facts(checkpoint.facts, expect)
        checkpoint = _order_channels(checkpoint, expect, own, report)
    if not checkpoint.grid:
        checkpoint = checkpoint._replace(tensors=fill_qkv_bias(checkpoint.tensors, own))
    checkpoint, notes = fold_class_rows(checkpoint, grid_of(model), set(own))
    fitted, clashes = _fit(checkpoint, own, grid_of(model), adapt, report)
    report.loaded = list(fitted)
    report.missing = [name for name in own if name not in fitted]
    _refuse_missing(report, require, clashes, adapt, list(checkpoint.tensors))
    eps, own_eps = checkpoint.norm_eps, norm_eps(model)
    if None not in (eps, own_eps) and eps != own_eps:
        same = f"--set norm_eps={eps:g} gives its outputs exactly"
        notes.append(f"made with layer norms of eps {eps:g}, this model has {own_eps:g}: {same}")
    report.notes += notes
    model.load_state_dict({**own, **fitted})
    return report


def _refuse_surplus(report: LoadReport) -> None:
    # A model without a class token, or whose head norms the mean of the tokens, has no use for these. All
    # else changes what the encoder says.
    spare = ("encoder.cls_token", "encoder.norm.")
    names = [name for name in report.unexpected if name.startswith("encoder.") and not name.startswith(spare)]
    if names:
        raise UserError(
            f"{report.source} does not fit this model, which has no place for {len(names)} tensors of its "
            "encoder, "
            f"the first is {names[0]}. Use the same depth for both runs; of other people's, plain ViTs fit"
        )


def _compare_heads(checkpoint: Checkpoint, model: nn.Module, report: LoadReport) -> None:
    heads = {
        "num_heads": ("encoder.blocks.", checkpoint.encoder, encoder_arguments(model).get("num_heads")),
        "decoder_num_heads": ("decoder_blocks.", checkpoint.decoder, decoder_heads(model)),
    }
    for name, (blocks, told, ours) in heads.items():
        theirs = told.get("num_heads")
        if ours is None or not any(tensor.startswith(blocks) for tensor in checkpoint.tensors):
            continue
        if theirs is None:
            part = "decoder's attention heads" if "decoder" in name else "attention heads"
            report.notes.append(f"the file does not say its number of {part}; this model has {ours} ({name})")
        elif theirs != ours:
            raise UserError(
                f"{report.source} was made with {theirs} attention heads ({name}), this model has {ours}: "
                f"equal shapes, but another function. Use --set {name}={theirs}"
            )


def _order_channels(
    checkpoint: Checkpoint, expect: dict, own: dict[str, Tensor], report: LoadReport
) -> Checkpoint:
    """The same channels in another order: everything that takes or gives channels, in the model's order."""
    theirs, ours = channels_of(checkpoint.facts), channels_of(expect)
    if theirs == ours or sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        return checkpoint
    was, now = listed(checkpoint.facts["channels"]), listed(expect["channels"])
    order = [theirs.index(name) for name in ours]
    tensors = {name: _reordered(name, value, order) for name, value in checkpoint.tensors.items()}
    used = {name.split(".")[0] for name in tensors if name in own}
    # A first block with as many channels as the image adds the image to its output, in the image's own order.
    bare = "image_skip" in used and "image_skip.layer.conv3.conv.weight" not in tensors
    if bare or PATCHES not in tensors:
        raise UserError(
            f"{report.source} was made with channels in the order {was}, not {now}: list them in its order"
        )
    report.notes.append(f"its channels {was} were put in this model's order {now}")
    return checkpoint._replace(tensors=tensors)


def _reordered(name: str, value: Tensor, order: list[int]) -> Tensor:
    if name in (PATCHES, "image_skip.layer.conv1.conv.weight", "image_skip.layer.conv3.conv.weight"):
        return value[:, order]  # (D, C, *kernel)
    # (p^d * C, D) or (p^d * C,): pixels of a patch, channel last.
    if name.startswith("decoder_pred."):
        return value.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
    return value


def _fit(
    checkpoint: Checkpoint, own: dict[str, Tensor], grid: tuple[int, ...], adapt: bool, report: LoadReport
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that fit, in the model's shapes, and by name why the others do not."""
    fitted, clashes = {}, {}
    flat = checkpoint.tensors.get(PATCHES)
    lift = adapt and len(grid) == 3 and flat is not None and flat.ndim == 4
    for name, value in checkpoint.tensors.items():
        if name not in own:
            continue
        wanted, reason = own[name].shape, ""
        if name == PATCHES:
            value = as_convolution(value, wanted)
            if adapt and value.shape != wanted and value.shape[2:4] == wanted[2:4]:
                value = adapt_patches(value, wanted)
                report.adapted.append(name)
        elif name in TABLES and value.shape[-1] == wanted[-1]:
            old = checkpoint.grid or ()
            if prod(old) != value.shape[1] or not old:
                reason = f": its grid cannot be known, it is neither this model's {grid} nor a square or cube"
            elif lift and len(old) == 2:
                value = adapt_positions(value, old, grid, resize_positions)
                report.adapted.append(name)
            elif len(old) == len(grid) and old != grid:
                value = resize_positions(value, old, grid)
                report.resized.append(name)
        if value.shape != wanted or reason:
            clashes[name] = f"{name} is {tuple(value.shape)}, the model wants {tuple(wanted)}{reason}"
        else:
            fitted[name] = value
    return fitted, clashes


def _refuse_missing(
    report: LoadReport, require: str, clashes: dict[str, str], adapt: bool, names: list[str]
) -> None:
    needed = [name for name in report.missing if name.startswith(require)]
    if not needed:
        return
    why = "; ".join(reason for name, reason in clashes.items() if name in needed)
    if not why and not report.loaded:
        why = f"no tensor has a name that is known here, the first is {names[0]}"
    why = why or f"{len(needed)} tensors are not in the file, the first is {needed[0]}"
    raise UserError(
        f"{report.source} does not fit this model: {why}. "
        "Use the same preset (width, depth, patch size, channels) for both runs"
        + ("" if adapt else "; --adapt fits weights of other channels or of 2D images")
    )


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers in the model."""
    return sum(prod(p.shape) for p in model.parameters() if p.requires_grad)


__all__ = [
    "LoadReport",
    "compare_facts",
    "encoder_arguments",
    "hash_case",
    "load_weights",
    "parameter_count",
    "read_weights",
    "resize_positions",
    "seen_cases",
    "weights_file",
]
