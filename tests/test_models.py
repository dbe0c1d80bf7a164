"""The models keep their promises on tiny sizes, and equal timm's and MONAI's where those do the same."""

import copy
import re

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR as MonaiUNETR
from torch import nn
from torch.testing import assert_close

from smae_utils import timm_library  # noqa: F401  (before timm: it mends the import of torchvision)
from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder, paste_visible, pixel_mask, sanity_band
from smae_utils.method.masking import split_by_noise
from smae_utils.method.norms import keep_channels_last
from smae_utils.method.patches import as_tuple, gather_tokens, patchify, sincos_positions, unpatchify
from smae_utils.method.unetr import UNETR
from smae_utils.method.vit import PatchEmbed, ViTClassifier

from timm.layers import Attention  # isort: skip
from timm.models.vision_transformer import VisionTransformer  # isort: skip

SHAPES = [
    ((16, 16), 4, 1),
    ((8, 24), 4, 3),
    ((12, 8), (4, 2), 4),
    ((8, 8, 8), 4, 1),
    ((8, 12, 4), (4, 4, 2), 4),
    ((4, 8, 12), 4, 3),
]
on_all_shapes = pytest.mark.parametrize("size, patch, chans", SHAPES)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def tiny_mae(size=(16, 16), patch=4, chans=1, **more):
    args = {"mask_ratio": 0.6, **more}
    return MaskedAutoencoder(size, patch, chans, 24, 2, 3, 12, 1, 2, **args).eval()


def image_and_noise(model, batch=2):
    encoder = model.encoder
    return torch.randn(batch, encoder.in_chans, *encoder.img_size), torch.rand(
        batch, encoder.pos_embed.shape[1]
    )


