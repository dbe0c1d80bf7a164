"""Weights of others come in and ours go out with equal outputs; a pickle that wants to run something is
refused and not run.
"""

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

from smae_utils import timm_library  # noqa: F401 (makes timm importable beside a CPU-only torch)
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.masking import split_by_noise
from smae_utils.method.unetr import UNETR
from smae_utils.method.vit import ViTClassifier
from smae_utils.work.export import export
from smae_utils.work.finetune import finetune
from smae_utils.work.pretrain import pretrain
from smae_utils.work.rebuild import load_finetuned
from smae_utils.work.run_folder import Run

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

    theirs = shaken(
        ViT(
            2,
            size,
            8,
            24,
            96,
            3,
            2,
            classification=True,
            num_classes=5,
            spatial_dims=len(size),
            post_activation=None,
            qkv_bias=bias,
        )
    )
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

    theirs = shaken(
        Theirs(1, 3, (32, 32, 32), feature_size=2, hidden_size=24, mlp_dim=96, num_heads=2, qkv_bias=True)
    )
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "monai.pt"
    )
    ours = shaken(UNETR((32, 32, 32), 16, 1, 24, 12, 2, 3, 2, norm_eps=1e-5, class_token=False))
    report = load_weights(ours, tmp_path / "monai.pt", require="")
    assert report.missing == [] and report.unexpected == []
    image = torch.rand(1, 1, 32, 32, 32)
    assert_close(ours(image), theirs(image), **EQUAL)


def test_a_monai_masked_autoencoder_predicts_the_same_patches_here(tmp_path):
    from monai.networks.nets import MaskedAutoEncoderViT

    theirs = shaken(
        MaskedAutoEncoderViT(
            1, (16, 16, 16), 8, 24, 96, 3, 2, 0.5, 12, 48, 2, 2, spatial_dims=3, qkv_bias=True
        )
    )
    save_file(theirs.state_dict(), tmp_path / "monai.safetensors")
    ours = shaken(MaskedAutoencoder((16, 16, 16), 8, 1, 24, 3, 2, 12, 2, 2, mask_ratio=0.5, norm_eps=1e-5))
    report = load_weights(ours, tmp_path / "monai.safetensors", require="")
    assert report.missing == [] and report.unexpected == []
    image, noise = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 8)
    visible = split_by_noise(noise, 0.5)[0]
    theirs._masking = lambda x, masking_ratio=None: (
        x[:, visible[0]],
        visible,
        torch.ones(1, 8, dtype=torch.int),
    )
    assert_close(ours.predict_all(image, noise).pred, theirs(image)[0], **EQUAL)


