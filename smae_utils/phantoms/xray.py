"""Frontal (PA) chest radiographs in the layout of NIH ChestX-ray14: the patient's right is on the image's
left.

Coordinates are patient units: x grows to the image's right (the patient's left), y downwards; the field of
view spans -1..1 at scale 1, the midline is x = 0. A picture is a sum of soft attenuation maps, unit: one
chest thickness of soft tissue, put through a film curve. Side 0 is the patient's right (sign -1), side 1 the
patient's left (sign +1).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image

from smae_utils.phantoms.shapes import case_rng, coverage, ellipsoid, tube

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
SIZES = {"demo": 96, "full": 1024}
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
UPPER, MIDDLE, LOWER = 0, 1, 2
AIR = 0.68  # what a full-depth lung takes away from the attenuation of the chest

# Finding: log odds in a sick patient, weight of (heart failure, infection, chronic lung disease), zones that
# it may take. The weights make the realistic pairs (edema with a large heart, fibrosis with thickened pleura)
# without copying a label.
PROFILE = {
    "Atelectasis": (-1.35, (0.2, 0.3, 0.2), (UPPER, LOWER)),
    "Cardiomegaly": (-1.45, (1.1, 0.0, -0.2), ()),
    "Effusion": (-1.3, (0.8, 0.5, 0.0), (LOWER,)),
    "Infiltration": (-1.2, (0.0, 0.8, 0.0), (UPPER, MIDDLE)),
    "Mass": (-1.45, (0.0, 0.0, 0.4), (UPPER, MIDDLE)),
    "Nodule": (-1.3, (0.0, 0.0, 0.4), (UPPER, MIDDLE, LOWER)),
    "Pneumonia": (-1.5, (0.0, 1.0, 0.1), (LOWER,)),
    "Pneumothorax": (-1.45, (-0.2, -0.2, 0.4), (UPPER,)),
    "Consolidation": (-1.5, (0.1, 1.0, 0.0), (UPPER, LOWER)),
    "Edema": (-1.55, (1.2, 0.1, 0.0), ()),
    "Emphysema": (-1.5, (-0.4, 0.0, 0.9), ()),
    "Fibrosis": (-1.5, (0.0, -0.1, 0.9), ()),
    "Pleural_Thickening": (-1.4, (0.0, 0.2, 0.8), (MIDDLE,)),
    "Hernia": (-1.45, (0.1, 0.0, 0.0), ()),
}


@dataclass
class Latents:
    """What makes one patient, each number in -1..1; every structure of the picture is a function of these."""

    width: float
    height: float
    yaw: float
    tilt: float
    inspiration: float
    heart: float
    rib_phase: float
    rib_slope: float
    vascularity: float
    branching: float
    fat: float
    breast: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Latents:
        return cls(*rng.uniform(-1, 1, len(fields(cls))))


@dataclass
class Side:
    """One half of the thorax, in patient units; `wall`, `ribs` and `vessels` are the latents that those
    structures follow.
    """

    sign: int
    wall: Latents
    ribs: Latents
    vessels: Latents
    width: float  # midline to the inner chest wall
    top: float  # y of the lung apex
    dome: float  # y of the top of the diaphragm
    curve: float  # how far the dome falls off towards the costophrenic angle
    air: float  # darkness of the lung, 1 is normal
    vessel_gain: float

    def place(self, zone: int, out: float = 0.58) -> tuple[float, float]:
        """Centre of a lung zone, `out` of the way from the midline to the chest wall."""
        return self.sign * out * self.width, self.top + (self.dome - self.top) * (0.32, 0.58, 0.84)[zone]

    @property
    def hilum(self) -> tuple[float, float]:
        """The left hilum stands a little higher than the right one."""
        return self.sign * 0.24 * self.width, self.top + (0.57 - 0.02 * self.sign) * (self.dome - self.top)


@dataclass
class Chest:
    """Both sides and what lies between them."""

    sides: tuple[Side, Side]
    middle: Latents
    body: Latents
    shift: float  # x of the mediastinum
    ratio: float  # width of the heart over the width of the chest


@dataclass
class Canvas:
    """Maps (H, W) that findings paint on; lists hold one map a side."""

    p: tuple[np.ndarray, np.ndarray]  # x, y of each pixel
    edge: float  # narrowest edge that the pixels can show
    wall: list[np.ndarray]  # signed distance to the chest wall, negative inside
    lung: list[np.ndarray]  # 0..1 inside the lung
    air: list[np.ndarray]  # air along the beam, 0..1.3
    vessels: list[np.ndarray]
    extra: np.ndarray  # attenuation that findings add

    def soft(self, distance: np.ndarray, width: float = 0.0) -> np.ndarray:
        return coverage(distance, max(width, self.edge))

    def fill(self, side: int, mask: np.ndarray, share: float) -> None:
        """Replace `share` of the air under `mask` by fluid or tissue."""
        self.air[side] = self.air[side] * (1 - share * mask)


def build_chest(seed: int, patient: int, visit_rng: np.random.Generator, context: float) -> Chest:
    """The patient's anatomy; a structure drawn outside `context` follows the latents of somebody else."""
    own = Latents.draw(case_rng(seed, patient, 0))
    own.inspiration = float(
        np.clip(own.inspiration + visit_rng.uniform(-0.3, 0.3), -1, 1)
    )  # no two breaths are alike

    def follow(structure: int) -> Latents:
        rng = case_rng(seed, patient, 1 + structure)
        return own if rng.random() < context else Latents.draw(rng)

    def side(sign: int, first: int) -> Side:
        wall, ribs, vessels = (follow(first + k) for k in range(3))
        width = (0.70 + 0.06 * wall.width) * (1 + 0.05 * sign * wall.yaw)
        top = -0.76 - 0.05 * wall.height
        dome = (
            0.36 + 0.03 * sign + 0.08 * wall.inspiration + 0.04 * wall.height
        )  # the liver holds the right dome up
        air = (1 + 0.07 * sign * wall.yaw) * (1 + 0.06 * wall.inspiration)
        return Side(
            sign,
            wall,
            ribs,
            vessels,
            width,
            top,
            dome,
            0.62 + 0.1 * wall.tilt,
            air,
            1 + 0.35 * vessels.vascularity,
        )

    middle = follow(6)
    return Chest(
        (side(-1, 0), side(1, 3)), middle, follow(7), 0.07 * middle.yaw, 0.43 + 0.03 * follow(8).heart
    )


