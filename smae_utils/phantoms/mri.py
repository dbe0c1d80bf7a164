"""Brain MRI phantoms, a drop-in for MSD Task01_BrainTumour: the same folders, file names, dataset.json,
sequences and labels.

Twelve numbers a patient (`Latents`) shape the anatomy and place the tumour. Intensity alone does not find the
tumour: caps around the ventricles are as bright as edema, veins and meningiomas enhance, a cyst is as dark as
necrosis, and a bias field moves all levels.
What tells them apart is context: decoys are symmetric or lie in known places, while a tumour has its three
layers in one hemisphere and pushes the ventricles and the midline away.

Coordinates are body mm: x towards the patient's right, y anterior, z superior, the origin in the middle of
the brain. Folds are gratings 15 mm apart, so that even the smallest brain has them three voxels of 4 mm
apart. The tumour is drawn in scanner mm, else it would shrink with the head.
"""

from __future__ import annotations

import json
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

AXCODES = ("RAS", "LPS", "LAS", "RPS", "LPI", "PSR")
EDEMA, NON_ENHANCING, ENHANCING = 1, 2, 3
WEAK_SHARE = 0.15  # of patients, whose tumour enhances little and on one side only

TISSUES = {  # brightness in FLAIR, T1w, T1gd, T2w, with white matter in T1w as 1
    "csf": (0.14, 0.25, 0.25, 1.00),
    "grey": (0.64, 0.72, 0.75, 0.62),
    "white": (0.52, 1.00, 1.01, 0.44),
    "deep grey": (0.60, 0.82, 0.85, 0.52),
    "vein": (0.22, 0.42, 1.45, 0.20),  # flowing blood is dark but for the contrast medium
    "old fluid": (
        0.46,
        0.42,
        0.44,
        0.94,
    ),  # with protein, so that FLAIR does not darken it: the same as in a tumour
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
        return 0.95 + 0.1 * self.size

    @property
    def angles(self) -> tuple[float, float, float]:
        return 0.15 * self.turn_x, 0.15 * self.turn_y, 0.3 * self.turn_z


class Case(NamedTuple):
    """One phantom: `image` float32 (X, Y, Z, 4) and `label` uint8 (X, Y, Z) in RAS+, and the voxel
    `spacing_mm`.
    """

    image: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]


class Tumour(NamedTuple):
    """Lengths in body mm. `lobes` (3, 4): for core, ring and edema, a direction and a phase that make the
    surface irregular.
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
        return float(np.sign(self.centre[0]))

    def polar(self, p) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance from the centre (mm), directions (3 arrays, length 1), and the radius of the smooth
        ellipsoid that way (mm).
        """
        q = [c - o for c, o in zip(p, self.centre)]
        r = np.sqrt(sum(c**2 for c in q)) + np.float32(1e-3)
        n = [sum(np.float32(self.turn[j, i]) * q[j] for j in range(3)) / r for i in range(3)]
        return r, n, 1 / np.sqrt(sum((c / a) ** 2 for c, a in zip(n, self.radii)))

    def lobe(self, n, which: int) -> np.ndarray:
        """-1..1 by direction, three lumps or so around the tumour."""
        *k, phase = self.lobes[which].tolist()
        return np.sin(sum(np.float32(a) * c for a, c in zip(k, n)) + np.float32(phase))

    def displace(self, p, depth) -> tuple:
        """Where the tissue seen at `p` lay before the tumour grew; tissue at the skull (`depth` 0) and far
        away stays in place.
        """
        r, _, radius = self.polar(p)
        share = (
            self.push * np.exp(-((r / (1.45 * radius)) ** 2)) * (1 - np.exp(-np.clip(depth, 0, None) / 12))
        )
        return tuple(c - share * (c - np.float32(o)) for c, o in zip(p, self.centre))


def _egg(p, centre, radii) -> np.ndarray:
    """As `ellipsoid`, but divided by the slope: mm near the surface in every direction, so that the cortex is
    even.
    """
    q = [c - o for c, o in zip(p, centre)]
    level = np.sqrt(sum((c / r) ** 2 for c, r in zip(q, radii)))
    return (level - 1) * level / (np.sqrt(sum((c / r**2) ** 2 for c, r in zip(q, radii))) + np.float32(1e-6))


