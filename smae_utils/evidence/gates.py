"""What must hold before two arms are compared, measured on the development seed: the phantoms are worth learning and can be learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from smae_utils.build import build_mae
from smae_utils.data import derive_seed, read_case
from smae_utils.evaluation import load_finetuned
from smae_utils.evidence.arms import DEV_SEED, DEV_TEST_SEED, GATES, MAIN, Arm
from smae_utils.evidence.study import Setup, Unit
from smae_utils.lesson import load_crop
from smae_utils.mae import sanity_band
from smae_utils.metrics import mean_auc
from smae_utils.patches import grid_size, mask_noise, patch_statistics, patchify
from smae_utils.runs import Run
from smae_utils.tasks import get_task
from smae_utils.transforms import ResizeRadiograph, middle, prepare
from smae_utils.weights import load_weights

CROPS_PER_SCAN = 12
# Large patches and data sets: fewer crops a scan, so that their pixels fit into memory.
MOST_SCANS, MOST_PATCHES = 60, 50_000
ATLAS_LIMIT, FLOOR_LIMIT = 0.8, 0.2


def run_gates(setup: Setup, task: str, tuned: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """All gates of one task: task, gate, what, value, limit, holds ("" where the figure is for information)."""
    from smae_utils.evidence.run import make_unit

    unit = make_unit(setup, task, DEV_SEED)
    rows = [*_context(unit, tuned), *([] if unit.real else _floor(unit)), *_encoder_matters(unit, tuned)]
    return unit.table(rows, ["gate", "what", "value", "limit", "holds"]).assign(task=task)


def budget(setup: Setup, task: str, tuned: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Gate (d): both arms at one and four times the fine-tuning steps. It holds when four times adds less than a tenth."""
    from smae_utils.evidence.run import make_unit

    unit = make_unit(setup, task, DEV_SEED)
    steps = unit.steps("finetune")
    rows = []
    for arm in MAIN[:2]:
        score = {}
        for times in (1, 4):
            longer = Arm(arm.name, arm.init, arm.tuned_as, (("steps", steps * times),))
            score[times] = _score(unit.run_arm(longer, tuned, name=f"budget{times}x-{arm.name}"))
            rows.append(("d", f"{arm.name} at {times}x steps", score[times], "", ""))
        gain = score[4] / score[1] - 1
        rows.append(("d", f"{arm.name}: relative gain of 4x steps", gain, "<= 0.1", gain <= 0.1))
    return unit.table(rows, ["gate", "what", "value", "limit", "holds"]).assign(task=task)


def _score(scores: dict[str, float]) -> float:
    return scores.get("mauc", scores.get("dsc"))


def _encoder_matters(unit: Unit, tuned: dict[str, tuple[float, float]]) -> list[tuple]:
    """Gate (c): without what the ViT says, or with a random ViT, the network loses."""
    scratch = _score(unit.run_arm(MAIN[0], tuned))
    rows = [("c", "scratch", scratch, "", "")]
    for arm in GATES:
        value = _score(unit.run_arm(arm, tuned))
        rows.append(("c", arm.name, value, f"< {scratch:.3f} - 0.03", value < scratch - 0.03))
    return rows


