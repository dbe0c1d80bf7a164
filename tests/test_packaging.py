"""What a clone promises before anything runs: files that agree with each other, and no figure typed in by hand."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from smae_utils.settings import STAGES, load_preset, resolve
from smae_utils.tasks import get_task, task_names

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}


def split_requirement(text: str) -> tuple[str, str]:
    name, versions = re.match(r"([\w.-]+)(.*)", text).groups()
    return name.lower(), versions


def tracked_files() -> list[Path]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode or not out.stdout:
        pytest.skip("not a git clone")
    return [ROOT / line for line in out.stdout.splitlines() if (ROOT / line).is_file()]


def test_environment_yml_lists_the_packages_and_ranges_of_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = dict(split_requirement(d) for d in conda if isinstance(d, str))
    extras = PROJECT["optional-dependencies"]
    wanted = dict(split_requirement(d) for d in PROJECT["dependencies"] + extras["examples"] + extras["dicom"] + extras["test"])
    wanted = {CONDA_NAMES.get(name, name): versions for name, versions in wanted.items()}
    assert listed == {**wanted, "python": PROJECT["requires-python"], "pip": ""}


def test_constraints_are_exact_and_cover_every_direct_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!-]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    direct = {split_requirement(d)[0] for d in PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])}
    assert direct <= pinned


@pytest.mark.parametrize("preset", ["demo", "small", "paper"])
@pytest.mark.parametrize("task", ["btcv", "cxr14", "brats"])
def test_every_preset_resolves_and_both_stages_share_one_encoder(preset, task):
    settings = [resolve(get_task(task), stage, preset, arm) for stage in STAGES for arm in ("scratch", "self")]
    for name in ("crop_size", "patch_size", "embed_dim", "depth", "num_heads"):
        assert len({getattr(s, name) for s in settings}) == 1
    assert set(load_preset(preset)) <= {"all", *task_names()}


def test_the_arms_of_a_preset_differ_only_in_learning_rate_and_layer_decay():
    for preset in ("demo", "small", "paper"):
        for task in ("btcv", "cxr14", "brats"):
            a, b = (resolve(get_task(task), "finetune", preset, arm) for arm in ("scratch", "self"))
            assert {k for k in a.__dataclass_fields__ if getattr(a, k) != getattr(b, k)} <= {"base_lr", "layer_decay"}


def test_paper_learning_rates_are_the_released_effective_ones():
    expected = {"btcv": (1.5e-4, 8.06e-4), "brats": (1.5e-4, 4.03e-4), "cxr14": (1.5e-4, 1e-3)}
    for task, rates in expected.items():
        for stage, rate in zip(STAGES, rates):
            s = resolve(get_task(task), stage, "paper", "self")
            assert s.base_lr * s.batch_size / 256 == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md"])
def test_figures_of_the_documents_are_what_their_command_writes(name):
    from smae_utils.readme import render

    text = (ROOT / name).read_text()
    assert render(text, ROOT, name) == text


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md", "docs/protocol.md"])
def test_no_document_has_an_empty_block_or_a_placeholder(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"<!-- (\w+):start -->\s*<!-- \1:end -->", text)
    assert not re.search(r"\b[A-Z]{4,}_[A-Z]{4,}\b|TODO|XXX", text)


def test_pictures_of_the_readme_are_there():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).is_file(), picture


def test_repository_is_small_and_stored_clean():
    files = tracked_files()
    assert sum(f.stat().st_size for f in files) < 8e6
    assert not [f for f in files if f.suffix in (".pt", ".pth", ".html")]


def test_code_passes_ruff():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