def _cerebrum(p) -> np.ndarray:
    """Distance to both hemispheres as one: an ellipsoid, narrower in front, with a flat base, and two
    temporal lobes.
    """
    x, y, z = p
    narrow = np.abs(x) * (1 + 0.0014 * np.clip(y + 10, 0, None))
    base = -20 + 0.0015 * (y - 20) ** 2 - z
    dome = np.maximum(_egg((narrow, y, z), (0, 0, 12), (67, 85, 52)), base)
    return np.minimum(dome, _egg((np.abs(x), y, z), (41, -2, -19), (24, 46, 22)))


def _cerebellum(p) -> np.ndarray:
    return _egg((np.abs(p[0]), p[1], p[2]), (14, -50, -37), (36, 30, 22))


def _stem(p) -> np.ndarray:
    return tube(p, ((0, -10, -8), (0, -14, -28), (0, -23, -60)), (14, 15, 9))


def _cisterns(p) -> np.ndarray:
    """Distance to the CSF around the brain stem and above the pituitary: it fills the gaps between the lobes
    at the base.
    """
    return np.minimum(_egg(p, (0, 6, -22), (22, 18, 12)), _egg(p, (0, -30, -24), (34, 32, 20)))


def _folds(p, phase) -> np.ndarray:
    """Distance in mm to the nearest sheet of a gyroid, three crossed gratings: the sulci, 15 mm apart, as a
    labyrinth.

    `phase` in -1..1, a number or an array, moves the pattern.
    """
    turn = np.float32(2 * np.pi / 42)
    a, b, c = (turn * (axis + 5 * np.sin(other / 19)) for axis, other in zip(p, (p[1], p[2], p[0])))
    a, b, c = a + 3.1 * phase, b - 2.0 * phase, c + 1.3 * phase
    return np.abs(np.sin(a) * np.cos(b) + np.sin(b) * np.cos(c) + np.sin(c) * np.cos(a)) / (1.35 * turn)


def _pia(p, outer, fold_phase) -> np.ndarray:
    """Depth in mm under the surface of the brain, which goes down into sulci, Sylvian fissures and between
    the hemispheres.

    `p` with |x| for x; `outer` is the depth under the smooth outline.
    """
    x, y, z = p
    core = ellipsoid((y, z), (-2, 2), (42, 25))  # corpus callosum and below: here the hemispheres are joined
    depth = np.minimum(outer, np.hypot(x, np.clip(-core, 0, None)))
    sheet, inward, along = (
        0.94 * (z + 4 - 0.3 * np.abs(y - 20)),
        np.clip(36 - x, 0, None),
        np.clip(np.abs(y - 4) - 34, 0, None),
    )
    sylvian = np.sqrt(sheet**2 + inward**2 + along**2)
    sulci = np.hypot(_folds(p, fold_phase), np.clip(depth - 15, 0, None))
    return np.minimum.reduce([depth, sylvian, sulci])


def _ventricle(p, grow_mm) -> np.ndarray:
    """Distance to the lateral and third ventricles; `p` with |x| for x."""
    horns = (
        ((9, 33, 4), (10, 20, 13), (13, -10, 18), (22, -34, 8), (31, -20, -10), (33, 2, -16)),
        ((22, -34, 8), (23, -56, 4)),
    )
    radii = ((5, 6, 6, 7.5, 4, 3), (7, 3))
    lateral = np.minimum.reduce([tube(p, points, radius) for points, radius in zip(horns, radii)]) - grow_mm
    return np.minimum(lateral, ellipsoid(p, (0, -4, 0), (2.5, 15, 11)) - 0.3 * grow_mm)


def _deep_grey(p) -> np.ndarray:
    """Distance to thalamus, caudate and lentiform nucleus; `p` with |x| for x."""
    caudate = tube(p, ((15, 27, 6), (19, 10, 16), (22, -12, 19)), (8, 5, 3))
    return np.minimum.reduce([caudate, _egg(p, (13, -11, 3), (10, 16, 10)), _egg(p, (27, 7, 1), (8, 18, 12))])


def _veins(p) -> np.ndarray:
    """Distance to the sagittal, straight and transverse sinuses and the middle cerebral vessels; `p` with |x|
    for x.
    """
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


