"""What training costs, counted without running it, against arithmetic and against what a real pass keeps."""

from __future__ import annotations

import pytest
import torch

from smae_utils.build import build_mae, build_model
from smae_utils.cost import crop_cost, run_flops
from smae_utils.settings import FinetuneSettings, PretrainSettings, make_settings
from smae_utils.tasks import get_task


def settings(tiny, task: str, stage: str):
    return make_settings({"pretrain": PretrainSettings, "finetune": FinetuneSettings}[stage], tiny[task, stage], where="test")


def test_flops_of_a_classifier_are_those_of_its_matrix_products(tiny):
    task, made = get_task("cxr14"), settings(tiny, "cxr14", "finetune")
    patches, width = (made.crop_size[0] // made.patch_size) ** 2, made.embed_dim
    length, pixels = patches + made.class_token, made.patch_size**2 * task.in_chans
    block = 2 * length * width * 12 * width + 2 * 2 * length**2 * width
    forward = made.depth * block + 2 * width * len(task.classes)
    embedding = 2 * patches * pixels * width
    # Backward costs twice as much, but for the pixels, which need no gradient.
    assert crop_cost(task, made).flops == pytest.approx(3 * forward + 2 * embedding, rel=0.02)


@pytest.mark.parametrize(("name", "stage"), [("btcv", "pretrain"), ("brats", "finetune"), ("cxr14", "finetune")])
def test_what_a_real_pass_keeps_is_what_was_counted(tiny, name, stage):
    task, made = get_task(name), settings(tiny, name, stage)
    model = build_mae(task, made) if stage == "pretrain" else build_model(task, made)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.rand(1, task.in_chans, *made.crop_size))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    cost = crop_cost(task, made)
    assert cost.activations == pytest.approx(held, rel=0.4)  # attention keeps its matrix only where it has no fused kernel
    assert cost.weights == sum(4 * p.numel() for p in model.parameters())


def test_a_run_costs_its_steps_times_its_crops(bare):
    flops, steps = run_flops("btcv", "pretrain", "small", 18)
    one = crop_cost(get_task("btcv"), _small())
    assert flops == pytest.approx(one.flops * steps * _small().batch_size * _small().crops_per_scan)


def _small():
    from smae_utils.settings import resolve

    return resolve(get_task("btcv"), "pretrain", "small")
