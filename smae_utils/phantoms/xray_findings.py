"""The fourteen findings, painted into a chest."""

from __future__ import annotations

import numpy as np

from smae_utils.phantoms.shapes import ellipsoid, tube
from smae_utils.phantoms.xray_chest import LOWER, MIDDLE, PROFILE, UPPER, Canvas, Chest

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
    """Hyperinflation: low flat domes, dark lungs with few vessels, a narrow heart.

    The heart is drawn narrow only where it is not enlarged as well.
    """
    chest.ratio -= 0.08 if chest.ratio < 0.5 else 0.0
    for side in chest.sides:
        side.dome += 0.13
        side.curve *= 0.3
        side.air *= 1.12
        side.vessel_gain *= 0.6


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
    # Distance from the hilum, turn off the aim.
    course = ((0.1, 0.3), (0.3, 0.15), (0.52, -0.1))
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


# Findings that change the anatomy before it is drawn; each takes chest, side index, zone, rng.
RESHAPE = {
    "Atelectasis": reshape_atelectasis,
    "Cardiomegaly": reshape_cardiomegaly,
    "Edema": reshape_edema,
    "Emphysema": reshape_emphysema,
}


# Findings that are painted; each takes canvas, chest, side index, zone, rng. The order is that of painting:
# free air clears the haze under it; solid lesions, fluid and pleura lie over the air.
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
    """The findings of one visit, each with its (side, zone).

    A finding whose zones are all taken is dropped: it would not show.
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
            # It takes both sides or the middle.
            elif not zones:
                found[name] = (0, MIDDLE)
    return found
