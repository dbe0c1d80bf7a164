"""Metrics equal independent references, and the conventions for what is missing hold."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from sklearn.metrics import roc_auc_score

from smae_utils.errors import UserError
from smae_utils.work.metrics import dsc, hd95_mm, mean_auc


def blob(rng, shape):
    """A union of a few random balls, often touching the border."""
    places = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    balls = [
        np.linalg.norm(places - rng.uniform(0, np.array(shape)), axis=-1) < rng.uniform(2, 4)
        for _ in range(3)
    ]
    return np.any(balls, axis=0)


def surface(mask):
    """The places of the mask's voxels with a face neighbour outside of it (outside of the scan counts)."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis, step in product(range(mask.ndim), (-1, 1)):
        inner &= np.roll(padded, step, axis)
    return np.argwhere(padded & ~inner) - 1


def brute_force_hd95(pred, label, spacing):
    a, b = (surface(mask) * np.array(spacing) for mask in (pred, label))
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


CASES = [
    ((14, 17), (1.0, 1.0)),
    ((14, 17), (0.7, 2.5)),
    ((9, 11, 10), (1.0, 1.0, 1.0)),
    ((9, 11, 10), (0.8, 1.5, 3.0)),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape, spacing", CASES)
def test_hd95_equals_a_brute_force_reference(shape, spacing, seed):
    rng = np.random.default_rng(seed)
    pred, label = blob(rng, shape), blob(rng, shape)
    expected = brute_force_hd95(pred, label, spacing)
    assert expected > 0
    assert hd95_mm(pred, label, spacing) == pytest.approx(expected, abs=1e-4)


def test_hd95_counts_voxels_at_the_border_of_the_scan_as_surface():
    pred, label = np.zeros((2, 6, 5), bool)
    pred[:1], label[:4] = True, True
    # of the label's 14 surface pixels the 5 of row 3 lie 3 rows of 2 mm away; the 95th percentile is among
    # them
    assert hd95_mm(pred, label, (2, 1)) == pytest.approx(6)
    full = np.ones((4, 4, 4), bool)
    assert hd95_mm(full, full, (1, 1, 1)) == 0


def test_hd95_is_zero_for_equal_masks_and_symmetric():
    rng = np.random.default_rng(5)
    pred, label = blob(rng, (12, 12)), blob(rng, (12, 12))
    assert hd95_mm(pred, pred, (1, 2)) == 0
    assert hd95_mm(pred, label, (1, 2)) == hd95_mm(label, pred, (1, 2)) > 0


def test_hd95_is_in_mm_it_scales_with_the_spacing_axis_by_axis():
    rng = np.random.default_rng(6)
    pred, label = blob(rng, (10, 10, 10)), blob(rng, (10, 10, 10))
    assert hd95_mm(pred, label, (2.4, 4.5, 9)) == pytest.approx(
        3 * hd95_mm(pred, label, (0.8, 1.5, 3)), rel=1e-5
    )
    one, moved = np.zeros((2, 8, 8), bool)
    one[2, 2], moved[5, 2] = True, True
    assert hd95_mm(one, moved, (4, 1)) == pytest.approx(12)
    assert hd95_mm(one.T, moved.T, (4, 1)) == pytest.approx(3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(14, 17), (9, 11, 10)])
def test_dsc_equals_monais(shape, seed):
    rng = np.random.default_rng(seed)
    pred, label = blob(rng, shape), blob(rng, shape)
    expected = compute_dice(*(torch.from_numpy(a)[None, None] for a in (pred, label))).item()
    assert 0 < expected < 1
    assert dsc(pred, label) == pytest.approx(expected, abs=1e-6)


def test_dsc_is_one_for_equal_masks_and_zero_for_disjoint_ones():
    one = np.zeros((4, 4), bool)
    one[:2] = True
    assert dsc(one, one) == 1
    assert dsc(one, ~one) == 0


