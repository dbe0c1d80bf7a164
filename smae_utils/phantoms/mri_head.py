"""The parts of a head, as distances in mm, and their brightness in the four channels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smae_utils.phantoms.shapes import (
    coverage,
    ellipsoid,
    tube,
)


def egg(p, centre, radii) -> np.ndarray:
    """As `ellipsoid`, but divided by the slope, so that it is mm near the surface in every direction.

    The cortex is then even.
    """
    q = [c - o for c, o in zip(p, centre)]
    level = np.sqrt(sum((c / r) ** 2 for c, r in zip(q, radii)))
    return (level - 1) * level / (np.sqrt(sum((c / r**2) ** 2 for c, r in zip(q, radii))) + np.float32(1e-6))


def cerebrum(p) -> np.ndarray:
    """Distance to both hemispheres as one.

    An ellipsoid, narrower in front, with a flat base, and two temporal lobes.
    """
    x, y, z = p
    narrow = np.abs(x) * (1 + 0.0014 * np.clip(y + 10, 0, None))
    base = -20 + 0.0015 * (y - 20) ** 2 - z
    dome = np.maximum(egg((narrow, y, z), (0, 0, 12), (67, 85, 52)), base)
    return np.minimum(dome, egg((np.abs(x), y, z), (41, -2, -19), (24, 46, 22)))


def cerebellum(p) -> np.ndarray:
    """Distance to both halves of the cerebellum."""
    return egg((np.abs(p[0]), p[1], p[2]), (14, -50, -37), (36, 30, 22))


def stem(p) -> np.ndarray:
    """Distance to the brain stem."""
    return tube(p, ((0, -10, -8), (0, -14, -28), (0, -23, -60)), (14, 15, 9))


def cisterns(p) -> np.ndarray:
    """Distance to the CSF around the brain stem and above the pituitary: it fills gaps at the base."""
    return np.minimum(egg(p, (0, 6, -22), (22, 18, 12)), egg(p, (0, -30, -24), (34, 32, 20)))


def folds(p, phase) -> np.ndarray:
    """Distance in mm to the nearest sulcus of a labyrinth, 15 mm apart.

    The sulci are the sheets of a gyroid, three crossed gratings.

    `phase` in -1..1, a number or an array, moves the pattern.
    """
    turn = np.float32(2 * np.pi / 42)
    a, b, c = (turn * (axis + 5 * np.sin(other / 19)) for axis, other in zip(p, (p[1], p[2], p[0])))
    a, b, c = a + 3.1 * phase, b - 2.0 * phase, c + 1.3 * phase
    return np.abs(np.sin(a) * np.cos(b) + np.sin(b) * np.cos(c) + np.sin(c) * np.cos(a)) / (1.35 * turn)


def pia(p, outer, fold_phase) -> np.ndarray:
    """Depth in mm under the surface of the brain.

    The surface goes down into sulci, Sylvian fissures and between the hemispheres.

    `p` with |x| for x; `outer` is the depth under the smooth outline.
    """
    x, y, z = p
    # Corpus callosum and below: here the hemispheres are joined.
    core = ellipsoid((y, z), (-2, 2), (42, 25))
    depth = np.minimum(outer, np.hypot(x, np.clip(-core, 0, None)))
    sheet, inward, along = (
        0.94 * (z + 4 - 0.3 * np.abs(y - 20)),
        np.clip(36 - x, 0, None),
        np.clip(np.abs(y - 4) - 34, 0, None),
    )
    sylvian = np.sqrt(sheet**2 + inward**2 + along**2)
    sulci = np.hypot(folds(p, fold_phase), np.clip(depth - 15, 0, None))
    return np.minimum.reduce([depth, sylvian, sulci])


def ventricle(p, grow_mm) -> np.ndarray:
    """Distance to the lateral and third ventricles; `p` with |x| for x."""
    horns = (
        ((9, 33, 4), (10, 20, 13), (13, -10, 18), (22, -34, 8), (31, -20, -10), (33, 2, -16)),
        ((22, -34, 8), (23, -56, 4)),
    )
    radii = ((5, 6, 6, 7.5, 4, 3), (7, 3))
    lateral = np.minimum.reduce([tube(p, points, radius) for points, radius in zip(horns, radii)]) - grow_mm
    return np.minimum(lateral, ellipsoid(p, (0, -4, 0), (2.5, 15, 11)) - 0.3 * grow_mm)


def deep_grey(p) -> np.ndarray:
    """Distance to thalamus, caudate and lentiform nucleus; `p` with |x| for x."""
    caudate = tube(p, ((15, 27, 6), (19, 10, 16), (22, -12, 19)), (8, 5, 3))
    return np.minimum.reduce([caudate, egg(p, (13, -11, 3), (10, 16, 10)), egg(p, (27, 7, 1), (8, 18, 12))])


def veins(p) -> np.ndarray:
    """Distance to the large venous sinuses and the middle cerebral vessels; `p` with |x| for x."""
    arc = np.linspace(0.6, 3.35, 9)
    sagittal = np.stack([0 * arc, 82 * np.cos(arc), 12 + 49 * np.sin(arc)], 1)
    return np.minimum.reduce(
        [
            tube(p, sagittal, np.linspace(2.5, 5, len(arc))),
            tube(p, ((0, -32, 10), (0, -78, 2)), 3),
            tube(p, ((0, -80, 0), (30, -70, -13), (46, -46, -17)), 4),
            tube(p, ((10, 8, -20), (38, 14, -10), (50, 6, 0), (54, -18, 4)), (3, 3, 2.5, 2)),
        ]
    )


# Brightness in FLAIR, T1w, T1gd, T2w, with white matter in T1w as 1.
TISSUES = {
    "csf": (0.14, 0.25, 0.25, 1.00),
    "grey": (0.64, 0.72, 0.75, 0.62),
    "white": (0.52, 1.00, 1.01, 0.44),
    "deep grey": (0.60, 0.82, 0.85, 0.52),
    # Flowing blood is dark but for the contrast medium.
    "vein": (0.22, 0.42, 1.45, 0.20),
    # Fluid with protein, so that FLAIR does not darken it: the same as in a tumour.
    "old fluid": (0.46, 0.42, 0.44, 0.94),
    "gliosis": (0.86, 0.76, 0.77, 0.78),
    "edema": (0.86, 0.76, 0.77, 0.78),
    "non-enhancing": (0.48, 0.43, 0.46, 0.92),
    "enhancing": (0.76, 0.66, 1.20, 0.69),
    "weakly enhancing": (0.76, 0.64, 1.04, 0.72),
}


class Latents(NamedTuple):
    """What makes a patient, each number in -1..1."""

    size: float
    aspect: float
    turn_x: float
    turn_y: float
    turn_z: float
    asymmetry: float
    ventricles: float
    atrophy: float
    fold: float
    tumour_azimuth: float  # sign: the side; magnitude: from the back of the brain to the front
    tumour_height: float
    tumour_size: float

    @property
    def scale(self) -> float:
        """Size of the head against the drawing."""
        return 0.95 + 0.1 * self.size

    @property
    def angles(self) -> tuple[float, float, float]:
        """Turns of the head in rad about x, y and z."""
        return 0.15 * self.turn_x, 0.15 * self.turn_y, 0.3 * self.turn_z


class Canvas:
    """One slab being painted: brightness (X, Y, Z, 4) float32 and labels (X, Y, Z) uint8.

    Edges are `width_mm` soft. `levels` is the table of tissues as it is in this patient.
    """

    def __init__(self, shape, width_mm: float, levels: dict[str, np.ndarray]):
        self.image = np.empty((*shape, 4), np.float32)
        self.image[:] = levels["white"]
        self.levels = levels
        self.label = np.zeros(shape, np.uint8)
        self.width_mm = width_mm

    def paint(self, distance, tissue: str, label: int | None = None) -> None:
        """Cover with a tissue where `distance` (X, Y, Z) in mm is below 0, with a soft edge."""
        near = distance < 2 * self.width_mm  # beyond, the share is below 0.0004
        under = self.image[near]
        self.image[near] = under + coverage(distance[near], self.width_mm)[:, None] * (
            self.levels[tissue] - under
        )
        if label is not None:
            self.label[distance < 0] = label
