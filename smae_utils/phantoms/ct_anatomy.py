"""What lies in the abdomen of the CT phantoms: organs, their shapes in body mm, and their tissues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smae_utils.phantoms.shapes import (
    ellipsoid,
    rotation,
    tube,
)

# The label of an organ is its place here + 1.
ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)


# What surgery takes out; one patient in ten lacks one of them.
REMOVABLE = ("gallbladder", "left kidney", "spleen")


class Latents(NamedTuple):
    """What makes a patient, each number in -1..1."""

    size: float
    aspect: float
    turn_x: float
    turn_z: float
    shift_x: float
    shift_y: float
    shift_z: float
    breath: float
    asymmetry: float
    fat: float
    organ_size: float
    phase: float

    @property
    def scale(self) -> float:
        """Size of the body against the drawing."""
        return 0.925 + 0.125 * self.size

    @property
    def fat_mm(self) -> float:
        """Thickness of the fat under the skin."""
        return 15 + 8 * self.fat


class Ball(NamedTuple):
    """An ellipsoid in body mm; `turn` in rad about x, y, z; `power` > 2 squares it off."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    power: float = 2.0
    turn: tuple[float, float, float] = (0, 0, 0)

    def distance(self, p, grow: float) -> np.ndarray:
        """Signed distance in mm of body coordinates `p`, about, to the ball with `grow` times its radii."""
        return ellipsoid(
            p,
            self.centre,
            [r * grow for r in self.radii],
            rotation(self.turn).T if any(self.turn) else None,
            self.power,
        )


class Tube(NamedTuple):
    """A poly-line in body mm with a radius at each point."""

    points: tuple[tuple[float, float, float], ...]
    radii: tuple[float, ...] | float

    def distance(self, p, grow: float) -> np.ndarray:
        """Signed distance in mm of body coordinates `p` to the tube with `grow` times its radii."""
        return tube(p, self.points, np.multiply(self.radii, grow))


@dataclass(frozen=True)
class Structure:
    """A named union of parts made of one tissue.

    Attributes:
        true_size: how thick it is at "full" size against the parts drawn here.
        keeps_mm: it is no thinner in a small patient (else a thin organ would vanish from a 7 mm grid).
        period_mm: it is repeated along z.
        rigid: it does not move with breathing.
    """

    name: str
    tissue: str
    parts: tuple[Ball | Tube, ...]
    true_size: float = 1.0
    keeps_mm: bool = False
    period_mm: float = 0.0
    rigid: bool = False

    @property
    def label(self) -> int:
        """Its label number; 0 for what is no organ of the task."""
        return ORGANS.index(self.name) + 1 if self.name in ORGANS else 0

    def distance(self, p, latents: Latents, size: str) -> np.ndarray:
        """Signed distance in mm of body coordinates `p` to the structure in this patient, negative inside."""
        grow = (self.true_size if size == "full" else 1) * (1 + 0.05 * latents.organ_size * (not self.rigid))
        if self.keeps_mm:
            grow /= latents.scale
        if self.period_mm:
            p = (p[0], p[1], fold(p[2], self.period_mm, latents.phase))
        return np.minimum.reduce([part.distance(p, grow) for part in self.parts])


class Tissue(NamedTuple):
    """HU without contrast medium, HU added at contrast gain 1, and a texture of so many HU."""

    base: float
    uptake: float
    texture: str = "plain"
    amplitude: float = 0.0


TISSUES = {
    "parenchyma": Tissue(55, 50, "vessels", 55),
    "kidney": Tissue(35, 110, "pyramids", 50),
    "blood": Tissue(42, 105),
    "soft": Tissue(40, 42, "folds", 14),
    "bile": Tissue(15, 0),
    "muscle": Tissue(52, 12, "fibres", 16),
    "bone": Tissue(290, 0, "fibres", 40),
    "disc": Tissue(85, 0),
    "fluid": Tissue(20, 0),
    "bowel": Tissue(38, 38, "folds", 14),
    "stool": Tissue(-40, 0, "folds", 60),
    "gas": Tissue(-850, 0),
}


# The colon goes up, across and down.
_COLON = (
    ((100, 0, -150), (98, 5, -65)),
    ((90, 45, -52), (45, 66, -68), (-30, 68, -66), (-88, 40, -35)),
    ((-102, -8, -30), (-100, -10, -150)),
)


def fold(z, period: float, phase: float):
    """Distance to the nearest of a row of planes, in -period/2..period/2.

    The planes are moved along by `phase` times half a period.
    """
    moved = z / np.float32(period) - np.float32(phase / 2)
    return (moved - np.round(moved)) * np.float32(period)


def _mirror(*parts: Ball | Tube) -> tuple[Ball | Tube, ...]:
    """The parts (none of them turned), and the same on the other side of the body."""

    def flip(point):
        return (-point[0], *point[1:])

    return parts + tuple(
        part._replace(centre=flip(part.centre))
        if isinstance(part, Ball)
        else part._replace(points=tuple(map(flip, part.points)))
        for part in parts
    )


