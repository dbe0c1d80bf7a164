"""A study as a file says it: data, rows, arms, grids and seeds.

It is read from `tools/study/NAME.yaml` and checked before anything runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from smae_utils.errors import UserError
from smae_utils.yaml_text import read_yaml

Row = int | str  # labelled training cases: a number, or a share of the training patients as "10%"


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        init: "scratch", the name of a pre-training, or "scaled": random weights as large as those of `like`.
        like: the pre-training from which `scaled` takes sizes.
        tuned_as: whose learning rates it takes; empty: its own.
        settings: settings of fine-tuning that it has of its own.
        equal_compute: the pre-training whose counted FLOPs it spends on more fine-tuning steps.
        rows: only these rows; empty: all.
    """

    init: str = "scratch"
    like: str = ""
    tuned_as: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    equal_compute: str = ""
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before the fresh seeds run.

    Attributes:
        name, title: of the file, and in words.
        task: a task, or how a list is made of a table: {table, image, folder, patient, classes}.
        metric: the primary figure, "dsc" or "mauc".
        seeds, dev_seed: fresh seeds; the seed on which designs, recipes and rates are chosen.
        dev_share: share of the training patients that score the development seed; never a test case.
        folds: patient-wise folds, of which each is the test part once; 0: the task's own test cases.
        split_seed: draws folds and development patients.
        labelled: rows of the main table.
        tune_row: the row at which rates are tuned.
        crops: crops of a step, from as many scans as there are, at most this many.
        all, pretrain, finetune: settings.
        pretrainings: name -> settings, and `images`: "all" training images or those of the row's "labelled"
            cases.
        arms: name -> `Arm`.
        grids: arm -> settings to try; `lr` is the learning rate itself. All of one size.
        designs: name -> settings to try with scratch alone, to find a set-up with room.
        probes: name -> settings with which a linear probe compares tokens of a random encoder and of the
            pre-trained one of `recipe_arm`.
        recipes: name -> settings of pre-training (key `pretrain`) to try one at a time, with `recipe_arm`
            at `recipe_rows`.
    """

    name: str
    title: str
    task: str | dict[str, Any]
    metric: str
    seeds: tuple[int, ...]
    dev_seed: int
    labelled: tuple[Row, ...]
    tune_row: Row
    arms: dict[str, Arm]
    grids: dict[str, list[dict[str, Any]]]
    dev_share: float = 0.2
    folds: int = 0
    split_seed: int = 2026
    crops: int = 4
    all: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    pretrainings: dict[str, dict[str, Any]] = field(default_factory=dict)
    designs: dict[str, dict[str, Any]] = field(default_factory=dict)
    design_rows: tuple[Row, ...] = ()
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe_arm: str = "self_all"
    recipe_rows: tuple[Row, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures that are kept: the primary one, and HD95 beside DSC."""
        return (self.metric, "hd95_mm") if self.metric == "dsc" else (self.metric,)

    def setup(self, arm: str, setting: dict[str, Any], more: dict[str, Any] | None = None) -> str:
        """Eight letters that change with anything that decides a figure of this arm.

        Rows of another set-up are not taken for this one's.
        """
        said = [
            self.task,
            self.all,
            self.pretrain,
            self.finetune,
            self.pretrainings,
            self.crops,
            self.split_seed,
            self.dev_share,
            self.folds,
        ]
        said += [dataclasses.asdict(self.arms[arm]), setting, more or {}]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]

    def units(self, seeds: tuple[int, ...] = ()) -> list[tuple[int, int]]:
        """(seed, fold) of every unit of the main table, seed by seed."""
        return [(seed, fold) for seed in seeds or self.seeds for fold in range(max(1, self.folds))]


def read_study(name: str) -> Study:
    """The study of `tools/study/NAME.yaml`, or of the YAML file `name`.

    Raises:
        UserError: for an unknown name, or a file that names what is not there.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.yaml"))
        raise UserError(
            f"unknown study {name!r}: expected one of {', '.join(known)}, or the path of a YAML file"
        )
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
        arms = {
            key: Arm(**{k: tuple(v) if isinstance(v, list) else v for k, v in (value or {}).items()})
            for key, value in content.pop("arms").items()
        }
        plain = {
            key: tuple(value) if key in ("seeds", "labelled", "design_rows", "recipe_rows") else value
            for key, value in content.items()
        }
        study = Study(name=path.stem, arms=arms, **plain)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no study: {' '.join(str(error).split())}; compare it with one of tools/study"
        ) from None
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    if len({len(grid) for grid in study.grids.values()}) > 1:
        raise UserError(
            f"{path}: grids must be of one size, got { ({k: len(g) for k, g in study.grids.items()}) }"
        )
    for name, arm in study.arms.items():
        known = {"scratch", "scaled", *study.pretrainings}
        if arm.init not in known or (arm.init == "scaled" and arm.like not in study.pretrainings):
            raise UserError(
                f"{path}: arm {name} starts from {arm.like or arm.init!r}: expected one of "
                f"{', '.join(sorted(known))}"
            )
        if arm.equal_compute and arm.equal_compute not in study.pretrainings:
            raise UserError(
                f"{path}: arm {name} spends the compute of {arm.equal_compute!r}, which is no pre-training"
            )
        if (arm.tuned_as or name) not in study.grids:
            raise UserError(
                f"{path}: arm {name} has no grid {arm.tuned_as or name!r}: give one, or say tuned_as"
            )
    if "scratch" not in study.arms:
        raise UserError(f"{path} has no arm scratch, with which all others are compared")


def shortened(study: Study, times: int) -> Study:
    """The same study with `times` fewer steps, for tests: its figures mean nothing."""

    def cut(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            k: max(2, math.ceil(v / times)) if k == "steps" else 1 if k == "warmup_steps" else v
            for k, v in settings.items()
        }

    def cut_both(more: dict[str, Any]) -> dict[str, Any]:
        return {k: cut(v) if k in ("pretrain", "finetune") else v for k, v in more.items()}

    tried = {
        part: {name: cut_both(more) for name, more in getattr(study, part).items()}
        for part in ("designs", "recipes", "probes")
    }
    shorter = {part: cut(getattr(study, part)) for part in ("pretrain", "finetune")}
    return dataclasses.replace(
        study, **shorter, **tried, pretrainings={k: cut(v) for k, v in study.pretrainings.items()}
    )
