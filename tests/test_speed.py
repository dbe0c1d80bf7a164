"""The table of speeds says what was measured against what; how fast anything is, no test asks."""

from __future__ import annotations

import pytest
import torch

from tools import speed
from tools.speed_works import AS_IT_COMES, Work, step_of


@pytest.mark.parametrize(
    ("precisions", "auto", "expected"),
    [
        (("fp32", "bf16"), "bf16", [("bf16", AS_IT_COMES, 4.0), ("bf16", "bf16", 2.0)]),
        (("fp32",), "bf16", [("bf16", AS_IT_COMES, 4.0), ("fp32", "fp32", 1.5)]),
        (("fp32", "bf16"), "fp32", [("fp32", AS_IT_COMES, 2.0), ("fp32", "fp32", 1.5)]),
    ],
)
def test_a_work_has_a_row_beside_the_peer_as_it_comes_and_one_in_one_precision(
    precisions, auto, expected, monkeypatch
):
    took = {"ours": {"bf16": 1.0, "fp32": 2.0}, "theirs": {AS_IT_COMES: 4.0, "fp32": 3.0, "bf16": 2.0}}
    monkeypatch.setattr(speed, "seconds", lambda act, precision: act(precision))
    monkeypatch.setattr(speed, "measured_flops_per_second", lambda device, precision: 1e3)

    def ours(precision):
        torch.ones(10, 10) @ torch.ones(10, 10)  # 2000 FLOPs
        return took["ours"][precision]

    work = Work("a step", "peer", ours, took["theirs"].__getitem__, precisions)
    rows = speed.compare(work, auto, 3)
    assert [row[1:4] for row in rows] == [
        (f"smae_utils {mine}", f"peer {other}", ratio) for mine, other, ratio in expected
    ]
    assert all(row[-1] == 2.0 for row in rows)


def test_both_sides_of_a_step_take_it_with_the_same_optimiser_but_for_the_peer_as_it_comes():
    losses = {}
    for precision in (AS_IT_COMES, "fp32", "bf16"):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        step = step_of(model, torch.ones(2, 8), lambda net, x: net(x).square().mean())
        losses[precision] = [step(precision) for _ in range(5)]
    assert losses[AS_IT_COMES] == pytest.approx(losses["fp32"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05) and losses["bf16"] != losses["fp32"]
