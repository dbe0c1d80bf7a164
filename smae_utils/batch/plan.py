"""A batch as a YAML file says it, expanded into runs and checked whole before anything starts.

    parameters: {task: btcv, preset: demo}        # of every run
    cross: {seed: [0, 1, 2]}                      # one run for each combination
    runs:
      pretrain: {notebook: 02_self_pretraining}
      finetune: {notebook: 03_fine_tuning, after: pretrain}
      evaluate: {notebook: 04_evaluation, after: finetune}

`after` joins runs that agree in all that both cross: here each fine-tuning waits for the pre-training of its
own seed. A text among the parameters may name others: `run_dir: runs/{task}-{seed}`.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from smae_utils.errors import UserError
from smae_utils.places import run_folder
from smae_utils.run_notebook import check_parameters, notebook_path
from smae_utils.yaml_text import read_yaml

TOP = ("parameters", "cross", "runs")
OF_A_RUN = ("notebook", "parameters", "cross", "after")
# Of a run's folder, beside what a batch writes itself.
NAME = re.compile(r"(?!(?:slurm|batch\.json|results\.csv|index\.html)$)\w[\w .+-]{0,99}")


@dataclass(frozen=True)
class Planned:
    """One run of a batch: of a notebook, or of a function.

    Attributes:
        name: of the run and of its folder: its group, and what it crosses.
        notebook: the file that is executed; None where a function is.
        parameters: all that are given, in the types that the notebook declares.
        crossed: those of them that tell this run from its siblings.
        after: names of the runs that must be done before it.
        function: "module:name" of what is called with the parameters, in place of a notebook; what it returns
            is kept as JSON. Files name none; it is for programs (`run.run_planned`).
    """

    name: str
    notebook: Path | None
    parameters: dict[str, Any]
    crossed: dict[str, Any]
    after: tuple[str, ...] = ()
    function: str = ""

    @property
    def program(self) -> str:
        """What is executed, in a word."""
        return self.notebook.stem if self.notebook else self.function

    @property
    def key(self) -> str:
        """Changes with the notebook's content, the parameters and the version of this package: what is done
        with another key is not done.
        """
        file = self.notebook
        content = self.function
        if file:
            content = _hash_of(file, file.stat().st_mtime_ns) if file.is_file() else "gone"
        said = [content, self.parameters, _version()]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def trains_in(self) -> Path | None:
        """The folder in which the notebook keeps its trainings, of a notebook like those of this package."""
        if "task" not in self.parameters:
            return None
        given = {k: self.parameters[k] for k in ("task", "run_dir", "preset", "seed") if k in self.parameters}
        return run_folder(**given).absolute()


@lru_cache
def _hash_of(file: Path, changed_ns: int) -> str:
    """Of a file's content, read once for each time it was changed: a batch asks for it all the time."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@lru_cache
def _version() -> str:
    return version("smae-utils")