class Canvas:
    """One slab being painted: brightness (X, Y, Z, 4) float32 and labels (X, Y, Z) uint8; edges are
    `width_mm` soft.

    `levels` is the table of tissues as it is in this patient.
    """

    def __init__(self, shape, width_mm: float, levels: dict[str, np.ndarray]):
        self.image = np.empty((*shape, 4), np.float32)
        self.image[:] = levels["white"]
        self.levels = levels
        self.label = np.zeros(shape, np.uint8)
        self.width_mm = width_mm

    def paint(self, distance, tissue: str, label: int | None = None) -> None:
        near = distance < 2 * self.width_mm  # beyond, the share is below 0.0004
        under = self.image[near]
        self.image[near] = under + coverage(distance[near], self.width_mm)[:, None] * (
            self.levels[tissue] - under
        )
        if label is not None:
            self.label[distance < 0] = label


def _draw_tumour(own: Latents, scale: float, rng: np.random.Generator, context: float) -> Tumour:
    """A tumour from the latents; `rng` gives what nothing else in the patient depends on. No mass effect at
    `context` 0.
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


def _paint_tumour(canvas: Canvas, tumour: Tumour, p, x_side, outer, white, keep_out) -> None:
    """Edema in white matter, then the enhancing ring, then what it encloses; inside the skull and on one side
    of the midline.

    `x_side` is the distance from the midline into the tumour's hemisphere, `white` that into white matter,
    `keep_out` that from ventricles and deep grey matter.
    """
    r, n, radius = tumour.polar(p)
    radius = radius * (1 + 0.09 * tumour.lobe(n, 0))
    ring = tumour.ring * (1 + 0.1 * tumour.lobe(n, 1))
    if tumour.weak:  # a crescent instead of a ring
        ring = ring * np.clip(1.6 * tumour.lobe(n, 2) - 0.5, 0, 1)
    limit = np.maximum(2.5 - outer, 2 - x_side)
    core = np.maximum(r - radius, limit)
    reach = radius + tumour.edema * (1 + 0.5 * tumour.lobe(n, 2) + 0.3 * np.abs(n[1]))
    spared = -white - 7 * np.exp(
        -np.clip(r - radius, 0, None) / 7
    )  # the cortex stays free of edema but where it touches the tumour
    canvas.paint(np.maximum.reduce([r - reach, spared, -keep_out, limit]), "edema", EDEMA)
    canvas.paint(core, "weakly enhancing" if tumour.weak else "enhancing", ENHANCING)
    canvas.paint(np.maximum(r - radius + ring, limit + 0.7 * ring), "non-enhancing", NON_ENHANCING)


class Decoys(NamedTuple):
    """What looks like tumour and is not, each a centre and a radius in body mm, or nothing."""

    cyst: tuple | None
    scar: tuple | None
    meningioma: tuple | None


def _draw_decoys(own: Latents, side: float, rng: np.random.Generator) -> Decoys:
    """Each in half of the patients: a cyst at a temporal pole and, on the side without the tumour, an old
    scar and a meningioma.

    The scar is fluid in a bright rim. The meningioma enhances as the tumour does, but sits on the skull, is
    solid and has no edema.
    """
    turn = rng.uniform(-0.9, 0.9)
    drawn = (
        ((rng.choice((-1.0, 1.0)) * 43, 33.0, -22.0), 15 + 3 * own.atrophy),
        ((-side * rng.uniform(32, 38), rng.uniform(-45, -20), rng.uniform(18, 32)), 11 + 2 * own.ventricles),
        ((-side * 56 * np.cos(turn), 10 + 62 * np.sin(turn), 24.0), 14 + 3 * own.fold),
    )
    return Decoys(*(decoy if there else None for decoy, there in zip(drawn, rng.random(3) < 0.5)))


def _paint_head(
    canvas: Canvas, still, latents: dict[str, Latents], tumour: Tumour, decoys: Decoys
) -> np.ndarray:
    """Paint a slab whose voxels lie at `still` (x, y, z) in body mm; returns the mask (X, Y, Z) of the brain.

    The skull holds the outline, so it is drawn in place; what is inside is drawn where the tumour has pushed
    it.
    """
    outer = -_cerebrum(still)
    moved = tumour.displace(still, outer)
    p = (np.abs(moved[0]), *moved[1:])

    def of_side(name: str):
        """A latent, of this or that hemisphere: they differ only where `context` is below 1."""
        right, left = (np.float32(getattr(latents[key], name)) for key in ("right", "left"))
        return right if right == left else np.where(moved[0] > 0, right, left)

    atrophy, fold = of_side("atrophy"), of_side("fold")
    pia, ventricle, deep = (
        _pia(p, outer, fold),
        _ventricle(p, 0.5 + 2.2 * of_side("ventricles")),
        _deep_grey(p),
    )
    sulcus = 1.3 + 0.6 * atrophy  # half its width in mm
    white = pia - sulcus - 3.6
    canvas.paint(white, "grey")
    tips = np.clip((np.abs(p[1] + 4) - 12) / 14, 0, 1) * np.clip(
        (p[2] + 8) / 8, 0, 1
    )  # caps sit on the front and back horns
    canvas.paint(ventricle - 0.5 - (5.5 + 1.5 * atrophy) * tips, "gliosis")
    canvas.paint(deep, "deep grey")
    canvas.paint(np.minimum(ventricle, pia - sulcus), "csf")
    canvas.paint(_egg(p, (23, -33, 6), (4.5, 7, 6)), "enhancing")  # choroid plexus

    cerebellum, stem = _cerebellum(still), _stem(still)
    canvas.paint(_cisterns(still), "csf")
    canvas.paint(cerebellum - 2.5, "csf")  # a cleft under the tentorium
    canvas.paint(cerebellum, "grey")
    canvas.paint(np.maximum(cerebellum + 6, _folds((p[0], still[1], 1.3 * still[2]), fold) - 2.2), "white")
    canvas.paint(stem, "white")
    canvas.paint(_egg(still, (0, -34, -36), (7, 6, 9)), "csf")  # fourth ventricle
    if decoys.scar:
        centre, radius = decoys.scar
        scar = _egg(moved, centre, (radius, 1.3 * radius, radius))
        canvas.paint(scar - 4, "gliosis")
        canvas.paint(scar, "old fluid")
    if decoys.cyst:
        centre, radius = decoys.cyst
        canvas.paint(_egg(still, centre, (radius, radius, radius)), "old fluid")
    if decoys.meningioma:
        centre, radius = decoys.meningioma
        canvas.paint(_egg(still, centre, (radius, radius, radius)), "enhancing")
    canvas.paint(_veins(p), "vein")

    below = np.minimum(cerebellum, stem) - 3
    inside = np.minimum(outer, below)  # the tumour stays above the tentorium
    _paint_tumour(canvas, tumour, still, tumour.side * moved[0], inside, white, np.minimum(ventricle, deep))
    return np.minimum.reduce([-outer, cerebellum, stem, _cisterns(still)]) < 0


def _draw_latents(rng: np.random.Generator, context: float) -> dict[str, Latents]:
    """Latents of each part: each number is the patient's with probability `context`, else the part's own
    draw, from the same range.
    """
    patient = rng.uniform(-1, 1, len(Latents._fields))
    drawn = {}
    for name in ("body", "right", "left", "tumour", "decoys"):
        own, coin = rng.uniform(-1, 1, len(patient)), rng.random(len(patient))
        drawn[name] = Latents(*np.where(coin < context, patient, own).tolist())
    return drawn


def patient_latents(seed: int, case: int) -> Latents:
    """The patient's own numbers, which every structure follows at context 1."""
    return _draw_latents(case_rng(seed, case), 1.0)["body"]


