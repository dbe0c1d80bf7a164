"""Transforms: label-free pre-training, one normalisation a scan, sides kept, and the way back to the scan's
own grid.
"""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms as mt
from PIL import Image
from scipy import ndimage

from smae_utils.data.batches import read_case
from smae_utils.data.crops import CropByClasses, CropForeground, slab_counts
from smae_utils.data.tasks import get_task
from smae_utils.data.transforms import (
    RandomRadiograph,
    ReadRadiograph,
)
from smae_utils.errors import UserError
from smae_utils.phantoms.shapes import rotation, save_nifti
from smae_utils.work.build import build_augmentation, build_transform
from smae_utils.work.grids import to_scan_grid
from smae_utils.work.metrics import dsc
from smae_utils.work.settings import FinetuneSettings, PretrainSettings

BTCV, BRATS = get_task("btcv"), get_task("brats")
SIZES = {"crop_size": (8, 8, 8), "spacing_mm": (2.0, 2.0, 2.0)}


@pytest.fixture
def mri(tmp_path):
    """A RAS+ MRI of 2 mm with four channels and a border of zeros, so that preparing it moves no voxel:
    (case, array).
    """
    rng = np.random.default_rng(0)
    array = np.zeros((18, 16, 14, 4), np.float32)
    array[3:15, 2:14, 2:12] = rng.normal([100, 200, 50, 400], [10, 30, 5, 90], (12, 12, 10, 4))
    save_nifti(tmp_path / "mri.nii.gz", array, (2, 2, 2))
    return {
        "case": "mri",
        "image": str(tmp_path / "mri.nii.gz"),
        "label": str(tmp_path / "no_such_label.nii.gz"),
    }, array


@pytest.fixture
def ct(tmp_path):
    rng = np.random.default_rng(1)
    array = np.full((14, 14, 14), -1000, np.int16)
    array[1:13, 2:12, 1:13] = rng.integers(-400, 600, (12, 10, 12))
    save_nifti(tmp_path / "ct.nii.gz", array, (2, 2, 2))
    return {
        "case": "ct",
        "image": str(tmp_path / "ct.nii.gz"),
        "label": str(tmp_path / "no_such_label.nii.gz"),
    }, array


def z_scored(array: np.ndarray) -> np.ndarray:
    """(X, Y, Z, C) -> (C, X, Y, Z): each channel by the mean and std of its non-zero voxels, by numpy
    alone."""
    out = []
    for channel in np.moveaxis(array, -1, 0):
        inside = channel != 0
        out.append(np.where(inside, (channel - channel[inside].mean()) / channel[inside].std(), 0))
    return np.stack(out)


