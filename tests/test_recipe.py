"""The choices of a recipe that are settings of their own do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smae_utils.build import build_model, build_optimizer
from smae_utils.errors import UserError
from smae_utils.settings import FinetuneSettings
from smae_utils.tasks import get_task
from smae_utils.training import few_labelled, finetune
from smae_utils.unetr import UNETR

SMALL = {"img_size": (16, 16, 16), "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 2}
SETTINGS = replace(FinetuneSettings(), crop_size=(16, 16, 16), patch_size=8, embed_dim=24, depth=3, num_heads=2, feature_size=2)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_the_encoder_learns_at_its_share_of_the_rate_and_the_decoder_at_the_full_one(layer_decay):
    model = build_model(get_task("hippocampus"), SETTINGS)
    slow, plain = (build_optimizer(model, replace(SETTINGS, encoder_lr=factor), layer_decay) for factor in (0.1, 1.0))
    scales = [{id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]} for optimizer in (slow, plain)]
    names = {id(p): name for name, p in model.named_parameters()}
    assert scales[0].keys() == scales[1].keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for key, name in names.items():
        if key in scales[0]:
            assert scales[0][key] == pytest.approx(scales[1][key] * (0.1 if name.startswith("encoder.") else 1)), name


def test_fewer_labelled_cases_are_a_part_of_more_and_follow_the_seed():
    cases = [{"case": f"c{i}"} for i in range(20)]
    few, more = ({c["case"] for c in few_labelled(cases, n, 3)} for n in (4, 12))
    assert len(few) == 4 and len(more) == 12 and few < more
    assert few != {c["case"] for c in few_labelled(cases, 4, 4)}


def test_a_run_trains_on_as_many_labelled_cases_as_asked_for(brats, tiny, bare, tmp_path):
    values = {**tiny["brats", "finetune"], "steps": 1, "batch_size": 1, "train_on_val": False}
    run = finetune("brats", brats, tmp_path / "run", preset=bare, overrides={**values, "labelled": 2}, report=[].append)
    assert len(run.config["cases"]["train"]) == 2
    with pytest.raises(UserError, match="more than the .* labelled training cases"):
        finetune("brats", brats, tmp_path / "no", preset=bare, overrides={**values, "labelled": 50}, report=[].append)


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
