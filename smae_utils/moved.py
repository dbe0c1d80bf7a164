"""Modules that lay flat in the package before they got floors: their old names still lead to them, with a
warning. To go with version 0.3.

Where one was divided, its old name finds what is in any of the parts. Three of many parts (`data`,
`inference`, `training`) and those that left the package (`demo`, `environment`, `evidence`, `readme`) have
none.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "accel": "work.devices",
    "build": "work.build work.losses work.optimizer",
    "check": "work.check work.estimate",
    "cost": "work.cost",
    "dicom": "data.dicom",
    "download": "data.download",
    "evaluation": "work.evaluation work.comparison data.writing",
    "explorer": "show.explorer",
    "export": "work.export",
    "foreign": "method.checkpoints.other_libraries method.checkpoints.adapt",
    "large": "data.out_of_core",
    "lesson": "show.notebook_helpers places",
    "loop": "work.loop",
    "mae": "method.mae",
    "metrics": "work.metrics",
    "patches": "method.patches method.masking",
    "pictures": "data.pictures",
    "plots": "show.plots show.result_plots",
    "predict": "predict_files",
    "progress": "work.progress",
    "reading": "data.reading data.volumes data.labels data.same_place data.pictures",
    "runs": "work.run_folder work.run_data work.provenance atomic",
    "scene": "show.masked_scene",
    "settings": "work.settings work.presets",
    "sources": "show.explorer_source",
    "tasks": "data.tasks",
    "timm_glue": "timm_library",
    "transforms": "data.transforms data.crops",
    "unetr": "method.unetr",
    "vit": "method.vit",
    "weights": "method.checkpoints.load method.checkpoints.save method.checkpoints.facts",
}


class _Same(Loader):
    """Gives the module of another name."""

    def __init__(self, name: str):
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system wrote the old name there


class _Several(Loader):
    """Gives a module that has the names of several: of one that was divided."""

    def __init__(self, names: list[str]):
        self.names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, f"Divided into {', '.join(self.names)}.")

        def find(name: str) -> object:
            for part in map(importlib.import_module, self.names):
                if hasattr(part, name):
                    return getattr(part, name)
            raise AttributeError(f"module {spec.name} has no attribute {name!r}")

        vars(module)["__getattr__"] = find
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to be done."""


class _OldNames(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "smae_utils" or name not in MOVED:
            return None
        new = [f"{package}.{part}" for part in MOVED[name].split()]
        warnings.warn(f"{fullname} is now {', '.join(new)}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Same(new[0]) if len(new) == 1 else _Several(new))


def install() -> None:
    """From now on old names are found."""
    sys.meta_path.append(_OldNames())
