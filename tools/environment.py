"""Making the environment: standard library only, since nothing else is there yet."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from smae_utils.errors import UserError
from smae_utils.places import ROOT, clone

VENV = ROOT / ".venv"


def venv_python() -> Path:
    """The environment's interpreter."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment() -> None:
    """Create `.venv` and install the pinned packages into it, unless that was done for these very files.

    Raises:
        UserError: for an old Python, or when pip fails (its own messages stand above).
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs on whatever Python there is)
        raise UserError(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: "
            "use make PYTHON=python3.11, for example"
        )
    root = clone("the files that pin an environment (pip has installed what it needs)")
    files = [root / "pyproject.toml", root / "constraints.txt"]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    stamp = VENV / "installed.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest and venv_python().exists():
        return
    print(
        f"making the environment in {VENV} (a few minutes; "
        "2 GB with a CPU-only torch, several more with CUDA)",
        flush=True,
    )
    try:
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    except subprocess.CalledProcessError:
        raise UserError(
            "this Python cannot make virtual environments: on Debian or Ubuntu, apt-get install python3-venv"
        ) from None
    # torch first and by exact version: for the range of another package pip may fetch a larger build.
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line.strip() for line in constraints if line.startswith("torch=="))
    _pip(pinned)
    _pip(
        "--constraint",
        str(ROOT / "constraints.txt"),
        "--editable",
        f"{ROOT}[examples,dicom,itk,medmnist,notebooks,slurm,tensorboard,test,browser]",
    )
    stamp.write_text(digest, encoding="utf-8")


def _pip(*args: str) -> None:
    command = [str(venv_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(
            f"pip install {' '.join(args)} failed, see above: check the network, then run the command again"
        )


def find_browser() -> str | None:
    """A Chromium that starts: the machine's own, else playwright's; None where there is neither."""

    def starts(program: str | None) -> bool:
        # It is asked for its version: one that lacks a library of the system is there and cannot start.
        return (
            bool(program)
            and Path(program).is_file()
            and subprocess.run([program, "--version"], capture_output=True).returncode == 0
        )

    for name in ("chromium", "chromium-browser", "google-chrome"):
        if starts(found := shutil.which(name)):
            return found
    python = venv_python() if venv_python().exists() else sys.executable
    ask = "from playwright.sync_api import sync_playwright\n"
    ask += "with sync_playwright() as p: print(p.chromium.executable_path)"
    fetched = subprocess.run([str(python), "-c", ask], capture_output=True, text=True).stdout.strip()
    return fetched if starts(fetched) else None


def make_browser() -> str:
    """Install a Chromium for the test that opens the explorer in JupyterLab; returns its path.

    One that is there is taken. The system's own packages are touched only by root.

    Raises:
        UserError: where that failed, with what to run instead.
    """
    if found := find_browser():
        return found
    playwright = [str(venv_python()), "-m", "playwright"]
    fetched = subprocess.run([*playwright, "install", "chromium"]).returncode == 0
    if _may_install() and not find_browser():
        if fetched:
            # It is there and lacks libraries of the system.
            subprocess.run([*playwright, "install-deps", "chromium"])
        else:
            # Some networks let through the packages of the system only.
            _install_packages("chromium")
    if found := find_browser():
        return found
    raise UserError(
        "no Chromium could be installed, see above: let an administrator run "
        f"{venv_python()} -m playwright install-deps chromium (or apt-get install "
        "chromium), then run make env-browser again"
    )


def make_slurm() -> None:
    """Install SLURM for the test that runs a batch on it, unless it is there.

    Raises:
        UserError: where that failed, with what to run instead.
    """
    if not shutil.which("slurmctld") and _may_install():
        _install_packages("slurm-wlm", "munge")
    if not shutil.which("slurmctld"):
        raise UserError(
            "no SLURM could be installed: let an administrator run apt-get install slurm-wlm munge"
        )


def _may_install() -> bool:
    """Whether packages of the system can be installed: by root, with apt-get."""
    return hasattr(os, "geteuid") and os.geteuid() == 0 and bool(shutil.which("apt-get"))


def _install_packages(*names: str) -> None:
    """Packages of Debian and its like, by root."""
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=quiet)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *names], env=quiet)


def run_tests(args: list[str]) -> int:
    """pytest in this environment, a process a core with one thread each; returns its exit code.

    Raises:
        UserError: where there are no tests, in an installed package.
    """
    cores = os.cpu_count() or 1
    spread = (
        []
        if cores == 1 or any(a in ("-n", "-x", "--pdb", "-s") for a in args)
        else ["-n", str(cores), "--dist", "worksteal"]
    )
    command = [sys.executable, "-m", "pytest", *spread, *args]
    return subprocess.run(
        command, cwd=clone("tests"), env={"OMP_NUM_THREADS": "1", **os.environ} if spread else None
    ).returncode
