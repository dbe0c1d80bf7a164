"""Patches and positions: the arithmetic of a vision transformer, for 2D and 3D alike.

One convention for masks everywhere: **1 = hidden**. The pixels of a patch are ordered with the spatial axes
first and the channel last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from smae_utils.errors import UserError


def as_tuple(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """An int for every axis, or one per axis -> a tuple of `ndim` ints.

    Raises:
        UserError: for another number of sizes, or a size below 1.
    """
    out = (int(value),) * ndim if isinstance(value, int) else tuple(int(v) for v in value)
    if len(out) != ndim or min(out) < 1:
        raise UserError(f"expected {ndim} sizes of at least 1, one an axis, got {value!r}")
    return out


def grid_size(img_size: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis.

    Raises:
        UserError: if an axis does not divide.
    """
    patch = as_tuple(patch_size, len(img_size))
    if any(n % p for n, p in zip(img_size, patch)):
        fits = tuple(max(n // p, 1) * p for n, p in zip(img_size, patch))
        raise UserError(
            f"image size {tuple(img_size)} is no multiple of the patch size {patch}: use {fits}, say, or "
            "another patch size"
        )
    return tuple(n // p for n, p in zip(img_size, patch))


def patchify(image: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """(B, C, *spatial) -> (B, L, p^d * C): patches in row-major order, pixels spatial first, channel last.

    Raises:
        UserError: if the patch size does not divide the image.
    """
    ndim = image.ndim - 2
    patch = as_tuple(patch_size, ndim)
    grid = grid_size(image.shape[2:], patch)
    batch, chans = image.shape[:2]
    split = image.reshape(batch, chans, *(n for pair in zip(grid, patch) for n in pair))
    axes = [0, *range(2, 2 + 2 * ndim, 2), *range(3, 3 + 2 * ndim, 2), 1]
    return split.permute(axes).reshape(batch, prod(grid), prod(patch) * chans)


def unpatchify(patches: Tensor, patch_size: int | Sequence[int], grid: Sequence[int]) -> Tensor:
    """(B, L, p^d * C) -> (B, C, *spatial): the exact inverse of `patchify`.

    Raises:
        UserError: if number or length of the patches do not fit the grid.
    """
    ndim = len(grid)
    patch = as_tuple(patch_size, ndim)
    batch, length, width = patches.shape
    if length != prod(grid) or width % prod(patch):
        raise UserError(
            f"expected {prod(grid)} patches of a multiple of {prod(patch)} pixels for grid {tuple(grid)}, "
            f"got {length} of {width}"
        )
    split = patches.reshape(batch, *grid, *patch, width // prod(patch))
    axes = [0, 1 + 2 * ndim, *(axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i))]
    return split.permute(axes).reshape(batch, -1, *(g * p for g, p in zip(grid, patch)))


def patch_statistics(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and std of each patch over its pixels and channels: (B, L, N) -> two (B, L, 1).

    The std is the root of the biased variance + `eps`, as in the released 3D code of Zhou et al.
    (2203.05573). facebookresearch/mae divides by N - 1: its targets differ from these by the factor
    sqrt((N - 1) / N), 0.07 % for a patch of 16 x 16 x 3 pixels.
    """
    mean = patches.mean(-1, keepdim=True)
    return mean, (patches.var(-1, keepdim=True, unbiased=False) + eps).sqrt()


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of tokens (B, L, D) -> (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Fixed sine-cosine positions (1, L, dim): axes in order, each with an equal even share of `dim`.

    The formula is that of MAE (He et al. 2111.06377), with frequencies 10000^(-2i / share), for any number
    of axes and any width; what is left of `dim` is zero. The order is our own: axis 0 comes first.
    facebookresearch/mae puts the columns (axis 1) first, so the two halves of its 2D table are swapped.

    Raises:
        UserError: if `dim` is too small for one frequency an axis.
    """
    half = dim // (2 * len(grid))
    if half == 0:
        raise UserError(
            f"embed_dim {dim} is too narrow for positions on {len(grid)} axes: use at least {2 * len(grid)}"
        )
    rate = 1 / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    table = torch.zeros(prod(grid), dim)
    for i, axis in enumerate(axes):
        angle = axis.reshape(-1, 1) * rate
        table[:, 2 * half * i : 2 * half * (i + 1)] = torch.cat([angle.sin(), angle.cos()], 1).float()
    return table.unsqueeze(0)