# Painted in this order: a later structure lies over an earlier one. Thin organs come last, so
# that none is swallowed.
STRUCTURES = (
    Structure("back muscles", "muscle", _mirror(Ball((33, -84, 0), (29, 19, 900), 2.5)), rigid=True),
    Structure(
        "psoas muscles",
        "muscle",
        _mirror(Tube(((24, -48, 30), (36, -46, -60), (62, -22, -220)), (8, 22, 26))),
        rigid=True,
    ),
    Structure("iliac bones", "bone", _mirror(Ball((98, -42, -195), (14, 52, 62), 2.5)), rigid=True),
    Structure("discs", "disc", (Ball((0, -48, 0), (23, 18, 900), 2.5),), rigid=True),
    Structure(
        "vertebrae",
        "bone",
        (
            Ball((0, -48, 0), (25, 20, 12.5), 5),
            Ball((0, -96, -4), (5, 15, 10), 3),
            *_mirror(Tube(((4, -84, 0), (40, -80, 2)), (8, 5)), Ball((16, -72, 0), (5, 10, 8))),
        ),
        period_mm=34,
        rigid=True,
    ),
    Structure("sternum", "bone", (Ball((0, 93, 200), (17, 7, 85), 3),), rigid=True),
    Structure("spinal canal", "fluid", (Ball((0, -77, 0), (10, 8, 900)),), rigid=True),
    Structure("heart", "blood", (Ball((-22, 54, 152), (60, 40, 54), 2.2, (0.3, 0, 0)),)),
    Structure("colon wall", "bowel", tuple(Tube(points, 21) for points in _COLON)),
    Structure("colon contents", "stool", tuple(Tube(points, 14) for points in _COLON)),
    Structure(
        "colon gas", "gas", (Tube(((38, 74, -66), (-28, 76, -64)), 8), Ball((98, 14, -80), (9, 8, 22)))
    ),
    Structure(
        "liver",
        "parenchyma",
        (Ball((80, 0, 36), (50, 66, 58), 2.3), Ball((12, 38, 58), (56, 29, 27), 2.2, (0, -0.25, 0))),
    ),
    Structure(
        "stomach",
        "soft",
        (
            Tube(
                ((-58, 4, 60), (-68, 30, 32), (-48, 56, 2), (-6, 64, -14), (18, 56, -10)),
                (35, 33, 27, 20, 15),
            ),
        ),
    ),
    Structure("spleen", "parenchyma", (Ball((-101, -34, 42), (27, 46, 48), 2.3, (0.25, 0, -0.25)),)),
    Structure(
        "pancreas",
        "soft",
        (
            Tube(
                ((26, 30, -34), (10, 40, -12), (-28, 36, 2), (-58, 12, 6), (-80, -2, 12)),
                (18, 16, 16, 15, 14),
            ),
        ),
        0.8,
        keeps_mm=True,
    ),
    Structure("right kidney", "kidney", (Ball((64, -50, -36), (29, 28, 49), 2.2),)),
    Structure("left kidney", "kidney", (Ball((-64, -50, -30), (29, 28, 49), 2.2),)),
    Structure(
        "gallbladder", "bile", (Ball((60, 50, -16), (23, 22, 33), 2.3, (-0.4, 0, 0)),), 0.75, keeps_mm=True
    ),
    Structure(
        "esophagus",
        "soft",
        (Tube(((-3, 8, 240), (-6, 8, 110), (-22, 10, 78), (-48, 8, 58)), 17.5),),
        0.6,
        keeps_mm=True,
    ),
    Structure(
        "right adrenal gland",
        "soft",
        (Ball((44, -35, 44), (18, 23, 36), 3, (0, 0, 0.2)),),
        0.6,
        keeps_mm=True,
    ),
    Structure(
        "left adrenal gland",
        "soft",
        (Ball((-46, -33, 48), (18, 23, 36), 3, (0, 0, -0.2)),),
        0.6,
        keeps_mm=True,
    ),
    Structure(
        "portal and splenic veins",
        "blood",
        (
            Tube(
                ((-88, -14, 34), (-48, 12, 26), (-8, 22, 14), (18, 22, 12), (40, 20, 34), (64, 16, 48)), 14.5
            ),
        ),
        0.6,
        keeps_mm=True,
    ),
    Structure(
        "inferior vena cava",
        "blood",
        (Tube(((24, -14, -115), (21, -10, 0), (23, 2, 70), (14, 24, 118)), 15.5),),
        0.75,
        keeps_mm=True,
    ),
    Structure(
        "aorta",
        "blood",
        (Tube(((-16, -14, -115), (-16, -13, 20), (-19, -24, 240)), 16.5),),
        0.75,
        keeps_mm=True,
    ),
    Structure("iliac vessels", "blood", _mirror(Tube(((14, -14, -124), (58, 4, -220)), 10)), rigid=True),
)
