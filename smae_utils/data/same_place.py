"""Do an image and its mask, or two channels, lie in the same place? By shape, affine and corners in mm."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from smae_utils.errors import UserError
from smae_utils.paths import has_ending


def check_grid(other: tuple, path: str, first: tuple, first_path: str) -> None:
    """Refuse a channel whose grid (shape, affine) is not the first one's."""
    if tuple(other[0]) != tuple(first[0]):
        raise UserError(
            f"{path} has shape {tuple(other[0])}, {first_path} {tuple(first[0])}: channels must lie on one "
            "grid"
        )
    check_same_place(other[1], first[1], other[0], path, first_path)


def contradiction(path: str) -> str:
    """In which way a NIfTI header contradicts itself about where the voxels lie; "" where it does not.

    What counts here is its affine, the sform first.
    """
    scan = nib.load(path)
    if "sform_code" not in scan.header:
        return (
            "an Analyze file does not say which side is left: it is taken as nibabel takes it"
            if has_ending(path, (".hdr", ".img"))
            else ""
        )
    sizes, stored = np.asarray(scan.header.get_zooms()[:3], float), voxel_sizes(scan.affine)
    if not np.allclose(sizes, stored, rtol=1e-3, atol=0):
        return f"voxel sizes {by(sizes)} mm, by its affine {by(stored)}"
    if scan.header["sform_code"] > 0 and scan.header["qform_code"] > 0:
        try:
            sform, qform = scan.get_sform(), scan.get_qform()
        except ValueError:
            return "its qform is no rotation"
        off = _farthest_corner(sform, qform, scan.shape)
        if off > 0.5 * stored.min():
            return f"its qform lies up to {off:.3g} mm away from its sform"
    return ""


def by(values: Sequence[float]) -> str:
    """Sizes joined by x, with three digits that matter however small they are."""
    return "x".join(f"{v:.3g}" for v in values)


def _farthest_corner(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """How far, in mm, two affines (4, 4) place a corner of a grid apart, along the worst axis."""
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape[:3]), 1]
    return float(np.abs(corners @ (one - other).T)[:, :3].max())


def check_same_place(
    label: np.ndarray,
    image: np.ndarray,
    shape: Sequence[int],
    label_path: str,
    image_path: str,
    what_to_do: str = "",
) -> None:
    """Refuse a label whose affine (4, 4) puts its corners more than half a voxel away from the image's."""
    off = _farthest_corner(label, image, shape)
    if off > 0.5 * voxel_sizes(image).min():
        what = what_to_do or "resample it onto the image's grid"
        raise UserError(
            f"{label_path} lies up to {off:.3g} mm away from its image {image_path}, by their affines. {what}"
        )
