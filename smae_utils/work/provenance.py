"""By what a result was made: date, machine, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent


def _git(*words: str) -> str:
    """What git says of this package's folder; "" where there is no git or repository, or git refuses."""
    command = ["git", "-C", str(PACKAGE), *words]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def commit() -> str:
    """The commit this package is of, with "-dirty" when it was changed since; else "unknown".

    An environment often lies inside another project's repository: only one that tracks this package counts.
    """
    if not _git("ls-files", "--error-unmatch", "--", "errors.py"):
        return "unknown"
    name = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    # Only what the figures follow from counts: results written since do not make a commit "dirty".
    changed = name != "unknown" and _git("status", "--porcelain", "--", ".", "../presets", "../tools")
    return f"{name}-dirty" if changed else name


def now() -> str:
    """Date and time with the offset to UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    """Versions, commit, machine, date: where a number comes from."""
    packages = {}
    for name in ("smae-utils", "torch", "timm", "monai", "accelerate", "numpy", "nibabel", "scikit-learn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "date": now(),
        "commit": commit(),
        "machine": machine_name(),
        "python": platform.python_version(),
        "packages": packages,
    }


def machine_name() -> str:
    """Processor and number of cores, in words."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"
