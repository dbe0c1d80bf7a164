"""Weights made to fit: class tokens, patches of 2D images or of other channels, tables of positions."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from smae_utils.errors import UserError
from smae_utils.method.checkpoints.other_libraries import PATCHES, TABLES, Checkpoint


def fill_qkv_bias(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add biases of zero for query, key and value where the model has them and the whole file has none."""
    if any(name.endswith(".attn.qkv.bias") for name in tensors):
        return tensors
    weights = {
        name: name.removesuffix("weight") + "bias" for name in tensors if name.endswith(".attn.qkv.weight")
    }
    zeros = {
        bias: tensors[name].new_zeros(len(tensors[name])) for name, bias in weights.items() if bias in wanted
    }
    return {**tensors, **zeros}


def fold_class_rows(
    checkpoint: Checkpoint, grid: tuple[int, ...], names: set[str]
) -> tuple[Checkpoint, list[str]]:
    """Add the class token's row of a position table to the token itself, which gives the same sum.

    The model's grid tells whether there is such a row. A table of another grid has one if its library
    always writes one, or if its length is a square or cube plus one. MAE keeps the decoder's class row at
    zero, so it is dropped.

    Args:
        grid: patches of the model along each axis.
        names: what the model has; tables that it lacks are left alone.

    Returns:
        The checkpoint with tables (1, L, D) of patches only and their grid (None if unknown), and notes.

    Raises:
        UserError: if the decoder's class row is not zero.
    """
    tensors = dict(checkpoint.tensors)
    old: tuple[int, ...] | None = None
    notes: list[str] = []
    patches, token = tensors.get(PATCHES), tensors.get("encoder.cls_token")
    if checkpoint.grid or not grid or patches is None:
        return checkpoint, notes
    ndim = patches.ndim - 2 or len(grid)  # MONAI may keep the embedding as a matrix
    rows = [False, True] if checkpoint.class_row is None else [checkpoint.class_row]
    for table in (name for name in TABLES if name in tensors and name in names):
        positions = tensors[table]
        found = _grid_of(positions.shape[1], ndim, grid[:ndim], rows if token is not None else [False])
        if found is None:
            continue
        row, old = found
        if token is not None and row and table == TABLES[0]:
            tensors["encoder.cls_token"] = token + positions[:, :1]
        elif row and positions[:, 0].any():
            what = "this MAE decoder has a position for the class token that is not zero"
            raise UserError(f"{what}: it cannot be represented here. Load its encoder alone")
        elif token is not None and not row and len(rows) == 2 and table == TABLES[0]:
            notes.append(
                f"its table of {positions.shape[1]} positions is taken to have no row for the class token"
            )
        tensors[table] = positions[:, 1:] if row else positions
    return checkpoint._replace(tensors=tensors, grid=old), notes


def _grid_of(
    length: int, ndim: int, model: tuple[int, ...], rows: list[bool]
) -> tuple[bool, tuple[int, ...]] | None:
    """Whether a table has a class row, and the grid of its other rows; None where that cannot be known."""
    for row in rows:
        if len(model) == ndim and length - row == prod(model):
            return row, model
    for row in reversed(rows):
        side = round((length - row) ** (1 / ndim))
        if side and side**ndim == length - row:
            return row, (side,) * ndim
    return None


def as_convolution(weight: Tensor, shape: torch.Size) -> Tensor:
    """A patch embedding stored as a matrix (D, p^d * C), channel last -> its convolution (D, C, *p)."""
    if weight.ndim == 2 and prod(shape[1:]) == weight.shape[1] and len(shape) > 2:
        return weight.reshape(len(weight), *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    return weight


def adapt_patches(weight: Tensor, shape: torch.Size) -> Tensor:
    """A patch embedding (D, C, p, p[, p]) for other channels or one more dimension.

    Channels as timm does it: summed for a single one, else repeated and scaled by C / (new C). From 2D to 3D
    as in I3D (Carreira and Zisserman, arXiv 1705.07750): repeated along the new last axis and divided by its
    length. A stack of equal slices then gives the response of one slice.
    """
    chans, wanted = weight.shape[1], shape[1]
    if chans != wanted:
        repeated = weight.repeat(1, -(-wanted // chans), *[1] * (weight.ndim - 2))[:, :wanted] * (
            chans / wanted
        )
        weight = weight.sum(1, keepdim=True) if wanted == 1 else repeated
    if weight.ndim == len(shape) - 1:
        weight = weight.unsqueeze(-1).repeat(*[1] * weight.ndim, shape[-1]) / shape[-1]
    return weight


def adapt_positions(positions: Tensor, grid: tuple[int, ...], new: tuple[int, ...], resize) -> Tensor:
    """A 2D table (1, L, D) on a 3D grid: resized in plane and repeated along the new last axis."""
    plane = resize(positions, grid, new[:2])
    return plane.unflatten(1, new[:2]).unsqueeze(3).repeat(1, 1, 1, new[2], 1).flatten(1, 3)
