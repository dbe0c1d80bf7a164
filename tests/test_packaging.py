"""What a clone promises before anything runs: files that agree with each other, and no figure typed in by hand."""

import ast
import os
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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "python-gdcm": "gdcm"}


def split_requirement(text: str) -> tuple[str, str]:
    name, versions = re.match(r"([\w.-]+)(.*)", text).groups()
    return name.lower(), versions


def tracked_files() -> list[Path]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode or not out.stdout:
        pytest.skip("not a git clone")
    return [ROOT / line for line in out.stdout.splitlines() if (ROOT / line).is_file()]


def test_environment_yml_lists_the_packages_and_ranges_of_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    listed = dict(split_requirement(d) for d in conda if isinstance(d, str))
    extras = PROJECT["optional-dependencies"]
    wanted = dict(split_requirement(d) for d in PROJECT["dependencies"] + extras["examples"] + extras["dicom"] + extras["itk"] + extras["test"])
    wanted = {CONDA_NAMES.get(name, name): versions for name, versions in wanted.items()}
    assert listed == {**wanted, "python": PROJECT["requires-python"], "pip": ""}


def test_constraints_are_exact_and_cover_every_direct_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
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


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md", "docs/recipe.md", "docs/phantoms.md"])
def test_figures_of_the_documents_are_what_their_command_writes(name):
    from smae_utils.readme import render

    text = (ROOT / name).read_text(encoding="utf-8")
    assert render(text, ROOT, name) == text


@pytest.mark.parametrize(
    "name", ["README.md", "docs/evidence.md", "docs/protocol.md", "docs/recipe.md", "docs/phantoms.md", "docs/phantoms_protocol.md"]
)
def test_no_document_has_an_empty_block_or_a_placeholder(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"<!-- (\w+):start -->\s*<!-- \1:end -->", text)
    assert not re.search(r"\b[A-Z]{4,}_[A-Z]{4,}\b|TODO|XXX", text)


def test_pictures_of_the_readme_are_there():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / picture).is_file(), picture


def test_repository_is_small_and_stored_clean():
    files = tracked_files()
    assert sum(f.stat().st_size for f in files) < 8e6
    assert not [f for f in files if f.suffix in (".pt", ".pth", ".html")]


def text_files_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in whatever encoding the machine has."""
    tree = ast.parse(source)
    imported = {(a.asname or a.name).split(".")[0] for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    lines = []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        given = {k.arg for k in call.keywords}
        if isinstance(call.func, ast.Attribute):
            name, owner = call.func.attr, call.func.value
            # Image.open, Run.open, gzip.open are no text files; io.open and codecs.open are.
            if name == "open" and isinstance(owner, ast.Name) and owner.id in (imported | {"cls"}) - {"io", "codecs"}:
                continue
            first = 0  # of the arguments after the path
        else:
            name, first = getattr(call.func, "id", ""), 1
            if name != "open":  # a function of the package's own, as runs.write_text
                continue
        if name == "open":
            modes = [*call.args[first : first + 1], *(k.value for k in call.keywords if k.arg == "mode")]
            if any("b" in str(ast.literal_eval(m)) for m in modes if isinstance(m, ast.Constant)):
                continue
        elif name not in ("read_text", "write_text"):
            continue
        if "encoding" not in given:
            lines.append(call.lineno)
    return lines


def test_the_search_for_text_files_finds_them():
    bad = ["open(p)", "open(p, 'w')", "p.open()", "p.open('a')", "p.read_text()", "p.write_text(t)", "import io\nio.open(p)", "open(p, mode='r')"]
    good = ["open(p, 'rb')", "p.open('wb')", "p.read_text(encoding='utf-8')", "from PIL import Image\nImage.open(p)", "open(p, encoding='utf-8')",
            "write_text(p, t)", "p.open(mode='rb')"]  # fmt: skip
    assert all(text_files_without_encoding(line) for line in bad)
    assert not any(text_files_without_encoding(line) for line in good)


@pytest.mark.parametrize("file", sorted((ROOT / "smae_utils").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_text_file_is_utf_8_whatever_the_machine_takes(file):
    assert not text_files_without_encoding(file.read_text(encoding="utf-8"))


def locale_env(kind: str, folder: Path) -> dict[str, str]:
    """Environment of a process whose locale is not UTF-8: cp1252, as on Windows, or plain ASCII."""
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONIOENCODING", None)
    if kind == "ascii":
        return {**env, "LC_ALL": "C"}
    try:
        subprocess.run(["localedef", "-i", "en_US", "-f", "CP1252", str(folder / "en_US.CP1252")], capture_output=True)
    except FileNotFoundError:
        pytest.skip("localedef is not installed: no locale of cp1252 can be made")
    if not (folder / "en_US.CP1252").exists():
        pytest.skip("localedef made no locale of cp1252")
    return {**env, "LOCPATH": str(folder), "LC_ALL": "en_US.CP1252"}


@pytest.mark.parametrize("kind", ["cp1252", "ascii"])
def test_a_notebook_and_its_page_hold_every_letter_in_a_locale_that_does_not(kind, tmp_path):
    import nbformat

    env = locale_env(kind, tmp_path)
    code = "import locale; print(locale.getencoding())"
    encoding = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip().lower()
    assert encoding and "utf" not in encoding
    cells = [
        nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print('\u00fc \u2264 \u809d')"),
    ]
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, tmp_path / "one.ipynb")
    command = [sys.executable, "-m", "smae_utils", "run", tmp_path / "one.ipynb", "--out", tmp_path / "built"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert "\u00fc \u2264 \u809d" in (tmp_path / "built" / "one.html").read_text(encoding="utf-8")


@pytest.fixture
def installed(tmp_path):
    """The package in a folder of its own, as pip installs it; call it with words of the command line."""
    import shutil

    site = tmp_path / "site"
    shutil.copytree(ROOT / "smae_utils", site / "smae_utils", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("presets", "notebooks"):
        shutil.copytree(ROOT / folder, site / "smae_utils" / folder)
    (site / "tests").mkdir()  # of another package
    (site / "tests" / "test_other.py").write_text("def test_other(): pass", encoding="utf-8")
    (tmp_path / "here").mkdir()

    def call(*words: str, code: str = "") -> subprocess.CompletedProcess:
        command = ["-c", code] if code else ["-m", "smae_utils", *words]
        env = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run([sys.executable, *command], cwd=tmp_path / "here", env=env, capture_output=True, text=True)

    call.here = tmp_path / "here"
    return call


@pytest.mark.parametrize("command", ["test", "env", "readme"])
def test_what_needs_a_clone_says_so_in_one_line_where_the_package_is_installed(command, installed):
    done = installed(command)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "clone the repository" in done.stderr


def test_jupyterlab_of_an_installed_package_opens_a_copy_of_its_notebooks_that_stays_the_users(installed):
    code = "from smae_utils.environment import notebooks_to_open; print(notebooks_to_open())"
    mine = installed.here / "notebooks" / "00_data.ipynb"
    mine.parent.mkdir()
    mine.write_text("mine", encoding="utf-8")
    done = installed(code=code)
    assert done.stdout.strip() == str(installed.here / "notebooks"), done.stderr
    assert {p.name for p in mine.parent.iterdir()} == {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert mine.read_text(encoding="utf-8") == "mine"


def test_jupyterlab_of_a_clone_opens_the_notebooks_where_they_are():
    from smae_utils.environment import notebooks_to_open

    assert notebooks_to_open() == ROOT / "notebooks"


def test_code_passes_ruff():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
