"""The house has floors: method, data, work, show. Nothing points back up, and nothing runs in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smae_utils"
# What may be imported by all, and knows of nothing but itself.
GROUND = ("errors", "paths", "places", "yaml_text", "atomic", "timm_library", "command_line", "locks")
# Part -> the parts below it. What is not named here (cli, predict_files, run_notebook) stands on top.
BELOW = {
    "method": {*GROUND},
    "data": {*GROUND, "method.patches"},
    "phantoms": {*GROUND},
    "work": {*GROUND, "method", "data"},
    "show": {*GROUND, "method", "data", "work", "phantoms"},
    "batch": {*GROUND, "run_notebook", "work", "show"},
}
TOP = ("cli", "run_notebook", "predict_files", "moved", "__main__", "__init__")


def name_of(file: Path) -> str:
    """smae_utils/data/case.py -> data.case"""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import is not followed here"
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] == "smae_utils":
                inner = module.removeprefix("smae_utils").removeprefix(".")
                whole = f"{inner}.{name}".strip(".")
                found.add(whole if whole in FILES else inner or "__init__")
    return found


def lies_in(module: str, parts: set[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def test_nothing_points_back_up():
    wrong = []
    for name, file in FILES.items():
        part = name.split(".")[0]
        if name in TOP:
            continue
        allowed = {part, *BELOW[part]} if part in BELOW else {*GROUND}
        wrong += [f"{name} -> {other}" for other in imports(file) if not lies_in(other, allowed)]
    assert not wrong


def test_no_circles():
    graph = {name: imports(file) - {name} for name, file in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_every_file_has_its_place():
    parts = {name.split(".")[0] for name in FILES}
    assert parts == {*GROUND, *BELOW, *TOP}


def test_the_package_knows_nothing_of_this_repository():
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(module.split(".")[0] in ("tools", "tests") for module in modules), file


def test_old_names_of_modules_still_lead_to_what_they_held():
    code = """
import warnings
warnings.simplefilter("error", ImportWarning)
from smae_utils.settings import make_settings, resolve
from smae_utils.reading import ReadScan, read_image, read_volume
from smae_utils.weights import load_weights, save_weights
from smae_utils.batch import check_parameters, notebook_path
import smae_utils.large, smae_utils.data.out_of_core, smae_utils.work.presets
assert smae_utils.large is smae_utils.data.out_of_core and resolve is smae_utils.work.presets.resolve
try:
    from smae_utils.settings import nonesuch
except ImportError as error:
    assert "nonesuch" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
