"""What training costs, counted without running it, against arithmetic and against what a real pass keeps."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smae_utils.data.tasks import get_task
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.work.build import build_mae, build_model
from smae_utils.work.cost import crop_cost, run_flops
from smae_utils.work.presets import resolve
from smae_utils.work.pretrain import pretrain
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, make_settings


def settings(tiny, task: str, stage: str):
    return make_settings(
        {"pretrain": PretrainSettings, "finetune": FinetuneSettings}[stage], tiny[task, stage], where="test"
    )


def test_flops_of_a_classifier_are_those_of_its_matrix_products(tiny):
    task, made = get_task("cxr14"), settings(tiny, "cxr14", "finetune")
    patches, width = (made.crop_size[0] // made.patch_size) ** 2, made.embed_dim
    length, pixels = patches + made.class_token, made.patch_size**2 * task.in_chans
    block = 2 * length * width * 12 * width + 2 * 2 * length**2 * width
    forward = made.depth * block + 2 * width * len(task.classes)
    embedding = 2 * patches * pixels * width
    # Backward costs twice as much, but for the pixels, which need no gradient.
    assert crop_cost(task, made).flops == pytest.approx(3 * forward + 2 * embedding, rel=0.02)


def test_flops_of_pretraining_are_those_of_visible_patches_alone_in_the_encoder(tiny):
    task, made = get_task("brats"), settings(tiny, "brats", "pretrain")
    model, length = build_mae(task, made), (made.crop_size[0] // made.patch_size) ** 3
    visible = int(length * (1 - made.mask_ratio))
    pixels, prefix = made.patch_size**3 * task.in_chans, int(made.class_token)

    def blocks(tokens, width, depth):
        return depth * (2 * tokens * width * 12 * width + 2 * 2 * tokens**2 * width)

    between = 2 * (visible + prefix) * made.embed_dim * made.decoder_embed_dim
    predicted = 2 * (length - visible) * made.decoder_embed_dim * pixels
    forward = blocks(visible + prefix, made.embed_dim, made.depth) + between + predicted
    forward += blocks(length + prefix, made.decoder_embed_dim, made.decoder_depth)
    embedding = 2 * visible * pixels * made.embed_dim
    image = torch.rand(1, task.in_chans, *made.crop_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(image).loss.backward()
    # Backward costs twice as much, but for the pixels, which need no gradient.
    assert counter.get_total_flops() == pytest.approx(3 * forward + 2 * embedding, rel=0.01)


def bytes_kept(model, image) -> int:
    """What a real forward pass of `model` keeps for its backward pass, without the weights."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(image)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["btcv", "brats", "cxr14"])
def test_what_a_real_pass_keeps_is_what_was_counted(tiny, name, stage):
    task, made = get_task(name), settings(tiny, name, stage)
    model = build_mae(task, made) if stage == "pretrain" else build_model(task, made)
    image = torch.rand(1, task.in_chans, *made.crop_size)
    cost = crop_cost(task, made)
    with sdpa_kernel(SDPBackend.MATH):  # attention written out, as it is counted
        assert cost.activations == bytes_kept(model, image)
    # A fused kernel keeps less, since it does not keep the attention matrix. The count stays a safe upper
    # bound, and a near one.
    assert cost.activations / 1.25 < bytes_kept(model, image) <= cost.activations
    assert cost.weights == sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 2}], ids=str)
def test_a_run_costs_as_many_crops_as_pass_through_the_network(length, tiny, brats, tmp_path, monkeypatch):
    """The crops are counted in a real run, so that the formula is not compared with itself."""
    values = (
        {k: v for k, v in tiny["brats", "pretrain"].items() if k != "steps"} | {"crops_per_scan": 3} | length
    )
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump({"brats": {"pretrain": values}}), encoding="utf-8")
    seen, forward = [], MaskedAutoencoder.forward

    def counting(self, image, *args, **kwargs):
        seen.append(len(image))
        return forward(self, image, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "forward", counting)
        run = pretrain(
            "brats", brats, tmp_path / "run", str(preset), {"train_on_val": True}, report=lambda line: None
        )
    cases = len(run.config["cases"]["train"])
    flops, steps = run_flops("brats", "pretrain", str(preset), cases)
    one = crop_cost(get_task("brats"), resolve(get_task("brats"), "pretrain", str(preset))).flops
    assert steps == len(run.read_log()) and flops == pytest.approx(one * sum(seen))
