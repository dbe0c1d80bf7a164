"""The worked example of CONTRIBUTING.md, as somebody would copy it: its task, its preset, its test."""

from __future__ import annotations

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
