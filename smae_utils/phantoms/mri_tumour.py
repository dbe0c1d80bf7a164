"""Tumours of the MRI phantoms, and what looks like one and is none."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smae_utils.phantoms.mri_head import Canvas, Latents
from smae_utils.phantoms.shapes import (
    rotation,
)


class Tumour(NamedTuple):
    """A tumour; lengths in body mm.

    `lobes` (3, 4) hold for core, ring and edema a direction and a phase that make the surface irregular.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: np.ndarray
    ring: float
    edema: float
    push: float
    lobes: np.ndarray
    weak: bool

    @property
    def side(self) -> float:
        """The side it lies on: 1 right, -1 left."""
        return float(np.sign(self.centre[0]))

    def polar(self, p) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance from the centre (mm), unit direction (3 arrays), radius of the ellipsoid there (mm)."""
        q = [c - o for c, o in zip(p, self.centre)]
        r = np.sqrt(sum(c**2 for c in q)) + np.float32(1e-3)
        n = [sum(np.float32(self.turn[j, i]) * q[j] for j in range(3)) / r for i in range(3)]
        return r, n, 1 / np.sqrt(sum((c / a) ** 2 for c, a in zip(n, self.radii)))

    def lobe(self, n, which: int) -> np.ndarray:
        """-1..1 by direction, with about three lumps around the tumour."""
        *k, phase = self.lobes[which].tolist()
        return np.sin(sum(np.float32(a) * c for a, c in zip(k, n)) + np.float32(phase))

    def displace(self, p, depth) -> tuple:
        """Where the tissue seen at `p` lay before the tumour grew.

        Tissue at the skull (`depth` 0) and far away stays in place.
        """
        r, _, radius = self.polar(p)
        share = (
            self.push * np.exp(-((r / (1.45 * radius)) ** 2)) * (1 - np.exp(-np.clip(depth, 0, None) / 12))
        )
        return tuple(c - share * (c - np.float32(o)) for c, o in zip(p, self.centre))


def draw_tumour(own: Latents, scale: float, rng: np.random.Generator, context: float) -> Tumour:
    """A tumour from the latents; at `context` 0 it has no mass effect.

    `rng` gives what nothing else in the patient depends on.
    """
    side, front = np.sign(own.tumour_azimuth), 2 * abs(own.tumour_azimuth) - 1
    centre = (side * 33.0, -6 + 36.0 * front, 15 + 9.0 * own.tumour_height)
    mean = (30.4 + 1.9 * own.tumour_size) / scale
    stretch = rng.uniform(1.0, 1.07)
    lobes = np.concatenate(
        [rng.uniform(1.5, 3, (3, 3)) * rng.choice((-1, 1), (3, 3)), rng.uniform(-np.pi, np.pi, (3, 1))], 1
    )
    turn = rotation((rng.uniform(-0.5, 0.5), 0, rng.uniform(-0.3, 0.3)))
    return Tumour(
        centre,
        (0.95 * mean, mean * stretch, mean / stretch),
        turn,
        ring=rng.uniform(12.8, 13.8) / scale,
        edema=rng.uniform(9, 17) / scale,
        push=context * (0.55 + 0.12 * own.tumour_size),
        lobes=lobes,
        weak=rng.random() < WEAK_SHARE,
    )


def paint_tumour(canvas: Canvas, tumour: Tumour, p, x_side, outer, white, keep_out) -> None:
    """Paint edema in white matter, then the enhancing ring, then what it encloses.

    All stay inside the skull and on one side of the midline.

    `x_side` is the distance from the midline into the tumour's hemisphere, `white` that into white matter,
    `keep_out` that from ventricles and deep grey matter.
    """
    r, n, radius = tumour.polar(p)
    radius = radius * (1 + 0.09 * tumour.lobe(n, 0))
    ring = tumour.ring * (1 + 0.1 * tumour.lobe(n, 1))
    # A crescent instead of a ring.
    if tumour.weak:
        ring = ring * np.clip(1.6 * tumour.lobe(n, 2) - 0.5, 0, 1)
    limit = np.maximum(2.5 - outer, 2 - x_side)
    core = np.maximum(r - radius, limit)
    reach = radius + tumour.edema * (1 + 0.5 * tumour.lobe(n, 2) + 0.3 * np.abs(n[1]))
    # The cortex is spared, except where it touches the tumour.
    spared = -white - 7 * np.exp(-np.clip(r - radius, 0, None) / 7)
    canvas.paint(np.maximum.reduce([r - reach, spared, -keep_out, limit]), "edema", EDEMA)
    canvas.paint(core, "weakly enhancing" if tumour.weak else "enhancing", ENHANCING)
    canvas.paint(np.maximum(r - radius + ring, limit + 0.7 * ring), "non-enhancing", NON_ENHANCING)


class Decoys(NamedTuple):
    """What looks like tumour and is not, each a centre and a radius in body mm, or nothing."""

    cyst: tuple | None
    scar: tuple | None
    meningioma: tuple | None


def draw_decoys(own: Latents, side: float, rng: np.random.Generator) -> Decoys:
    """A cyst, an old scar and a meningioma, each in half of the patients.

    The cyst lies at a temporal pole, the others on the side without the tumour. The scar is fluid in a bright
    rim. The meningioma enhances as the tumour does, but sits on the skull, is solid and has no edema.
    """
    turn = rng.uniform(-0.9, 0.9)
    drawn = (
        ((rng.choice((-1.0, 1.0)) * 43, 33.0, -22.0), 15 + 3 * own.atrophy),
        ((-side * rng.uniform(32, 38), rng.uniform(-45, -20), rng.uniform(18, 32)), 11 + 2 * own.ventricles),
        ((-side * 56 * np.cos(turn), 10 + 62 * np.sin(turn), 24.0), 14 + 3 * own.fold),
    )
    return Decoys(*(decoy if there else None for decoy, there in zip(drawn, rng.random(3) < 0.5)))


EDEMA, NON_ENHANCING, ENHANCING = 1, 2, 3


# Share of the patients whose tumour enhances little, and on one side only.
WEAK_SHARE = 0.15
