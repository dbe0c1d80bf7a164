"""The linear probe of notebook 03 reads off tokens what is in them, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from smae_utils.data.tasks import get_task
from smae_utils.method.patches import patchify
from smae_utils.work import linear_probe


class Tokens(torch.nn.Module):
    """An "encoder" whose tokens are what is asked for: the mean of each patch, or noise."""

    def __init__(self, patch: int, knows: bool, size: tuple[int, ...]):
        super().__init__()
        self.patch_size, self.knows, self.img_size, self.prefix_tokens = patch, knows, size, 1

    def forward(self, image):
        tokens = patchify(image, self.patch_size).mean(-1, keepdim=True)
        tokens = tokens if self.knows else torch.randn_like(tokens)
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1), []


@pytest.mark.parametrize("task", ["btcv", "cxr14"])
def test_the_probe_reads_what_tokens_hold(task, data, tiny, monkeypatch):
    record, settings = get_task(task), tiny[task, "finetune"]
    size, spacing = settings["crop_size"], settings.get("spacing_mm", ())
    cases = record.read_splits(data[task], 0, 0)["train"]
    windows = linear_probe._windows

    def telling(task, case, size, spacing_mm):
        """Images that are as bright as their first finding says, or as their own mask."""
        for image, label in windows(task, case, size, spacing_mm):
            yield (
                torch.full_like(image, float(case["label"][0] == 1))
                if label is None
                else (label > 0).float(),
                label,
            )

    monkeypatch.setattr(linear_probe, "_windows", telling)
    few = dataclasses.replace(record, classes=record.classes[:1])  # the others are not what is shown
    torch.manual_seed(0)
    if task == "btcv":
        structure = dataclasses.replace(record, classes=("structure",), regions=(tuple(range(1, 14)),))
        assert linear_probe.probe(structure, Tokens(4, True, size), cases, spacing) > 0.99
        assert (
            linear_probe.probe(structure, Tokens(4, False, size), cases, spacing) < 0.9
        )  # few cases: chance is wide
        return
    cases = [{**case, "label": case["label"][:1]} for case in cases]
    assert linear_probe.probe(few, Tokens(4, True, size), cases, spacing) > 0.99
    assert linear_probe.probe(few, Tokens(4, False, size), cases, spacing) < 0.9
    assert math.isnan(linear_probe.probe(few, Tokens(4, True, size), cases[:1]))


def test_the_probe_never_scores_a_patient_that_it_was_fitted_on_and_leaves_out_what_is_unknown(monkeypatch):
    cases = [
        {"case": f"c{i}", "patient": f"p{i // 4}", "image": "x", "label": np.array([float(i % 2)])}
        for i in range(12)
    ]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "linear_probe", lambda *parts: seen.append(parts) or 0.0)
        patch.setattr(linear_probe, "read_tokens", lambda task, encoder, cases, spacing_mm: cases)
        linear_probe.probe(get_task("cxr14"), None, cases)
    fitted, scored = ({c["patient"] for c in part} for part in seen[0])
    assert fitted == {"p0", "p1"} and scored == {"p2"}
    task = dataclasses.replace(get_task("cxr14"), classes=("a",))
    monkeypatch.setattr(
        linear_probe,
        "_windows",
        lambda task, case, size, spacing_mm: [(torch.full((1, 8, 8), float(case["shown"])), None)],
    )
    known = [{"label": np.array([float(i % 2)]), "shown": i % 2} for i in range(8)]
    # Counted as absent, these would confuse the fit.
    unknown = [{"label": np.array([np.nan]), "shown": 1} for _ in range(8)]
    tokens = linear_probe.read_tokens(task, Tokens(4, True, (8, 8)), known + unknown)
    assert linear_probe.linear_probe(tokens, tokens) == 1.0


def test_the_effective_rank_counts_the_directions_of_tokens():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    for n in (1, 5):
        assert linear_probe.effective_rank(rng.normal(size=(4096, n)) @ basis[:n]) == pytest.approx(
            n, rel=0.02
        )
