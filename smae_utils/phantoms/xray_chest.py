"""A chest as it takes away from X-rays: lungs, heart, mediastinum, body and bones."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from smae_utils.phantoms.shapes import case_rng, coverage, ellipsoid, tube

UPPER, MIDDLE, LOWER = 0, 1, 2


# What a full-depth lung takes away from the attenuation of the chest.
AIR = 0.68


# Finding: log odds in a sick patient; weights of heart failure, infection and chronic lung disease; zones
# that it may take. The weights make realistic pairs (edema with a large heart, fibrosis with thickened
# pleura) without copying a label.
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
        """Latents drawn at random."""
        return cls(*rng.uniform(-1, 1, len(fields(cls))))


@dataclass
class Side:
    """One half of the thorax, in patient units.

    `wall`, `ribs` and `vessels` are the latents that those structures follow.
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
        """Where the vessels leave the mediastinum: a little higher on the left than on the right."""
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
        """Share inside (H, W), 0..1, by signed distance; its edge is `width` wide, if pixels can show it."""
        return coverage(distance, max(width, self.edge))

    def fill(self, side: int, mask: np.ndarray, share: float) -> None:
        """Replace `share` of the air under `mask` by fluid or tissue."""
        self.air[side] = self.air[side] * (1 - share * mask)


def build_chest(seed: int, patient: int, visit_rng: np.random.Generator, context: float) -> Chest:
    """The patient's anatomy; a structure drawn outside `context` follows the latents of somebody else."""
    own = Latents.draw(case_rng(seed, patient, 0))
    # No two breaths are alike.
    own.inspiration = float(np.clip(own.inspiration + visit_rng.uniform(-0.3, 0.3), -1, 1))

    def follow(structure: int) -> Latents:
        rng = case_rng(seed, patient, 1 + structure)
        return own if rng.random() < context else Latents.draw(rng)

    def side(sign: int, first: int) -> Side:
        wall, ribs, vessels = (follow(first + k) for k in range(3))
        width = (0.70 + 0.06 * wall.width) * (1 + 0.05 * sign * wall.yaw)
        top = -0.76 - 0.05 * wall.height
        # The liver holds the right dome up.
        dome = 0.36 + 0.03 * sign + 0.08 * wall.inspiration + 0.04 * wall.height
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
    """Posterior ribs and the steeper, fainter anterior ribs; the thorax's height sets their period."""
    x, y = canvas.p
    period = (0.62 - side.top) / 9.5
    u = np.clip(x * side.sign / side.width, 0, 1.1)
    slope = 0.30 + 0.08 * side.ribs.rib_slope + 0.05 * side.ribs.tilt
    posterior = slope * (u - 0.2) ** 2
    anterior = 0.64 * slope + (0.55 + 0.15 * side.ribs.rib_slope) * np.clip(1 - u, 0, 1) ** 1.2

    def bands(course: np.ndarray, half_width: float) -> np.ndarray:
        phase = (y - side.top - course) / period + 0.5 * side.ribs.rib_phase
        off = np.abs(phase - np.floor(phase) - 0.5) * period - half_width * period
        # The cortex is denser than the marrow.
        return canvas.soft(off, 0.02) * (1 + 0.35 * np.exp(-((off / 0.012) ** 2)))

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
        # Below its widest level the cage runs straight down: an ellipse would pinch the costophrenic angle.
        straight = np.abs(x - side.sign * 0.45 * side.width) - 0.55 * side.width
        wall = np.where(y > base, straight, wall).astype(np.float32)
        lung = (
            canvas.soft(wall, 0.025)
            * canvas.soft(y - diaphragm(side, x), 0.025)
            * canvas.soft(-side.sign * (x - chest.shift), 0.03)
        )
        # The beam meets less lung near the chest wall.
        depth = 0.72 + 0.28 * np.clip(-wall / (0.3 * side.width), 0, 1)
        canvas.wall.append(wall)
        canvas.lung.append(lung)
        canvas.air.append(lung * depth * np.float32(side.air))
        canvas.vessels.append(vessel_map(canvas, side) * lung)
    return canvas


def heart_map(chest: Chest, canvas: Canvas) -> np.ndarray:
    """Heart (0..1): a third right of the midline, two thirds left, its apex down and to the left."""
    width = chest.ratio * sum(side.width for side in chest.sides)
    lean, tall = 0.60, 0.18 + 0.16 * chest.ratio
    # It keeps its width while it leans.
    across = np.sqrt(max((width / 2) ** 2 - (tall * np.sin(lean)) ** 2, 0.01)) / np.cos(lean)
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
    # The trapezius covers the apices.
    shoulder = top - 0.20 + 0.24 * np.clip(np.abs(x) / half - 0.1, 0, 2) ** 0.7
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
        # A turned patient carries the inner ends along with the mediastinum.
        inner = s * 0.07 + chest.shift
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