def fill(model):
    """Random values everywhere, so that no bias, scale or head is trivially zero or one; positions stay."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "pos_embed" not in name:
                value.copy_(torch.randn_like(value) * 0.2)
    return model


# ---- masked autoencoder


@on_all_shapes
def test_mae_predicts_every_patch_at_any_size_and_number_of_channels(size, patch, chans):
    model = tiny_mae(size, patch, chans)
    image, noise = image_and_noise(model)
    out = model.predict_all(image, noise)
    patches = patchify(image, patch)
    assert out.pred.shape == patches.shape
    assert out.mask.shape == patches.shape[:2]
    assert (out.pred.detach().abs().amax(-1) > 0).all()
    assert model.to_image(image, out.pred).shape == image.shape


@on_all_shapes
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_mean_squared_error_over_hidden_patches_only(size, patch, chans, norm_pix_loss):
    model = tiny_mae(size, patch, chans, norm_pix_loss=norm_pix_loss)
    image, noise = image_and_noise(model)
    out = model.predict_all(image, noise)
    target, pred = patchify(image, patch).numpy().astype(float), out.pred.detach().numpy()
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, keepdims=True) + 1e-6)
    rank = noise.numpy().argsort(1).argsort(1)
    hidden = rank >= int(noise.shape[1] * (1 - 0.6))
    assert float(out.loss.detach()) == pytest.approx(((pred - target) ** 2)[hidden].mean(), abs=1e-5)


@on_all_shapes
def test_training_predicts_the_hidden_patches_as_a_picture_does_and_has_its_loss(size, patch, chans):
    model = tiny_mae(size, patch, chans)
    image, noise = image_and_noise(model)
    with torch.no_grad():
        picture, trained = model.eval().predict_all(image, noise), model.train()(image, noise)
    assert torch.equal(picture.mask, trained.mask) and torch.equal(picture.hidden, trained.hidden)
    assert trained.pred.shape[1] == int(trained.mask[0].sum())
    assert_close(trained.pred, gather_tokens(picture.pred, trained.hidden), atol=1e-5, rtol=0)
    assert torch.equal(torch.zeros_like(trained.mask).scatter(1, trained.hidden, 1.0), trained.mask)
    assert_close(trained.loss, picture.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("train", [False, True])
@on_all_shapes
def test_pixels_of_hidden_patches_do_not_reach_the_prediction_and_visible_ones_do(size, patch, chans, train):
    model = tiny_mae(size, patch, chans).train(train)
    image, noise = image_and_noise(model)
    hidden = pixel_mask(split_by_noise(noise, 0.6)[2], model.patch_size, image.shape)
    with torch.no_grad():
        pred = model(image, noise).pred
        without_hidden = model(torch.where(hidden, torch.full_like(image, 7), image), noise).pred
        without_visible = model(torch.where(hidden, image, torch.full_like(image, 7)), noise).pred
    assert torch.equal(without_hidden, pred)
    assert not torch.allclose(without_visible, pred, atol=1e-2)


def test_the_mask_of_an_image_and_its_prediction_do_not_depend_on_the_batch():
    model = tiny_mae()
    image, noise = image_and_noise(model, batch=3)
    with torch.no_grad():
        together, alone = model(image, noise), model(image[1:2], noise[1:2])
    assert torch.equal(alone.mask[0], together.mask[1])
    assert_close(alone.pred[0], together.pred[1], atol=1e-5, rtol=0)


def test_without_noise_a_mask_is_drawn_that_differs_from_image_to_image():
    model = tiny_mae()
    out = model(torch.randn(4, 1, 16, 16))
    assert out.mask.sum(1).tolist() == [10.0] * 4
    assert len({tuple(row) for row in out.mask.tolist()}) > 1


def test_noise_of_another_shape_is_an_error_that_names_both():
    with pytest.raises(UserError, match=r"\(2, 16\).*\(2, 9\)"):
        tiny_mae()(torch.zeros(2, 1, 16, 16), torch.rand(2, 9))


def test_a_mask_ratio_that_leaves_nothing_is_an_error_when_the_model_is_built():
    for ratio in (0, 1, 0.99):
        with pytest.raises(UserError, match="mask_ratio"):
            tiny_mae(mask_ratio=ratio)


def test_to_image_puts_the_true_patches_back_from_their_own_target():
    for norm_pix_loss in (True, False):
        model = tiny_mae((8, 12, 4), (4, 4, 2), 2, norm_pix_loss=norm_pix_loss)
        image, _ = image_and_noise(model)
        assert_close(model.to_image(image, model.target(model.encoder.cut(image))), image, atol=1e-5, rtol=0)


def test_mae_learns_a_tiny_batch():
    model = tiny_mae().train()
    ramp = torch.linspace(0, 3, 16)
    image = (ramp[:, None] * torch.tensor([1.0, -1.0])[:, None, None] + ramp.sin())[:, None]
    noise = torch.rand(2, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(image, noise).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# ---- what all models share


def build(kind, size=(32, 32), patch=8, chans=1, **more):
    if kind == "mae":
        return tiny_mae(size, patch, chans, **more)
    if kind == "unetr":
        return UNETR(size, patch, chans, 24, 3, 3, 2, feature_size=2, **more).eval()
    return ViTClassifier(size, patch, chans, 24, 2, 3, 5, pool=kind, **more).eval()


KINDS = ["mae", "cls", "mean", "unetr"]


@on_all_shapes
def test_the_patch_embedding_is_the_convolution_whose_weights_it_holds(size, patch, chans):
    embed = PatchEmbed(chans, as_tuple(patch, len(size)), 24)
    image = torch.rand(2, chans, *size)
    own, conv = embed(patchify(image, patch)), embed.proj(image).flatten(2).transpose(1, 2)
    assert_close(own, conv)
    weights = torch.rand_like(conv)
    for a, b in zip(
        *(torch.autograd.grad((out * weights).sum(), list(embed.parameters())) for out in (own, conv))
    ):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bf16_on_a_cpu_is_computed_in_fp32_and_says_what_timms_says(causal, monkeypatch):
    computed = []
    product = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **k: computed.append(q.dtype) or product(q, *a, **k),
    )
    own = timm_library.CpuAttention(24, num_heads=3, qkv_bias=True)
    theirs = Attention(24, num_heads=3, qkv_bias=True)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(2, 9, 24)
    assert_close(own(x, is_causal=causal), theirs(x, is_causal=causal))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = own(x, is_causal=causal)
    assert mixed.dtype == torch.bfloat16 and set(computed) == {torch.float32}
    assert_close(mixed.float(), theirs(x, is_causal=causal), rtol=0, atol=0.02)


@pytest.mark.parametrize("size, chans", [((32, 24), 3), ((16, 24, 16), 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_to_every_trainable_parameter(kind, size, chans):
    model = fill(build(kind, size, 8, chans)).train()
    image = torch.randn(2, chans, *size)
    out = model(image)
    (out.loss if kind == "mae" else out.square().mean()).backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert value.grad is not None and torch.isfinite(value.grad).all() and value.grad.any(), name
        else:
            assert value.grad is None, name


@pytest.mark.parametrize("kind", KINDS)
def test_positions_start_from_one_table_fixed_in_mae_and_learnable_elsewhere(kind):
    model = build(kind, (32, 16), 8)
    table = sincos_positions((4, 2), 24)
    assert torch.equal(model.encoder.pos_embed, table)
    trainable = [p for p in model.parameters() if p.requires_grad]
    out = model.train()(torch.randn(2, 1, 32, 16))
    (out.loss if kind == "mae" else out.square().mean()).backward()
    torch.optim.AdamW(trainable, lr=1e-2).step()
    assert torch.equal(model.encoder.pos_embed, table) == (kind == "mae")
    if kind == "mae":
        assert torch.equal(model.decoder_pos_embed, sincos_positions((4, 2), 12))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_another_size_is_an_error_that_names_both_sizes(kind):
    model = build(kind, (32, 32))
    with pytest.raises(UserError, match=re.escape("(1, 32, 32)") + ".*" + re.escape("(1, 32, 40)")):
        model(torch.zeros(2, 1, 32, 40))
    with pytest.raises(UserError, match=re.escape("(1, 32, 32)") + ".*" + re.escape("(3, 32, 32)")):
        model(torch.zeros(2, 3, 32, 32))


def test_the_models_share_the_encoder_by_parameter_name_and_shape():
    def shapes(kind):
        return {name: p.shape for name, p in build(kind).encoder.named_parameters()}

    depth_two = {name: shape for name, shape in shapes("unetr").items() if not name.startswith("blocks.2.")}
    assert shapes("mae") == shapes("cls") == depth_two
    assert {n: s for n, s in shapes("mae").items() if not n.startswith("norm.")} == shapes("mean")


def test_a_width_that_does_not_divide_into_its_heads_is_an_error():
    with pytest.raises(UserError, match="24 .* num_heads 5"):
        ViTClassifier((16, 16), 8, 1, 24, 1, 5, 2)


def test_a_pool_that_is_unknown_or_has_no_token_is_an_error():
    with pytest.raises(UserError, match="pool"):
        build("max")
    with pytest.raises(UserError, match="class_token"):
        build("cls", class_token=False)


# ---- against timm and MONAI


@pytest.mark.parametrize("pool, global_pool", [("cls", "token"), ("mean", "avg")])
@pytest.mark.parametrize("size, chans", [((32, 32), 3), ((24, 40), 1)])
def test_classifier_equals_timms_vision_transformer(pool, global_pool, size, chans):
    theirs = fill(VisionTransformer(size, 8, chans, 5, global_pool, 24, 2, 3)).eval()
    ours = build(pool, size, 8, chans)
    weights = {f"encoder.{name}": value for name, value in theirs.state_dict().items()}
    for name in [n for n in weights if n.startswith(("encoder.head", "encoder.fc_norm"))]:
        weights[name.removeprefix("encoder.")] = weights.pop(name)
    positions = torch.randn_like(theirs.pos_embed)
    with torch.no_grad():
        theirs.pos_embed.copy_(positions)
    # timm gives the class token a row of the table; here that row is part of the token.
    weights["encoder.pos_embed"] = positions[:, 1:]
    weights["encoder.cls_token"] = weights["encoder.cls_token"] + positions[:, :1]
    ours.load_state_dict(weights, strict=True)
    image = torch.randn(3, chans, *size)
    with torch.no_grad():
        assert_close(ours(image), theirs(image), atol=1e-5, rtol=1e-5)


class TorchViT(torch.nn.Module):
    """MONAI's ViT, which needs einops, in torch's own layers: the same arguments, the same two results."""

    def __init__(
        self,
        in_channels,
        img_size,
        patch_size,
        hidden_size,
        mlp_dim,
        num_layers,
        num_heads,
        spatial_dims,
        **rest,
    ):
        super().__init__()
        conv = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[spatial_dims]
        self.proj = conv(in_channels, hidden_size, patch_size, patch_size)
        self.pos_embed = torch.nn.Parameter(
            torch.randn(1, int(np.prod([n // p for n, p in zip(img_size, patch_size)])), hidden_size)
        )
        layer = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(hidden_size, num_heads, mlp_dim, **layer)
            for _ in range(num_layers)
        )
        self.norm = torch.nn.LayerNorm(hidden_size)

    def forward(self, image):
        x, hidden = self.proj(image).flatten(2).transpose(1, 2) + self.pos_embed, []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        return self.norm(x), hidden


THEIR_NAMES = [
    (r"^vit\.proj\.", "encoder.patch_embed.proj."),
    (r"^vit\.", "encoder."),
    (r"\.self_attn\.in_proj_", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"^encoder1\.", "image_skip."),
    (r"^encoder([234])\.", lambda m: f"skips.{int(m[1]) - 2}."),
    (r"^decoder([2345])\.", lambda m: f"ups.{5 - int(m[1])}."),
]


@pytest.mark.parametrize("size, chans", [((32, 48), 1), ((32, 16, 16), 2)])
def test_unetr_equals_monais_unetr_around_torchs_transformer(monkeypatch, size, chans):
    monkeypatch.setattr("monai.networks.nets.unetr.ViT", TorchViT)
    theirs = fill(
        MonaiUNETR(
            chans, 3, size, feature_size=2, hidden_size=24, mlp_dim=96, num_heads=3, spatial_dims=len(size)
        )
    ).eval()
    ours = UNETR(size, 16, chans, 24, 12, 3, 3, feature_size=2, class_token=False, norm_eps=1e-5).eval()
    weights = {}
    for name, value in theirs.state_dict().items():
        for pattern, new in THEIR_NAMES:
            name = re.sub(pattern, new, name)
        weights[name] = value
    ours.load_state_dict(weights, strict=True)
    image = torch.randn(2, chans, *size)
    with torch.no_grad():
        logits = theirs(image)
        assert logits.std() > 0.05
        assert_close(ours(image), logits, atol=1e-4, rtol=1e-4)


# ---- UNETR


@pytest.mark.parametrize(
    "patch, depth, blocks", [(16, 12, [3, 6, 9]), (8, 12, [4, 8]), (4, 12, [6]), (16, 4, [1, 2, 3])]
)
def test_unetr_takes_its_skips_from_evenly_spaced_blocks(patch, depth, blocks):
    assert UNETR((32, 32), patch, 1, 24, depth, 3, 2, feature_size=2).skip_blocks == blocks


@pytest.mark.parametrize(
    "size, patch", [((32, 48), 16), ((24, 40), 8), ((32, 16, 16), 16), ((16, 24, 8), 8), ((8, 12), 4)]
)
def test_unetr_gives_logits_at_full_resolution(size, patch):
    model = UNETR(size, patch, 2, 24, 4, 3, 5, feature_size=2).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 2, *size))
    assert logits.shape == (1, 5, *size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("patch", [(8, 16), (16, 8), 6, 12, 2])
def test_unetr_with_an_uneven_patch_or_no_power_of_two_is_an_error(patch):
    with pytest.raises(UserError, match="power of two"):
        UNETR((48, 48), patch, 1, 24, 12, 3, 2, feature_size=2)


def test_unetr_with_fewer_blocks_than_stages_is_an_error():
    with pytest.raises(UserError, match="at least 4 blocks"):
        UNETR((32, 32), 16, 1, 24, 3, 3, 2, feature_size=2)


# ---- pictures and the sanity band


@on_all_shapes
def test_paste_visible_keeps_visible_pixels_exactly_and_takes_hidden_ones_from_the_reconstruction(
    size, patch, chans
):
    image, other = torch.randn(2, 2, chans, *size)
    patches, replaced = patchify(image, patch), patchify(other, patch)
    mask = split_by_noise(torch.rand(patches.shape[:2]), 0.6)[2]
    edges = (patch,) * len(size) if isinstance(patch, int) else patch
    pasted = patchify(paste_visible(image, other, mask, edges), patch)
    assert torch.equal(pasted[mask == 0], patches[mask == 0])
    assert torch.equal(pasted[mask == 1], replaced[mask == 1])


@on_all_shapes
def test_pixel_mask_is_the_mask_drawn_on_the_image(size, patch, chans):
    edges = (patch,) * len(size) if isinstance(patch, int) else patch
    grid = [n // p for n, p in zip(size, edges)]
    mask = split_by_noise(torch.rand(2, int(np.prod(grid))), 0.6)[2]
    drawn = unpatchify(mask.unsqueeze(-1).expand(-1, -1, int(np.prod(edges))), patch, grid).bool()
    assert torch.equal(pixel_mask(mask, edges, (2, chans, *size)), drawn)


@on_all_shapes
def test_predicting_the_mean_of_normalised_patches_costs_1(size, patch, chans):
    image = torch.randn(2, chans, *size)
    edges = (patch,) * len(size) if isinstance(patch, int) else patch
    mask = split_by_noise(torch.rand(patchify(image, patch).shape[:2]), 0.6)[2]
    assert sanity_band(image, mask, edges)["patch_mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_copying_a_neighbour_costs_nothing_where_all_patches_are_identical(norm_pix_loss):
    for tile, repeats in [
        (torch.randn(2, 1, 4, 4), (1, 1, 3, 2)),
        (torch.randn(2, 2, 4, 4, 4), (1, 1, 2, 1, 3)),
    ]:
        image = tile.repeat(*repeats)
        mask = split_by_noise(torch.rand(2, 6), 0.6)[2]
        band = sanity_band(image, mask, (4,) * (tile.ndim - 2), norm_pix_loss)
        assert band["nearest_visible"] == 0
        assert band["patch_mean"] > 0.1


def test_the_sanity_band_copies_the_nearest_visible_patch():
    values = torch.tensor([0.0, 1, 5, 20, 30, 100])  # a row of flat patches; 0 and 4 are visible
    image = values.repeat_interleave(2).repeat(2, 1)[None, None]
    mask = torch.tensor([[0.0, 1, 1, 1, 0, 1]])
    band = sanity_band(image, mask, (2, 2), norm_pix_loss=False)
    # patch 1 copies 0, patch 3 and 5 copy 4; patch 2 lies between them and copies either
    fixed = 1 + (20 - 30) ** 2 + (100 - 30) ** 2
    assert band["nearest_visible"] in (pytest.approx((fixed + 5**2) / 4), pytest.approx((fixed + 25**2) / 4))
    assert band["patch_mean"] == 0


def test_the_band_leaves_out_air_as_the_loss_does():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 8, 8)
    image[..., :4] = 0  # air: half of the patches hold one value
    mask = torch.ones(1, 16)
    mask[0, ::5] = 0
    body = sanity_band(image[..., 4:], mask.reshape(1, 4, 4)[:, :, 2:].reshape(1, 8), 2, False)
    assert sanity_band(image, mask, 2, False, air_loss=False)["patch_mean"] == pytest.approx(
        body["patch_mean"]
    )
    assert sanity_band(image, mask, 2, False)["patch_mean"] < body["patch_mean"]


@pytest.mark.parametrize("ndim", [2, 3])
def test_instance_norm_that_keeps_channels_last_is_instance_norm(ndim):
    form = torch.channels_last if ndim == 2 else torch.channels_last_3d
    plain = nn.InstanceNorm2d(5) if ndim == 2 else nn.InstanceNorm3d(5)
    model = nn.Sequential(nn.Sequential(copy.deepcopy(plain)), nn.InstanceNorm3d(5, affine=True))
    keep_channels_last(model)
    assert type(model[0][0]) is not type(plain) and type(model[1]) is nn.InstanceNorm3d
    for fmt in (torch.contiguous_format, form):
        x = (torch.randn(3, 5, *(12,) * ndim) * 2 + 3).to(memory_format=fmt).requires_grad_()
        weight = torch.randn(x.shape)
        one = model[0](x)
        (ours,) = torch.autograd.grad((one * weight).sum(), x)
        other = plain.double()(x.double())
        (theirs,) = torch.autograd.grad((other * weight).sum(), x)
        assert torch.allclose(one.double(), other, atol=1e-5) and torch.allclose(ours, theirs, atol=1e-5)
        assert one.is_contiguous(memory_format=fmt)
