"""The linear probe of notebook 03 reads off tokens what is in them, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from smae_utils.data.tasks import get_task
from smae_utils.method.patches import patchify
from smae_utils.show import notebook_helpers
from smae_utils.work.settings import FinetuneSettings, make_settings


class Tokens(torch.nn.Module):
    """An "encoder" whose tokens are what is asked for: the mean of each patch, or noise."""

    def __init__(self, patch: int, knows: bool):
        super().__init__()
        self.patch_size, self.knows, self.prefix_tokens = patch, knows, 1

    def forward(self, image):
        tokens = patchify(image, self.patch_size).mean(-1, keepdim=True)
        tokens = tokens if self.knows else torch.randn_like(tokens)
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1), []


@pytest.mark.parametrize("task", ["btcv", "cxr14"])
def test_the_probe_reads_what_tokens_hold(task, data, tiny, monkeypatch):
    record, settings = get_task(task), make_settings(FinetuneSettings, tiny[task, "finetune"], "test")
    cases = record.read_splits(data[task], 0, 0)["train"]
    if task == "cxr14":  # images as bright as their first finding says
        monkeypatch.setattr(
            notebook_helpers, "load_crop", lambda task, settings, case: torch.full((1, *settings.crop_size), float(case["label"][0] == 1))
        )
    else:  # images that are their masks

        def masks(task, settings, case):
            label = notebook_helpers.middle(
                notebook_helpers.read_case(notebook_helpers.build_transform(task, settings, with_label=True), case)["label"].as_tensor(),
                settings.crop_size,
            )
            return (label > 0).float()

        monkeypatch.setattr(notebook_helpers, "load_crop", masks)
    torch.manual_seed(0)
    assert notebook_helpers.probe(record, settings, Tokens(4, knows=True), cases) > 0.99
    assert notebook_helpers.probe(record, settings, Tokens(4, knows=False), cases) < 0.9  # few cases: chance is wide
    assert math.isnan(notebook_helpers.probe(record, settings, Tokens(4, knows=True), cases[:1]))