def diaphragm(side: Side, x: np.ndarray) -> np.ndarray:
    """y of the diaphragm at each x: a dome whose top lies over the middle of the lung."""
    return side.dome + side.curve * (x * side.sign - 0.45 * side.width) ** 2 / side.width


def rib_map(canvas: Canvas, side: Side, wall: np.ndarray) -> np.ndarray:
    """Posterior ribs and the steeper, fainter anterior ribs; their period is tied to the height of the
    thorax.
    """
    x, y = canvas.p
    period = (0.62 - side.top) / 9.5
    u = np.clip(x * side.sign / side.width, 0, 1.1)
    slope = 0.30 + 0.08 * side.ribs.rib_slope + 0.05 * side.ribs.tilt
    posterior = slope * (u - 0.2) ** 2
    anterior = 0.64 * slope + (0.55 + 0.15 * side.ribs.rib_slope) * np.clip(1 - u, 0, 1) ** 1.2

    def bands(course: np.ndarray, half_width: float) -> np.ndarray:
        phase = (y - side.top - course) / period + 0.5 * side.ribs.rib_phase
        off = np.abs(phase - np.floor(phase) - 0.5) * period - half_width * period
        return canvas.soft(off, 0.02) * (
            1 + 0.35 * np.exp(-((off / 0.012) ** 2))
        )  # the cortex is denser than the marrow

    inside = canvas.soft(wall - 0.02, 0.04) * canvas.soft(-x * side.sign, 0.03)
    inside = inside * (1 - 0.7 * canvas.soft(diaphragm(side, x) - y, 0.1))  # the abdomen drowns them
    return inside * (bands(posterior, 0.21) + 0.6 * bands(anterior, 0.19) * canvas.soft(0.5 - u, 0.15))


