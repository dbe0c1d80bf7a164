"""Frontal (PA) chest radiographs in the layout of NIH ChestX-ray14: the patient's right is on the left.

Coordinates are patient units: x grows to the image's right (the patient's left), y downwards. The field of
view spans -1..1 at scale 1; the midline is x = 0. Side 0 is the patient's right (sign -1), side 1 the left
(sign +1). A picture is a sum of soft attenuation maps, put through a film curve; their unit is one chest
thickness of soft tissue.
"""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
from PIL import Image

from smae_utils.phantoms.shapes import case_rng, ellipsoid, tube
from smae_utils.phantoms.xray_chest import (
    AIR,
    Canvas,
    Chest,
    Latents,
    body_map,
    bone_map,
    build_chest,
    heart_map,
    mediastinum_map,
    open_canvas,
)
from smae_utils.phantoms.xray_findings import PAINT, RESHAPE, draw_findings

SIZES = {"demo": 96, "full": 1024}
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def pose_grid(pixels: int, rng: np.random.Generator) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Patient coordinates of the pixels, two float32 arrays (H, W), and a pixel's size in these units."""
    # The thorax fills the film at 0.75..1.1 of its size.
    scale, turn = (rng.uniform(0.75, 1.1) * 1.1, rng.uniform(-0.15, 0.15))
    # Up to 12 % of a field 2 wide; less for a large thorax, whose costophrenic angles must stay on it.
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
    """Write `n` radiographs, the table and the two lists as NIH ships them; returns the images' paths."""
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
            # The real set holds some RGBA files; here one patient in 20 has one, about one image in 40.
            (picture.convert("RGBA") if visit == 0 and patient % 20 == 7 else picture).save(path)
            rows.append(
                f"{path.name},{'|'.join(found) or 'No Finding'},{visit},{patient},{age},{sex},"
                "PA,2048,2048,0.168,0.168,"
            )
            subset.append(path.name)
            paths.append(path)
    (out / "Data_Entry_2017.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name, names in lists.items():
        (out / name).write_text("".join(f"{file}\n" for file in names), encoding="utf-8")
    return paths
