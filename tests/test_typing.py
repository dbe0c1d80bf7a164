"""Types: mypy finds nothing in what [tool.mypy] of pyproject.toml names."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKED = ("smae_utils/method", "smae_utils/work", "smae_utils/data/case.py")


@pytest.mark.slow
def test_mypy_finds_nothing():
    pytest.importorskip("mypy", reason="mypy, of the test extra, is not installed")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["files"]
    assert set(CHECKED) <= set(named)
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no issues found" in done.stdout, done.stdout + done.stderr
