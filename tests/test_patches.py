"""Patches, masks and positions do the arithmetic they say, checked against loops and NumPy."""

from itertools import product

import numpy as np
import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch.testing import assert_close

from smae_utils.errors import UserError
from smae_utils.method.mae import paste_visible, pixel_mask, sanity_band
from smae_utils.method.masking import mask_noise, split_by_noise, visible_count
from smae_utils.method.patches import (
    as_tuple,
    gather_tokens,
    grid_size,
    patch_statistics,
    patchify,
    sincos_positions,
    unpatchify,
)

CASES = [
    ((8, 8), 4, 1),
    ((6, 12), 3, 4),
    ((8, 6), (2, 3), 3),
    ((4, 4, 4), 2, 1),
    ((4, 6, 8), 2, 4),
    ((4, 6, 5), (2, 3, 5), 3),
]


@pytest.mark.parametrize("size, patch, chans", CASES)
def test_unpatchify_is_the_exact_inverse_of_patchify_both_ways(size, patch, chans):
    image = torch.randn(2, chans, *size)
    grid = grid_size(size, patch)
    patches = patchify(image, patch)
    assert patches.shape == (2, np.prod(grid), np.prod(size) // np.prod(grid) * chans)
    assert torch.equal(unpatchify(patches, patch, grid), image)
    other = torch.randn_like(patches)
    assert torch.equal(patchify(unpatchify(other, patch, grid), patch), other)


@pytest.mark.parametrize("size, patch, chans", CASES)
def test_patches_are_the_slices_of_the_image_in_row_major_order(size, patch, chans):
    image = np.random.default_rng(0).normal(size=(2, chans, *size)).astype(np.float32)
    edges = as_tuple(patch, len(size))
    rows = []
    for place in product(*(range(n // p) for n, p in zip(size, edges))):
        window = tuple(slice(g * p, (g + 1) * p) for g, p in zip(place, edges))
        rows.append(np.moveaxis(image[(slice(None), slice(None), *window)], 1, -1).reshape(2, -1))
    assert np.array_equal(patchify(torch.from_numpy(image), patch).numpy(), np.stack(rows, 1))


def test_pixels_of_a_patch_are_spatial_first_and_channel_last():
    image = torch.tensor([[[0, 1, 2, 3], [10, 11, 12, 13]], [[100, 101, 102, 103], [110, 111, 112, 113]]])[
        None
    ]
    expected = [[0, 100, 1, 101, 10, 110, 11, 111], [2, 102, 3, 103, 12, 112, 13, 113]]
    assert patchify(image, 2)[0].tolist() == expected


def test_an_image_that_does_not_divide_is_an_error_that_names_a_size_that_fits():
    assert grid_size((8, 6, 10), (4, 3, 5)) == (2, 2, 2)
    with pytest.raises(UserError, match=r"\(10, 8\).*\(4, 4\).*\(8, 8\)"):
        grid_size((10, 8), 4)
    with pytest.raises(UserError, match="multiple"):
        patchify(torch.zeros(1, 1, 8, 8, 7), 4)


@pytest.mark.parametrize("bad", [(4, 4, 4), (4,), 0, (4, 0), -2])
def test_a_patch_size_with_the_wrong_number_of_axes_or_below_one_is_an_error(bad):
    with pytest.raises(UserError, match="expected 2 sizes"):
        grid_size((8, 8), bad)


def test_patches_that_do_not_fill_the_grid_are_an_error():
    with pytest.raises(UserError, match="expected 4 patches"):
        unpatchify(torch.zeros(1, 3, 16), 4, (2, 2))
    with pytest.raises(UserError, match="multiple of 16 pixels"):
        unpatchify(torch.zeros(1, 4, 17), 4, (2, 2))


def test_patch_statistics_use_the_biased_variance_plus_1e_6():
    patches = np.random.default_rng(1).normal(3, 0.01, (2, 5, 12))  # a small variance, so that 1e-6 shows
    mean, std = patch_statistics(torch.from_numpy(patches))
    assert mean.shape == std.shape == (2, 5, 1)
    np.testing.assert_allclose(mean.numpy()[..., 0], patches.mean(-1), rtol=1e-12)
    np.testing.assert_allclose(std.numpy()[..., 0], np.sqrt(patches.var(-1) + 1e-6), rtol=1e-12)


def test_a_flat_patch_has_finite_statistics():
    mean, std = patch_statistics(torch.full((1, 1, 8), 5.0))
    assert float(mean) == 5
    assert float(std) == pytest.approx(1e-3)


@pytest.mark.parametrize("length, ratio", [(16, 0.75), (27, 0.6), (10, 0.125), (196, 0.75), (7, 0.5)])
def test_exactly_int_of_the_visible_share_stays_visible(length, ratio):
    visible, hidden, mask = split_by_noise(torch.rand(3, length), ratio)
    keep = int(length * (1 - ratio))
    assert visible_count(length, ratio) == keep
    assert visible.shape == (3, keep) and hidden.shape == (3, length - keep)
    assert mask.sum(1).tolist() == [length - keep] * 3


def test_the_patches_with_the_smallest_noise_stay_visible():
    noise = torch.rand(4, 20)
    visible, hidden, mask = split_by_noise(noise, 0.75)
    for row in range(4):
        order = np.argsort(noise[row].numpy(), kind="stable")
        assert visible[row].tolist() == order[:5].tolist()
        assert hidden[row].tolist() == order[5:].tolist()
        assert torch.nonzero(mask[row] == 0).flatten().tolist() == sorted(order[:5].tolist())


def test_the_same_noise_gives_the_same_mask_also_where_it_ties():
    noise = torch.rand(2, 30)
    assert torch.equal(split_by_noise(noise, 0.5)[2], split_by_noise(noise.clone(), 0.5)[2])
    assert split_by_noise(torch.zeros(1, 8), 0.75)[0].tolist() == [[0, 1]]


def test_the_noise_of_an_image_depends_on_its_seed_and_not_on_its_batch_or_the_global_state():
    together = mask_noise([3, 5, 7], 50)
    torch.manual_seed(123)
    for row, seed in zip(together, [3, 5, 7]):
        assert torch.equal(mask_noise([seed], 50)[0], row)
    assert len({tuple(row.tolist()) for row in together}) == 3
    assert together.min() >= 0 and together.max() < 1


def test_drawing_noise_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mask_noise([1], 10)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "length, ratio", [(16, 0), (16, 1), (16, 1.5), (16, -0.25), (16, 0.99), (3, 0.75), (1, 0.5)]
)
def test_a_mask_ratio_that_leaves_nothing_visible_or_nothing_hidden_is_an_error(length, ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        split_by_noise(torch.rand(2, length), ratio)


def test_gather_tokens_takes_rows_by_index():
    tokens = torch.randn(2, 6, 3)
    index = torch.tensor([[5, 0], [2, 2]])
    expected = np.stack([tokens[b].numpy()[index[b].numpy()] for b in range(2)])
    assert np.array_equal(gather_tokens(tokens, index).numpy(), expected)


def numpy_positions(grid, dim):
    """facebookresearch/mae's 1D formula on each axis in turn, axis 0 first, zeros to fill."""
    share = dim // (2 * len(grid)) * 2
    omega = 1 / 10000 ** (np.arange(share // 2) / (share / 2))
    rows = []
    for place in product(*(range(n) for n in grid)):
        row = [f(place[axis] * w) for axis in range(len(grid)) for f in (np.sin, np.cos) for w in omega]
        rows.append(row + [0.0] * (dim - len(row)))
    return np.array(rows)


@pytest.mark.parametrize(
    "grid, dim",
    [
        ((4, 4), 16),
        ((3, 5), 24),
        ((2, 3, 4), 24),
        ((2, 3, 4), 48),
        ((3, 2), 18),
        ((2, 3, 4), 32),
        ((2, 2, 2), 6),
        ((5,), 7),
    ],
)
def test_positions_follow_the_papers_formula_for_any_grid_and_width(grid, dim):
    table = sincos_positions(grid, dim)
    assert table.shape == (1, np.prod(grid), dim)
    np.testing.assert_allclose(table[0].numpy(), numpy_positions(grid, dim), atol=1e-6)


@pytest.mark.parametrize(
    "ndim, dim, left", [(2, 18, 2), (2, 19, 3), (3, 32, 2), (3, 47, 5), (3, 768, 0), (3, 512, 2)]
)
def test_columns_that_are_left_over_are_zero_and_no_others(ndim, dim, left):
    table = sincos_positions((3,) * ndim, dim)[0]
    used = table.abs().sum(0) > 0
    assert used.tolist() == [True] * (dim - left) + [False] * left


def test_each_axis_fills_its_own_columns_axis_0_first():
    table = sincos_positions((3, 4, 5), 24)[0].reshape(3, 4, 5, 24)
    for axis in range(3):
        share = table[..., 8 * axis : 8 * (axis + 1)]
        for other in {0, 1, 2} - {axis}:
            assert torch.equal(share.select(other, 0), share.select(other, 2))
        assert not torch.allclose(share.select(axis, 0), share.select(axis, 1))


def test_every_patch_has_a_position_of_its_own():
    table = sincos_positions((6, 6, 6), 24)[0]
    assert (torch.cdist(table, table) + torch.eye(len(table))).min() > 1e-2


@pytest.mark.parametrize("grid, dim, monai_axes", [((3, 5), 16, (1, 0)), ((2, 3, 4), 24, (1, 0, 2))])
def test_positions_equal_monais_up_to_the_order_of_the_axes_columns(grid, dim, monai_axes):
    ours = sincos_positions(grid, dim)
    shares = ours.split(dim // len(grid), dim=2)
    theirs = build_sincos_position_embedding(list(grid), dim, len(grid)).detach()
    assert_close(torch.cat([shares[axis] for axis in monai_axes], 2), theirs, atol=1e-5, rtol=0)


def test_the_paper_s_code_puts_the_columns_of_the_width_first_and_these_those_of_axis_0():
    # facebookresearch/mae, util/pos_embed.py: np.meshgrid(grid_w, grid_h), whose first array is the width.
    share = 16 // 2
    omega = 1 / 10000 ** (np.arange(share // 2) / (share / 2))
    width, height = np.meshgrid(np.arange(5.0), np.arange(3.0))
    angles = [np.outer(place.reshape(-1), omega) for place in (width, height)]
    theirs = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    ours = sincos_positions((3, 5), 16)[0].numpy()
    np.testing.assert_allclose(np.concatenate([ours[:, share:], ours[:, :share]], 1), theirs, atol=1e-6)


@pytest.mark.parametrize("size, patch", [((8, 12), 4), ((8, 4, 12), 4)])
def test_masks_and_the_sanity_band_take_one_patch_size_for_all_axes(size, patch):
    image, other = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    grid = grid_size(size, patch)
    mask = split_by_noise(torch.rand(2, int(np.prod(grid))), 0.5)[2]
    each = (patch,) * len(size)
    assert torch.equal(pixel_mask(mask, patch, image.shape), pixel_mask(mask, each, image.shape))
    assert torch.equal(paste_visible(image, other, mask, patch), paste_visible(image, other, mask, each))
    assert sanity_band(image, mask, patch) == sanity_band(image, mask, each)


def test_a_width_too_narrow_for_positions_is_an_error():
    with pytest.raises(UserError, match="at least 6"):
        sincos_positions((2, 2, 2), 5)
