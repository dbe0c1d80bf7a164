"""CONTRIBUTING.md: its worked example as somebody would copy it, with its task, preset and test; and its list
of the parts of the package.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np

from smae_utils.cli import main
from smae_utils.data.tasks import get_task, registry

ROOT = Path(__file__).resolve().parent.parent


def test_the_task_of_the_example_passes_its_own_test(tmp_path, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    task, test = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    (preset,) = re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)
    module: dict = {}
    exec(compile(task, "heart.py", "exec"), module)
    known = {**registry._registry(), "heart": module["TASK"]}
    monkeypatch.setattr(registry, "_registry", lambda: known)
    demo = tmp_path / "demo.yaml"
    demo.write_text(
        (ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8") + "\n" + preset, encoding="utf-8"
    )
    names = {"json": json, "nib": nib, "np": np, "main": main, "get_task": get_task}
    exec(compile(test.replace("--preset demo", f"--preset {demo}"), "test_heart.py", "exec"), names)
    (check,) = (value for name, value in names.items() if name.startswith("test_"))
    check(tmp_path)


def test_every_part_of_the_package_is_named_and_every_module_says_what_it_is_for():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (house,) = re.findall(r"^## The house\n\n((?:    .*\n)+)", text, re.M)
    package = ROOT / "smae_utils"
    folders = {file.parent.name for file in package.rglob("__init__.py")}
    on_top = {file.stem for file in package.glob("*.py") if not file.stem.startswith("__")}
    named = set(re.findall(r"\w+", house))
    assert folders | on_top <= named
    files = [file for top in ("smae_utils", "tools") for file in (ROOT / top).rglob("*.py")]
    assert not [f for f in files if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))]
