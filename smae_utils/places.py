"""Where presets, notebooks, data and runs lie: in a clone, or beside an installed package.

Standard library only.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from smae_utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def shipped(folder: str) -> Path:
    """`presets` or `notebooks`: inside an installed package, or beside it in a clone."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else ROOT / folder


def work_root() -> Path:
    """Where `data/` and `runs/` go: the clone, or without one the current folder."""
    return ROOT if is_clone() else Path.cwd()


def run_folder(task: str, run_dir: str = "", preset: str = "demo", seed: int = 0) -> Path:
    """Where a notebook keeps its runs: `run_dir`, or `runs/TASK-PRESET-seedN`."""
    name = f"{Path(task).stem}-{Path(preset).stem}-seed{seed}"
    return Path(run_dir) if run_dir else work_root() / "runs" / name


def is_clone() -> bool:
    """Whether this package lies in a clone of its repository, as opposed to an installed one."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "constraints.txt").is_file()


def clone(what: str) -> Path:
    """The clone's folder, for a command that works on `what` of it.

    Raises:
        UserError: where the package is installed without one.
    """
    if not is_clone():
        raise UserError(
            f"this package is installed in {ROOT}, without {what}: clone the repository and run the command "
            "there"
        )
    return ROOT


def need_notebook_packages(*names: str) -> None:
    """Refuse to go on without packages of the extra `notebooks`, which the rest of the package does not need.

    Raises:
        UserError: where one of `names` is not installed, with the command that installs it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(
            f"this needs {' and '.join(missing)}, not installed here: pip install 'smae-utils[notebooks]'"
        )