def _floor(unit: Unit) -> list[tuple]:
    """Gate (b): how far the normalised target can be predicted at all, and how far the masked autoencoder has come."""
    settings = unit.settings("pretrain")
    n = max(6, unit.setup.cases("test", unit.task) // unit.quick // 3)
    images = []
    for how in ({}, {"clean": True}):
        folder = unit.phantoms(n, DEV_TEST_SEED, **how)
        cases = sorted((c for part in unit.record.read_splits(folder, 0, 0).values() for c in part), key=lambda c: c["case"])
        images.append([_prepared(unit, case, settings) for case in cases])
    # The body's box depends on the noise: twins are compared where both boxes have one size, cut at the same place.
    pairs = [(a, b) for a, b in zip(*images) if a.shape == b.shape]
    noisy, clean = (torch.stack([middle(x, settings.crop_size) for x in part]) for part in zip(*pairs))
    targets = []
    for batch in (noisy, clean):
        patches = patchify(batch, settings.patch_size)
        mean, std = patch_statistics(patches)
        targets.append((patches - mean) / std)
    floor = float((targets[0] - targets[1]).square().mean())
    model = build_mae(unit.record, settings).eval()
    load_weights(model, unit.pretrained("self"), require="")
    noise = mask_noise(range(len(noisy)), model.encoder.pos_embed.shape[1])
    with torch.inference_mode():
        out = model(noisy, noise)
    band = sanity_band(noisy, out.mask, model.patch_size, settings.norm_pix_loss)["patch_mean"]
    loss, halfway = float(out.loss), band - 0.5 * (band - floor)
    return [
        ("b", "clean against noisy phantom, MSE of the target", floor, f"<= {FLOOR_LIMIT}", floor <= FLOOR_LIMIT),
        ("b", "loss of predicting the patch mean", band, "", ""),
        ("b", "loss of the masked autoencoder, unseen images", loss, f"<= {halfway:.3f} (halfway)", loss <= halfway),
    ]


def _prepared(unit: Unit, case: dict, settings) -> torch.Tensor:
    """A scan before it is cut to the model's input; a radiograph at that size."""
    if unit.record.spatial_dims == 2:
        return load_crop(unit.record, settings, case)
    return read_case(prepare(unit.record, settings, with_label=False), case)["image"].as_tensor()


def _context(unit: Unit, tuned: dict[str, tuple[float, float]]) -> list[tuple]:
    """Gate (0): position alone, and a linear model on a patch's own pixels and position, do worse than the trained network."""
    network = _score(unit.run_arm(MAIN[0], tuned))
    return _context_2d(unit, network) if unit.record.spatial_dims == 2 else _context_3d(unit)


def _context_2d(unit: Unit, network: float) -> list[tuple]:
    small, splits = ResizeRadiograph((32, 32)), unit.splits("finetune")
    read = prepare(get_task(unit.list_file()), unit.settings("finetune"), with_label=False)
    sets = {}
    for part in ("train", unit.scored):
        pixels = np.stack([small(read_case(read, c))["image"].numpy().ravel() for c in splits[part]])
        sets[part] = pixels, np.stack([c["label"] for c in splits[part]])
    linear = linear_auc(*sets["train"], *sets[unit.scored])
    return [
        ("0", "linear model on pixels, mAUC", linear, f"< {network:.3f} (network)", linear < network - 0.02),
        ("0", "trained network, mAUC", network, "", ""),
    ]


def patch_table(unit: Unit, part: str, features: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    """Random crops of a split, patch by patch: pixels (N, p^d C) or features, index of the patch, presence of each class (N, classes).

    Args:
        part: "train", or "test" for the cases that are scored.
        features: (1, C, *crop_size) -> (1, L, any): what stands for the pixels.
    """
    settings = unit.settings("finetune")
    task = get_task(unit.list_file())
    transform = prepare(task, settings, with_label=True)
    rng = np.random.default_rng(derive_seed(DEV_SEED, len(part)))
    cases = unit.splits("finetune")["train" if part == "train" else unit.scored][:MOST_SCANS]
    length = prod(grid_size(settings.crop_size, settings.patch_size))
    x, y = [], []
    for case in cases:
        data = read_case(transform, case)
        image, label = data["image"].as_tensor(), data["label"].as_tensor()
        for _ in range(max(1, min(CROPS_PER_SCAN, MOST_PATCHES // (len(cases) * length)))):
            corner = [int(rng.integers(n - c + 1)) for n, c in zip(image.shape[1:], settings.crop_size)]
            cut = (slice(None), *(slice(o, o + c) for o, c in zip(corner, settings.crop_size)))
            masks = torch.from_numpy(np.stack(task.class_masks(label[cut][0].numpy()))).float()
            x.append((features or partial(patchify, patch_size=settings.patch_size))(image[cut][None])[0].numpy())
            y.append(_inside(masks[None], settings.patch_size)[0].numpy() > 0.05)
    return {"x": np.concatenate(x), "index": np.tile(np.arange(length), len(x)), "y": np.concatenate(y)}


def _inside(values: torch.Tensor, patch_size) -> torch.Tensor:
    """Mean over each patch: (B, classes, *spatial) -> (B, L, classes)."""
    return patchify(values, patch_size).unflatten(-1, (-1, values.shape[1])).mean(-2)


def _context_3d(unit: Unit) -> list[tuple]:
    train, test = patch_table(unit, "train"), patch_table(unit, "test")
    length = int(train["index"].max()) + 1
    frequency = np.stack([train["y"][train["index"] == i].mean(0) for i in range(length)])
    atlas = mean_auc(test["y"], frequency[test["index"]])[0]
    one_hot = np.eye(length, dtype=np.float32)
    linear = linear_auc(train["x"], train["y"], test["x"], test["y"], one_hot[train["index"]], one_hot[test["index"]])
    model, task, settings = load_finetuned(Run(unit.folder / "scratch"))

    @torch.inference_mode()
    def certainty(crop: torch.Tensor) -> torch.Tensor:
        logits = model(crop).float()
        return _inside(logits.softmax(1)[:, 1:] if task.exclusive else logits.sigmoid(), settings.patch_size)

    network = mean_auc(test["y"], patch_table(unit, "test", certainty)["x"])[0]
    return [
        ("0", "class of a patch from its position alone, AUC", atlas, f"<= {ATLAS_LIMIT}", atlas <= ATLAS_LIMIT),
        ("0", "class of a patch from its pixels and position, linear, AUC", linear, f"< {network:.3f} (network)", linear < network - 0.02),
        ("0", "class of a patch by the trained network, AUC", network, "", ""),
    ]


def principal(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """64 principal components of both, fitted on the first; fewer where it has fewer rows or columns."""
    reduce = make_pipeline(StandardScaler(), PCA(min(64, *x.shape), random_state=0), StandardScaler()).fit(x)
    return reduce.transform(x), reduce.transform(x_test)


def linear_auc(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, extra=None, extra_test=None) -> float:
    """Mean AUC of a logistic regression a class on 64 principal components (and extra columns)."""
    a, b = principal(x, x_test)
    if extra is not None:
        a, b = np.hstack([a, extra]), np.hstack([b, extra_test])
    scores = np.zeros(y_test.shape)
    for i in range(y.shape[1]):
        if 0 < y[:, i].sum() < len(y):
            scores[:, i] = LogisticRegression(C=0.1, max_iter=300).fit(a, y[:, i]).decision_function(b)
    return mean_auc(y_test, scores)[0]