def read_batch(file: str | Path) -> list[Planned]:
    """The runs of a batch, each after those that it waits for.

    Raises:
        UserError: for a file that is no batch, an unknown word, notebook or parameter, a value of another
            type, a circle, or two runs with one name or one folder.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the YAML file of a batch")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict) or not content["runs"]:
        raise UserError(f"{path} is no batch: expected 'runs', each with a 'notebook'")
    _known(path, "the batch", content, TOP)
    specs = {str(name): spec for name, spec in content["runs"].items()}
    groups = {name: _expand(path, name, spec, content) for name, spec in specs.items()}
    runs = [_joined(path, run, specs[group], groups) for group, of in groups.items() for run in of]
    _apart(path, runs)
    try:
        order = list(TopologicalSorter({run.name: run.after for run in runs}).static_order())
    except CycleError as error:
        raise UserError(
            f"{path}: runs wait for each other in a circle: {' -> '.join(error.args[1])}"
        ) from None
    return sorted(runs, key=lambda run: order.index(run.name))


def _known(path: Path, what: str, given: Mapping, known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{path}: {what} has no {name!r}: expected some of {', '.join(known)}{meant}")


def _mapping(path: Path, what: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} must be a mapping of names to values, got {value!r}")
    return {str(name): content for name, content in value.items()}


def _expand(path: Path, group: str, spec: Any, content: dict) -> list[Planned]:
    """One run for each combination of what a group crosses; whom they wait for is not said yet."""
    spec = _mapping(path, f"run {group}", spec)
    _known(path, f"run {group}", spec, OF_A_RUN)
    if not isinstance(spec.get("notebook"), str):
        given = spec.get("notebook")
        raise UserError(f"{path}: run {group} names no 'notebook': expected a path or a name, got {given!r}")
    try:
        notebook = notebook_path(spec["notebook"]).resolve()
    except UserError as error:
        raise UserError(f"{path}: run {group}: {error}") from None
    own, own_cross = (_mapping(path, f"{key!r} of {group}", spec.get(key)) for key in ("parameters", "cross"))
    fixed = {**_mapping(path, "'parameters' of the batch", content.get("parameters")), **own}
    cross = {**_mapping(path, "'cross' of the batch", content.get("cross")), **own_cross}
    for name, values in cross.items():
        if not isinstance(values, list) or not values or len({str(v) for v in values}) < len(values):
            raise UserError(
                f"{path}: {name!r} that {group} crosses must be a list of different values, got {values!r}"
            )
        if name in own:
            raise UserError(f"{path}: run {group} has {name!r} as a fixed parameter and crosses it: keep one")
    runs = []
    for point in itertools.product(*cross.values()):
        crossed = dict(zip(cross, point))
        values = {**fixed, **crossed}
        try:
            values = {name: _filled(name, value, values) for name, value in values.items()}
            values = check_parameters(notebook, values)
        except UserError as error:
            raise UserError(f"{path}: run {group}: {error}") from None
        # Relative to where the batch is planned, whoever asks for it later.
        if values.get("run_dir"):
            values["run_dir"] = os.path.abspath(values["run_dir"])
        name = "-".join([group, *(f"{k}{_short(v)}" for k, v in crossed.items())])
        runs.append(Planned(name, notebook, values, crossed))
    return runs


def _filled(name: str, value: Any, values: dict[str, Any]) -> Any:
    """A text with the other parameters that it names in braces."""
    if not isinstance(value, str) or "{" not in value:
        return value
    try:
        return value.format_map({k: v for k, v in values.items() if k != name})
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{name}: {value!r} names {error}, which is no other parameter of this run") from None


def _short(value: Any) -> str:
    """A value as a part of a name of a file."""
    text = (
        re.sub(r"\.(ya?ml|json|csv|ipynb)$", "", Path(value).name) if isinstance(value, str) else str(value)
    )
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text)


def _joined(path: Path, run: Planned, spec: dict, groups: dict[str, list[Planned]]) -> Planned:
    """The run with the names of those that it waits for."""
    after = (spec or {}).get("after") or []
    names: list[str] = []
    for group in map(str, after if isinstance(after, list) else [after]):
        if group not in groups:
            raise UserError(
                f"{path}: run {run.name} waits for {group!r}: expected some of {', '.join(groups)}"
            )
        found = [
            other.name
            for other in groups[group]
            if all(other.crossed[k] == v for k, v in run.crossed.items() if k in other.crossed)
        ]
        if not found:
            raise UserError(f"{path}: run {run.name} waits for {group}, of which none has its {run.crossed}")
        names += found
    return replace(run, after=tuple(names))


def _apart(path: Path, runs: list[Planned]) -> None:
    """Refuse two runs that would write to one place."""
    names: dict[str, Planned] = {}
    folders: dict[tuple[str, Path], Planned] = {}
    for run in runs:
        if not NAME.fullmatch(run.name):
            raise UserError(
                f"{path}: {run.name[:120]!r} cannot be the name of a run's folder: expected up to 100 "
                "letters, digits, spaces, - _ . +, and none of slurm, batch.json, results.csv, index.html"
            )
        if run.name.casefold() in names:
            raise UserError(
                f"{path}: two runs would be called {run.name}: give their groups, or the values that "
                "they cross, names that differ"
            )
        names[run.name.casefold()] = run
        if run.trains_in is None:
            continue
        other = folders.setdefault((str(run.notebook), run.trains_in), run)
        if other is not run:
            raise UserError(
                f"{path}: {other.name} and {run.name} would both train in {run.trains_in}: give run_dir with "
                "what tells them apart, as run_dir: runs/{task}-{seed}"
            )
