"""Preset files, and how the settings of a stage come of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import yaml

from smae_utils.data.tasks import Task, get_task
from smae_utils.errors import UserError
from smae_utils.places import shipped
from smae_utils.work.settings import (
    ARMS,
    STAGE_SETTINGS,
    STAGES,
    FinetuneSettings,
    PretrainSettings,
    StageSettings,
    make_settings,
)
from smae_utils.yaml_text import read_yaml

# Two ways to say one thing: whichever is said last counts.
PAIRS = (("epochs", "steps"), ("warmup_steps", "warmup_epochs"), ("lr", "base_lr"))

EITHER = (*PAIRS, *((b, a) for a, b in PAIRS))


def load_preset(name: str) -> dict[str, Any]:
    """A preset by name, or by the path of a YAML file; "" says nothing, so that the defaults stand."""
    if not name:
        return {}
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped("presets") / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in shipped("presets").glob("*.yaml"))
        raise UserError(
            f"unknown preset {name!r}: expected one of {', '.join(known)}, or the path of a YAML file"
        )
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with sections all, TASK, got {type(content).__name__}")
    for name, section in content.items():
        if name != "all":
            _known_task(name, path)
        for where, part in (
            (name, section),
            *(
                (f"{name}: {stage}", (section or {}).get(stage))
                for stage in STAGES
                if isinstance(section, dict)
            ),
        ):
            if part is not None and not isinstance(part, dict):
                raise UserError(f"section {where} of {path} must be a mapping of settings, got {part!r}")
            for arm in ARMS:
                if isinstance(said := (part or {}).get(arm), (str, int, float, list)):
                    raise UserError(
                        f"section {where}: {arm} of {path} must be a mapping of settings, got {said!r}"
                    )
    return content


def _known_task(name: str, path: Path) -> None:
    try:
        get_task(name)
    except UserError as error:
        raise UserError(f"{path} has a section {name!r}: {error}") from None


@overload
def resolve(
    task: Task,
    stage: Literal["pretrain"],
    preset: str,
    arm: str = "scratch",
    overrides: Mapping[str, Any] | None = None,
) -> PretrainSettings: ...


@overload
def resolve(
    task: Task,
    stage: Literal["finetune"],
    preset: str,
    arm: str = "scratch",
    overrides: Mapping[str, Any] | None = None,
) -> FinetuneSettings: ...


@overload
def resolve(
    task: Task, stage: str, preset: str, arm: str = "scratch", overrides: Mapping[str, Any] | None = None
) -> StageSettings: ...


def resolve(
    task: Task, stage: str, preset: str, arm: str = "scratch", overrides: Mapping[str, Any] | None = None
) -> StageSettings:
    """Settings of a stage, from what counts least to what counts most.

    That is: defaults; the preset (all, then the task; general, then the stage, then the arm); a list file's
    own settings; `overrides`.

    Raises:
        UserError: for an unknown preset, key, or a value of the wrong type, naming the right ones.
    """
    cls = STAGE_SETTINGS[stage]
    content = load_preset(preset)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    sections = [
        *((f"preset {preset!r}", content.get(name) or {}) for name in ("all", task.like, task.name)),
        (f"list {task.name}", task.settings),
    ]
    for where, section in sections:
        layers += [(where, section), (where, section.get(stage) or {})]
        if stage == "finetune":
            layers.append((where, (section.get(stage) or {}).get(arm) or {}))
    layers.append(("--set", overrides or {}))
    for where, layer in layers:
        found = {k: v for k, v in layer.items() if k not in (*STAGES, *ARMS) or where == "--set"}
        for name, other in EITHER:
            # For these, 0 means: take the other.
            means_other = name in ("steps", "epochs", "base_lr") and not found.get(name)
            # The later layer counts, also over the other way to say it.
            if name in found and other not in found and not means_other:
                values[other], origin[other] = 0, where
        values.update(found)
        origin.update(dict.fromkeys(found, where))
    return make_settings(cls, values, where=origin)