def is_part_of(crop: np.ndarray, whole: np.ndarray) -> bool:
    """Whether the crop (C, x, y, z) occurs in the whole (C, X, Y, Z), to rounding."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, crop.shape)[0]
    return bool((np.abs(windows - crop).max(axis=(-4, -3, -2, -1)) < 1e-3).any())


def test_mri_channels_are_standardised_by_their_own_non_zero_voxels(mri):
    case, array = mri
    prepared = read_case(build_transform(BRATS, PretrainSettings(**SIZES), with_label=False), case)[
        "image"
    ].numpy()
    assert np.allclose(prepared, z_scored(array)[:, 3:15, 2:14, 2:12], atol=1e-3)  # cropped to the head


def test_ct_is_clipped_to_the_window_and_mapped_to_0_to_1(ct):
    case, array = ct
    prepared = read_case(build_transform(BTCV, PretrainSettings(**SIZES), with_label=False), case)[
        "image"
    ].numpy()
    expected = (np.clip(array, -175, 250) + 175) / 425
    assert np.allclose(prepared[0], expected[1:13, 2:12, 1:13], atol=1e-4)
    assert prepared.min() == 0 and prepared.max() == 1


def test_pretraining_needs_no_label_file(mri):
    case, _ = mri
    settings = PretrainSettings(**SIZES, crops_per_scan=3)
    prepared = read_case(build_transform(BRATS, settings, with_label=False), case)
    crops = build_augmentation(BRATS, settings)(prepared)
    assert [tuple(c["image"].shape) for c in crops] == [(4, 8, 8, 8)] * 3
    with pytest.raises(UserError, match="no_such_label"):
        read_case(build_transform(BRATS, settings, with_label=True), case)


def test_crops_are_cut_from_the_normalised_scan_and_not_normalised_themselves(mri):
    case, array = mri
    settings = PretrainSettings(**SIZES, crops_per_scan=5, flip_prob=0)
    augment = build_augmentation(BRATS, settings)
    augment.set_random_state(seed=0)
    crops = [
        c["image"].numpy()
        for c in augment(read_case(build_transform(BRATS, settings, with_label=False), case))
    ]
    whole = z_scored(array)
    assert all(is_part_of(crop, whole) for crop in crops)
    assert not is_part_of(crops[0] + 0.1, whole)
    assert len({float(c.sum()) for c in crops}) > 1


def test_finetuning_crops_are_normalised_like_the_whole_scan(mri, tmp_path):
    case, array = mri
    save_nifti(tmp_path / "label.nii.gz", (array[..., 0] > 110).astype(np.uint8) * 3, (2, 2, 2))
    settings = FinetuneSettings(**SIZES, crops_per_scan=4, flip_prob=0, rotate_prob=0, intensity_prob=0)
    prepared = read_case(
        build_transform(BRATS, settings, with_label=True), {**case, "label": str(tmp_path / "label.nii.gz")}
    )
    whole = z_scored(array)
    for crop in build_augmentation(BRATS, settings)(prepared):
        assert is_part_of(crop["image"].numpy(), whole)
        truth = (
            crop["image"].numpy()[0] * array[array[..., 0] != 0][:, 0].std()
            + array[array[..., 0] != 0][:, 0].mean()
        )
        assert np.array_equal(crop["label"].numpy()[0] == 3, (truth > 110) & (crop["image"].numpy()[0] != 0))


def test_a_scan_smaller_than_the_crop_is_padded_with_background(ct):
    case, array = ct
    settings = PretrainSettings(crop_size=(24, 24, 24), spacing_mm=(2.0, 2.0, 2.0), flip_prob=0)
    prepared = read_case(build_transform(BTCV, settings, with_label=False), case)
    image = build_augmentation(BTCV, settings)(prepared)[0]["image"].numpy()
    assert image.shape == (1, 24, 24, 24)
    body = (np.clip(array, -175, 250) + 175) / 425
    assert image.sum() == pytest.approx(body.sum(), rel=1e-4)
    assert (image == 0).sum() == 24**3 - (body > 0).sum()


def landmarks() -> dict:
    """Right kidney (2) at high x, left kidney (3) at low x, aorta (8) at the back, liver (6) on top."""
    label = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    label[0, 6:, 3:5, 3:5], label[0, :2, 3:5, 3:5] = 2, 3
    label[0, 3:5, :2, 3:5], label[0, 3:5, 3:5, 6:] = 8, 6
    return {"case": "landmarks", "image": label.float() / 13, "label": label}


def centre(label: torch.Tensor, value: int) -> np.ndarray:
    return np.argwhere(label[0].numpy() == value).mean(0)


def test_a_sided_task_is_never_flipped_left_right_and_is_flipped_otherwise():
    settings = FinetuneSettings(**SIZES, crops_per_scan=1, flip_prob=1.0, rotate_prob=0, intensity_prob=0)
    for task, sign in ((BTCV, 1), (replace(BTCV, sided=False), -1)):
        augment = build_augmentation(task, settings)
        for seed in range(20):
            augment.set_random_state(seed=seed)
            label = augment(landmarks())[0]["label"]
            assert sign * (centre(label, 2) - centre(label, 3))[0] > 4
            assert centre(label, 6)[2] < centre(label, 8)[2]  # head and foot did change places
            # Front-back is left-right after half a turn.
            assert sign * (centre(label, 8) - centre(label, 6))[1] < 0


def test_a_preset_may_ask_for_mirroring():
    settings = FinetuneSettings(
        **SIZES, crops_per_scan=1, flip_prob=1.0, rotate_prob=0, intensity_prob=0, mirror=True
    )
    label = build_augmentation(BTCV, settings)(landmarks())[0]["label"]
    assert centre(label, 2)[0] < centre(label, 3)[0]


def test_flips_and_quarter_turns_together_never_make_a_mirrored_sided_scan():
    settings = FinetuneSettings(**SIZES, crops_per_scan=1, flip_prob=0.5, rotate_prob=0.5, intensity_prob=0)
    augment = build_augmentation(BTCV, settings)
    for seed in range(150):
        augment.set_random_state(seed=seed)
        label = augment(landmarks())[0]["label"]
        back, top = centre(label, 8), centre(label, 6)
        if back[1] < 2 and top[2] > 5:  # upright, spine at the back: what a real scan looks like
            assert centre(label, 2)[0] > centre(label, 3)[0], f"seed {seed}: the right kidney lies left"


def test_image_and_label_move_together():
    settings = FinetuneSettings(**SIZES, crops_per_scan=1, flip_prob=0.5, rotate_prob=0.5, intensity_prob=0)
    augment, seen = build_augmentation(BRATS, settings), set()
    for seed in range(20):
        augment.set_random_state(seed=seed)
        label = torch.randint(
            0, 4, (1, 8, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        out = augment({"case": "x", "image": label.float().repeat(4, 1, 1, 1), "label": label})[0]
        assert torch.equal(out["image"][2:3].to(torch.uint8), out["label"].to(torch.uint8))
        seen.add(out["label"].numpy().tobytes())
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("nan", "NaN"),
        ("grid", "one grid"),
        ("value", "integers 0 .. 3"),
        ("fraction", "integers 0 .. 3"),
        ("channels", "expects 4"),
    ],
)
def test_a_scan_that_would_train_silently_wrong_is_refused_by_name(what, word, mri, tmp_path):
    case, array = mri
    label = np.zeros(array.shape[:3], np.float32)
    if what == "nan":
        array[5, 5, 5, 1] = np.nan
    elif what == "grid":
        label = label[:-1]
    elif what == "value":
        label[5, 5, 5] = 4
    elif what == "fraction":
        label[5, 5, 5] = 0.5
    else:
        array = array[..., :3]
    case = {"case": "mri", "image": str(tmp_path / "bad.nii.gz"), "label": str(tmp_path / "bad_label.nii.gz")}
    nib.save(nib.Nifti1Image(array, np.diag([2, 2, 2, 1.0])), case["image"])
    nib.save(nib.Nifti1Image(label, np.diag([2, 2, 2, 1.0])), case["label"])
    with pytest.raises(UserError, match=word) as error:
        read_case(build_transform(BRATS, FinetuneSettings(**SIZES), with_label=True), case)
    assert str(tmp_path / "bad") in str(error.value)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PSR", "LPI"])
@pytest.mark.parametrize("tilt", [0.0, 5.0])
def test_a_mask_comes_back_from_the_prepared_grid_to_the_scans_own(axcodes, tilt, tmp_path):
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 36, 30)), indexing="ij")
    ellipsoid = ((x - 22) / 11) ** 2 + ((y - 15) / 8) ** 2 + ((z - 16) / 9) ** 2 < 1
    body = ((x - 20) / 18) ** 2 + ((y - 17) / 15) ** 2 + ((z - 15) / 14) ** 2 < 1
    store = {
        "spacing_mm": (2.0, 2.2, 2.5), "axcodes": axcodes, "origin_mm": (-50, 10, 30),
        "tilt": rotation((np.deg2rad(tilt), 0, 0)) if tilt else None,
    }  # fmt: skip
    case = {"case": "a", "image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    save_nifti(tmp_path / "image.nii.gz", np.where(body, 50, -1000).astype(np.int16), **store)
    save_nifti(tmp_path / "label.nii.gz", ellipsoid.astype(np.uint8), **store)
    stored = nib.load(case["label"])
    truth = np.asarray(stored.dataobj).astype(bool)

    settings = FinetuneSettings(crop_size=(16, 16, 16), spacing_mm=(2.5, 2.0, 2.4))
    label = read_case(build_transform(BTCV, settings, with_label=True), case)["label"]
    image = read_case(build_transform(BTCV, settings, with_label=False), case)["image"]
    assert label.shape == image.shape and label.shape[1:] != truth.shape
    channels = torch.stack([label[0] == 1, label[0] == 0]).as_tensor().float()
    back = to_scan_grid(channels, np.asarray(image.affine), truth.shape, stored.affine)
    assert back.shape == (2, *truth.shape) and dsc((back[0] > 0.5).numpy(), truth) > 0.9
    index = np.indices(truth.shape).reshape(3, -1)  # the same by scipy, voxel by voxel
    place = (
        np.linalg.inv(np.asarray(image.affine)) @ stored.affine @ np.vstack([index, np.ones(index.shape[1])])
    )[:3]
    expected = ndimage.map_coordinates(channels[1].numpy(), place, order=1, mode="grid-constant")
    last = np.array(channels.shape[1:])[:, None] - 1
    inside, outside = ((place >= 0) & (place <= last)).all(0), ((place < -1) | (place > last + 1)).any(0)
    made = back[1].numpy().ravel()
    assert inside.sum() > 10_000 and np.abs(made - expected)[inside].max() < 1e-3 and not made[outside].any()
    # Half precision is for the network, not for where voxels lie.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_scan_grid(channels, np.asarray(image.affine), truth.shape, stored.affine), back)
    # Some planes at a time give the same.
    lower = stored.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 7], [0, 0, 0, 1]])
    part = to_scan_grid(channels, np.asarray(image.affine), (*truth.shape[:2], 5), lower)
    assert torch.allclose(part, back[..., 7:12], atol=1e-4)


def test_what_reaches_the_edge_of_a_scan_is_carried_to_its_last_plane():
    coarse, fine = np.diag([4.0, 4, 4, 1]), np.diag([2.0, 2, 2, 1])
    coarse[:3, 3] = (
        1  # the fields of view are one: voxels of 4 mm have their centres 1 mm further in than those of 2 mm
    )
    back = to_scan_grid(torch.full((1, 5, 5, 5), 0.6), coarse, (10, 10, 10), fine)[0]
    assert torch.allclose(back[1:-1, 1:-1], torch.tensor(0.6), atol=1e-4)
    far = to_scan_grid(torch.full((1, 5, 5, 5), 0.6), coarse, (10, 10, 14), fine)[0]
    assert not far[..., 12:].any()  # and no further


def test_radiograph_crops_are_standardised_by_the_whole_radiograph(tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 200
    Image.fromarray(pixels).save(tmp_path / "half.png")
    read = ReadRadiograph()({"image": str(tmp_path / "half.png")})
    augment = RandomRadiograph((16, 16), 0.5, (0.05, 0.2), "")
    augment.set_random_state(seed=0)
    crops = [augment(read)[0]["image"] for _ in range(40)]
    dark, bright = (0 - pixels.mean()) / pixels.std(), (200 - pixels.mean()) / pixels.std()
    flat = {round(float(c.mean()), 3) for c in crops if float(c.std()) < 1e-4}
    assert flat == {round(dark, 3), round(bright, 3)}  # a crop of one grey value is not moved to zero
    assert all(c.shape == (1, 16, 16) for c in crops)


@pytest.mark.parametrize("policy", ["", "rand-m9-mstd0.5-inc1"])
def test_radiograph_augmentation_follows_its_seed_and_no_global_one(policy, cxr14):
    read = ReadRadiograph()({"image": str(next(cxr14.rglob("*.png")))})
    augment = RandomRadiograph((32, 32), 0.5, (0.3, 1.0), policy)

    def draw(seed: int, world: int) -> torch.Tensor:
        torch.manual_seed(world)
        np.random.seed(world)
        augment.set_random_state(seed=seed)
        return torch.stack([augment(read)[0]["image"] for _ in range(4)])

    assert torch.equal(draw(1, 10), draw(1, 20))
    assert not torch.equal(draw(1, 10), draw(2, 10))


def test_a_2d_image_is_resized_alike_in_training_and_in_prediction(tmp_path):
    from smae_utils.data.transforms import resize

    pixels = np.random.default_rng(0).integers(0, 256, (256, 192), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = np.asarray(image.resize((48, 64), Image.Resampling.BICUBIC), np.float32)
    ours = resize(torch.from_numpy(pixels[None].astype(np.float32)), (64, 48))[0].numpy()
    assert np.abs(ours.clip(0, 255) - theirs).max() <= 1.5  # PIL rounds to whole numbers twice


@pytest.mark.parametrize("shape", [(20, 17, 15), (12, 12, 12), (13, 30, 12)])
def test_crops_around_classes_are_the_ones_that_monai_draws(shape):
    generator = torch.Generator().manual_seed(3)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[0, 2:9, 3:8, 1:7] = torch.randint(0, 4, (7, 5, 6), generator=generator)
    image = torch.rand(1, *shape, generator=generator)
    how = {
        "spatial_size": (12, 12, 12),
        "num_samples": 3,
        "label_key": "label",
        "num_classes": 6,
        "warn": False,
    }
    theirs, ours = (kind(["image", "label"], **how) for kind in (mt.RandCropByLabelClassesd, CropByClasses))
    for seed in range(8):
        for more in ({}, {"class_counts": slab_counts(label)}):
            for kind in (theirs, ours):
                kind.set_random_state(seed)
            wanted = theirs({"image": image, "label": label})
            for a, b in zip(wanted, ours({"image": image, "label": label, **more})):
                assert all(
                    torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in ("image", "label")
                )


@pytest.mark.parametrize("shape", [(20, 17, 15), (12, 12, 12), (13, 30, 12)])
@pytest.mark.parametrize("empty", [False, True])
def test_crops_around_foreground_are_the_ones_that_monai_draws(shape, empty):
    image = torch.zeros(2, *shape)
    if not empty:
        image[1, 5:11, 6:20, 4:9] = 1
        image[0] = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.9).float()
    theirs = mt.RandWeightedCropd("image", w_key="foreground", spatial_size=(12, 12, 12), num_samples=3)
    ours = CropForeground((12, 12, 12), 3)
    weights = (image != 0).any(0, keepdim=True).float()
    for seed in range(8):
        theirs.set_random_state(seed)
        ours.set_random_state(seed)
        wanted = theirs({"image": image, "foreground": weights})
        for a, b in zip(wanted, ours({"image": image})):
            assert torch.equal(torch.as_tensor(a["image"]), b["image"])