@pytest.mark.parametrize("name", ["selfmedmae_mae3d_a", "facebook_mae_a"])
def test_pickled_checkpoints_of_the_authors_and_of_facebook_load_as_their_safetensors_do(name, tmp_path):
    tensors = load_file(GOLDEN / f"{name}.weights.safetensors")
    files = {
        "selfmedmae_mae3d_a": (
            "a.pth.tar",
            {
                "epoch": 3,
                "state_dict": {f"module.{k}": v for k, v in tensors.items()},
                "optimizer": {"lr": 1.0},
            },
        ),
        "facebook_mae_a": (
            "b.pth",
            {"model": tensors, "epoch": 3, "args": argparse.Namespace(lr=1e-3, data_path="x")},
        ),
    }
    file, content = files[name]
    torch.save(content, tmp_path / file)
    sizes = {
        "selfmedmae_mae3d_a": ((16,) * 3, 4, 2, 48, 3, 4, 24, 2, 4),
        "facebook_mae_a": ((32,) * 2, 8, 3, 48, 3, 4, 32, 2, 4),
    }[name]
    one, two = (shaken(MaskedAutoencoder(*sizes)) for _ in range(2))
    load_weights(one, tmp_path / file, require="")
    load_weights(two, GOLDEN / f"{name}.weights.safetensors", require="")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"reg_tokens": 2}, "encoder.reg_token"),
        ({"pre_norm": True}, "encoder.norm_pre"),
        ({"init_values": 0.1}, "encoder.blocks.0.ls1.gamma"),
    ],
)
def test_a_vit_with_parts_that_this_encoder_lacks_is_refused_by_the_part(more, part, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(
        img_size=(32, 32), patch_size=8, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=2, **more
    )
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = ViTClassifier((32, 32), 8, 1, 24, 2, 2, 2)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(UserError, match=f"no place for .*{part}"):
        load_weights(ours, tmp_path / "timm.safetensors")
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_weights_made_with_another_epsilon_of_the_norms_say_so(tmp_path):
    from monai.networks.nets import ViT

    from smae_utils.method.checkpoints.save import save_weights

    theirs = shaken(
        ViT(
            1,
            (16, 16),
            8,
            24,
            96,
            2,
            2,
            classification=True,
            num_classes=3,
            spatial_dims=2,
            post_activation=None,
            qkv_bias=True,
        )
    )
    save_file(theirs.state_dict(), tmp_path / "monai.safetensors")
    ours, right = (shaken(ViTClassifier((16, 16), 8, 1, 24, 2, 2, 3, norm_eps=eps)) for eps in (1e-6, 1e-5))
    assert "norm_eps=1e-05" in str(load_weights(ours, tmp_path / "monai.safetensors"))
    assert "norm_eps" not in str(load_weights(right, tmp_path / "monai.safetensors"))
    save_weights(right, tmp_path / "own.safetensors")
    assert len(load_weights(ours, tmp_path / "own.safetensors").notes) == 1
    assert load_weights(right, tmp_path / "own.safetensors").notes == []


def timm_vit(size=(32, 48), chans=1, **more):
    """A small ViT of timm, random in all its tensors."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, **more}
    return shaken(VisionTransformer(img_size=size, in_chans=chans, **sizes))


def same_tokens(theirs, file, size=(32, 48), **tolerance):
    """Load `file` into our ViT of this size and compare all tokens, the class token's too, with timm's."""
    ours = shaken(ViTClassifier(size, 8, 1, 24, 2, 2, 2))
    report = load_weights(ours, file)
    image = torch.rand(2, 1, *size)
    assert_close(ours.encoder(image)[0], theirs.forward_features(image), **(tolerance or EQUAL))
    return report


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (112, 96), (112, 104), (32, 32), (8, 80)], ids=str)
def test_a_timm_vit_of_any_grid_gives_the_same_tokens_here(size, tmp_path):
    # 32 x 48 in patches of 8 has 24 patches, with a class row 25 = 5 x 5; 112 x 96 has 168 and 169 = 13 x 13.
    theirs = timm_vit(size)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert same_tokens(theirs, tmp_path / "timm.pth", size).resized == []


def test_a_timm_vit_whose_class_token_has_no_position_gives_the_same_tokens_here(tmp_path):
    theirs = timm_vit((40, 40), no_embed_class=True)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert "no row for the class token" in str(same_tokens(theirs, tmp_path / "timm.pth", (40, 40)))


def test_positions_of_a_square_timm_vit_are_resized_without_its_class_row(tmp_path):
    theirs = timm_vit((32, 32))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = shaken(ViTClassifier((32, 48), 8, 1, 24, 2, 2, 2))
    assert load_weights(ours, tmp_path / "timm.pth").resized == ["encoder.pos_embed"]
    square = theirs.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, size=(4, 6), mode="bilinear")
    assert_close(ours.encoder.pos_embed, expected.flatten(2).transpose(1, 2), **EQUAL)
    assert_close(ours.encoder.cls_token, theirs.cls_token + theirs.pos_embed[:, :1], **EQUAL)


@pytest.mark.parametrize("size", [(32, 56), (32, 40)], ids=str)
def test_a_table_whose_grid_cannot_be_known_is_refused(size, tmp_path):
    torch.save(timm_vit(size).state_dict(), tmp_path / "timm.pth")
    ours = shaken(ViTClassifier((32, 48), 8, 1, 24, 2, 2, 2))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(UserError, match=r"pos_embed is .*grid cannot be known.*\(4, 6\)"):
        load_weights(ours, tmp_path / "timm.pth")
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: value for name, value in tensors.items()}


NESTINGS = {
    "data parallel": lambda t: under("module.", t),
    "compiled": lambda t: {"model": under("_orig_mod.", t)},
    "compiled and data parallel": lambda t: {"state_dict": under("module._orig_mod.", t)},
    "data parallel and compiled": lambda t: {"model_state_dict": under("_orig_mod.module.", t)},
    "lightning": lambda t: {"state_dict": under("model.", t), "optimizer_states": [], "epoch": 3},
    "encoder of a module": lambda t: {"state_dict": under("model.encoder.", t)},
    "dictionaries in dictionaries": lambda t: {"state_dict": {"model": {"encoder": t}}, "epoch": 1},
    "dictionaries and names": lambda t: {"model": {"module": under("net._orig_mod.backbone.", t)}},
    "compiled blocks": lambda t: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in t.items()
    },
    "with an averaged copy": lambda t: {"model": t, "model_ema": {k: v + 1 for k, v in t.items()}},
    "beside an optimiser": lambda t: {"net": t, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_names_are_found_in_any_nesting(nesting, tmp_path):
    theirs = timm_vit()
    torch.save(NESTINGS[nesting](theirs.state_dict()), tmp_path / "a.ckpt")
    report = same_tokens(theirs, tmp_path / "a.ckpt")
    assert set(report.missing) == {"head.weight", "head.bias"}


def test_our_own_names_and_monais_are_found_in_any_nesting(tmp_path):
    from monai.networks.nets import ViT

    ours = shaken(MaskedAutoencoder((16, 24), 8, 1, 24, 2, 2, 12, 1, 2))
    again = shaken(MaskedAutoencoder((16, 24), 8, 1, 24, 2, 2, 12, 1, 2))
    torch.nn.init.zeros_(again.decoder_pred.weight)
    torch.save({"state_dict": under("model._orig_mod.", ours.state_dict())}, tmp_path / "own.pt")
    report = load_weights(again, tmp_path / "own.pt", require="")
    assert report.unexpected == [] and report.resized == []
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
    monai = shaken(ViT(1, (16, 24), 8, 24, 96, 2, 2, spatial_dims=2, qkv_bias=True))
    save_file(under("module.encoder.", monai.state_dict()), tmp_path / "monai.safetensors")
    plain = shaken(ViTClassifier((16, 24), 8, 1, 24, 2, 2, 2, norm_eps=1e-5, class_token=False, pool="mean"))
    load_weights(plain, tmp_path / "monai.safetensors")
    image = torch.rand(1, 1, 16, 24)
    plain.encoder.norm = monai.norm  # a head that pools the mean leaves this norm out
    assert_close(plain.encoder(image)[0], monai(image)[0], **EQUAL)


def test_a_pickled_network_without_known_names_keeps_them(tmp_path):
    one, two = (torch.nn.Sequential() for _ in range(2))
    for net in (one, two):
        net.add_module("model", torch.nn.Linear(3, 2))
    torch.save({"state_dict": under("module.", one.state_dict())}, tmp_path / "a.pth")
    load_weights(two, tmp_path / "a.pth", require="")
    assert torch.equal(one.model.weight, two.model.weight)


def test_a_file_of_student_and_teacher_is_refused_by_both_names(tmp_path):
    one, two = timm_vit().state_dict(), {k: v + 1 for k, v in timm_vit().state_dict().items()}
    contents = {
        "nested": {"student": one, "teacher": under("backbone.", two)},
        "names": under("student.", one) | under("teacher.", two),
    }
    for how, content in contents.items():
        torch.save(content, tmp_path / f"{how}.pth")
        with pytest.raises(UserError, match=r"holds two .*student.cls_token and teacher.*cls_token") as error:
            load_weights(ViTClassifier((32, 48), 8, 1, 24, 2, 2, 2), tmp_path / f"{how}.pth")
        assert "\n" not in str(error.value)
    torch.save({"student": one, "teacher": one}, tmp_path / "equal.pth")
    same_tokens(timm_vit(), tmp_path / "equal.pth")


FILE = {
    "layer": "encoder.layer",
    "qkv": "attention.attention.{}",
    "names": ("query", "key", "value"),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
MEMORY = {
    "layer": "layers",
    "qkv": "attention.{}",
    "names": ("q_proj", "k_proj", "v_proj"),
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def as_transformers(tensors: dict, style: dict, layer: str | None = None) -> dict:
    """timm's names -> those of transformers' ViT without `vit.`: of its files, or of its memory since version
    5.
    """
    plain = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    out = {}
    for name, value in tensors.items():
        if not name.startswith("blocks."):
            name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            out[plain.get(name, name.replace("norm.", "layernorm."))] = value
            continue
        _, index, part, kind = name.replace("attn.", "attn_").replace("mlp.", "mlp_").split(".")
        at, part = f"{layer or style['layer']}.{index}.", part.replace("_", ".")
        if part == "attn.qkv":
            for one, third in zip(style["names"], value.chunk(3)):
                out[f"{at}{style['qkv'].format(one)}.{kind}"] = third.clone()
        else:
            renamed = {"norm1": "layernorm_before", "norm2": "layernorm_after"}.get(part) or style[part]
            out[f"{at}{renamed}.{kind}"] = value
    return out


@pytest.mark.parametrize("style", [FILE, MEMORY], ids=["files", "memory"])
@pytest.mark.parametrize("prefix", ["vit.", "", "module.vit."])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_vit_of_transformers_gives_the_same_tokens_here(file, prefix, style, tmp_path):
    theirs = timm_vit()
    tensors = under(prefix, as_transformers(theirs.state_dict(), style))
    tensors |= {"classifier.weight": torch.ones(2, 24), "classifier.bias": torch.ones(2)}
    tensors["pooler.dense.bias"] = torch.ones(24)
    save = save_file if file.endswith("safetensors") else torch.save
    save(tensors, tmp_path / file)
    report = same_tokens(theirs, tmp_path / file)
    assert report.missing == [] and report.unexpected == ["pooler.dense.bias"]
    assert "norm_eps=1e-12" in str(report)


def test_a_vit_of_transformers_without_bias_of_queries_loads_with_a_bias_of_zero(tmp_path):
    theirs = timm_vit(qkv_bias=False)
    save_file(as_transformers(theirs.state_dict(), FILE), tmp_path / "model.safetensors")
    same_tokens(theirs, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("style", "layer"),
    [(FILE, "decoder_layers"), (FILE, "decoder_encoder.layer"), (MEMORY, "decoder_layers")],
    ids=["version 4", "version 5", "memory"],
)
@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=str)
def test_a_masked_autoencoder_of_transformers_is_the_same_here(size, style, layer, tmp_path):
    """Its names made from our tensors, with a zero class row in the decoder's table as theirs has."""
    source, ours = (
        shaken(MaskedAutoencoder(size, 8, 1, 24, 2, 2, 12, 1, 2, norm_eps=1e-12)) for _ in range(2)
    )
    torch.nn.init.zeros_(ours.decoder_pred.weight)
    with torch.no_grad():
        source.encoder.pos_embed.add_(1)
    state = source.state_dict()
    row = torch.randn(1, 1, 24)
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    encoder |= {
        "cls_token": encoder["cls_token"] - row,
        "pos_embed": torch.cat([row, encoder["pos_embed"]], 1),
    }
    blocks = {k.removeprefix("decoder_"): v for k, v in state.items() if k.startswith("decoder_blocks.")}
    rest = {
        k: v for k, v in state.items() if k.startswith(("decoder_embed.", "decoder_norm.", "decoder_pred."))
    }
    tensors = under("vit.", as_transformers(encoder, style))
    tensors |= under("decoder.", {**as_transformers(blocks, style, layer), **rest})
    tensors |= {
        "decoder.mask_token": state["mask_token"],
        "decoder.decoder_pos_embed": torch.cat([torch.zeros(1, 1, 12), state["decoder_pos_embed"]], 1),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    report = load_weights(ours, tmp_path / "pytorch_model.bin", require="")
    assert report.missing == [] and report.unexpected == [] and report.resized == []
    image, noise = torch.rand(1, 1, *size), torch.rand(1, source.encoder.pos_embed.shape[1])
    assert_close(ours.predict_all(image, noise).pred, source.predict_all(image, noise).pred, **EQUAL)


def test_a_vit_of_transformers_with_parts_that_this_encoder_lacks_is_refused_by_the_part(tmp_path):
    tensors = as_transformers(timm_vit().state_dict(), FILE)
    tensors["encoder.layer.0.layer_scale1.lambda1"] = torch.ones(24)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no place for .*encoder.blocks.0.layer_scale1"):
        load_weights(ViTClassifier((32, 48), 8, 1, 24, 2, 2, 2), tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", ["half.safetensors", "half.pth"])
def test_weights_of_another_precision_become_fp32_of_the_same_values(kind, file, tmp_path):
    theirs = timm_vit()
    stored = {name: value.to(kind) for name, value in theirs.state_dict().items()}
    (save_file if file.endswith("safetensors") else torch.save)(stored, tmp_path / file)
    theirs.load_state_dict({name: value.float() for name, value in stored.items()})
    same_tokens(theirs, tmp_path / file)
    resized = shaken(ViTClassifier((64, 64), 8, 1, 24, 2, 2, 2))
    square = {**stored, "pos_embed": stored["pos_embed"][:, :17]}
    torch.save(square, tmp_path / "square.pth")
    load_weights(resized, tmp_path / "square.pth")
    assert all(value.dtype == torch.float32 for value in resized.state_dict().values())


class Malicious:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def test_a_pickle_that_wants_to_run_something_is_refused_and_not_run(tmp_path):
    torch.save(
        {"model": {"cls_token": torch.zeros(1)}, "args": Malicious(tmp_path / "proof")}, tmp_path / "bad.pth"
    )
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
    from smae_utils.method.checkpoints.save import save_weights

    save_weights(source, tmp_path / "flat.safetensors")
    solid = shaken(UNETR((16, 24, 16), 8, 2, 24, 3, 2, 1, 2))
    solid.encoder.blocks = solid.encoder.blocks[:2]
    load_weights(solid, tmp_path / "flat.safetensors", adapt=True)
    slice_ = torch.rand(1, 2, 16, 24)
    flat = solid.encoder.embed(solid.encoder.cut(slice_.unsqueeze(-1).repeat(1, 1, 1, 1, 16)))[:, 1:].reshape(
        2, 3, 2, 24
    )
    two = shaken(ViTClassifier((16, 24), 8, 2, 24, 2, 2, 2))
    load_weights(two, tmp_path / "flat.safetensors", adapt=True)
    expected = two.encoder.embed(two.encoder.cut(slice_))[:, 1:].reshape(2, 3, 24)
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
    run = finetune(
        "cxr14",
        cxr14,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["cxr14", "finetune"], "pool": pool},
        report=quiet,
    )
    theirs, ours = built(export(run.path, "timm", tmp_path / "out")), load_finetuned(run)[0]
    image = torch.rand(2, 1, 32, 32)
    assert_close(theirs(image), ours(image), **EQUAL)


def test_an_exported_classifier_gives_the_same_logits_in_monai(cxr14, tiny, bare, tmp_path):
    overrides = {**tiny["cxr14", "finetune"], "norm_eps": 1e-5, "pool": "cls"}
    run = finetune("cxr14", cxr14, tmp_path / "run", preset=bare, overrides=overrides, report=quiet)
    theirs, ours = built(export(run.path, "monai-vit", tmp_path / "out")), load_finetuned(run)[0]
    image = torch.rand(2, 1, 32, 32)
    assert_close(theirs(image)[0], ours(image), **EQUAL)


@pytest.mark.slow
def test_an_exported_unetr_gives_the_same_logits_in_monai(brats, tiny, bare, tmp_path):
    fits = {
        "patch_size": 16,
        "depth": 12,
        "class_token": False,
        "norm_eps": 1e-5,
        "crop_size": [32, 32, 32],
        "steps": 1,
    }
    run = finetune(
        "brats",
        brats,
        tmp_path / "run",
        preset=bare,
        overrides={**tiny["brats", "finetune"], **fits},
        report=quiet,
    )
    theirs, ours = built(export(run.path, "monai-unetr", tmp_path / "out")), load_finetuned(run)[0]
    image = torch.rand(1, 4, 32, 32, 32)
    assert_close(theirs(image), ours(image), **EQUAL)


def test_an_exported_encoder_of_a_pretraining_run_gives_the_same_tokens_in_monai(brats, tiny, bare, tmp_path):
    run = pretrain(
        "brats",
        brats,
        tmp_path / "run",
        bare,
        {**tiny["brats", "pretrain"], "class_token": False, "norm_eps": 1e-5},
        report=quiet,
    )
    theirs = built(export(run.path, "monai-vit", tmp_path / "out"))
    ours = UNETR((16, 16, 16), 8, 4, 24, 3, 2, 1, 2, class_token=False, norm_eps=1e-5).eval()
    load_weights(ours, run.path)
    image = torch.rand(1, 4, 16, 16, 16)
    assert_close(theirs(image)[0], ours.encoder(image)[0], **EQUAL)


def test_what_a_target_cannot_hold_is_refused_with_the_settings_that_it_could(
    brats, cxr14, tiny, bare, tmp_path
):
    three = finetune(
        "brats", brats, tmp_path / "three", preset=bare, overrides=tiny["brats", "finetune"], report=quiet
    )
    two = finetune(
        "cxr14", cxr14, tmp_path / "two", preset=bare, overrides=tiny["cxr14", "finetune"], report=quiet
    )
    for run, to, words in (
        (three, "monai-unetr", "patch_size=16 depth=12 class_token=false norm_eps=1e-05"),
        (three, "timm", "2D"), (two, "monai-unetr", "segmentation"),
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
    monkeypatch.setattr(
        timm, "create_model", lambda name, **how: asked.append((name, how["pretrained"])) or theirs
    )
    ours = shaken(ViTClassifier((32, 32), 16, 3, 192, 12, 3, 2))
    load_weights(ours, "timm:vit_tiny_patch16_224.augreg_in21k")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True)]
    image = torch.rand(1, 3, 32, 32)
    assert_close(ours.encoder(image)[0][:, 0], theirs(image), **EQUAL)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_huge_patch99", "did you mean"),
        ("vit_tiny_patch16_224.augreg_in21k", "could not get the weights"),
    ],
)
def test_a_timm_name_that_cannot_be_had_is_one_line(name, words, monkeypatch):
    import timm

    def offline(*args, **how):
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=words) as error:
        load_weights(ViTClassifier((32, 32), 16, 3, 192, 2, 3, 2), f"timm:{name}")
    assert "\n" not in str(error.value)
