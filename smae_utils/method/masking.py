"""Which patches are hidden: drawn by noise, from a seed. One convention everywhere: **1 = hidden**."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smae_utils.errors import UserError


def visible_count(length: int, mask_ratio: float) -> int:
    """How many of `length` patches stay visible: int(length * (1 - mask_ratio)).

    Raises:
        UserError: if no patch would be visible, or none hidden.
    """
    keep = int(length * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or not 0 < keep < length:
        raise UserError(
            f"mask_ratio {mask_ratio} leaves {keep} of {length} patches visible: expected a ratio strictly "
            "between 0 and 1 that leaves at least one patch visible and one hidden"
        )
    return keep


def mask_noise(seeds: Sequence[int], length: int) -> Tensor:
    """(B, L) uniform noise, one seed an image, drawn on the CPU.

    An image has the same mask on every device and in every batch.
    """
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(int(seed) % 2**63)) for seed in seeds]
    return torch.stack(rows)


def split_by_noise(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches stay visible: those with the smallest noise (MAE, He et al. 2111.06377, appendix A.1).

    Args:
        noise: (B, L).
        mask_ratio: share of hidden patches.

    Returns:
        visible (B, V) and hidden (B, L - V) patch indices in order of noise, mask (B, L) with 1 = hidden.
    """
    keep = visible_count(noise.shape[1], mask_ratio)
    order = noise.argsort(dim=1, stable=True)
    mask = torch.ones_like(noise).scatter(1, order[:, :keep], 0.0)
    return order[:, :keep], order[:, keep:], mask
