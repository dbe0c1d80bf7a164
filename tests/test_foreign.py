"""Weights of others come in and ours go out with equal outputs; a pickle that wants to run something is refused and not run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from smae_utils import timm_glue  # noqa: F401 (makes timm importable beside a CPU-only torch)
from smae_utils.errors import UserError
from smae_utils.evaluation import load_finetuned
from smae_utils.export import export
from smae_utils.mae import MaskedAutoencoder
from smae_utils.patches import split_by_noise
from smae_utils.runs import Run
from smae_utils.training import finetune, pretrain
from smae_utils.unetr import UNETR
from smae_utils.vit import ViTClassifier
from smae_utils.weights import load_weights

GOLDEN = Path(__file__).parent / "golden"
EQUAL = {"atol": 2e-5, "rtol": 1e-4}


def quiet(line: str) -> None:
    pass


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random numbers everywhere, so that a tensor that was not handed over shows."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_timm_vit_gives_the_same_logits_here(pool, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    theirs = shaken(
        VisionTransformer(
            img_size=32,
            patch_size=8,
            in_chans=3,
            embed_dim=24,
            depth=3,
            num_heads=2,
            num_classes=5,
            global_pool={"cls": "token", "mean": "avg"}[pool],
        )
    )
    torch.save({"model": theirs.state_dict()}, tmp_path / "timm.pth")
    ours = shaken(ViTClassifier((32, 32), 8, 3, 24, 3, 2, 5, pool=pool))
    report = load_weights(ours, tmp_path / "timm.pth", require="")
    assert report.missing == [] and report.unexpected == []
    image = torch.rand(2, 3, 32, 32)
    assert_close(ours(image), theirs(image), **EQUAL)


@pytest.mark.parametrize(("size", "bias"), [((16, 24, 16), True), ((32, 16), False)])
def test_a_monai_vit_gives_the_same_tokens_and_logits_here(size, bias, tmp_path):
    from monai.networks.nets import ViT

    theirs = shaken(ViT(2, size, 8, 24, 96, 3, 2, classification=True, num_classes=5, spatial_dims=len(size), post_activation=None, qkv_bias=bias))
    save_file(theirs.state_dict(), tmp_path / "monai.safetensors")
    ours = shaken(ViTClassifier(size, 8, 2, 24, 3, 2, 5, norm_eps=1e-5))
    report = load_weights(ours, tmp_path / "monai.safetensors", require="")
    assert report.missing == [] and report.unexpected == []
    image = torch.rand(2, 2, *size)
    assert_close(ours(image), theirs(image)[0], **EQUAL)


def test_a_perceptron_patch_embedding_of_monai_is_the_same_convolution(tmp_path):
    from monai.networks.nets import ViT

    theirs = shaken(ViT(2, (16, 16, 16), 8, 24, 96, 2, 2, proj_type="perceptron", qkv_bias=True))
    save_file(theirs.state_dict(), tmp_path / "monai.safetensors")
    ours = shaken(UNETR((16, 16, 16), 8, 2, 24, 3, 2, 1, 2, norm_eps=1e-5, class_token=False))
    ours.encoder.blocks = ours.encoder.blocks[:2]
    load_weights(ours, tmp_path / "monai.safetensors")
    image = torch.rand(1, 2, 16, 16, 16)
    assert_close(ours.encoder(image)[0], theirs(image)[0], **EQUAL)


def test_a_monai_unetr_gives_the_same_logits_here(tmp_path):
    from monai.networks.nets import UNETR as Theirs

    theirs = shaken(Theirs(1, 3, (32, 32, 32), feature_size=2, hidden_size=24, mlp_dim=96, num_heads=2, qkv_bias=True))
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "monai.pt")
    ours = shaken(UNETR((32, 32, 32), 16, 1, 24, 12, 2, 3, 2, norm_eps=1e-5, class_token=False))
    report = load_weights(ours, tmp_path / "monai.pt", require="")
    assert report.missing == [] and report.unexpected == []
    image = torch.rand(1, 1, 32, 32, 32)
    assert_close(ours(image), theirs(image), **EQUAL)


def test_a_monai_masked_autoencoder_predicts_the_same_patches_here(tmp_path):
    from monai.networks.nets import MaskedAutoEncoderViT

    theirs = shaken(MaskedAutoEncoderViT(1, (16, 16, 16), 8, 24, 96, 3, 2, 0.5, 12, 48, 2, 2, spatial_dims=3, qkv_bias=True))
    save_file(theirs.state_dict(), tmp_path / "monai.safetensors")
    ours = shaken(MaskedAutoencoder((16, 16, 16), 8, 1, 24, 3, 2, 12, 2, 2, mask_ratio=0.5, norm_eps=1e-5))
    report = load_weights(ours, tmp_path / "monai.safetensors", require="")
    assert report.missing == [] and report.unexpected == []
    image, noise = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 8)
    visible = split_by_noise(noise, 0.5)[0]
    theirs._masking = lambda x, masking_ratio=None: (x[:, visible[0]], visible, torch.ones(1, 8, dtype=torch.int))
    assert_close(ours(image, noise).pred, theirs(image)[0], **EQUAL)


@pytest.mark.parametrize("name", ["selfmedmae_mae3d_a", "facebook_mae_a"])
def test_pickled_checkpoints_of_the_authors_and_of_facebook_load_as_their_safetensors_do(name, tmp_path):
    tensors = load_file(GOLDEN / f"{name}.weights.safetensors")
    files = {
        "selfmedmae_mae3d_a": ("a.pth.tar", {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}, "optimizer": {"lr": 1.0}}),
        "facebook_mae_a": ("b.pth", {"model": tensors, "epoch": 3, "args": argparse.Namespace(lr=1e-3, data_path="x")}),
    }
    file, content = files[name]
    torch.save(content, tmp_path / file)
    sizes = {"selfmedmae_mae3d_a": ((16,) * 3, 4, 2, 48, 3, 4, 24, 2, 4), "facebook_mae_a": ((32,) * 2, 8, 3, 48, 3, 4, 32, 2, 4)}[name]
    one, two = (shaken(MaskedAutoencoder(*sizes)) for _ in range(2))
    load_weights(one, tmp_path / file, require="")
    load_weights(two, GOLDEN / f"{name}.weights.safetensors", require="")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize(
    ("more", "part"),
    [({"reg_tokens": 2}, "encoder.reg_token"), ({"pre_norm": True}, "encoder.norm_pre"), ({"init_values": 0.1}, "encoder.blocks.0.ls1.gamma")],
)
def test_a_vit_with_parts_that_this_encoder_lacks_is_refused_by_the_part(more, part, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(img_size=(32, 32), patch_size=8, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=2, **more)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = ViTClassifier((32, 32), 8, 1, 24, 2, 2, 2)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(UserError, match=f"no place for .*{part}"):
        load_weights(ours, tmp_path / "timm.safetensors")
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_weights_made_with_another_epsilon_of_the_norms_say_so(tmp_path):
    from monai.networks.nets import ViT

    from smae_utils.weights import save_weights

    theirs = shaken(ViT(1, (16, 16), 8, 24, 96, 2, 2, classification=True, num_classes=3, spatial_dims=2, post_activation=None, qkv_bias=True))
    save_file(theirs.state_dict(), tmp_path / "monai.safetensors")
    ours, right = (shaken(ViTClassifier((16, 16), 8, 1, 24, 2, 2, 3, norm_eps=eps)) for eps in (1e-6, 1e-5))
    assert "norm_eps=1e-05" in str(load_weights(ours, tmp_path / "monai.safetensors"))
    assert load_weights(right, tmp_path / "monai.safetensors").notes == []
    save_weights(right, tmp_path / "own.safetensors")
    assert len(load_weights(ours, tmp_path / "own.safetensors").notes) == 1
    assert load_weights(right, tmp_path / "own.safetensors").notes == []


class Malicious:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def test_a_pickle_that_wants_to_run_something_is_refused_and_not_run(tmp_path):
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": Malicious(tmp_path / "proof")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth was not loaded: it wants to run .*system"):
        load_weights(ViTClassifier((16, 16), 8, 1, 24, 2, 2, 2), tmp_path / "bad.pth")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None])
def test_damaged_checkpoints_are_refused_in_one_line(content, tmp_path):
    file = tmp_path / "cut.pth"
    torch.save({"model": {"cls_token": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:700] if content is None else content)
    with pytest.raises(UserError, match=r"cut\.pth") as error:
        load_weights(ViTClassifier((16, 16), 8, 1, 24, 2, 2, 2), file)
    assert "\n" not in str(error.value)


def test_an_rgb_vit_adapted_to_grey_sees_a_grey_image_as_it_saw_three_equal_channels(tmp_path):
    source = shaken(ViTClassifier((16, 16), 8, 3, 24, 2, 2, 2))
    save_file(source.encoder.state_dict(), tmp_path / "rgb.safetensors")
    grey = shaken(ViTClassifier((16, 16), 8, 1, 24, 2, 2, 2))
    with pytest.raises(UserError, match="--adapt"):
        load_weights(grey, tmp_path / "rgb.safetensors")
    report = load_weights(grey, tmp_path / "rgb.safetensors", adapt=True)
    assert report.adapted == ["encoder.patch_embed.proj.weight"]
    image = torch.rand(1, 1, 16, 16)
    assert_close(grey.encoder(image)[0], source.encoder(image.repeat(1, 3, 1, 1))[0], **EQUAL)
    four = shaken(ViTClassifier((16, 16), 8, 4, 24, 2, 2, 2))
    load_weights(four, tmp_path / "rgb.safetensors", adapt=True)
    assert four.encoder.patch_embed.proj.weight.shape[1] == 4


def test_a_2d_vit_adapted_to_3d_answers_a_stack_of_equal_slices_as_it_answered_one(tmp_path):
    source = shaken(ViTClassifier((16, 24), 8, 3, 24, 2, 2, 2))
    for name, value in source.encoder.state_dict().items():
        if name.endswith("pos_embed"):
            value.zero_()
    from smae_utils.weights import save_weights

    save_weights(source, tmp_path / "flat.safetensors")
    solid = shaken(UNETR((16, 24, 16), 8, 2, 24, 3, 2, 1, 2))
    solid.encoder.blocks = solid.encoder.blocks[:2]
    load_weights(solid, tmp_path / "flat.safetensors", adapt=True)
    slice_ = torch.rand(1, 2, 16, 24)
    flat = solid.encoder.embed(slice_.unsqueeze(-1).repeat(1, 1, 1, 1, 16)).reshape(2, 3, 2, 24)
    two = shaken(ViTClassifier((16, 24), 8, 2, 24, 2, 2, 2))
    load_weights(two, tmp_path / "flat.safetensors", adapt=True)
    expected = two.encoder.embed(slice_).reshape(2, 3, 24)
    assert_close(flat[:, :, 0], expected, **EQUAL)
    assert_close(flat[:, :, 1], expected, **EQUAL)
    assert_close(solid.encoder.cls_token, source.encoder.cls_token)


def built(folder: Path) -> torch.nn.Module:
    """The model that arguments.json describes, with the exported weights, all of them."""
    arguments = json.loads((folder / "arguments.json").read_text())
    module, name = arguments.pop("constructor").rsplit(".", 1)  # the class itself, not through the package
    model = getattr(importlib.import_module(module), name)(**arguments)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_exported_classifier_gives_the_same_logits_in_timm(pool, cxr14, tiny, bare, tmp_path):
    run = finetune("cxr14", cxr14, tmp_path / "run", preset=bare, overrides={**tiny["cxr14", "finetune"], "pool": pool}, report=quiet)
    theirs, ours = built(export(run.path, "timm", tmp_path / "out")), load_finetuned(run)[0]
    image = torch.rand(2, 1, 32, 32)
    assert_close(theirs(image), ours(image), **EQUAL)


def test_an_exported_classifier_gives_the_same_logits_in_monai(cxr14, tiny, bare, tmp_path):
    overrides = {**tiny["cxr14", "finetune"], "norm_eps": 1e-5, "pool": "cls"}
    run = finetune("cxr14", cxr14, tmp_path / "run", preset=bare, overrides=overrides, report=quiet)
    theirs, ours = built(export(run.path, "monai-vit", tmp_path / "out")), load_finetuned(run)[0]
    image = torch.rand(2, 1, 32, 32)
    assert_close(theirs(image)[0], ours(image), **EQUAL)


def test_an_exported_unetr_gives_the_same_logits_in_monai(brats, tiny, bare, tmp_path):
    fits = {"patch_size": 16, "depth": 12, "class_token": False, "norm_eps": 1e-5, "crop_size": [32, 32, 32], "steps": 1}
    run = finetune("brats", brats, tmp_path / "run", preset=bare, overrides={**tiny["brats", "finetune"], **fits}, report=quiet)
    theirs, ours = built(export(run.path, "monai-unetr", tmp_path / "out")), load_finetuned(run)[0]
    image = torch.rand(1, 4, 32, 32, 32)
    assert_close(theirs(image), ours(image), **EQUAL)


def test_an_exported_encoder_of_a_pretraining_run_gives_the_same_tokens_in_monai(brats, tiny, bare, tmp_path):
    run = pretrain("brats", brats, tmp_path / "run", bare, {**tiny["brats", "pretrain"], "class_token": False, "norm_eps": 1e-5}, report=quiet)
    theirs = built(export(run.path, "monai-vit", tmp_path / "out"))
    ours = UNETR((16, 16, 16), 8, 4, 24, 3, 2, 1, 2, class_token=False, norm_eps=1e-5).eval()
    load_weights(ours, run.path)
    image = torch.rand(1, 4, 16, 16, 16)
    assert_close(theirs(image)[0], ours.encoder(image)[0], **EQUAL)


def test_what_a_target_cannot_hold_is_refused_with_the_settings_that_it_could(brats, cxr14, tiny, bare, tmp_path):
    three = finetune("brats", brats, tmp_path / "three", preset=bare, overrides=tiny["brats", "finetune"], report=quiet)
    two = finetune("cxr14", cxr14, tmp_path / "two", preset=bare, overrides=tiny["cxr14", "finetune"], report=quiet)
    for run, to, words in (
        (three, "monai-unetr", "patch_size=16 depth=12 class_token=false norm_eps=1e-05"), (three, "timm", "2D"), (two, "monai-unetr", "segmentation"),
        (two, "monai-vit", "norm_eps=1e-05"), (two, "keras", "expected one of timm"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            export(run.path, to, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not Run(tmp_path / "out").finished


def test_a_timm_model_by_name_is_taken_from_timm_and_only_when_asked(monkeypatch):
    import timm

    theirs = shaken(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0))
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **how: asked.append((name, how["pretrained"])) or theirs)
    ours = shaken(ViTClassifier((32, 32), 16, 3, 192, 12, 3, 2))
    load_weights(ours, "timm:vit_tiny_patch16_224.augreg_in21k")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True)]
    image = torch.rand(1, 3, 32, 32)
    assert_close(ours.encoder(image)[0][:, 0], theirs(image), **EQUAL)


@pytest.mark.parametrize(
    ("name", "words"), [("vit_huge_patch99", "did you mean"), ("vit_tiny_patch16_224.augreg_in21k", "could not get the weights")]
)
def test_a_timm_name_that_cannot_be_had_is_one_line(name, words, monkeypatch):
    import timm

    def offline(*args, **how):
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=words) as error:
        load_weights(ViTClassifier((32, 32), 16, 3, 192, 2, 3, 2), f"timm:{name}")
    assert "\n" not in str(error.value)
