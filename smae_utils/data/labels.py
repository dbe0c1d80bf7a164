"""Values of mask files to label numbers of a task, and what is refused on the way."""

from __future__ import annotations

import numpy as np

from smae_utils.data.tasks import Task
from smae_utils.errors import UserError

# A float mask may miss an integer by so much: what scaling factors and other tools' nearest neighbours leave.
INTEGER_TOLERANCE = 1e-3


def whole_numbers(values: np.ndarray, path: str, expected: str) -> np.ndarray:
    """Label values as integers; floats that miss one by less than `INTEGER_TOLERANCE` are rounded.

    Raises:
        UserError: for fractions.
    """
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    rounded = np.round(values)
    off = np.abs(values - rounded)
    if not np.isfinite(values).all() or off.max(initial=0) > INTEGER_TOLERANCE:
        found = np.unique(values[~(off <= INTEGER_TOLERANCE)])
        some = ", ".join(f"{v:.6g}" for v in found[:6]) + (" and more" if len(found) > 6 else "")
        raise UserError(
            f"{path} holds values {some}: expected {expected}; is it a probability map or an image?"
        )
    return rounded.astype(np.int64)


def encode_labels(values: np.ndarray, task: Task, path: str) -> np.ndarray:
    """Values as stored -> uint8 0 .. label_values - 1, and `IGNORE` for what the list calls ignore.

    Raises:
        UserError: for values that are no label of the task.
    """
    expected = f"integers {describe_values(task)}"
    whole = whole_numbers(values, path, expected)
    found = np.unique(whole)
    numbers = task.label_numbers
    if strange := [int(v) for v in found if int(v) not in numbers]:
        some = ", ".join(map(str, strange[:8])) + (" and more" if len(strange) > 8 else "")
        hint = (
            ' Name them in "labels"; {"background": [0, VALUE]} in nnU-Net\'s style makes a value background'
            if task.name.endswith((".json", ".csv"))
            else ""
        )
        raise UserError(
            f"{path} holds values {some}: task {task.title or task.name} expects {expected}.{hint}"
        )
    table = np.array([numbers[int(v)] for v in found], np.uint8)
    return table[np.searchsorted(found, whole)]


def describe_values(task: Task) -> str:
    """The stored label values of a task in words: `0 .. 2`, or `0, 17, 1002`."""
    stored = sorted(task.label_numbers)
    if stored == list(range(len(stored))):
        return f"0 .. {stored[-1]}"
    return ", ".join(map(str, stored[:12])) + (" and more" if len(stored) > 12 else "")