def _draw_grid(
    rng: np.random.Generator, size: str
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape in voxels and spacing in mm of a scan: 192 x 224 x 160 mm at "demo" size, 240 x 240 x 155 mm at
    "full" size.
    """
    if size == "demo":
        spacing_mm = tuple(round(s, 3) for s in rng.uniform(3.8, 4.2, 3).tolist())
        return tuple(round(extent / s) for extent, s in zip((192, 224, 160), spacing_mm)), spacing_mm
    if size == "full":
        return (240, 240, 155), (1.0, 1.0, 1.0)
    raise ValueError(f"size is 'demo' or 'full', not {size!r}")


def _bias(axes, waves: np.ndarray) -> np.ndarray:
    """A smooth factor 0.8..1.2 (X, Y, Z), as a receive coil makes it; `waves` (3, 4): direction in rad a mm,
    and phase.
    """
    total = sum(
        np.cos(sum(np.float32(k) * a for k, a in zip(wave, axes)) + np.float32(wave[3])) for wave in waves
    )
    return 1 + np.float32(0.2) * np.tanh(total)


def make_case(seed: int, case: int, size: str = "demo", context: float = 1.0, clean: bool = False) -> Case:
    """The phantom `case` of `seed`, in RAS+ with the spacing in mm: FLAIR, T1w, T1gd and T2w (X, Y, Z, 4) and
    labels (X, Y, Z).

    The image is 0 outside the brain. `clean` leaves out the noise. `context` in 0..1 is the share by which
    the hemispheres, the ventricles, the tumour and its mass effect follow the patient's latents.
    """
    shape, spacing_mm = _draw_grid(case_rng(seed, case, 1), size)
    rng, noise = case_rng(seed, case), case_rng(seed, case, 2)
    latents = _draw_latents(rng, context)
    body = latents["body"]
    tumour = _draw_tumour(latents["tumour"], body.scale, rng, context)
    decoys = _draw_decoys(latents["decoys"], tumour.side, rng)
    shift_mm = rng.uniform(-12, 12, 3)
    gains = rng.uniform(300, 700, 4).astype(np.float32)
    levels = {
        tissue: np.float32(row) * rng.uniform(0.93, 1.07, 4).astype(np.float32)
        for tissue, row in TISSUES.items()
    }
    waves = rng.uniform(-1, 1, (4, 3, 4)) * (
        *[2 * np.pi / 200] * 3,
        np.pi,
    )  # sequence, wave, (direction, phase)
    noise_sd = rng.uniform(0.015, 0.02)

    image, label = np.empty((*shape, 4), np.float32), np.empty(shape, np.uint8)
    axes = grid_mm(shape, spacing_mm)
    stretch = np.float32(1 + 0.05 * body.aspect)
    for start in range(
        0, shape[2], 16
    ):  # in slabs: some forty float32 arrays of a full-size scan would take GBs
        slab = slice(start, start + 16)
        part = (*axes[:2], axes[2][..., slab])
        x, y, z = to_body(part, shift_mm, body.angles, body.scale)
        x = x / stretch - np.float32(3 * body.asymmetry) * np.sin(
            y / 50
        )  # bent: the poles lie off the midline, to either side
        canvas = Canvas(x.shape, float(np.mean(spacing_mm)), levels)
        mask = _paint_head(canvas, (x, y * stretch, z), latents, tumour, decoys)
        canvas.image *= np.stack([_bias(part, w) for w in waves], -1)
        if not clean:
            canvas.image += noise.standard_normal(canvas.image.shape, np.float32) * np.float32(noise_sd)
        image[..., slab, :] = np.where(
            mask[..., None], np.maximum(canvas.image * gains, 1), 0
        )  # 0 is kept for the background
        label[..., slab] = canvas.label * mask
    return Case(image, label, spacing_mm)


def write(
    out: Path, n: int, seed: int, size: str = "demo", context: float = 1.0, clean: bool = False
) -> list[Path]:
    """Write `n` cases as the decathlon does, with a dataset.json, under out/Task01_BrainTumour; returns the
    image paths.

    Images are int16 (X, Y, Z, 4). Storage orientation, origin and, in one case of three, a tilt of 2 to 5
    degrees differ by case. Beside the first image lies a junk file as macOS leaves it in archives, for the
    real download has them too.
    """
    folder = Path(out) / "Task01_BrainTumour"
    paths, training = [], []
    for case in range(1, n + 1):
        phantom = make_case(seed, case, size, context, clean)
        rng = case_rng(seed, case, 3)
        tilt = (
            rotation((np.deg2rad(rng.uniform(2, 5)) * rng.choice((-1, 1)), 0, 0))
            if rng.random() < 1 / 3
            else None
        )
        store = {
            "axcodes": str(rng.choice(AXCODES)),
            "origin_mm": tuple(np.round(rng.uniform(-150, -50, 3), 1)),
            "tilt": tilt,
        }
        name = f"BRATS_{case:03d}.nii.gz"
        paths.append(folder / "imagesTr" / name)
        save_nifti(paths[-1], np.round(phantom.image).astype(np.int16), phantom.spacing_mm, **store)
        save_nifti(folder / "labelsTr" / name, phantom.label, phantom.spacing_mm, **store)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    (folder / "imagesTr" / "._BRATS_001.nii.gz").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    index = {
        "name": "BRATS",
        "description": "Gliomas segmentation tumour and oedema in on brain images; phantoms drawn by smae_utils, no patient data",
        "reference": "https://www.med.upenn.edu/sbia/brats2017.html",
        "licence": "CC-BY-SA 4.0",
        "release": "2.0 04/05/2018",
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": n,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return paths
