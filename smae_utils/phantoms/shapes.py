"""Geometry, texture and file writing shared by the phantoms.

Coordinates are millimetres in patient space, RAS+ as nibabel means it: the first index grows towards the
patient's Right, the second towards Anterior, the third towards Superior.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations


def case_rng(seed: int, case: int, stream: int = 0) -> np.random.Generator:
    """A generator that depends on the seed, the case and a stream number alone, not on earlier draws."""
    return np.random.default_rng([seed, case, stream])


def grid_mm(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Coordinate axes in mm from the centre of the field of view, float32: three arrays that broadcast."""
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm)]
    return tuple(np.meshgrid(*axes, indexing="ij", sparse=True))


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """(3, 3) rotation by `angles` in rad about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def to_body(axes, shift_mm, angles, scale):
    """Scanner mm -> the patient's own frame, float32: undo the shift, the rotation and the patient's size."""
    moved = [a - s for a, s in zip(axes, shift_mm)]
    inverse = rotation(angles).T / scale
    return tuple(sum(np.float32(inverse[i, j]) * moved[j] for j in range(3)) for i in range(3))


def ellipsoid(p, centre, radii, turn: np.ndarray | None = None, power: float = 2.0):
    """Signed distance in mm, about: negative inside.

    `turn` (3, 3) rotates the axes; `power` > 2 squares the shape off.
    """
    q = [a - c for a, c in zip(p, centre)]
    if turn is not None:
        q = [sum(np.float32(turn[i, j]) * q[j] for j in range(len(q))) for i in range(len(q))]
    level = sum(np.abs(a / r) ** power for a, r in zip(q, radii)) ** (1 / power)
    return ((level - 1) * min(radii)).astype(np.float32)


def tube(p, points, radius):
    """Signed distance in mm to a poly-line `points` (n, 3) of `radius` mm (a number, or one a point)."""
    points = np.asarray(points, np.float32)
    radii = np.broadcast_to(np.asarray(radius, np.float32), len(points))
    best = None
    for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
        ab = b - a
        t = sum((x - o) * d for x, o, d in zip(p, a, ab)) / max(float(ab @ ab), 1e-6)
        t = np.clip(t, 0, 1)
        distance = np.sqrt(sum((x - (o + t * d)) ** 2 for x, o, d in zip(p, a, ab))) - (ra + t * (rb - ra))
        best = distance if best is None else np.minimum(best, distance)
    return best.astype(np.float32)


def coverage(distance, width_mm: float):
    """Share inside a surface, 0..1, by signed distance: an edge `width_mm` wide, as by partial volume."""
    return 1 / (1 + np.exp(np.clip(distance * (4 / width_mm), -30, 30)))


def save_nifti(
    path: Path,
    array,
    spacing_mm,
    axcodes="RAS",
    origin_mm=(0, 0, 0),
    tilt: np.ndarray | None = None,
    units="mm",
) -> None:
    """Write a RAS+ `array` (X, Y, Z[, C]), stored in the orientation `axcodes`.

    Args:
        spacing_mm: voxel size along each axis.
        origin_mm: where the voxel (0, 0, 0) of the RAS array lies.
        tilt: (3, 3), turns the scanner's axes against the patient's.
        units: of space, as the header says them.
    """
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if tilt is None else tilt) @ np.diag(spacing_mm)
    affine[:3, 3] = origin_mm
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axcodes))
    stored = orientations.apply_orientation(array, change)
    affine = affine @ orientations.inv_ornt_aff(change, array.shape[:3])
    image = nib.Nifti1Image(np.ascontiguousarray(stored), affine)
    image.header.set_xyzt_units(units)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