def vessel_map(canvas: Canvas, side: Side) -> np.ndarray:
    """Arteries and veins fanning out from the hilum, each forking once; width follows the vascularity."""
    hub = np.array(side.hilum)
    height = side.dome - side.top
    best = np.full(canvas.p[0].shape, 1.0, np.float32)
    for k, angle in enumerate(np.linspace(-1.3, 1.25, 6)):
        angle += 0.16 * np.sin(2.1 * k + 3 * side.vessels.branching)
        reach = height * (0.40 + 0.06 * np.cos(1.7 * k + 3 * side.vessels.branching))
        radius = 0.020 * np.sqrt(side.vessel_gain)

        def step(a: float, length: float, reach: float = reach) -> np.ndarray:
            return reach * length * np.array([side.sign * np.cos(a), np.sin(a)])

        fork = hub + step(angle, 0.5)
        ends = [fork + step(angle + bend, 0.55) for bend in (0.30 + 0.2 * side.vessels.branching, -0.40)]
        best = np.minimum(
            best, tube(canvas.p, [hub, fork, ends[0]], [1.3 * radius, 0.85 * radius, 0.35 * radius])
        )
        best = np.minimum(best, tube(canvas.p, [fork, ends[1]], [0.7 * radius, 0.3 * radius]))
    blob = np.exp(-((canvas.p[0] - hub[0]) ** 2 + ((canvas.p[1] - hub[1]) / 1.6) ** 2) / 0.055**2)
    return np.float32(0.5 + 0.5 * side.vessel_gain) * (0.7 * canvas.soft(best, 0.015) + 0.5 * blob)


def open_canvas(chest: Chest, p: tuple[np.ndarray, np.ndarray], pixel: float) -> Canvas:
    """Lungs, their air and their vessels on the pixels `p`, before any finding is painted."""
    x, y = p
    canvas = Canvas(p, 1.6 * pixel, [], [], [], [], np.zeros_like(x))
    for side in chest.sides:
        base = 0.30
        wall = ellipsoid(
            p, (side.sign * 0.45 * side.width, base), (0.55 * side.width, base - side.top), power=2.4
        )
        # Below its widest level the cage runs straight down: an ellipse alone would pinch the costophrenic
        # angle off.
        straight = np.abs(x - side.sign * 0.45 * side.width) - 0.55 * side.width
        wall = np.where(y > base, straight, wall).astype(np.float32)
        lung = (
            canvas.soft(wall, 0.025)
            * canvas.soft(y - diaphragm(side, x), 0.025)
            * canvas.soft(-side.sign * (x - chest.shift), 0.03)
        )
        depth = 0.72 + 0.28 * np.clip(
            -wall / (0.3 * side.width), 0, 1
        )  # the beam meets less lung near the chest wall
        canvas.wall.append(wall)
        canvas.lung.append(lung)
        canvas.air.append(lung * depth * np.float32(side.air))
        canvas.vessels.append(vessel_map(canvas, side) * lung)
    return canvas


def heart_map(chest: Chest, canvas: Canvas) -> np.ndarray:
    """Heart (0..1): a third of it right of the midline, two thirds left, its apex down and to the patient's
    left.
    """
    width = chest.ratio * sum(side.width for side in chest.sides)
    lean, tall = 0.60, 0.18 + 0.16 * chest.ratio
    across = np.sqrt(max((width / 2) ** 2 - (tall * np.sin(lean)) ** 2, 0.01)) / np.cos(
        lean
    )  # keeps the width while it leans
    turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]])
    bottom = (chest.sides[0].dome + chest.sides[1].dome) / 2
    return canvas.soft(
        ellipsoid(canvas.p, (chest.shift + 0.17 * width, bottom - 0.11), (across, tall), turn, 2.2), 0.035
    )


def mediastinum_map(chest: Chest, canvas: Canvas) -> np.ndarray:
    """Great vessels (0..1): a band that widens to the heart, with the aortic knob on the patient's left."""
    x, y = canvas.p
    top = chest.sides[1].top
    band = canvas.soft(np.abs(x - chest.shift - 0.01) - 0.115 - 0.07 * np.clip(y + 0.2, 0, 1), 0.04)
    knob = ellipsoid(canvas.p, (chest.shift + 0.09, top + 0.43), (0.09, 0.10))
    trunk = ellipsoid(canvas.p, (chest.shift + 0.06, top + 0.66), (0.13, 0.20))
    return np.maximum(band, canvas.soft(np.minimum(knob, trunk), 0.03))


