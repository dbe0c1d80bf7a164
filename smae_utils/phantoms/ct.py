"""Abdominal CT phantoms, a drop-in for the BTCV scans: the same folders, file names, case ids and 13 labels.

Twelve numbers a patient (`LATENTS`) place, size and texture everything, so what is visible predicts what is
hidden, while the pose varies too much for position alone to be a good atlas. Organs that touch share their HU
and texture (liver and spleen; both kidneys; the vessels; stomach, pancreas, esophagus and adrenals), so that
a threshold does not tell them apart: their place among others does.

At "demo" size the thin organs (vessels, esophagus, pancreas, gallbladder, adrenals) are exaggerated, far
beyond life for the adrenals: each is then about four voxels of 7 mm thick. "full" size draws them a fifth to
two fifths thinner, still generous.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smae_utils.phantoms.shapes import (
    case_rng,
    coverage,
    ellipsoid,
    grid_mm,
    rotation,
    save_nifti,
    to_body,
    tube,
)

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
)  # label = place here + 1
TRAIN_IDS = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST_IDS = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
REMOVABLE = (
    "gallbladder",
    "left kidney",
    "spleen",
)  # what surgery takes out; one patient in ten lacks one of them
AXCODES = ("RAS", "LPS", "LAS", "RPS", "LPI", "PSR")
AIR_HU, FAT_HU = -1000, -105


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
        return 0.925 + 0.125 * self.size

    @property
    def fat_mm(self) -> float:
        return 15 + 8 * self.fat


class Case(NamedTuple):
    """One phantom: `image_hu` int16 and `label` uint8, both (X, Y, Z) in RAS+, and the voxel `spacing_mm`."""

    image_hu: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]


class Ball(NamedTuple):
    """An ellipsoid in body mm; `turn` in rad about x, y, z; `power` > 2 squares it off."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    power: float = 2.0
    turn: tuple[float, float, float] = (0, 0, 0)

    def distance(self, p, grow: float) -> np.ndarray:
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
        return tube(p, self.points, np.multiply(self.radii, grow))


