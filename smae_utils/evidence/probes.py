"""Linear probes of the encoder's tokens, random against pre-trained: what can be read off them without fine-tuning?"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from torch import Tensor

from smae_utils.build import build_model
from smae_utils.data import derive_seed
from smae_utils.evidence.gates import linear_auc, patch_table, principal
from smae_utils.evidence.study import Setup, Unit
from smae_utils.lesson import load_crop
from smae_utils.phantoms import patient_latents
from smae_utils.weights import load_weights

# Phantoms drawn for reading latents only: these many to fit, these many to score.
LATENT_SEED, LATENT_FIT, LATENT_TEST = 79, 160, 80

Tokens = Callable[[Tensor], Tensor]  # (B, C, *crop_size) -> (B, L, D)


def probe(setup: Setup, task: str, seed: int) -> pd.DataFrame:
    """Rows of one seed: `linear_probe_auc` for the labels, `latents_r2` for the patient's latents (phantoms only)."""
    from smae_utils.evidence.run import make_unit

    unit = make_unit(setup, task, seed)
    settings = unit.settings("finetune")
    patients = None if unit.real else _patients(unit)
    rows = []
    for arm in ("random", "pretrained"):
        torch.manual_seed(derive_seed(seed, 40))
        model = build_model(unit.record, settings).eval()
        if arm == "pretrained":
            load_weights(model, unit.pretrained("self"))
        tokens = _tokens_of(model.encoder)
        figures = {"linear_probe_auc": _labels_auc(unit, tokens)}
        if patients:
            figures["latents_r2"] = _latents_r2(unit, tokens, *patients)
        rows += [{"task": task, "arm": f"probe_{arm}", "seed": seed, "metric": k, "value": v} for k, v in figures.items()]
    return unit.table(rows)


def _tokens_of(encoder: torch.nn.Module) -> Tokens:
    @torch.inference_mode()
    def tokens(crops: Tensor) -> Tensor:
        return torch.cat([encoder(batch)[0][:, encoder.prefix_tokens :] for batch in crops.split(32)])

    return tokens


def _labels_auc(unit: Unit, tokens: Tokens) -> float:
    """Classes of each patch from its token; findings of a radiograph from the mean of its tokens."""
    if unit.record.spatial_dims == 3:
        train, test = (patch_table(unit, part, tokens) for part in ("train", "test"))
        return linear_auc(train["x"], train["y"], test["x"], test["y"])
    settings, splits, sets = unit.settings("finetune"), unit.splits("finetune"), []
    for part in ("train", unit.scored):
        means = [tokens(load_crop(unit.record, settings, case)[None])[0].mean(0).numpy() for case in splits[part]]
        sets += [np.stack(means), np.stack([c["label"] for c in splits[part]])]
    return linear_auc(*sets)


def _patients(unit: Unit) -> tuple[Tensor, np.ndarray]:
    """The middles of scans of patients drawn for this alone, one scan each, (N, C, *crop_size), and their latents (N, 12)."""
    total = max(4, (LATENT_FIT + LATENT_TEST) // unit.quick)
    # A patient of the X-ray phantom has about two radiographs.
    folder = unit.phantoms(total * (2 if unit.record.spatial_dims == 2 else 1), LATENT_SEED)
    cases = {c["patient"]: c for part in unit.record.read_splits(folder, 0, 0).values() for c in part}
    settings = unit.settings("finetune")
    ordered = [cases[name] for name in sorted(cases)]
    np.random.default_rng(LATENT_SEED).shuffle(ordered)
    ordered = ordered[:total]
    latents = np.stack([patient_latents(unit.task, LATENT_SEED, int(re.findall(r"\d+", case["patient"])[-1])) for case in ordered])
    return torch.stack([load_crop(unit.record, settings, case) for case in ordered]), latents


def _latents_r2(unit: Unit, tokens: Tokens, images: Tensor, latents: np.ndarray) -> float:
    """Mean R2, over the twelve latents, of a ridge regression on 64 principal components of all tokens of a scan's middle; unseen patients."""
    x = tokens(images).flatten(1).numpy()
    n = min(max(4, LATENT_FIT // unit.quick), len(x) * 2 // 3)
    a, b = principal(x[:n], x[n:])
    return float(r2_score(latents[n:], RidgeCV(np.logspace(-1, 4, 11)).fit(a, latents[:n]).predict(b)))