def body_map(chest: Chest, canvas: Canvas) -> np.ndarray:
    """Soft tissue: torso, neck, arms and breasts, in chest thicknesses."""
    x, y = canvas.p
    body = chest.body
    half = max(side.width for side in chest.sides) + 0.12 + 0.06 * body.fat
    top = min(side.top for side in chest.sides)
    shoulder = (
        top - 0.20 + 0.24 * np.clip(np.abs(x) / half - 0.1, 0, 2) ** 0.7
    )  # the trapezius covers the apices
    torso = np.maximum(np.abs(x) - half - 0.25 * np.clip(-y - 0.2, 0, 0.6), shoulder - y)
    neck = np.maximum(np.abs(x) - 0.24 - 0.05 * body.fat, y)
    thick = np.sqrt(np.clip(1.12 - (x / (half + 0.15)) ** 2, 0.2, 1)) * (1.0 + 0.09 * body.fat)
    thick = thick * (0.68 + 0.32 * np.clip((y - shoulder) / 0.45, 0, 1))
    total = np.maximum(canvas.soft(torso, 0.08), 0.9 * canvas.soft(neck, 0.06)) * thick
    for side in chest.sides:
        arm = tube(
            canvas.p,
            [(side.sign * (half + 0.02), top + 0.24), (side.sign * (half + 0.55), 0.75)],
            [0.2, 0.17 + 0.03 * body.fat],
        )
        total = np.maximum(total, 0.55 * canvas.soft(arm, 0.14))
        breast = ellipsoid(canvas.p, (side.sign * 0.58 * side.width, side.dome - 0.22), (0.30, 0.27))
        total = total + 0.16 * max(body.breast, 0) * canvas.soft(breast, 0.05) * np.clip(
            0.8 + 1.5 * (y - side.dome + 0.25), 0, 1
        )
    return total


def bone_map(chest: Chest, canvas: Canvas) -> np.ndarray:
    """Spine with its discs, clavicles, shoulder blades, upper arms and ribs, in chest thicknesses."""
    x, y = canvas.p
    spine_period = (0.62 - chest.sides[0].top) / 11
    disc = 0.5 + 0.5 * np.cos(2 * np.pi * y / spine_period)
    total = (0.13 + 0.05 * disc) * canvas.soft(np.abs(x) - 0.085, 0.03)
    for k, side in enumerate(chest.sides):
        s, w, top, tilt = side.sign, side.width, side.top, 0.05 * side.ribs.tilt
        inner = s * 0.07 + chest.shift  # a turned patient carries the inner ends along with the mediastinum
        clavicle = [
            (inner, top + 0.22 + tilt),
            (s * 0.45 * w, top + 0.15 + tilt),
            (s * 0.75 * w, top + 0.06),
            (s * 1.15 * w, top + 0.07),
        ]
        blade = [(s * 0.98 * w, top + 0.12), (s * 0.86 * w, top + 0.45), (s * 0.98 * w, top + 0.85)]
        humerus = [(s * (w + 0.17), top + 0.22), (s * (w + 0.29), top + 0.45), (s * (w + 0.67), 0.75)]
        total = total + 0.13 * canvas.soft(tube(canvas.p, clavicle, [0.045, 0.03, 0.03, 0.035]), 0.025)
        total = total + 0.07 * canvas.soft(tube(canvas.p, blade, [0.07, 0.035, 0.02]), 0.05)
        total = total + 0.20 * canvas.soft(tube(canvas.p, humerus, [0.09, 0.055, 0.05]), 0.05)
        total = total + 0.10 * rib_map(canvas, side, canvas.wall[k])
    return total


def ripple(
    p: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, wavelength: float, waves: int = 10
) -> np.ndarray:
    """Smooth random texture (H, W), about -1..1, the same at every pixel size."""
    angles, phases = rng.uniform(0, np.pi, waves), rng.uniform(0, 2 * np.pi, waves)
    lengths = wavelength * rng.uniform(0.8, 1.4, waves)
    total = sum(
        np.cos((p[0] * np.cos(a) + p[1] * np.sin(a)) * np.float32(2 * np.pi / n) + f)
        for a, f, n in zip(angles, phases, lengths)
    )
    return total * np.float32(np.sqrt(2 / waves) / 1.5)


