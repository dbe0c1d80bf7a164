"""The choices of a recipe that are settings of their own do what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.patches import patchify
from smae_utils.method.unetr import UNETR
from smae_utils.work.build import build_augmentation, build_model, build_optimizer
from smae_utils.work.finetune import few_labelled, finetune
from smae_utils.work.pretrain import drawn_ratio, pretrain
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, make_settings

SMALL = {
    "img_size": (16, 16, 16),
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
}
SETTINGS = replace(
    FinetuneSettings(),
    crop_size=(16, 16, 16),
    patch_size=8,
    embed_dim=24,
    depth=3,
    num_heads=2,
    feature_size=2,
)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_the_encoder_learns_at_its_share_of_the_rate_and_the_decoder_at_the_full_one(layer_decay):
    model = build_model(get_task("hippocampus"), SETTINGS)
    slow, plain = (
        build_optimizer(model, replace(SETTINGS, encoder_lr=factor), layer_decay) for factor in (0.1, 1.0)
    )
    scales = [
        {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
        for optimizer in (slow, plain)
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    assert scales[0].keys() == scales[1].keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for key, name in names.items():
        if key in scales[0]:
            assert scales[0][key] == pytest.approx(
                scales[1][key] * (0.1 if name.startswith("encoder.") else 1)
            ), name


def test_fewer_labelled_cases_are_a_part_of_more_and_follow_the_seed():
    cases = [{"case": f"c{i}"} for i in range(20)]
    few, more = ({c["case"] for c in few_labelled(cases, n, 3)} for n in (4, 12))
    assert len(few) == 4 and len(more) == 12 and few < more
    assert few != {c["case"] for c in few_labelled(cases, 4, 4)}


def test_a_run_trains_on_as_many_labelled_cases_as_asked_for(brats, tiny, bare, tmp_path):
    values = {**tiny["brats", "finetune"], "steps": 1, "batch_size": 1, "train_on_val": False}
    run = finetune(
        "brats", brats, tmp_path / "run", preset=bare, overrides={**values, "labelled": 2}, report=[].append
    )
    assert len(run.config["cases"]["train"]) == 2
    with pytest.raises(UserError, match="more than the .* labelled training cases"):
        finetune(
            "brats",
            brats,
            tmp_path / "no",
            preset=bare,
            overrides={**values, "labelled": 50},
            report=[].append,
        )


def test_without_the_image_skip_all_that_the_decoder_knows_went_through_the_encoder():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 16, 16, 16)
    for use_image in (True, False):
        model = UNETR(**SMALL, out_chans=2, feature_size=2, use_image=use_image).eval()
        model.encoder.register_forward_hook(lambda module, args, out: (out[0] * 0, [t * 0 for t in out[1]]))
        with torch.no_grad():
            same = torch.equal(model(image), model(image * 2 + 1))
        assert same == (not use_image)
        assert any(name.startswith("image_skip") for name in model.state_dict()) == use_image


def test_normed_skips_are_as_large_from_every_encoder():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 16, 16, 16)
    for normed in (True, False):
        model = UNETR(**SMALL, out_chans=2, feature_size=2, use_image=False, norm_skips=normed).eval()
        with torch.no_grad():
            before = model(image)
            model.encoder.register_forward_hook(lambda module, args, out: (out[0], [t * 6 for t in out[1]]))
            assert torch.allclose(model(image), before, atol=1e-4) == normed


def test_pre_training_mirrors_as_fine_tuning_does():
    image = torch.arange(8 * 8 * 8, dtype=torch.float32).reshape(1, 8, 8, 8) + 1
    flat = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (16, 1)))
    task = get_task("hippocampus")
    for sided, mirror in ((True, False), (True, True), (False, False)):
        keeps = sided and not mirror
        settings = replace(PretrainSettings(), crop_size=(8, 8, 8), flip_prob=1.0, mirror=mirror)
        crop = build_augmentation(replace(task, sided=sided), settings)({"image": image})[0]["image"]
        assert torch.equal(torch.as_tensor(crop), image.flip(3) if keeps else image.flip((1, 2, 3)))
        flat_task = replace(get_task("cxr14"), sided=sided)
        crops = build_augmentation(flat_task, replace(settings, crop_size=(16, 16), crop_area=(1.0, 1.0)))(
            {"image": flat, "mean": 0.0, "std": 1.0}
        )
        row = crops[0]["image"][0, 8]
        assert bool(row[0] < row[-1]) == keeps


def test_learned_positions_learn_while_pre_training_and_fixed_ones_do_not(brats, tiny, bare, tmp_path):
    tables = {}
    for positions in ("sincos", "learned"):
        run = pretrain(
            "brats",
            brats,
            tmp_path / positions,
            bare,
            {**tiny["brats", "pretrain"], "positions": positions},
            report=[].append,
        )
        tables[positions] = load_file(run.path / "model.safetensors")["encoder.pos_embed"]
    model = build_model(get_task("brats"), make_settings(FinetuneSettings, tiny["brats", "finetune"], "test"))
    assert torch.equal(tables["sincos"], model.encoder.pos_embed.detach()) and not torch.equal(
        tables["learned"], tables["sincos"]
    )
    load_weights(model, tmp_path / "learned")
    assert torch.equal(model.encoder.pos_embed.detach(), tables["learned"])
    with pytest.raises(UserError, match="positions .*must be one of sincos, learned"):
        pretrain(
            "brats",
            brats,
            tmp_path / "no",
            bare,
            {**tiny["brats", "pretrain"], "positions": "rotary"},
            report=[].append,
        )


def test_the_mask_ratio_is_drawn_for_each_step_and_again_after_a_resume(brats, tiny, bare, tmp_path):
    settings = make_settings(PretrainSettings, {"mask_ratio_range": [0.3, 0.9]}, "test")
    drawn = [drawn_ratio(settings.mask_ratio_range, seed) for seed in range(200)]
    assert (
        0.3 <= min(drawn) < 0.35
        and 0.85 < max(drawn) <= 0.9
        and drawn_ratio(settings.mask_ratio_range, 5) == drawn[5]
    )
    assert drawn_ratio(PretrainSettings().mask_ratio_range, 5) is None
    values = {**tiny["brats", "pretrain"], "mask_ratio_range": [0.3, 0.8], "save_every": 2}
    whole = pretrain("brats", brats, tmp_path / "whole", bare, values, report=[].append)

    def stop(line: str) -> None:
        if line.startswith("step      3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain("brats", brats, tmp_path / "cut", bare, values, report=stop)
    pretrain("brats", brats, tmp_path / "cut", bare, values, resume=True, report=[].append)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.finished and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UserError, match="two numbers"):
        make_settings(PretrainSettings, {"mask_ratio_range": [0.9, 0.3]}, "test")


def test_patches_of_air_do_not_count_when_asked():
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        **SMALL, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=False
    )
    image = torch.randn(2, 1, 16, 16, 16)
    image[:, :, :8] = 0.0  # half of it is air
    noise = torch.rand(2, 64)
    with torch.no_grad():
        out = model.predict_all(image, noise)
        body = (patchify(image, 4) != 0).any(-1) & out.mask.bool()
        expected = (out.pred - patchify(image, 4)).square().mean(-1)[body].mean()
        model.air_loss = False
        assert model(image, noise).loss == pytest.approx(
            float(expected), rel=1e-5
        ) and out.loss != pytest.approx(float(expected), rel=1e-3)
        assert float(model(torch.zeros_like(image), noise).loss) == 0
