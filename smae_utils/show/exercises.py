"""The checks of the notebooks' exercises: small made-up data, and another way to the same answer.

A check prints "solved", or "not solved yet: ..." with what was asked for. It raises for nothing that the
reader wrote.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceLoss
from sklearn.metrics import f1_score, mean_squared_error, roc_auc_score

from smae_utils.data.tasks.list_files import read_list

# (what the reader's function returned, what is right) -> whether they agree.
Same = Callable[[Any, Any], bool]


def _close(got: Any, right: Any) -> bool:
    """Equal numbers or arrays of one shape, as far as single precision goes; NaN equals NaN."""
    got, right = np.asarray(got, float), np.asarray(right, float)
    return got.shape == right.shape and np.allclose(got, right, rtol=1e-4, atol=1e-6, equal_nan=True)


def _judge(answer: Any, questions: Iterable[tuple[tuple, Any]], hint: str, same: Same = _close) -> bool:
    """Print and return whether `answer` is a function that is right for all questions.

    Args:
        questions: (arguments, right result), with different results, so that no constant passes.
        hint: one sentence that says what is asked for.
    """
    if not callable(answer):
        print(f"not solved yet: {hint}")
        return False
    for arguments, right in questions:
        try:
            got = answer(*copy.deepcopy(arguments))
        except Exception as error:
            said = " ".join(str(error).split())[:120]
            print(f"not solved yet: the function stopped with {type(error).__name__} ({said}); {hint}")
            return False
        try:
            agrees = got is not None and got is not ... and bool(same(got, right))
        except Exception:  # of a type that cannot be compared
            agrees = False
        if not agrees:
            print(f"not solved yet: {hint}")
            return False
    print("solved")
    return True


def check_count_patients(answer: Any) -> bool:
    """`answer(cases)` -> how many patients the cases are of."""
    rng = np.random.default_rng(0)
    questions = []
    for patients in (1, 4, 7):
        owners = [*range(patients), *rng.integers(0, patients, 2 * patients)]  # each at least once
        questions.append(
            (([{"case": f"scan{i}", "patient": f"p{owner}"} for i, owner in enumerate(owners)],), patients)
        )
    return _judge(
        answer, questions, "a whole number is asked for; a patient who has several images counts once."
    )


def check_window(answer: Any) -> bool:
    """`answer(hu, low, high)` -> the values with `low` .. `high` brought to 0 .. 1, clipped at both ends."""
    rng = np.random.default_rng(0)
    questions = []
    for low, high in ((-175.0, 250.0), (-1000.0, 400.0), (0.0, 80.0)):
        hu = rng.uniform(-1200, 1500, (3, 4))
        questions.append(((hu, low, high), np.interp(hu, [low, high], [0, 1])))
    return _judge(
        answer, questions, "an array of the shape of `hu` is asked for, with no value below 0 or above 1."
    )


def check_visible_patches(answer: Any) -> bool:
    """`answer(noise, mask_ratio)` -> indices of the patches that stay visible, in any order."""
    rng = np.random.default_rng(0)
    questions = []
    for length, ratio in ((8, 0.75), (16, 0.5), (24, 0.25)):  # the share of these is a whole number
        noise = rng.random(length)
        below = [i for i in range(length) if (noise < noise[i]).sum() < round(length * (1 - ratio))]
        questions.append(((torch.from_numpy(noise), ratio), below))
    hint = (
        "the indices of the patches with the smallest noise are asked for, int(L * (1 - mask_ratio)) of them."
    )
    return _judge(
        answer, questions, hint, lambda got, right: sorted(np.asarray(got).reshape(-1).tolist()) == right
    )


def check_hidden_loss(answer: Any) -> bool:
    """`answer(predicted, target, mask)` -> mean squared error of the patches with mask 1.

    Shapes: (B, L, N), (B, L, N), (B, L).
    """
    questions = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        predicted, target = rng.normal(size=(2, 2, 6, 5)).astype(np.float32)
        mask = np.array([rng.permutation([1, 1, 1, 1, 0, 0]) for _ in range(2)], np.float32)
        right = mean_squared_error(target[mask == 1], predicted[mask == 1])
        questions.append((tuple(map(torch.from_numpy, (predicted, target, mask))), right))
    return _judge(
        answer, questions, "one number is asked for, the mean over all pixels of the patches whose mask is 1."
    )


def check_put_together(answer: Any) -> bool:
    """`answer(patches, p, rows, columns)` of (rows * columns, p * p) -> the image (rows * p, columns * p)."""
    questions = []
    for seed, (p, rows, columns) in enumerate(((2, 3, 4), (3, 2, 2), (4, 1, 3))):
        image = np.random.default_rng(seed).normal(size=(rows * p, columns * p)).astype(np.float32)
        cut = [
            image[i * p : i * p + p, j * p : j * p + p].ravel() for i in range(rows) for j in range(columns)
        ]
        questions.append(((torch.from_numpy(np.stack(cut)), p, rows, columns), image))
    return _judge(
        answer,
        questions,
        "an image of shape (rows * p, columns * p) is asked for, in which each patch is back in its place.",
    )


def check_rate(answer: Any) -> bool:
    """`answer(step, steps, warmup, peak)` -> learning rate of a step, counted from 1.

    It is a line up to `peak`, then half a cosine.
    """
    questions = []
    for steps, warmup, peak in ((20, 5, 1.0), (50, 10, 4.0)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup + 1)
        rates = list(np.linspace(0, peak, warmup + 1)[1:-1])
        for _ in range(warmup, steps + 1):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        questions += [((step, steps, warmup, peak), rate) for step, rate in enumerate(rates, start=1)]
    return _judge(
        answer,
        questions,
        "one number is asked for, which is `peak` at step `warmup` and would be 0 at step `steps + 1`.",
    )


def check_patch_mean_loss(answer: Any) -> bool:
    """`answer(patches)` of (B, L, N) -> mean squared error of predicting each patch's own mean."""
    questions = []
    for seed in range(3):
        patches = np.random.default_rng(seed).normal(seed, 1 + seed, (2, 5, 8)).astype(np.float32)
        rows = patches.reshape(10, 8)
        flat = np.stack([[sum(row) / len(row)] * len(row) for row in rows])
        questions.append(((torch.from_numpy(patches),), mean_squared_error(rows, flat)))
    return _judge(
        answer,
        questions,
        "one number is asked for, the mean squared distance of pixels from the mean of their own patch.",
    )