# Findings that change the anatomy before it is drawn; all share one signature: chest, side index, zone, rng.


def reshape_atelectasis(chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """Volume loss: the dome rises, the mediastinum is pulled over."""
    chest.sides[k].dome -= rng.uniform(0.13, 0.19)
    chest.shift += chest.sides[k].sign * rng.uniform(0.09, 0.13)


def reshape_cardiomegaly(chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A heart wider than half of the chest."""
    chest.ratio = rng.uniform(0.55, 0.63)


def reshape_edema(chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """Congested vessels."""
    for side in chest.sides:
        side.vessel_gain = 1.1 * side.vessel_gain + 0.5


def reshape_emphysema(chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """Hyperinflation: low flat domes, dark lungs with few vessels, a narrow heart unless it is enlarged as
    well.
    """
    chest.ratio -= 0.08 if chest.ratio < 0.5 else 0.0
    for side in chest.sides:
        side.dome += 0.13
        side.curve *= 0.3
        side.air *= 1.12
        side.vessel_gain *= 0.6


# Findings that are painted; all share one signature: canvas, chest, side index, zone, rng.


def paint_atelectasis(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A wedge from the hilum to the dome or the apex, along the mediastinum."""
    side = chest.sides[k]
    away = 1 if zone == LOWER else -1
    apex = np.array(side.hilum) - (side.sign * 0.1, 0.12 * away)
    run = np.clip((canvas.p[1] - apex[1]) * away, 0, None)
    off = (canvas.p[0] - apex[0]) * side.sign - rng.uniform(0.65, 0.8) * run - 0.04
    canvas.fill(k, canvas.soft(off, 0.05) * canvas.soft(0.03 - run, 0.05), rng.uniform(0.6, 0.75))


def paint_effusion(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """Fluid that blunts the costophrenic angle, its meniscus climbing along the chest wall."""
    side = chest.sides[k]
    x, y = canvas.p
    u = np.clip(x * side.sign / side.width, 0, 1)
    level = side.dome + rng.uniform(-0.08, 0.04) - 0.30 * u**5 + 0.05
    canvas.fill(k, canvas.soft(level - y, 0.06), 0.93)


def paint_infiltration(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """An ill-defined hazy area, patchy inside."""
    cloud = ellipsoid(canvas.p, chest.sides[k].place(zone), (0.28, 0.30)) + 0.09 * ripple(canvas.p, rng, 0.28)
    patch = 0.72 + 0.4 * ripple(canvas.p, rng, 0.17)
    canvas.fill(k, canvas.soft(cloud, 0.22) * np.clip(patch, 0, 1), rng.uniform(0.45, 0.6))


def paint_ball(
    canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator, low: float, high: float
) -> None:
    """A round solid lesion, its radius between `low` and `high` of the width of this side."""
    side = chest.sides[k]
    radius = rng.uniform(low, high) * side.width
    centre = np.array(side.place(zone, rng.uniform(0.56, 0.68))) + (0, rng.uniform(-0.06, 0.06))
    turn = rng.uniform(0, np.pi)
    lobed = radius * 0.05 * np.cos(3 * np.arctan2(canvas.p[1] - centre[1], canvas.p[0] - centre[0]) + turn)
    canvas.fill(
        k, canvas.soft(ellipsoid(canvas.p, centre, (radius, radius)) + lobed, 0.04), rng.uniform(0.42, 0.62)
    )


def paint_mass(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """About two patches of 1/8 of the field across."""
    paint_ball(canvas, chest, k, zone, rng, 0.29, 0.36)


def paint_nodule(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """About one patch of 1/8 of the field across."""
    paint_ball(canvas, chest, k, zone, rng, 0.175, 0.20)


def paint_pneumonia(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A hazy lower lobe in which the air-filled bronchi stay dark."""
    side = chest.sides[k]
    haze = canvas.soft(
        ellipsoid(canvas.p, side.place(LOWER, 0.6), (0.36, 0.30)) + 0.05 * ripple(canvas.p, rng, 0.3), 0.16
    )
    hub = np.array(side.hilum)
    aims = rng.uniform(-0.12, 0.12) + np.array([0.4, 0.85, 1.3])
    course = ((0.1, 0.3), (0.3, 0.15), (0.52, -0.1))  # distance from the hilum, turn off the aim
    paths = [
        [hub + reach * np.array([side.sign * np.cos(a + turn), np.sin(a + turn)]) for reach, turn in course]
        for a in aims
    ]
    bronchi = canvas.soft(
        np.minimum.reduce([tube(canvas.p, path, [0.028, 0.022, 0.012]) for path in paths]), 0.03
    )
    canvas.fill(k, haze * (1 - 0.7 * bronchi), rng.uniform(0.55, 0.7))
    canvas.vessels[k] = canvas.vessels[k] * (1 - 0.8 * haze)


def paint_pneumothorax(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A rim of free air without vessels, wider over the apex, bounded by the thin line of the lung's edge."""
    side = chest.sides[k]
    gap = rng.uniform(0.11, 0.17)
    rim = canvas.soft(-canvas.wall[k] - gap, 0.02) * canvas.lung[k]
    canvas.vessels[k] = canvas.vessels[k] * (1 - rim)
    # The collapsing lung is denser than before; around it there is nothing but air.
    canvas.air[k] = 0.88 * canvas.air[k] * (1 - rim) + np.float32(0.96 * side.air) * rim
    line = np.exp(-(((canvas.wall[k] + gap) / max(0.014, canvas.edge / 1.6)) ** 2))
    canvas.vessels[k] += line * canvas.lung[k] * canvas.soft(0.3 * side.width - canvas.p[0] * side.sign, 0.1)


def paint_consolidation(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A dense lobe that ends sharply at its fissure."""
    side = chest.sides[k]
    level = side.place(zone)[1] + (0.14 if zone == UPPER else -0.16) + rng.uniform(-0.04, 0.04)
    fissure = (
        canvas.p[1]
        - level
        - side.sign * rng.uniform(0.05, 0.25) * (canvas.p[0] - side.sign * 0.5 * side.width)
    )
    lobe = canvas.soft(fissure if zone == UPPER else -fissure, 0.025)
    canvas.fill(k, lobe, rng.uniform(0.6, 0.75))
    canvas.vessels[k] = canvas.vessels[k] * (1 - lobe)


def paint_edema(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """Bat wings: haze around both hila that leaves the periphery free."""
    share = rng.uniform(0.36, 0.5)
    for k, side in enumerate(chest.sides):
        centre = np.array(side.hilum) + (side.sign * 0.10, 0.0)
        wing = ellipsoid(canvas.p, centre, (0.26, 0.36)) + 0.05 * ripple(canvas.p, rng, 0.2)
        canvas.fill(k, canvas.soft(wing, 0.20), share)


def paint_fibrosis(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A net of fine lines at both bases and along the periphery."""
    x, y = canvas.p
    bend = 0.03 * ripple(canvas.p, rng, 0.3)
    pitch = rng.uniform(0.105, 0.125)
    net = sum(
        np.cos(np.pi * (x * np.cos(a) + y * np.sin(a) + bend) / pitch) ** 8
        for a in rng.uniform(0, 0.5) + np.array([0, 1.05, 2.1])
    )
    for k, side in enumerate(chest.sides):
        base = canvas.soft(side.dome - 0.30 - y, 0.25)
        rim = canvas.soft(-canvas.wall[k] - 0.14, 0.12)
        canvas.vessels[k] += 0.9 * np.minimum(net, 1.2) * np.maximum(base, 0.7 * rim) * canvas.lung[k]


def paint_pleura(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """A white band along the lateral wall, over the apex too in some."""
    side = chest.sides[k]
    start, end = side.top + rng.uniform(0, 0.3), side.dome - rng.uniform(0.05, 0.25)
    x, y = canvas.p
    extent = (
        canvas.soft(start - y, 0.1)
        * canvas.soft(y - end, 0.1)
        * canvas.soft(0.3 * side.width - x * side.sign, 0.1)
    )
    band = canvas.soft(-canvas.wall[k] - rng.uniform(0.075, 0.10) - 0.015 * ripple(canvas.p, rng, 0.25), 0.03)
    canvas.fill(k, band * extent, rng.uniform(0.75, 0.9))


def paint_hernia(canvas: Canvas, chest: Chest, k: int, zone: int, rng: np.random.Generator) -> None:
    """Stomach behind the heart: a round wall, gas above and fluid below a level."""
    x, y = canvas.p
    radius = rng.uniform(0.15, 0.18)
    cy = (chest.sides[0].dome + chest.sides[1].dome) / 2 - 0.10
    ball = ellipsoid(canvas.p, (chest.shift + rng.uniform(0.06, 0.12), cy), (1.1 * radius, radius))
    gas = canvas.soft(y - cy - rng.uniform(-0.03, 0.03), 0.02)
    canvas.extra += canvas.soft(ball, 0.03) * (0.08 - 0.46 * gas) + 0.10 * np.exp(-((ball / 0.025) ** 2))


RESHAPE = {
    "Atelectasis": reshape_atelectasis,
    "Cardiomegaly": reshape_cardiomegaly,
    "Edema": reshape_edema,
    "Emphysema": reshape_emphysema,
}
# Painted in this order: free air clears the haze under it, while solid lesions, fluid and pleura lie over the
# air.
PAINT = {
    "Atelectasis": paint_atelectasis,
    "Infiltration": paint_infiltration,
    "Pneumonia": paint_pneumonia,
    "Consolidation": paint_consolidation,
    "Edema": paint_edema,
    "Fibrosis": paint_fibrosis,
    "Pneumothorax": paint_pneumothorax,
    "Mass": paint_mass,
    "Nodule": paint_nodule,
    "Effusion": paint_effusion,
    "Pleural_Thickening": paint_pleura,
    "Hernia": paint_hernia,
}


def draw_findings(patient_rng: np.random.Generator, rng: np.random.Generator) -> dict[str, tuple[int, int]]:
    """The findings of one visit, each with its (side, zone). One that finds all its zones taken is dropped:
    it would not show.
    """
    disease = patient_rng.standard_normal(3)
    sick, draws = rng.random() < 0.7, rng.random(len(FINDINGS))
    free = [divmod(int(spot), 3) for spot in rng.permutation(6)]
    found = {}
    for name, draw in zip(FINDINGS, draws):
        odds, weights, zones = PROFILE[name]
        if sick and draw < 1 / (1 + np.exp(-odds - np.dot(weights, disease))):
            spot = next((spot for spot in free if spot[1] in zones), None)
            if spot is not None:
                free.remove(spot)
                found[name] = spot
            elif not zones:  # it takes both sides or the middle
                found[name] = (0, MIDDLE)
    return found


def pose_grid(pixels: int, rng: np.random.Generator) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Patient coordinates of the pixels, two (H, W) float32 arrays, and the size of a pixel in patient
    units."""
    scale, turn = (
        rng.uniform(0.75, 1.1) * 1.1,
        rng.uniform(-0.15, 0.15),
    )  # at 0.75..1.1 of its size the thorax fills the film
    # Up to 12 % of a field that is 2 wide; less for a large thorax, whose costophrenic angles must stay on
    # the film.
    shift = rng.uniform(-1, 1, 2) * np.clip(1.05 - 0.80 * scale, 0.08, 0.24) + (0, 0.06)
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) * np.float32(2 / pixels) - 1
    x, y = (
        (axis[None] - np.float32(shift[0])) / np.float32(scale),
        (axis[:, None] - np.float32(shift[1])) / np.float32(scale),
    )
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return (cos * x + sin * y, cos * y - sin * x), 2 / pixels / scale


def attenuation(chest: Chest, canvas: Canvas) -> np.ndarray:
    """Everything along the beam, (H, W) in chest thicknesses."""
    x, y = canvas.p
    left = chest.sides[1]
    heart = heart_map(chest, canvas)
    solid = np.maximum(heart, mediastinum_map(chest, canvas))
    total = body_map(chest, canvas) + bone_map(chest, canvas) + 0.05 * heart + canvas.extra
    for air, vessels in zip(canvas.air, canvas.vessels):
        total = total - AIR * air * (1 - 0.8 * solid) + 0.16 * vessels * (1 - 0.8 * solid)
    top = chest.sides[0].top
    trachea = [(0.3 * chest.shift, top - 0.25), (chest.shift, top + 0.48)]
    bronchi = [trachea[1], (chest.shift + 0.13, top + 0.62)], [trachea[1], (chest.shift - 0.12, top + 0.60)]
    airway = np.minimum.reduce(
        [tube(canvas.p, trachea, 0.04), *(tube(canvas.p, b, [0.035, 0.025]) for b in bronchi)]
    )
    bubble = ellipsoid(
        canvas.p, (0.5 * left.width, left.dome + 0.17), (0.17, 0.085 + 0.02 * chest.body.fat), power=2.5
    )
    return total - 0.13 * canvas.soft(airway, 0.03) - 0.30 * canvas.soft(bubble, 0.04) * (y > left.dome)


def patient_latents(seed: int, patient: int) -> tuple[float, ...]:
    """The patient's own numbers, which every structure follows at context 1."""
    return astuple(Latents.draw(case_rng(seed, patient, 0)))


def make_case(
    seed: int, patient: int, visit: int, size: str = "demo", context: float = 1.0, clean: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One radiograph, uint8 (H, W) with rows from the top, and its findings in the order of FINDINGS.

    `context` is the share of structures that follow the patient's latents; `clean` leaves the film grain out.
    """
    rng = case_rng(seed, patient, 100 + visit)
    chest = build_chest(seed, patient, rng, context)
    found = draw_findings(case_rng(seed, patient, 50), rng)
    p, pixel = pose_grid(SIZES[size], rng)
    for name in (n for n in found if n in RESHAPE):
        RESHAPE[name](chest, *found[name], rng)
    canvas = open_canvas(chest, p, pixel)
    for name in (n for n in PAINT if n in found):
        PAINT[name](canvas, chest, *found[name], rng)
    gain, offset = rng.uniform(0.88, 1.12), rng.uniform(-0.06, 0.06)
    total = attenuation(chest, canvas)
    film = 1 / (1 + np.exp(-4.3 * (gain * total - 0.62 + offset)))
    floor = 1 / (1 + np.exp(4.3 * (0.62 - offset)))  # bare film is black whatever the exposure
    grey = 255 * (film - floor) / (1 - floor)
    if not clean:
        grey = grey + rng.uniform(1, 2) * rng.standard_normal(grey.shape, dtype=np.float32)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8), tuple(found)


def write(
    out: Path, n: int, seed: int, size: str = "demo", context: float = 1.0, clean: bool = False
) -> list[Path]:
    """Write `n` radiographs, the table and the two lists as NIH ships them; returns the paths of the
    images."""
    out = Path(out)
    paths, rows, lists = [], [HEADER], {"train_val_list.txt": [], "test_list.txt": []}
    folders, patient = min(n, 4), 0
    while len(paths) < n:
        patient += 1
        rng = case_rng(seed, patient, 51)
        visits, age = int(rng.integers(1, 4)), int(rng.integers(20, 85))
        sex = "F" if Latents.draw(case_rng(seed, patient, 0)).breast > 0 else "M"
        subset = lists["test_list.txt" if patient % 10 in (3, 6, 9) else "train_val_list.txt"]
        for visit in range(min(visits, n - len(paths))):
            image, found = make_case(seed, patient, visit, size, context, clean)
            path = (
                out
                / f"images_{1 + len(paths) * folders // n:03d}"
                / "images"
                / f"{patient:08d}_{visit:03d}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image)
            # The real set holds some RGBA files: about one image in 40 here, one patient in 20 with two
            # images each.
            (picture.convert("RGBA") if visit == 0 and patient % 20 == 7 else picture).save(path)
            rows.append(
                f"{path.name},{'|'.join(found) or 'No Finding'},{visit},{patient},{age},{sex},PA,2048,2048,0.168,0.168,"
            )
            subset.append(path.name)
            paths.append(path)
    (out / "Data_Entry_2017.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name, names in lists.items():
        (out / name).write_text("".join(f"{file}\n" for file in names), encoding="utf-8")
    return paths
