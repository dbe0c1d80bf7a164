"""Handing weights over by name: what was loaded, what was not, and an error when the encoder is not whole.

All weights are written as safetensors. Other people's checkpoints are read by `foreign`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from smae_utils.errors import UserError
from smae_utils.foreign import TIMM, Checkpoint, adapt_patches, adapt_positions, as_convolution, read_file, read_timm
from smae_utils.patches import as_tuple

WEIGHTS = "model.safetensors"
PATCHES = "encoder.patch_embed.proj.weight"


@dataclass
class LoadReport:
    """Tensor names by what became of them; `resized` and `adapted` are among the loaded; `notes` tell what else to mind."""

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

        return (
            f"weights from {self.source}: loaded {few(self.loaded)}, resized {few(self.resized)}, adapted {few(self.adapted)}, "
            f"new in this model {few(self.missing)}, not used {few(self.unexpected)}" + "".join(f"; note: {note}" for note in self.notes)
        )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the parameters of `model`, with the patch grid and norm epsilon of its encoder beside them; never leaves half a file."""
    grid = getattr(getattr(model, "encoder", None), "grid", ())
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"grid": json.dumps(list(grid)), "norm_eps": json.dumps(norm_eps(model))})
    part.replace(path)


def norm_eps(model: nn.Module) -> float | None:
    """Epsilon of the layer norms of a model's encoder; None without an encoder."""
    encoder = getattr(model, "encoder", None)
    return next((m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)), None) if encoder else None


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


def read_weights(source: str | Path) -> Checkpoint:
    """A checkpoint by this package's names; other people's are converted, see `foreign`."""
    if str(source).startswith(TIMM):
        return read_timm(str(source).removeprefix(TIMM))
    return read_file(weights_file(source))


def resize_positions(positions: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """(1, prod(old), D) -> (1, prod(new), D) by linear interpolation over the grid."""
    table = positions.transpose(1, 2).unflatten(2, old)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    return F.interpolate(table.float(), size=new, mode=mode, align_corners=False).flatten(2).transpose(1, 2).to(positions.dtype)


def load_weights(model: nn.Module, source: str | Path, require: str = "encoder.", adapt: bool = False) -> LoadReport:
    """Load by name whatever fits; positions are resized when the patch grid differs.

    Args:
        model: any model with an `encoder` (MAE, classifier, UNETR).
        source: "timm:NAME" (downloaded by timm), run folder, safetensors file, or a checkpoint of the sources that `foreign` knows.
        adapt: also fit a patch embedding of other channels, or of 2D into 3D, as for weights pre-trained on natural images.
        require: every tensor of the model whose name starts so must be loaded; "" requires all (to evaluate, not to fine-tune).

    Raises:
        UserError: if the file cannot be read, a required tensor is missing or has another shape, or the file's encoder has parts
            that this one lacks.
    """
    tensors, old_grid, eps = read_weights(source)
    own = model.state_dict()
    new_grid = getattr(getattr(model, "encoder", None), "grid", ())
    report = LoadReport(str(source))
    report.unexpected = [name for name in tensors if name not in own]
    # A model without a class token, or whose head norms the mean of the tokens, has no use for these; all else changes what the encoder says.
    spare = ("encoder.cls_token", "encoder.norm.")
    if surplus := [name for name in report.unexpected if name.startswith("encoder.") and not name.startswith(spare)]:
        raise UserError(
            f"{source} does not fit this model, which has no place for {len(surplus)} tensors of its encoder, the first is {surplus[0]}. "
            "Use the same depth for both runs; of other people's, plain ViTs fit"
        )
    clashes = []
    for name, value in tensors.items():
        if name not in own:
            continue
        if name == PATCHES:
            value = as_convolution(value, own[name].shape)
            if adapt and value.shape != own[name].shape and value.shape[2:4] == own[name].shape[2:4]:
                value = adapt_patches(value, own[name].shape)
                report.adapted.append(name)
        if adapt and name.endswith("pos_embed") and len(new_grid) == 3 and tensors.get(PATCHES, value).ndim == 4:
            old = old_grid or _guess_grid(value.shape[1], 2)
            value = adapt_positions(value, old, new_grid, resize_positions)
            report.adapted.append(name)
            own[name] = value
            report.loaded.append(name)
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
    if needed:
        why = "; ".join(c for c in clashes if c.split(" ")[0] in needed)
        why = why or f"{len(needed)} tensors are not in the file, the first is {needed[0]}"
        raise UserError(
            f"{source} does not fit this model: {why}. Use the same preset (width, depth, patch size, channels) for both runs"
            + ("" if adapt else "; --adapt fits weights of other channels or of 2D images")
        )
    own_eps = norm_eps(model)
    if None not in (eps, own_eps) and eps != own_eps:
        report.notes.append(f"made with layer norms of eps {eps:g}, this model has {own_eps:g}: --set norm_eps={eps:g} gives its outputs exactly")
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
