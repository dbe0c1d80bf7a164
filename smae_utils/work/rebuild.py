"""A run's network again, with its weights, and what it was made for."""

from __future__ import annotations

from torch import nn

from smae_utils.data.tasks import Task, task_of
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.work.build import build_mae, build_model
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import Asked, FinetuneSettings, PretrainSettings, make_settings


def settings_of(run: Run, kind: type[Asked]) -> Asked:
    """The settings that a run was made with."""
    return make_settings(kind, run.config["settings"], where=str(run.path / "config.yaml"))


def load_pretrained(run: Run) -> tuple[MaskedAutoencoder, Task, PretrainSettings]:
    """The masked autoencoder of a finished pre-training run, in eval mode."""
    task, settings = task_of(run.config), settings_of(run, PretrainSettings)
    model = build_mae(task, settings)
    load_weights(model, run.path, require="")
    return model.eval(), task, settings


def load_finetuned(run: Run) -> tuple[nn.Module, Task, FinetuneSettings]:
    """The network of a finished fine-tuning run, in eval mode."""
    task, settings = task_of(run.config), settings_of(run, FinetuneSettings)
    model = build_model(task, settings)
    load_weights(model, run.path, require="")
    return model.eval(), task, settings