@dataclass(frozen=True)
class Structure:
    """A named union of parts made of one tissue.

    `true_size`: how thick it is at "full" size against the parts drawn here. `keeps_mm`: a small patient does
    not have it thinner (else a thin organ would vanish from a 7 mm grid). `period_mm`: repeated along z.
    `rigid`: does not move with breathing.
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
        return ORGANS.index(self.name) + 1 if self.name in ORGANS else 0

    def distance(self, p, latents: Latents, size: str) -> np.ndarray:
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


_COLON = (
    ((100, 0, -150), (98, 5, -65)),
    ((90, 45, -52), (45, 66, -68), (-30, 68, -66), (-88, 40, -35)),
    ((-102, -8, -30), (-100, -10, -150)),
)  # going up, across and down

# Painted in this order: a later structure lies over an earlier one, so the thin organs come last and none is
# swallowed.
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


def fold(z, period: float, phase: float):
    """Distance in -period/2..period/2 from the nearest of a row of planes, moved along by `phase` of half a
    period.
    """
    moved = z / np.float32(period) - np.float32(phase / 2)
    return (moved - np.round(moved)) * np.float32(period)


def wave(p, wavelengths: tuple[float, float, float], phase: float) -> np.ndarray:
    """A grating of body coordinates: the phase grows by a turn every `wavelengths` mm along x, y and z (inf:
    not at all).
    """
    turns = sum(c * np.float32(1 / w) for c, w in zip(p, wavelengths) if np.isfinite(w))
    return np.cos(np.float32(2 * np.pi) * turns + np.float32(np.pi * phase))


def texture(kind: str, p, distance: np.ndarray, phase: float) -> np.ndarray | float:
    """What a tissue adds to its HU, about -1..1; every wavelength is 3 voxels of 7 mm or more, even in the
    smallest patient.
    """
    if kind == "vessels":  # bright tubes that run front to back and bend: a row across, a row along
        x, y, z = p
        bent = (x + 7 * np.sin(y / 22), y, z + 7 * np.sin(y / 16 + x / 40))
        both = wave(bent, (32, np.inf, 90), phase) + wave(bent, (-80, np.inf, 32), phase)
        return np.clip(both - 0.7, 0, None)
    if kind == "pyramids":  # a bright cortex, dark pyramids spaced along the kidney, a dark sinus
        cortex = coverage(-8 - distance, 5)
        sinus = coverage(distance + 19, 6)
        return cortex - 0.5 * (1 - cortex) * (1 + wave(p, (np.inf, np.inf, 30), phase)) - 1.2 * sinus
    if kind == "folds":
        return wave((p[0], p[1] + 6 * np.sin(p[0] / 20), p[2]), (60, 60, 34), phase)
    if kind == "fibres":
        return wave(p, (70, 70, 34), phase)
    return 0.0


class Canvas:
    """One slab of the scan being painted: HU (X, Y, Z) float32 and labels (X, Y, Z) uint8."""

    def __init__(self, axes, spacing_mm: tuple[float, float, float]):
        self.axes = axes
        self.pitch = float(np.mean(spacing_mm[:2]))
        shape = tuple(a.size for a in axes)
        self.image = np.full(shape, AIR_HU, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self._frames: dict[Latents, tuple] = {}

    def frame(self, latents: Latents):
        """Body coordinates of every voxel, (x, y, z), and the same with z as breathing moves the upper organs
        (mm, float32).
        """
        if latents not in self._frames:
            shift = (26 * latents.shift_x, 20 * latents.shift_y, 12 * latents.shift_z)
            x, y, z = to_body(
                self.axes, shift, (0.15 * latents.turn_x, 0, 0.35 * latents.turn_z), latents.scale
            )
            stretch = np.float32(1 + 0.07 * latents.aspect)
            x = x / stretch + np.float32(9 * latents.asymmetry) * np.sin(
                z / 70
            )  # the whole trunk bends to one side
            y = y * stretch
            moved = z - np.float32(11 * latents.breath) / (1 + np.exp(-z / 30))
            self._frames[latents] = (x, y, z), (x, y, moved)
        return self._frames[latents]

    def paint(self, p, distance_of, hu, label: int | None = None) -> None:
        """Cover with `hu`, a number or a function of (p, distance), where `distance_of(p)` < 0, with a soft
        edge a voxel wide.

        The distance is first taken on a coarse grid, so that the fine one is only worked out in a box around
        the structure.
        """
        step = 8 if self.pitch < 2 else 3
        near = distance_of(tuple(c[::step, ::step] for c in p)) < 2 * step * self.pitch
        if not near.any():
            return
        box = []
        for axis in (0, 1):
            hit = np.flatnonzero(near.any(axis=(1 - axis, 2))) * step
            box.append(slice(max(hit[0] - step, 0), hit[-1] + step + 1))
        box = tuple(box)
        p = tuple(c[box] for c in p)
        distance = distance_of(p)
        share = coverage(distance, self.pitch)
        self.image[box] += share * ((hu(p, distance) if callable(hu) else hu) - self.image[box])
        if label is not None:
            self.label[box][distance < 0] = label


def _outline(p, grow_mm: float) -> np.ndarray:
    """Distance to the skin less the fat (`grow_mm` 0), a cylinder with a waist; `grow_mm` moves it out or
    in."""
    waist = 1 - 0.06 * np.exp(-(((p[2] + 45) / 50) ** 2))
    return ellipsoid((p[0] / waist, p[1] / waist), (0, 0), (148 + grow_mm, 103 + grow_mm), power=2.4)


def _ribs(p, phase: float) -> np.ndarray:
    """Distance to curved ribs in the body wall, lower in front, that end at the costal margin and beside the
    sternum.
    """
    wall = _outline(p, -9)
    plane = fold(p[2] + 0.45 * p[1], 34, phase) * 0.91
    margin = 0.6 * (-22 + 0.75 * (p[1] - 20 * np.cos(p[0] / 60)) - p[2])
    front = np.minimum(p[1] - 40, 42 - np.abs(p[0]))
    return np.maximum.reduce([np.hypot(wall, plane) - 6.5, margin, front])


def _lungs(p) -> np.ndarray:
    """Distance to the lung bases: inside the ribs, above the two domes of the diaphragm, either side of the
    mediastinum.
    """
    domes = [ellipsoid(p, (side * 74, 0, low), (66, 88, 82), power=2.2) for side, low in ((1, 18), (-1, 12))]
    middle = ellipsoid(p[:2], (-4, -6), (34, 46))
    floor = (
        10 + 0.5 * np.clip(p[1] + 40, 0, None) + 45 * np.exp(-((p[0] / 40) ** 2))
    )  # deepest at the back and the sides
    return np.maximum.reduce([_outline(p, -15), -domes[0], -domes[1], -middle, 0.7 * (floor - p[2])])


def _small_bowel(p, phase: float) -> np.ndarray:
    """Distance to loops of bowel: a periodic lattice, cut to the front of the lower abdomen."""
    x, y, z = p
    bent = (x + 11 * np.sin(z / 24 + y / 40), y + 9 * np.sin(x / 27), z + 11 * np.sin(x / 31 + y / 22))
    loops = sum(wave(bent, w, phase) for w in ((46, 150, np.inf), (np.inf, 46, 150), (150, np.inf, 46)))
    return np.maximum(-6 * (loops + 0.4), ellipsoid(p, (0, 24, -105), (98, 62, 88), power=2.6))


def _paint_trunk(canvas: Canvas, latents: dict[str, Latents], tissue) -> None:
    """Skin, fat, body wall, ribs, lungs and bowel: what lies under the structures of the table."""
    own = latents["body"]
    still, breathing = canvas.frame(own)
    canvas.paint(still, lambda p: _outline(p, own.fat_mm), 30)
    canvas.paint(still, lambda p: _outline(p, own.fat_mm - 2.5), FAT_HU + 5)
    canvas.paint(still, lambda p: _outline(p, 0), tissue("muscle", own))
    canvas.paint(still, lambda p: _outline(p, -14), FAT_HU)
    own = latents["bowel"]
    canvas.paint(canvas.frame(own)[1], lambda p: _small_bowel(p, own.phase), tissue("bowel", own))
    canvas.paint(
        canvas.frame(latents["lungs"])[1],
        _lungs,
        lambda p, d: -840 + 200 * texture("vessels", p, d, latents["lungs"].phase),
    )
    own = latents["ribs"]
    canvas.paint(canvas.frame(own)[0], lambda p: _ribs(p, own.phase), 280)


def _draw_latents(rng: np.random.Generator, context: float) -> dict[str, Latents]:
    """Latents of each structure: each number is the patient's with probability `context`, else the
    structure's own draw.

    Either way it comes from the same range, so `context` changes how much structures say of each other and
    not what they look like.
    """
    patient = rng.uniform(-1, 1, len(Latents._fields))
    drawn = {}
    for name in ("body", "ribs", "lungs", "bowel", *(s.name for s in STRUCTURES)):
        own, coin = rng.uniform(-1, 1, len(patient)), rng.random(len(patient))
        drawn[name] = Latents(*np.where(coin < context, patient, own).tolist())
    return drawn


def patient_latents(seed: int, case: int) -> Latents:
    """The patient's own numbers, which every structure follows at context 1."""
    return _draw_latents(case_rng(seed, case), 1.0)["body"]


