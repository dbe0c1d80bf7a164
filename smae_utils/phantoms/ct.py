"""Abdominal CT phantoms, a drop-in for the BTCV scans: the same folders, file names, case ids and 13 labels.

Twelve numbers a patient (`Latents`) place, size and texture everything, so what is visible predicts what is
hidden. The pose varies too much for position alone to be a good atlas. Organs that touch share their HU and
texture (liver and spleen; both kidneys; the vessels; stomach, pancreas, esophagus and adrenals): a threshold
does not tell them apart, but their place among others does.

At "demo" size the thin organs (vessels, esophagus, pancreas, gallbladder, adrenals) are exaggerated, the
adrenals far beyond life: each is then about four voxels of 7 mm thick. "full" size draws them a fifth to two
fifths thinner, still generous.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smae_utils.phantoms.ct_anatomy import REMOVABLE, STRUCTURES, TISSUES, Latents, fold
from smae_utils.phantoms.shapes import (
    case_rng,
    coverage,
    ellipsoid,
    grid_mm,
    rotation,
    save_nifti,
    to_body,
)

TRAIN_IDS = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST_IDS = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
AXCODES = ("RAS", "LPS", "LAS", "RPS", "LPI", "PSR")
AIR_HU, FAT_HU = -1000, -105


class Case(NamedTuple):
    """One phantom: `image_hu` int16 and `label` uint8, both (X, Y, Z) in RAS+, and the voxel `spacing_mm`."""

    image_hu: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]


def wave(p, wavelengths: tuple[float, float, float], phase: float) -> np.ndarray:
    """A grating of body coordinates: its phase grows by a turn every `wavelengths` mm along x, y and z.

    A wavelength of inf does not count.
    """
    turns = sum(c * np.float32(1 / w) for c, w in zip(p, wavelengths) if np.isfinite(w))
    return np.cos(np.float32(2 * np.pi) * turns + np.float32(np.pi * phase))


def texture(kind: str, p, distance: np.ndarray, phase: float) -> np.ndarray | float:
    """What a tissue adds to its HU, about -1..1.

    Every wavelength is 3 voxels of 7 mm or more, even in the smallest patient.
    """
    # Bright tubes that run front to back and bend: a row across, a row along.
    if kind == "vessels":
        x, y, z = p
        bent = (x + 7 * np.sin(y / 22), y, z + 7 * np.sin(y / 16 + x / 40))
        both = wave(bent, (32, np.inf, 90), phase) + wave(bent, (-80, np.inf, 32), phase)
        return np.clip(both - 0.7, 0, None)
    # A bright cortex, dark pyramids spaced along the kidney, a dark sinus.
    if kind == "pyramids":
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
        """Body coordinates of every voxel, (x, y, z) in mm, float32; and the same, moved by breathing.

        Breathing moves the upper organs along z.
        """
        if latents not in self._frames:
            shift = (26 * latents.shift_x, 20 * latents.shift_y, 12 * latents.shift_z)
            x, y, z = to_body(
                self.axes, shift, (0.15 * latents.turn_x, 0, 0.35 * latents.turn_z), latents.scale
            )
            stretch = np.float32(1 + 0.07 * latents.aspect)
            # The whole trunk bends to one side.
            x = x / stretch + np.float32(9 * latents.asymmetry) * np.sin(z / 70)
            y = y * stretch
            moved = z - np.float32(11 * latents.breath) / (1 + np.exp(-z / 30))
            self._frames[latents] = (x, y, z), (x, y, moved)
        return self._frames[latents]

    def paint(self, p, distance_of, hu, label: int | None = None) -> None:
        """Cover with `hu` where `distance_of(p)` < 0, with a soft edge a voxel wide.

        `hu` is a number or a function of (p, distance). The distance is first taken on a coarse grid, so that
        the fine one is only worked out in a box around the structure.
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
    """Distance to the body wall under the fat, a cylinder with a waist; `grow_mm` moves it out or in."""
    waist = 1 - 0.06 * np.exp(-(((p[2] + 45) / 50) ** 2))
    return ellipsoid((p[0] / waist, p[1] / waist), (0, 0), (148 + grow_mm, 103 + grow_mm), power=2.4)


def _ribs(p, phase: float) -> np.ndarray:
    """Distance to curved ribs in the body wall, lower in front.

    They end at the costal margin and beside the sternum.
    """
    wall = _outline(p, -9)
    plane = fold(p[2] + 0.45 * p[1], 34, phase) * 0.91
    margin = 0.6 * (-22 + 0.75 * (p[1] - 20 * np.cos(p[0] / 60)) - p[2])
    front = np.minimum(p[1] - 40, 42 - np.abs(p[0]))
    return np.maximum.reduce([np.hypot(wall, plane) - 6.5, margin, front])


def _lungs(p) -> np.ndarray:
    """Distance to the lung bases: inside the ribs, above both diaphragm domes, beside the mediastinum."""
    domes = [ellipsoid(p, (side * 74, 0, low), (66, 88, 82), power=2.2) for side, low in ((1, 18), (-1, 12))]
    middle = ellipsoid(p[:2], (-4, -6), (34, 46))
    # The lungs reach deepest at the back and the sides.
    floor = 10 + 0.5 * np.clip(p[1] + 40, 0, None) + 45 * np.exp(-((p[0] / 40) ** 2))
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
    """Latents of each structure: with probability `context` a number is the patient's, else its own.

    Both come from one range, so `context` changes how much structures say of each other, not their looks.
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
    """Shape in voxels and spacing in mm of a scan: about 280 mm along z at "demo", 335 mm at "full" size."""
    in_plane, between = rng.random(2).tolist()
    if size == "demo":
        pixel, slices = round(6.2 + 0.5 * in_plane, 3), round(6.4 + 1.2 * between, 2)
        return (64, 52, round(280 / slices)), (pixel, pixel, slices)
    if size == "full":
        pixel, slices = round(0.74 + 0.11 * in_plane, 4), round(2.5 + 0.3 * between, 2)
        return (512, 512, round(335 / slices)), (pixel, pixel, slices)
    raise ValueError(f"size is 'demo' or 'full', not {size!r}")


def make_case(seed: int, case: int, size: str = "demo", context: float = 1.0, clean: bool = False) -> Case:
    """The phantom `case` of `seed`: HU and labels (X, Y, Z) in RAS+ with the spacing in mm.

    Args:
        context: 0..1, the share of each structure's place, size and texture that the patient's latents give.
        clean: leave the noise out.
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
    # In slabs: a full-size scan in float32 coordinates would take many GB.
    for start in range(0, shape[2], thick):
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
    """The first `n` BTCV ids, three of the training set to two of the test set; past all 30, from 41 on."""
    train, test = iter(TRAIN_IDS), iter(TEST_IDS)
    official = [next(train if turn in (0, 1, 3) else test) for _ in range(6) for turn in range(5)]
    return (official + list(range(41, 41 + max(n - 30, 0))))[:n]


def write(
    out: Path, n: int, seed: int, size: str = "demo", context: float = 1.0, clean: bool = False
) -> list[Path]:
    """Write `n` cases as BTCV does, under out/RawData/Training; returns the paths of the images.

    Files are img/imgNNNN.nii.gz (int16 HU) and label/labelNNNN.nii.gz. Storage orientation, origin and, in
    one case of three, a tilt of 2 to 5 degrees differ by case.
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
