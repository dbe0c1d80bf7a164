"""The run folder: the contract between notebooks, command line and batch runner.

config.yaml          all that is needed to repeat the run, with versions and commit; `segments`: its sittings
log.jsonl            one line a logged step, with at least `step` and `loss`
last/                resumable state; always whole, see `atomic.swap_folder`
checkpoints/         weights that `keep_every` kept, stepN.safetensors
model.safetensors    the weights, once the run is finished
metrics.csv, .json   written by evaluation
.lock                there while a process trains this run, see `only_process`
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from smae_utils.atomic import newest_folder, write_text
from smae_utils.data.tasks.lists import is_list
from smae_utils.errors import UserError
from smae_utils.locks import Timeout, alone, held
from smae_utils.method.checkpoints.save import WEIGHTS
from smae_utils.work.settings import rate
from smae_utils.yaml_text import read_yaml, write_yaml

# Of config.yaml. Since 2, places are absolute, with those relative to the run beside them; and `segments`.
SCHEMA = 2
LOCK = ".lock"
# Settings of how a run is carried out, not of what it computes: another sitting may have others.
FREE_SETTINGS = ("num_workers", "log_every", "save_every", "cache_rate", "keep_every", "track", "store")


def absolute(path: str | Path) -> str:
    """An absolute path with its links as they are.

    A link into a store of data keeps the name and ending that it has here.
    """
    whole = os.path.join(os.getcwd(), path)
    plain = os.path.normpath(whole)
    # "link/.." is the parent of what the link points to: such a path is left as it was typed.
    return (
        plain
        if not os.path.exists(whole) or (os.path.exists(plain) and os.path.samefile(plain, whole))
        else whole
    )


def recorded_places(run: str | Path, **paths: str | Path) -> dict[str, str]:
    """Each path as `NAME`, absolute, and as `NAME_from_run`, relative to the run folder.

    The second survives moving both together.
    """
    out = {}
    for name, path in paths.items():
        out[name] = absolute(path)
        with suppress(ValueError):  # another drive, on Windows
            out[f"{name}_from_run"] = Path(os.path.relpath(out[name], absolute(run))).as_posix()
    return out


@contextmanager
def only_process(path: str | Path) -> Iterator[None]:
    """Within it this process alone trains the run of folder `path`, which is made.

    The system frees the lock of a killed process.

    Raises:
        UserError: while another process is within it.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"{folder} is being trained by another process: wait until it has ended or end it, or choose "
        "another --out"
    )
    with alone(folder / LOCK, refusal):
        yield


def forget_dead_lock(path: str | Path) -> None:
    """Remove the lock that a process left which was killed after its last step, where this can be done."""
    lock = Path(path) / LOCK
    if lock.exists():
        with suppress(Timeout, OSError), held(lock, timeout=0):
            pass


