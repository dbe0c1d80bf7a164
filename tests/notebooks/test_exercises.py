"""Each exercise of a notebook: its stub is not solved, its solution is, and what is nearly right is
refused."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from smae_utils.show import exercises
from smae_utils.work.optimizer import cosine_schedule

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NAMES = {"np": np, "pd": pd, "torch": torch, "exercises": exercises}


def cells_of(path: Path) -> dict[str, tuple[str, str]]:
    """Name of the exercise -> its code cell, and the code of the folded solution in the cell after it."""
    found = {}
    cells = nbformat.read(path, as_version=4).cells
    for cell, after in zip(cells, cells[1:]):
        if cell.cell_type == "code" and (
            name := re.search(r"^exercises\.check_(\w+)\(\1\);$", cell.source, re.M)
        ):
            folded = re.fullmatch(
                r"<details><summary>Solution</summary>\n\n```python\n(.+?)```\n\n.+\n\n</details>",
                after.source,
                re.S,
            )
            assert after.cell_type == "markdown" and folded, (
                f"{path.stem}: no folded solution after {name[1]}"
            )
            found[name[1]] = cell.source, folded[1]
    return found


CELLS = {path.stem: cells_of(path) for path in NOTEBOOKS}
EXERCISES = {name: cells for of in CELLS.values() for name, cells in of.items()}


def outcome(code: str, capsys, **names) -> str:
    """What a cell prints."""
    capsys.readouterr()
    exec(code, {**NAMES, **names})
    return capsys.readouterr().out


def answered(name: str, answer: str) -> str:
    """The cell of an exercise with the reader's lines in the place of the stub."""
    stub = EXERCISES[name][0]
    return f"{answer}\n\n{stub[stub.index('exercises.check_') :]}"


def solution(name: str):
    """The function of a folded solution."""
    names = dict(NAMES)
    exec(EXERCISES[name][1], names)
    return names[name]


# One plausible mistake each.
WRONG = {
    "count_patients": lambda cases: len(cases),
    "window": lambda hu, low, high: (hu - low) / (high - low),
    "visible_patches": lambda noise, ratio: noise.argsort()[: int(len(noise) * ratio)],
    "hidden_loss": lambda predicted, target, mask: (predicted - target).square().mean(),
    "put_together": lambda patches, p, rows, columns: patches.reshape(rows * p, columns * p),
    "rate": lambda step, steps, warmup, peak: peak * (1 + np.cos(np.pi * step / (steps + 1))) / 2,
    "patch_mean_loss": lambda patches: patches.var(-1).mean(),
    "count_new": lambda network, pretrained: sum(
        value.numel() for name, value in pretrained.items() if name not in network
    ),
    "batch_dice": lambda p, y: (
        1 - (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
    ).mean(),
    "dice": lambda pred, label: 2 * (pred & label).sum() / max(pred.sum() + label.sum(), 1),
    "auc": lambda target, score: (
        np.mean(score[target == 1][:, None] > score[target == 0][None]) if (target == 0).any() else np.nan
    ),
    "list_entry": lambda image, mask, patient: {"image": image, "label": str(mask), "patient": patient},
    "split_by_patient": lambda splits: (
        not {c["patient"] for c in splits["train"]} & {c["patient"] for c in splits["test"]}
    ),
}


def test_each_notebook_ends_with_two_or_three_exercises():
    assert len(CELLS) == 6 and all(2 <= len(of) <= 3 for of in CELLS.values())
    checks = {name.removeprefix("check_") for name in vars(exercises) if name.startswith("check_")}
    assert checks == set(EXERCISES) == set(WRONG)


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_is_unsolved_as_it_stands_and_solved_by_its_solution(name, capsys):
    stub, solved = EXERCISES[name]
    assert outcome(stub, capsys).startswith("not solved yet: ")
    assert outcome(answered(name, solved), capsys) == "solved\n"


@pytest.mark.parametrize("name", EXERCISES)
def test_what_is_nearly_right_a_constant_and_a_failing_answer_are_refused(name, capsys):
    check, right, first = getattr(exercises, f"check_{name}"), solution(name), []

    def constant(*arguments):
        first.append(right(*arguments))
        return first[0]

    def failing(*_):
        raise KeyError("patient")

    for answer in (WRONG[name], constant, failing, lambda *_: None, lambda: 1, ..., None, 3):
        assert check(answer) is False
        said = capsys.readouterr().out
        assert said.startswith("not solved yet: ") and said.count("\n") == 1


@pytest.mark.parametrize(("steps", "warmup"), [(12, 4), (30, 1)])
def test_the_rate_of_the_exercise_is_the_one_that_training_takes(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = cosine_schedule(optimizer, steps, warmup)
    rate = solution("rate")
    for step in range(1, steps + 1):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step, steps, warmup, 3e-3))
