"""Handing weights over by name: what was loaded, what was not, and an error when the encoder is not whole.

All weights are safetensors. Names of other people's checkpoints are known here and nowhere else.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from smae_utils.errors import UserError
from smae_utils.patches import as_tuple

WEIGHTS = "model.safetensors"

# SelfMedMAE (the authors' MAE and UNETR) and facebookresearch/mae, to this package's names.
FOREIGN_NAMES = [
    (r"^encoder_pos_embed$", "encoder.pos_embed"),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^decoder\.blocks\.", "decoder_blocks."),
    (r"^decoder\.norm\.", "decoder_norm."),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^decoder\.encoder1\.", "image_skip."),
    (r"^decoder\.encoder(\d)\.", lambda m: f"skips.{int(m[1]) - 2}."),
    (r"^decoder\.decoder(\d)\.", lambda m: f"ups.{5 - int(m[1])}."),
    (r"^decoder\.out\.", "out."),
    (r"^(patch_embed|blocks|norm)\.", r"encoder.\1."),
    (r"^(cls_token|pos_embed)$", r"encoder.\1"),
]


@dataclass
class LoadReport:
    """Tensor names by what became of them; `resized` are among the loaded."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def few(names: list[str]) -> str:
            parts = sorted({name.split(".")[0] for name in names})
            return f"{len(names)}" + (f" ({', '.join(parts)})" if parts else "")

        return (
            f"weights from {self.source}: loaded {few(self.loaded)}, resized {few(self.resized)}, "
            f"new in this model {few(self.missing)}, not used {few(self.unexpected)}"
        )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the parameters of `model`, with the patch grid of its encoder beside them; never leaves half a file."""
    grid = getattr(getattr(model, "encoder", None), "grid", ())
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"grid": json.dumps(list(grid))})
    part.replace(path)


def weights_file(source: str | Path) -> Path:
    """The safetensors file of a run folder, or the file itself.

    Raises:
        UserError: if there is none.
    """
    path = Path(source)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        hint = "the run folder has no finished weights: run pretrain first, or finish it with --resume" if path.is_dir() else "check the path"
        raise UserError(f"no weights at {file}: {hint}")
    return file


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], tuple[int, ...] | None]:
    """Tensors by this package's names, and the patch grid if the file says it."""
    file = weights_file(source)
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            grid = tuple(json.loads((handle.metadata() or {}).get("grid", "[]")))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}): save the weights again or copy them again") from None
    if grid:  # written by `save_weights`: the names and the table are this package's own
        return tensors, grid
    return _fold_class_position(_own_names(tensors)), None


def _own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in tensors.items():
        for pattern, new in FOREIGN_NAMES:
            name, count = re.subn(pattern, new, name)
            if count:
                break
        out[name] = value
    return out


def _fold_class_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Others give the class token a row of the position table: add that row to the token, which is the same sum.

    The decoder's class row is fixed at zero in facebookresearch/mae, so it is dropped.
    """
    patch = tensors.get("encoder.patch_embed.proj.weight")
    if "encoder.cls_token" not in tensors:
        return tensors
    for table in ("encoder.pos_embed", "decoder_pos_embed"):
        positions = tensors.get(table)
        if positions is None or patch is None or not _has_class_row(positions.shape[1], patch.ndim - 2):
            continue
        if table == "encoder.pos_embed":
            tensors["encoder.cls_token"] = tensors["encoder.cls_token"] + positions[:, :1]
        elif positions[:, 0].any():
            raise UserError("this MAE decoder has a position for the class token that is not zero: it cannot be represented here")
        tensors[table] = positions[:, 1:]
    return tensors


def _has_class_row(length: int, ndim: int) -> bool:
    """Whether a table is a square or cubic grid plus one."""
    return round((length - 1) ** (1 / ndim)) ** ndim == length - 1


def resize_positions(positions: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """(1, prod(old), D) -> (1, prod(new), D) by linear interpolation over the grid."""
    table = positions.transpose(1, 2).unflatten(2, old)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    return F.interpolate(table.float(), size=new, mode=mode, align_corners=False).flatten(2).transpose(1, 2).to(positions.dtype)


def load_weights(model: nn.Module, source: str | Path, require: str = "encoder.") -> LoadReport:
    """Load by name whatever fits; positions are resized when the patch grid differs.

    Args:
        model: any model with an `encoder` (MAE, classifier, UNETR).
        source: run folder or safetensors file.
        require: every tensor of the model whose name starts so must be loaded; "" requires all (to evaluate, not to fine-tune).

    Raises:
        UserError: if the file cannot be read, a required tensor is missing or has another shape, or the file's encoder is larger.
    """
    tensors, old_grid = read_weights(source)
    own = model.state_dict()
    new_grid = getattr(getattr(model, "encoder", None), "grid", ())
    report = LoadReport(str(source))
    clashes = []
    for name, value in tensors.items():
        if name not in own:
            report.unexpected.append(name)
            continue
        if name.endswith("pos_embed") and value.shape[-1] == own[name].shape[-1] and len(old_grid or new_grid) == len(new_grid):
            old = old_grid or (new_grid if value.shape == own[name].shape else _guess_grid(value.shape[1], len(new_grid)))
            if old != tuple(new_grid):
                value = resize_positions(value, old, new_grid)
                report.resized.append(name)
        if value.shape != own[name].shape:
            clashes.append(f"{name} is {tuple(value.shape)}, the model wants {tuple(own[name].shape)}")
            continue
        own[name] = value
        report.loaded.append(name)
    report.missing = [name for name in own if name not in report.loaded]
    needed = [name for name in report.missing if name.startswith(require)]
    surplus = [name for name in report.unexpected if name.startswith("encoder.blocks.")]
    if needed or surplus:
        why = "; ".join(c for c in clashes if c.split(" ")[0] in needed)
        if needed and not why:
            why = f"{len(needed)} tensors are not in the file, the first is {needed[0]}"
        why = why or f"the model has no place for {len(surplus)} tensors of the file, the first is {surplus[0]}"
        raise UserError(f"{source} does not fit this model: {why}. Use the same preset (width, depth, patch size, channels) for both runs")
    model.load_state_dict(own)
    return report


def _guess_grid(length: int, ndim: int) -> tuple[int, ...]:
    side = round(length ** (1 / ndim))
    if side**ndim != length:
        raise UserError(f"a position table of {length} patches is no {ndim}D cube, and the file does not say its grid: it cannot be resized")
    return as_tuple(side, ndim)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers in the model."""
    return sum(prod(p.shape) for p in model.parameters() if p.requires_grad)


__all__ = ["LoadReport", "load_weights", "read_weights", "resize_positions", "save_weights", "weights_file", "parameter_count"]