def _draw_grid(
    rng: np.random.Generator, size: str
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape in voxels and spacing in mm of a scan: about 280 mm along z at "demo" size, 335 mm at "full"
    size.
    """
    in_plane, between = rng.random(2).tolist()
    if size == "demo":
        pixel, slices = round(6.2 + 0.5 * in_plane, 3), round(6.4 + 1.2 * between, 2)
        return (64, 52, round(280 / slices)), (pixel, pixel, slices)
    if size == "full":
        pixel, slices = round(0.74 + 0.11 * in_plane, 4), round(2.5 + 0.3 * between, 2)
        return (512, 512, round(335 / slices)), (pixel, pixel, slices)
    raise ValueError(f"size is 'demo' or 'full', not {size!r}")


def make_case(seed: int, case: int, size: str = "demo", context: float = 1.0, clean: bool = False) -> Case:
    """The phantom `case` of `seed`: HU and labels (X, Y, Z) in RAS+ with the spacing in mm; `clean` leaves
    out the noise.

    `context` in 0..1 is the share of each structure's place, size and texture phase that follows the
    patient's latents.
    """
    shape, spacing_mm = _draw_grid(case_rng(seed, case, 1), size)
    rng = case_rng(seed, case)
    latents = _draw_latents(rng, context)
    gain, offset, noise_hu = rng.uniform(0.5, 1.3), rng.uniform(-8, 8), rng.uniform(2, 4)
    missing = rng.choice(REMOVABLE) if rng.random() < 0.1 else None

    def tissue(name: str, own: Latents):
        kind = TISSUES[name]
        level = kind.base + gain * kind.uptake + offset * (kind.uptake > 0)
        return lambda p, distance: level + kind.amplitude * texture(kind.texture, p, distance, own.phase)

    image, label = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    axes, noise = grid_mm(shape, spacing_mm), case_rng(seed, case, 2)
    body = latents["body"]
    couch_y = 20 * body.shift_y - (103 + body.fat_mm) * body.scale - 26
    thick = shape[2] if size == "demo" else 8
    for start in range(
        0, shape[2], thick
    ):  # in slabs: a full-size scan in float32 coordinates would take many GB
        slab = slice(start, start + thick)
        canvas = Canvas((*axes[:2], axes[2][..., slab]), spacing_mm)
        canvas.paint(
            np.broadcast_arrays(*canvas.axes), lambda p: np.abs(p[1] - couch_y - (p[0] / 45) ** 2) - 6, -150
        )
        _paint_trunk(canvas, latents, tissue)
        for structure in STRUCTURES:
            if structure.name == missing:
                continue
            own = latents[structure.name]
            p = canvas.frame(own)[0 if structure.rigid else 1]
            canvas.paint(
                p,
                partial(structure.distance, latents=own, size=size),
                tissue(structure.tissue, own),
                structure.label,
            )
        if not clean:
            canvas.image += noise_hu * noise.standard_normal(canvas.image.shape, np.float32)
        image[..., slab] = np.round(np.clip(canvas.image, -1024, 3071))
        label[..., slab] = canvas.label
    return Case(image, label, spacing_mm)


def case_ids(n: int) -> list[int]:
    """The first `n` BTCV ids, three of the official training set to two of the test set; past all 30, from 41
    on.
    """
    train, test = iter(TRAIN_IDS), iter(TEST_IDS)
    official = [next(train if turn in (0, 1, 3) else test) for _ in range(6) for turn in range(5)]
    return (official + list(range(41, 41 + max(n - 30, 0))))[:n]


def write(
    out: Path, n: int, seed: int, size: str = "demo", context: float = 1.0, clean: bool = False
) -> list[Path]:
    """Write `n` cases as BTCV does, img/imgNNNN.nii.gz (int16 HU) and label/labelNNNN.nii.gz under
    out/RawData/Training.

    Storage orientation, origin and, in one case of three, a tilt of 2 to 5 degrees differ by case. Returns
    the image paths.
    """
    folder = Path(out) / "RawData" / "Training"
    paths = []
    for case in case_ids(n):
        phantom = make_case(seed, case, size, context, clean)
        rng = case_rng(seed, case, 3)
        tilt = (
            rotation((np.deg2rad(rng.uniform(2, 5)) * rng.choice((-1, 1)), 0, 0))
            if rng.random() < 1 / 3
            else None
        )
        store = {
            "axcodes": str(rng.choice(AXCODES)),
            "origin_mm": tuple(np.round(rng.uniform(-300, 0, 3), 1)),
            "tilt": tilt,
        }
        paths.append(folder / "img" / f"img{case:04d}.nii.gz")
        save_nifti(paths[-1], phantom.image_hu, phantom.spacing_mm, **store)
        save_nifti(folder / "label" / f"label{case:04d}.nii.gz", phantom.label, phantom.spacing_mm, **store)
    return paths