def check_count_new(answer: Any) -> bool:
    """`answer(network, pretrained)`, two state dicts -> how many numbers of `network` are new.

    New are those whose tensor's name is not in `pretrained`.
    """
    questions = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shapes = {
            part: [tuple(map(int, rng.integers(1, 5, size=2))) for _ in range(3)]
            for part in ("encoder", "ups", "decoder_blocks")
        }
        tensors = {
            f"{part}.{i}.weight": torch.zeros(shape)
            for part, of in shapes.items()
            for i, shape in enumerate(of)
        }
        network = {name: value for name, value in tensors.items() if not name.startswith("decoder_blocks")}
        pretrained = {name: value for name, value in tensors.items() if not name.startswith("ups")}
        questions.append(((network, pretrained), sum(a * b for a, b in shapes["ups"])))
    return _judge(
        answer,
        questions,
        "a whole number is asked for: numbers are counted, not tensors, and only those of the network.",
    )


def check_batch_dice(answer: Any) -> bool:
    """`answer(p, y)` -> 1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1), each sum over the whole batch.

    `p` are probabilities and `y` 0 or 1, both (B, X, Y).
    """
    loss = DiceLoss(batch=True, smooth_nr=1.0, smooth_dr=1.0)
    questions = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        p, y = (
            torch.from_numpy(rng.random((3, 4, 5))),
            torch.from_numpy((rng.random((3, 4, 5)) > 0.6).astype(float)),
        )
        y[0] = 0  # a crop without the structure
        questions.append(((p, y), float(loss(p[:, None], y[:, None]))))
    return _judge(
        answer,
        questions,
        "one number is asked for; each sum goes over all crops of the batch, "
        "and 1 is added above and below the line.",
    )


