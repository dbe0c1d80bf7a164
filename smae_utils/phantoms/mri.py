"""Brain MRI phantoms, a drop-in for MSD Task01_BrainTumour: the same folders, files, sequences and labels.

Twelve numbers a patient (`Latents`) shape the anatomy and place the tumour. Intensity alone does not find the
tumour: caps around the ventricles are as bright as edema, veins and meningiomas enhance, a cyst is as dark as
necrosis, and a bias field moves all levels. What tells them apart is context: decoys are symmetric or lie in
known places; a tumour has its three layers in one hemisphere and pushes ventricles and midline away.

Coordinates are body mm: x towards the patient's right, y anterior, z superior, the origin in the middle of
the brain. Folds are gratings 15 mm apart, so that even in the smallest brain they are three voxels of 4 mm
apart. The tumour is drawn in scanner mm, else it would shrink with the head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smae_utils.phantoms import mri_head as head
from smae_utils.phantoms.mri_head import TISSUES, Canvas, Latents
from smae_utils.phantoms.mri_tumour import Decoys, Tumour, draw_decoys, draw_tumour, paint_tumour
from smae_utils.phantoms.shapes import (
    case_rng,
    grid_mm,
    rotation,
    save_nifti,
    to_body,
)

AXCODES = ("RAS", "LPS", "LAS", "RPS", "LPI", "PSR")


class Case(NamedTuple):
    """One phantom in RAS+: `image` float32 (X, Y, Z, 4), `label` uint8 (X, Y, Z), and `spacing_mm`."""

    image: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]


def _paint_head(
    canvas: Canvas, still, latents: dict[str, Latents], tumour: Tumour, decoys: Decoys
) -> np.ndarray:
    """Paint a slab whose voxels lie at `still` (x, y, z) in body mm; returns the mask (X, Y, Z) of the brain.

    The skull holds the outline, so it is drawn in place. What is inside is drawn where the tumour pushed it.
    """
    outer = -head.cerebrum(still)
    moved = tumour.displace(still, outer)
    p = (np.abs(moved[0]), *moved[1:])

    def of_side(name: str):
        """A latent, of this or that hemisphere: they differ only where `context` is below 1."""
        right, left = (np.float32(getattr(latents[key], name)) for key in ("right", "left"))
        return right if right == left else np.where(moved[0] > 0, right, left)

    atrophy, fold = of_side("atrophy"), of_side("fold")
    pia, ventricle, deep = (
        head.pia(p, outer, fold),
        head.ventricle(p, 0.5 + 2.2 * of_side("ventricles")),
        head.deep_grey(p),
    )
    sulcus = 1.3 + 0.6 * atrophy  # half its width in mm
    white = pia - sulcus - 3.6
    canvas.paint(white, "grey")
    # Caps sit on the front and back horns.
    tips = np.clip((np.abs(p[1] + 4) - 12) / 14, 0, 1) * np.clip((p[2] + 8) / 8, 0, 1)
    canvas.paint(ventricle - 0.5 - (5.5 + 1.5 * atrophy) * tips, "gliosis")
    canvas.paint(deep, "deep grey")
    canvas.paint(np.minimum(ventricle, pia - sulcus), "csf")
    canvas.paint(head.egg(p, (23, -33, 6), (4.5, 7, 6)), "enhancing")  # choroid plexus

    cerebellum, stem = head.cerebellum(still), head.stem(still)
    canvas.paint(head.cisterns(still), "csf")
    canvas.paint(cerebellum - 2.5, "csf")  # a cleft under the tentorium
    canvas.paint(cerebellum, "grey")
    canvas.paint(
        np.maximum(cerebellum + 6, head.folds((p[0], still[1], 1.3 * still[2]), fold) - 2.2), "white"
    )
    canvas.paint(stem, "white")
    canvas.paint(head.egg(still, (0, -34, -36), (7, 6, 9)), "csf")  # fourth ventricle
    if decoys.scar:
        centre, radius = decoys.scar
        scar = head.egg(moved, centre, (radius, 1.3 * radius, radius))
        canvas.paint(scar - 4, "gliosis")
        canvas.paint(scar, "old fluid")
    if decoys.cyst:
        centre, radius = decoys.cyst
        canvas.paint(head.egg(still, centre, (radius, radius, radius)), "old fluid")
    if decoys.meningioma:
        centre, radius = decoys.meningioma
        canvas.paint(head.egg(still, centre, (radius, radius, radius)), "enhancing")
    canvas.paint(head.veins(p), "vein")

    below = np.minimum(cerebellum, stem) - 3
    inside = np.minimum(outer, below)  # the tumour stays above the tentorium
    paint_tumour(canvas, tumour, still, tumour.side * moved[0], inside, white, np.minimum(ventricle, deep))
    return np.minimum.reduce([-outer, cerebellum, stem, head.cisterns(still)]) < 0


def _draw_latents(rng: np.random.Generator, context: float) -> dict[str, Latents]:
    """Latents of each part: a number is the patient's with probability `context`, else the part's own.

    Both come from the same range.
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
    """Shape in voxels and spacing in mm of a scan.

    It is 192 x 224 x 160 mm at "demo" size, 240 x 240 x 155 mm at "full" size.
    """
    if size == "demo":
        spacing_mm = tuple(round(s, 3) for s in rng.uniform(3.8, 4.2, 3).tolist())
        return tuple(round(extent / s) for extent, s in zip((192, 224, 160), spacing_mm)), spacing_mm
    if size == "full":
        return (240, 240, 155), (1.0, 1.0, 1.0)
    raise ValueError(f"size is 'demo' or 'full', not {size!r}")


