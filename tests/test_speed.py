"""The table of speeds says what was measured against what; how fast anything is, no test asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools import memory, speed
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


def test_rows_of_other_works_stay_with_what_says_how_they_were_made(tmp_path, monkeypatch):
    took = iter([1.0, 2.0, 3.0])

    def made(name):
        return lambda: Work(name, "peer", lambda precision: None, lambda precision: None, ())

    monkeypatch.setattr(speed, "WORKS", {"one": made("one"), "two": made("two")})
    monkeypatch.setattr(speed, "seconds", lambda act, precision: 1.0)
    monkeypatch.setattr(
        speed, "compare", lambda work, *_: [(work.name, "us", "peer", next(took), *[0.0] * 5)]
    )
    speed.benchmark_speed(tmp_path, 1)
    table = speed.benchmark_speed(tmp_path, 2, only="two")
    assert dict(zip(table.work, table.ratio_median)) == {"one": 1.0, "two": 3.0}
    text = (tmp_path / "speed.csv").read_text()
    assert "--repeats 1\n" in text and "--repeats 2 --only 'two'" in text and text.count("\none,") == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells it")
def test_the_highest_memory_of_a_call_is_counted_from_where_it_began(monkeypatch):
    work = Work("one", "peer", lambda _: torch.ones(50_000_000).sum(), lambda _: torch.ones(10).sum())
    monkeypatch.setattr(memory, "WORKS", {"one": lambda: work})
    assert memory.peak_gb("one", "ours", "fp32") == pytest.approx(0.2, abs=0.03)
    assert memory.peak_gb("one", "theirs", "fp32") < 0.03