class Run:
    """A run folder opened for reading or writing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def check(
        cls,
        path: str | Path,
        config: dict[str, Any],
        resume: bool = False,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> Run:
        """A folder to start a run in, or one whose run can go on with `config`; nothing is written.

        What decides the result has to be the same: stage, task, what a list says, weights to start
        from, the settings but for `FREE_SETTINGS`, and the cases of each part. Where data and list
        lie now may have changed.

        Args:
            defaults: fills settings that are newer than the run.

        Raises:
            UserError: if the folder already holds a run and `resume` is off, if it was made with other
                settings, or if it holds something else.
        """
        run = cls(path)
        if not run.exists:
            if run.path.is_dir() and any(p.name != LOCK for p in run.path.iterdir()):
                raise UserError(f"{run.path} is not empty and holds no run: choose another --out")
            return run
        if not resume:
            raise UserError(f"{run.path} already holds a run: go on with --resume, or choose another --out")
        before, after = _deciding(run.config, defaults), _deciding(config)
        # With digests of both, the path of the weights does not matter.
        if None not in (before["init_digest"], after["init_digest"]):
            before["init"] = after["init"]
        for key, old in before.items():
            new = after[key]
            # What an older run does not say cannot differ, nor can what a list's record no longer has.
            if key in ("record", "init_digest") and None in (old, new):
                continue
            if key == "record":
                old, new = ({k: v for k, v in one.items() if k in old and k in new} for one in (old, new))
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
                old, new = old.get(key), new.get(key)
            raise UserError(
                f"{run.path} was started with {key}={_short(old)}, now {_short(new)}: resume with the same, "
                "or choose another --out"
            )
        return run

    @classmethod
    def start(
        cls,
        path: str | Path,
        config: dict[str, Any],
        resume: bool = False,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> Run:
        """Create the folder, or open it again to go on, if `check` allows it.

        Free settings and places are then those of `config`.
        """
        run = cls.check(path, config, resume, defaults)
        if not run.exists:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(run.path / "config.yaml", write_yaml({"schema": SCHEMA, **config}))
            return run
        old = run.config
        places_now = {k: config.get(k) for k in PLACES}
        free = {k: v for k, v in config["settings"].items() if k in FREE_SETTINGS}
        going_on = {
            **old,
            "schema": SCHEMA,
            **places_now,
            "settings": {**defaults, **old["settings"], **free},
        }
        going_on = {k: v for k, v in going_on.items() if k not in PLACES or v is not None}
        write_text(run.path / "config.yaml", write_yaml(going_on))
        return run

    @classmethod
    def open(cls, path: str | Path, stage: str | None = None) -> Run:
        """An existing run, optionally of one stage.

        Raises:
            UserError: if there is none, or it is of another stage.
        """
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise UserError(
                f"{run.path} is no run folder (no config.yaml in it): give the --out folder of an earlier "
                "command"
            )
        if stage and run.config.get("stage") != stage:
            raise UserError(f"{run.path} is a {run.config.get('stage')} run, a {stage} run was expected")
        return run

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "config.yaml").is_file()

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml.

        Raises:
            UserError: if it is damaged, no run's, or written by a newer version of this package.
        """
        file = self.path / "config.yaml"
        try:
            content = read_yaml(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file} is damaged ({' '.join(str(error).split())[:120]}): make the run again"
            ) from None
        if not isinstance(content, dict):
            raise UserError(
                f"{file} is no run's configuration (stage, task and settings expected): make the run again"
            )
        schema = content.get("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise UserError(
                f"{file} has schema {schema!r}, this version of smae-utils knows up to {SCHEMA}: install a "
                "newer one"
            )
        if not {"stage", "task", "settings"} <= set(content):
            raise UserError(
                f"{file} is no run's configuration (stage, task and settings expected): make the run again"
            )
        return content

    @property
    def finished(self) -> bool:
        """Whether the weights are there."""
        return (self.path / WEIGHTS).is_file()

    def need_finished(self) -> None:
        """Refuse a run whose weights are not there yet."""
        if not self.finished:
            raise UserError(f"{self.path} is not finished: go on with {self.config['stage']} --resume first")

    def add_segment(self, segment: dict[str, Any]) -> None:
        """Add a sitting to `segments` of config.yaml; `step` of it is the step after which it begins."""
        config = self.config
        said = config.get("segments") or []
        # A run of an older version was one sitting, of which its config.yaml tells.
        if not said and "precision" in config and segment["step"]:
            first = {"step": 0, **{k: config.get("provenance", {}).get(k) for k in ("date", "commit")}}
            said = [
                {
                    **first,
                    **{k: config.get(k) for k in ("device", "precision", "processes")},
                    "num_workers": None,
                }
            ]
        self.note(segments=[*said, segment])

    def note(self, **entries: Any) -> None:
        """Add entries to config.yaml (device, precision, ...)."""
        write_text(self.path / "config.yaml", write_yaml({**self.config, **entries}))

    def log(self, **entry: Any) -> None:
        """Append one line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of log.jsonl."""
        file = self.path / "log.jsonl"
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
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

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, weights) that `keep_every` kept, oldest first."""
        return sorted(
            (int(p.stem.removeprefix("step")), p)
            for p in (self.path / "checkpoints").glob("step*.safetensors")
        )

    def state(self) -> Path | None:
        """Folder of the newest whole state, if any."""
        return newest_folder(self.path / "last", "state.json")


# Entries of config.yaml that say where something lies, and nothing of the result.
PLACES = ("task", "task_from_run", "data", "data_from_run")


def said_of_list(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the list of a run says, whatever it is called and wherever it lies; None of a known task."""
    record = config.get("record")
    return {k: v for k, v in record.items() if k != "title"} if record else None


def _deciding(config: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Of a configuration what decides the result; of a list what it says, not where it lies."""
    settings = {**defaults, **config["settings"]}
    # The two ways to say a learning rate are one.
    settings["lr"] = rate(settings.get("lr", 0.0), settings.pop("base_lr", 0), settings["batch_size"])
    return {
        "stage": config["stage"],
        "task": "a list" if is_list(config["task"]) else config["task"],
        "record": said_of_list(config),
        "init": config.get("init", "scratch"),
        "init_digest": config.get("init_digest"),
        "settings": {k: v for k, v in settings.items() if k not in FREE_SETTINGS},
        "cases": config.get("cases"),
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