def _bias(axes, waves: np.ndarray) -> np.ndarray:
    """A smooth factor 0.8..1.2 (X, Y, Z), as a receive coil makes it.

    `waves` (3, 4) hold a direction in rad a mm, and a phase.
    """
    total = sum(
        np.cos(sum(np.float32(k) * a for k, a in zip(wave, axes)) + np.float32(wave[3])) for wave in waves
    )
    return 1 + np.float32(0.2) * np.tanh(total)


def make_case(seed: int, case: int, size: str = "demo", context: float = 1.0, clean: bool = False) -> Case:
    """The phantom `case` of `seed` in RAS+, with the spacing in mm; the image is 0 outside the brain.

    The image (X, Y, Z, 4) holds FLAIR, T1w, T1gd and T2w, the label is (X, Y, Z).

    Args:
        context: 0..1, the share by which the hemispheres, the ventricles, the tumour and its mass effect
            follow the patient's latents.
        clean: leave the noise out.
    """
    shape, spacing_mm = _draw_grid(case_rng(seed, case, 1), size)
    rng, noise = case_rng(seed, case), case_rng(seed, case, 2)
    latents = _draw_latents(rng, context)
    body = latents["body"]
    tumour = draw_tumour(latents["tumour"], body.scale, rng, context)
    decoys = draw_decoys(latents["decoys"], tumour.side, rng)
    shift_mm = rng.uniform(-12, 12, 3)
    gains = rng.uniform(300, 700, 4).astype(np.float32)
    levels = {
        tissue: np.float32(row) * rng.uniform(0.93, 1.07, 4).astype(np.float32)
        for tissue, row in TISSUES.items()
    }
    # Axes: sequence, wave, (direction, phase).
    waves = rng.uniform(-1, 1, (4, 3, 4)) * (*[2 * np.pi / 200] * 3, np.pi)
    noise_sd = rng.uniform(0.015, 0.02)

    image, label = np.empty((*shape, 4), np.float32), np.empty(shape, np.uint8)
    axes = grid_mm(shape, spacing_mm)
    stretch = np.float32(1 + 0.05 * body.aspect)
    # In slabs: some forty float32 arrays of a full-size scan would take GBs.
    for start in range(0, shape[2], 16):
        slab = slice(start, start + 16)
        part = (*axes[:2], axes[2][..., slab])
        x, y, z = to_body(part, shift_mm, body.angles, body.scale)
        # The brain is bent: its poles lie off the midline, to either side.
        x = x / stretch - np.float32(3 * body.asymmetry) * np.sin(y / 50)
        canvas = Canvas(x.shape, float(np.mean(spacing_mm)), levels)
        mask = _paint_head(canvas, (x, y * stretch, z), latents, tumour, decoys)
        canvas.image *= np.stack([_bias(part, w) for w in waves], -1)
        if not clean:
            canvas.image += noise.standard_normal(canvas.image.shape, np.float32) * np.float32(noise_sd)
        # 0 is kept for the background.
        image[..., slab, :] = np.where(mask[..., None], np.maximum(canvas.image * gains, 1), 0)
        label[..., slab] = canvas.label * mask
    return Case(image, label, spacing_mm)


def write(
    out: Path, n: int, seed: int, size: str = "demo", context: float = 1.0, clean: bool = False
) -> list[Path]:
    """Write `n` cases as the decathlon does, under out/Task01_BrainTumour; returns the images' paths.

    Images are int16 (X, Y, Z, 4); a dataset.json lists them. Storage orientation, origin and, in one case of
    three, a tilt of 2 to 5 degrees differ by case. As in the real download, a junk file of macOS lies there.
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
        "description": "Gliomas segmentation tumour and oedema in on brain images; "
        "phantoms drawn by smae_utils, no patient data",
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
