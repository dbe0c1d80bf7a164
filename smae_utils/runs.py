"""The run folder: the contract between notebooks, command line and batch runner.

config.yaml         everything needed to repeat the run, versions and git commit included
log.jsonl           one line a logged step, with at least `step` and `loss`
last/               resumable state; always whole, see `swap_in`
model.safetensors   the weights, once the run is finished
metrics.csv, .json  written by evaluation
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from smae_utils.errors import UserError
from smae_utils.weights import WEIGHTS


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _git(*words: str) -> str:
    """What git says of the folder of this package; "" where there is no git or no repository."""
    try:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def provenance() -> dict[str, Any]:
    """Versions, commit, machine, date: where a number comes from."""
    packages = {}
    for name in ("smae-utils", "torch", "timm", "monai", "accelerate", "numpy", "nibabel", "scikit-learn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    # Only what the figures follow from counts: results written since do not make a commit "dirty".
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    if commit != "unknown" and _git("status", "--porcelain", "--", ".", "../presets"):
        commit += "-dirty"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "machine": machine_name(),
        "python": platform.python_version(),
        "packages": packages,
    }


def machine_name() -> str:
    """Processor and number of cores, in words."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


class Run:
    """A run folder opened for reading or writing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def start(cls, path: str | Path, config: dict[str, Any], resume: bool = False, defaults: dict[str, Any] = MappingProxyType({})) -> Run:
        """Create the folder, or open it again to go on; `defaults` fills settings that an older run does not have.

        Raises:
            UserError: if the folder already holds a run and `resume` is off, or if it was made with other settings.
        """
        run = cls(path)
        file = run.path / "config.yaml"
        if not file.is_file():
            if run.path.is_dir() and any(run.path.iterdir()):
                raise UserError(f"{run.path} is not empty and holds no run: choose another --out")
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(file, yaml.safe_dump(config, sort_keys=False))
            return run
        if not resume:
            raise UserError(f"{run.path} already holds a run: go on with --resume, or choose another --out")
        old = run.config
        # Settings that are newer than the run have their defaults in it.
        old["settings"] = {**defaults, **old["settings"]}
        old.setdefault("record", config.get("record"))
        for key in ("stage", "task", "record", "data", "init", "settings", "cases"):
            if old.get(key) != config.get(key):
                before, now = old.get(key), config.get(key)
                if isinstance(before, dict) and isinstance(now, dict):
                    name = next(k for k in {**before, **now} if before.get(k) != now.get(k))
                    key, before, now = name, before.get(name), now.get(name)
                raise UserError(f"{run.path} was started with {key}={before!r}, now {now!r}: resume with the same, or choose another --out")
        return run

    @classmethod
    def open(cls, path: str | Path, stage: str | None = None) -> Run:
        """An existing run, optionally of one stage.

        Raises:
            UserError: if there is none, or it is of another stage.
        """
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise UserError(f"{run.path} is no run folder (no config.yaml in it): give the --out folder of an earlier command")
        if stage and run.config.get("stage") != stage:
            raise UserError(f"{run.path} is a {run.config.get('stage')} run, a {stage} run was expected")
        return run

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml."""
        file = self.path / "config.yaml"
        try:
            content = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is damaged ({' '.join(str(error).split())[:120]}): make the run again") from None
        if not isinstance(content, dict) or not {"stage", "task", "settings"} <= set(content):
            raise UserError(f"{file} is no run's configuration (stage, task and settings expected): make the run again")
        return content

    @property
    def finished(self) -> bool:
        """Whether the weights are there."""
        return (self.path / WEIGHTS).is_file()

    def note(self, **entries: Any) -> None:
        """Add entries to config.yaml (device, precision, ...)."""
        write_text(self.path / "config.yaml", yaml.safe_dump({**self.config, **entries}, sort_keys=False))

    def log(self, **entry: Any) -> None:
        """Append one line to log.jsonl."""
        with (self.path / "log.jsonl").open("a") as handle:
            handle.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of log.jsonl."""
        file = self.path / "log.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        out = []
        for line in lines:
            try:
                out.append(json.loads(line))
            except ValueError:  # the line that a kill cut short
                continue
        return out

    def cut_log(self, step: int) -> None:
        """Drop lines after `step`: they are written again when a run goes on from there."""
        kept = [line for line in self.read_log() if line["step"] <= step]
        write_text(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file; NaN becomes null, which every reader understands."""
        write_text(self.path / name, json.dumps(_no_nan(content), indent=1))

    def swap_in(self, new: Path, final: Path) -> None:
        """Replace the folder `final` by the whole folder `new`. A kill in between leaves `new`, which `state` then finds."""
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, weights) that `keep_every` kept, oldest first."""
        return sorted((int(p.stem.removeprefix("step")), p) for p in (self.path / "checkpoints").glob("step*.safetensors"))

    def state(self) -> Path | None:
        """Folder of the newest whole state, if any."""
        last, new, old = (self.path / name for name in ("last", "last.new", "last.old"))
        if not last.exists():  # killed between the two renames of `swap_in`: finish what it was doing
            for folder in (new, old):
                if (folder / "state.json").is_file():
                    folder.rename(last)
                    break
        return last if (last / "state.json").is_file() else None


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