@pytest.mark.parametrize("missed", [True, False], ids=["missed", "predicted though absent"])
def test_a_structure_on_one_side_only_has_dsc_0_and_the_diagonal_in_mm_as_hd95(missed):
    there, empty = np.zeros((3, 4, 6), bool), np.zeros((3, 4, 6), bool)
    there[1, 1, 1] = True
    pair = (empty, there) if missed else (there, empty)
    assert dsc(*pair) == 0
    assert hd95_mm(*pair, (1, 2, 0.5)) == pytest.approx(math.sqrt(3**2 + 8**2 + 3**2))


def test_missing_a_structure_never_scores_better_than_finding_it():
    corner, opposite, empty = np.zeros((3, 5, 6), bool)
    corner[0, 0], opposite[-1, -1] = True, True
    assert hd95_mm(empty, corner, (1, 3)) > hd95_mm(opposite, corner, (1, 3))


def test_a_structure_absent_in_both_is_nan():
    empty = np.zeros((3, 4), bool)
    assert math.isnan(dsc(empty, empty))
    assert math.isnan(hd95_mm(empty, empty, (1, 1)))


@pytest.mark.parametrize(
    "metric", [dsc, lambda pred, label: hd95_mm(pred, label, (1, 1))], ids=["dsc", "hd95_mm"]
)
def test_other_shapes_and_arrays_that_are_not_boolean_are_an_error(metric):
    mask = np.ones((4, 4), bool)
    for pred, label in [
        (mask, mask[:2]),
        (mask, mask[None]),
        (mask.astype(int), mask),
        (mask, mask.astype(np.float32)),
    ]:
        with pytest.raises(UserError, match="boolean"):
            metric(pred, label)


@pytest.mark.parametrize("spacing", [(1,), (1, 1, 1), (1, 0), (1, -2)])
def test_a_spacing_that_is_not_positive_or_not_one_an_axis_is_an_error(spacing):
    mask = np.ones((4, 4), bool)
    with pytest.raises(UserError, match="2 positive voxel sizes"):
        hd95_mm(mask, mask, spacing)


def pair_counting_auc(target, score):
    """The share of (positive, negative) pairs in the right order, ties half."""
    difference = score[target == 1][:, None] - score[target == 0][None]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def test_mean_auc_equals_scikit_learns_macro_average_and_pair_counting():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (40, 5))
    # Rounded, so that scores tie.
    scores = np.round(rng.normal(size=(40, 5)) + targets * np.linspace(0, 2, 5), 1)
    mean, per_class = mean_auc(targets, scores)
    assert mean == pytest.approx(roc_auc_score(targets, scores, average="macro"), abs=1e-12)
    np.testing.assert_allclose(
        per_class, [pair_counting_auc(t, s) for t, s in zip(targets.T, scores.T)], atol=1e-12
    )
    assert len(set(per_class.round(6))) == 5


def test_a_class_with_one_outcome_is_nan_and_left_out_of_the_mean():
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(0, 2, (30, 4)), rng.normal(size=(30, 4))
    targets[:, 1], targets[:, 3] = 0, 1
    mean, per_class = mean_auc(targets, scores)
    assert np.isnan(per_class).tolist() == [False, True, False, True]
    assert mean == pytest.approx(
        roc_auc_score(targets[:, [0, 2]], scores[:, [0, 2]], average="macro"), abs=1e-12
    )


def test_auc_is_nan_where_no_class_can_be_scored():
    mean, per_class = mean_auc(np.zeros((5, 2)), np.random.default_rng(2).normal(size=(5, 2)))
    assert math.isnan(mean) and np.isnan(per_class).all()


@pytest.mark.parametrize("targets, scores", [((5, 2), (5, 3)), ((5, 2), (4, 2)), ((5,), (5,))])
def test_targets_and_scores_of_other_shapes_are_an_error(targets, scores):
    with pytest.raises(UserError, match="one shape"):
        mean_auc(np.zeros(targets), np.zeros(scores))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error(bad):
    scores = np.zeros((4, 2))
    scores[1, 1] = bad
    with pytest.raises(UserError, match="diverged"):
        mean_auc(np.eye(4)[:, :2], scores)