def check_dice(answer: Any) -> bool:
    """`answer(pred, label)` of boolean arrays -> DSC; 0 when one is empty, NaN when both are."""
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.random((2, 4, 5, 3)) < share) for share in (0.3, 0.6)]
    empty = np.zeros((4, 5, 3), bool)
    questions = [((p, label), f1_score(label.ravel(), p.ravel())) for p, label in pairs]
    questions += [((pairs[0][0], empty), 0.0), ((empty, pairs[0][0]), 0.0), ((empty, empty), np.nan)]
    return _judge(
        answer,
        questions,
        "one number is asked for: 0 when only one of the masks is empty, NaN when both are.",
    )


def check_auc(answer: Any) -> bool:
    """`answer(target, score)`, both (n,) -> AUC of what is known; NaN when one outcome is absent.

    Targets are 1, 0 or NaN.
    """
    questions = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        target = np.array([1.0, 0.0, *rng.integers(0, 2, 18), np.nan, np.nan])
        score = rng.integers(0, 6, len(target)) / 5  # several images have the same score
        questions.append(((target, score), roc_auc_score(target[:-2], score[:-2])))
    questions.append(((np.array([1.0, 1.0, np.nan]), np.array([0.2, 0.7, 0.4])), np.nan))
    hint = (
        "one number is asked for; pairs of equal scores count half, "
        "unknown targets not at all, and without any pair it is NaN."
    )
    return _judge(answer, questions, hint)


def check_list_entry(answer: Any) -> bool:
    """`answer(image, mask, patient)` -> an entry of a JSON list; without a label where the mask is None."""
    rng = np.random.default_rng(0)
    questions = []
    for labelled in (True, False, True):
        number = int(rng.integers(1000))
        right = {
            "image": f"scans/{number}.nii.gz",
            "label": f"masks/{number}.nii.gz",
            "patient": f"p{number}",
        }
        arguments = (right["image"], right["label"] if labelled else None, right["patient"])
        questions.append((arguments, right if labelled else {k: v for k, v in right.items() if k != "label"}))
    hint = (
        "a dictionary is asked for from which the reader of lists gets image, "
        "label and patient; without a mask it gets no label."
    )
    return _judge(answer, questions, hint, _reads_as)


def _reads_as(entry: Any, right: dict[str, str]) -> bool:
    """Whether the package, given a list file with this entry, reads what is right."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.json"
        path.write_text(json.dumps({"training": [entry]}), encoding="utf-8")
        content = read_list(path)
    return not content["notes"] and content["cases"]["train"] == [right]


def check_split_by_patient(answer: Any) -> bool:
    """`answer(splits)` -> True when no patient has cases in two of the parts, else False."""
    rng = np.random.default_rng(0)
    questions = []
    for shared in ((), ("train", "val"), ("train", "test"), (), ("val", "test")):
        people = rng.permutation(30)
        owners = {"train": people[:8], "val": people[8:11], "test": people[11:15]}
        # The first of each part has two scans in it, which is no fault.
        owners = {part: [*of, of[0]] for part, of in owners.items()}
        if shared:
            owners[shared[1]].append(owners[shared[0]][-2])
        splits = {
            part: [{"case": f"{part}{i}", "patient": f"p{p}"} for i, p in enumerate(of)]
            for part, of in owners.items()
        }
        questions.append(((splits,), not shared))
    hint = "True or False is asked for; each two of the three parts have to be compared."
    return _judge(
        answer, questions, hint, lambda got, right: isinstance(got, (bool, np.bool_)) and bool(got) == right
    )
