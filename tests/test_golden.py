"""The models give the numbers of the authors' code and of facebookresearch/mae (tests/golden, random weights,
tiny sizes).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.masking import split_by_noise
from smae_utils.method.patches import patchify
from smae_utils.method.unetr import UNETR

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
LOSS = {"atol": 1e-5, "rtol": 0}
REST = {"atol": 1e-4, "rtol": 0}


def golden_io(name):
    return load_file(GOLDEN / f"{name}.io.safetensors")


def mae(name, ndim, size, width, depth, heads):
    """The model of `configs.json` in this package's arguments, all of its tensors loaded."""
    c = CONFIGS[name]
    model = MaskedAutoencoder(
        (c[size],) * ndim,
        c["patch_size"],
        c["in_chans"],
        c[width],
        c[depth],
        c[heads],
        c["decoder_embed_dim"],
        c["decoder_depth"],
        c["decoder_num_heads"],
        mask_ratio=c["mask_ratio"],
    )
    report = load_weights(model, GOLDEN / f"{name}.weights.safetensors", require="")
    assert not report.missing and not report.unexpected and not report.resized
    return model.eval()


@pytest.fixture
def authors_mae():
    return mae(
        "selfmedmae_mae3d_a", 3, "input_size", "encoder_embed_dim", "encoder_depth", "encoder_num_heads"
    ), golden_io("selfmedmae_mae3d_a")


def test_3d_mae_has_the_authors_loss_in_eval_and_in_train_mode(authors_mae):
    model, io = authors_mae
    for mode in (False, True):
        loss = model.train(mode)(io["image"], io["noise"]).loss
        assert_close(loss, io["loss"][0], **LOSS)
        assert float(loss.detach()) == pytest.approx(CONFIGS["selfmedmae_mae3d_a"]["loss"], abs=1e-5)


def test_3d_mae_predicts_the_authors_patches_hidden_and_visible(authors_mae):
    model, io = authors_mae
    assert_close(model.predict_all(io["image"], io["noise"]).pred, io["pred_patches"], **REST)


def test_3d_mae_hides_the_authors_patches_for_their_noise(authors_mae):
    model, io = authors_mae
    assert torch.equal(model(io["image"], io["noise"]).mask, io["mask"])
    assert torch.equal(
        split_by_noise(io["noise"], CONFIGS["selfmedmae_mae3d_a"]["mask_ratio"])[2], io["mask"]
    )


def test_3d_mae_has_the_authors_gradient(authors_mae):
    model, io = authors_mae
    for mode in (False, True):
        model.train(mode).zero_grad()
        model(io["image"], io["noise"]).loss.backward()
        assert_close(model.encoder.blocks[0].attn.qkv.weight.grad.norm(), io["qkv0_grad_norm"][0], **REST)


def test_3d_mae_reconstructs_the_authors_patches_with_their_unbiased_std(authors_mae):
    model, io = authors_mae
    patches = patchify(io["image"], CONFIGS["selfmedmae_mae3d_a"]["patch_size"])
    std = (patches.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    pred = model.predict_all(io["image"], io["noise"]).pred
    assert_close(pred * std + patches.mean(-1, keepdim=True), io["recon_patches"], **REST)


def test_3d_unetr_has_the_authors_logits():
    name = "selfmedmae_unetr3d_a"
    c, io = CONFIGS[name], golden_io(name)
    size = (c["roi_x"], c["roi_y"], c["roi_z"])
    model = UNETR(
        size,
        c["patch_size"],
        c["in_chans"],
        c["encoder_embed_dim"],
        c["encoder_depth"],
        c["encoder_num_heads"],
        c["num_classes"],
        c["feature_size"],
    ).eval()
    report = load_weights(model, GOLDEN / f"{name}.weights.safetensors", require="")
    assert not report.missing and not report.unexpected and not report.resized
    with torch.no_grad():
        logits = model(io["image"])
    assert_close(logits, io["logits"], **REST)
    assert float(logits.abs().mean()) == pytest.approx(c["logits_abs_mean"], abs=1e-4)


def test_2d_mae_has_facebooks_patches_and_mask():
    model, io = (
        mae("facebook_mae_a", 2, "img_size", "embed_dim", "depth", "num_heads"),
        golden_io("facebook_mae_a"),
    )
    out = model.predict_all(io["image"], io["noise"])
    assert_close(out.pred, io["pred_patches"], **REST)
    assert torch.equal(out.mask, io["mask"])
