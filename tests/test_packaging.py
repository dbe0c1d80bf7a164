"""What a clone promises before anything runs: files that agree with each other, and no figure typed in by
hand.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import yaml

import smae_utils
from smae_utils.data.tasks import get_task, task_names
from smae_utils.work.presets import load_preset, resolve
from smae_utils.work.settings import STAGES
from tools.readme import BLOCKS, render

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "python-gdcm": "gdcm"}
CONDA_EXTRAS = ("examples", "dicom", "itk", "notebooks", "test")


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
    wanted = dict(
        split_requirement(d)
        for d in PROJECT["dependencies"] + sum((extras[name] for name in CONDA_EXTRAS), [])
    )
    wanted = {CONDA_NAMES.get(name, name): versions for name, versions in wanted.items()}
    assert listed == {**wanted, "python": PROJECT["requires-python"], "pip": ""}


def test_constraints_are_exact_and_cover_every_direct_dependency():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!-]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    direct = {
        split_requirement(d)[0]
        for d in PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    }
    assert direct <= pinned


@pytest.mark.parametrize("preset", ["demo", "small", "paper"])
@pytest.mark.parametrize("task", ["btcv", "cxr14", "brats"])
def test_every_preset_resolves_and_both_stages_share_one_encoder(preset, task):
    settings = [
        resolve(get_task(task), stage, preset, arm) for stage in STAGES for arm in ("scratch", "self")
    ]
    for name in ("crop_size", "patch_size", "embed_dim", "depth", "num_heads"):
        assert len({getattr(s, name) for s in settings}) == 1
    assert set(load_preset(preset)) <= {"all", *task_names()}


def test_the_arms_of_a_preset_differ_only_in_learning_rate_and_layer_decay():
    for preset in ("demo", "small", "paper"):
        for task in ("btcv", "cxr14", "brats"):
            a, b = (resolve(get_task(task), "finetune", preset, arm) for arm in ("scratch", "self"))
            assert {k for k in a.__dataclass_fields__ if getattr(a, k) != getattr(b, k)} <= {
                "lr",
                "base_lr",
                "layer_decay",
                "encoder_lr",
            }


def test_paper_learning_rates_are_the_released_effective_ones():
    expected = {"btcv": (1.5e-4, 8.06e-4), "brats": (1.5e-4, 4.03e-4), "cxr14": (1.5e-4, 1e-3)}
    for task, rates in expected.items():
        for stage, rate in zip(STAGES, rates):
            s = resolve(get_task(task), stage, "paper", "self")
            assert s.base_lr * s.batch_size / 256 == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_figures_of_the_documents_are_what_their_command_writes(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert render(text, ROOT, name) == text


@pytest.mark.parametrize(
    "name", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_no_document_has_an_empty_block_or_a_placeholder(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"<!-- ([\w-]+):start -->\s*<!-- \1:end -->", text)
    assert not re.search(r"\b[A-Z]{4,}_[A-Z]{4,}\b|TODO|XXX", without_code(text))


def without_code(text: str) -> str:
    """A document without its blocks and pieces of code."""
    return re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """What links may name behind #: headings as GitHub writes them, a second one of the same name with -1."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    made = [
        re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    ]
    return {name + (f"-{made[:i].count(name)}" if name in made[:i] else "") for i, name in enumerate(made)}


def dead_links(file: Path, root: Path) -> list[str]:
    """Links and pictures of a document that lead to no file of the project, or to no heading of one;
    addresses of the web are left alone.
    """
    file, root, dead = file.resolve(), root.resolve(), []
    text = without_code(file.read_text(encoding="utf-8"))
    patterns = (r"\]\(\s*<?([^)\s>]+)", r"^\[[^\]^]+\]:\s*(\S+)", r"(?:href|src)=[\"']([^\"']+)")
    for link in (found for pattern in patterns for found in re.findall(pattern, text, re.M)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if (
            not target.exists()
            or root not in target.parents
            or (anchor and anchor not in anchors(target.read_text(encoding="utf-8")))
        ):
            dead.append(link)
    return dead


def test_the_search_for_dead_links_finds_them(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.md").write_text(
        "# One `two`, three\n\n# Same\n# Same\n```\n# no heading\n```\n", encoding="utf-8"
    )
    good = [
        "[x](../a.md)",
        "[x](../a.md#one-two-three)",
        "![x](../a.md)",
        "[x](#here)",
        "[x](https://a.b/c)",
        "`[x](no.md)`",
        "[x](../a.md#same-1)",
    ]
    bad = ["[x](a.md)", "[x](../a.md#two)", "![x](no.png)", "[x](#there)", "[x]: no.md", '<img src="no.png">',
           "[x](../a.md#no-heading)",
           "[x](../../b.md)"]  # fmt: skip
    (tmp_path.parent / "b.md").touch()
    for line in good + bad:
        (tmp_path / "docs" / "b.md").write_text(f"# Here\n\n{line}\n", encoding="utf-8")
        assert len(dead_links(tmp_path / "docs" / "b.md", tmp_path)) == (line in bad), line


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_between_documents_lead_somewhere(name):
    assert not dead_links(ROOT / name, ROOT)


def test_hooks_are_the_tools_of_the_tests_and_the_citation_names_this_version():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    tools = {tool for repo in repos for hook in repo["hooks"] for tool in hook["additional_dependencies"]}
    assert {tool.split("==")[0] for tool in tools} == {"ruff", "nbstripout"}
    assert tools <= set((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert {repo["repo"] for repo in repos} == {"local"}
    assert (
        str(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"])
        == PROJECT["version"]
    )


SMALL = {"": 100_000, ".png": 300_000, ".safetensors": 1_000_000}  # bytes a file may have, by its ending
MADE = {".pt", ".pth", ".bin", ".ckpt", ".html", ".npy", ".npz", ".nii", ".gz", ".dcm", ".zip", ".pyc"}


def unwanted(file: Path) -> str:
    """Why a file does not belong into the repository; empty where it does."""
    if file.suffix in MADE:
        return f"{file} is made by a command or is data"
    if file.suffix == ".safetensors" and file.parent != ROOT / "tests" / "golden":
        return f"{file} holds weights"
    size, most = file.stat().st_size, SMALL.get(file.suffix, SMALL[""])
    return f"{file} has {size} bytes, more than {most}" if size > most else ""


def test_repository_is_small_and_stored_clean():
    files = tracked_files()
    assert not [reason for file in files if (reason := unwanted(file))]
    assert sum(f.stat().st_size for f in files) < 6e6


def test_a_file_that_does_not_belong_into_the_repository_is_noticed(tmp_path):
    for name, size in (
        ("model.pt", 10),
        ("model.safetensors", 10),
        ("scan.nii.gz", 10),
        ("table.csv", 200_000),
        ("picture.png", 400_000),
    ):
        (tmp_path / name).write_bytes(bytes(size))
        assert name in unwanted(tmp_path / name)
    (tmp_path / "module.py").write_bytes(bytes(1000))
    assert unwanted(tmp_path / "module.py") == ""


def text_files_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in whatever encoding the machine has."""
    tree = ast.parse(source)
    imported = {
        (a.asname or a.name).split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    } | {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    lines = []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        given = {k.arg for k in call.keywords}
        if isinstance(call.func, ast.Attribute):
            name, owner = call.func.attr, call.func.value
            # Image.open, Run.open, gzip.open are no text files; io.open and codecs.open are.
            if (
                name == "open"
                and isinstance(owner, ast.Name)
                and owner.id in (imported | {"cls"}) - {"io", "codecs"}
            ):
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
    bad = [
        "open(p)",
        "open(p, 'w')",
        "p.open()",
        "p.open('a')",
        "p.read_text()",
        "p.write_text(t)",
        "import io\nio.open(p)",
        "open(p, mode='r')",
    ]
    good = ["open(p, 'rb')", "p.open('wb')", "p.read_text(encoding='utf-8')",
            "from PIL import Image\nImage.open(p)",
            "open(p, encoding='utf-8')",
            "write_text(p, t)", "p.open(mode='rb')"]  # fmt: skip
    assert all(text_files_without_encoding(line) for line in bad)
    assert not any(text_files_without_encoding(line) for line in good)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "smae_utils").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_text_file_is_utf_8_whatever_the_machine_takes(file):
    assert not text_files_without_encoding(file.read_text(encoding="utf-8"))


def locale_env(kind: str, folder: Path) -> dict[str, str]:
    """Environment of a process whose locale is not UTF-8: cp1252, as on Windows, or plain ASCII."""
    env = {
        **os.environ,
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("PYTHONIOENCODING", None)
    if kind == "ascii":
        return {**env, "LC_ALL": "C"}
    try:
        subprocess.run(
            ["localedef", "-i", "en_US", "-f", "CP1252", str(folder / "en_US.CP1252")], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("localedef is not installed: no locale of cp1252 can be made")
    if not (folder / "en_US.CP1252").exists():
        pytest.skip("localedef made no locale of cp1252")
    return {**env, "LOCPATH": str(folder), "LC_ALL": "en_US.CP1252"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cp1252", "ascii"])
def test_a_notebook_and_its_page_hold_every_letter_in_a_locale_that_does_not(kind, tmp_path):
    import nbformat

    env = locale_env(kind, tmp_path)
    code = "import locale; print(locale.getencoding())"
    encoding = (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        .stdout.strip()
        .lower()
    )
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
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "here", env=env, capture_output=True, text=True
        )

    call.here = tmp_path / "here"
    return call


def test_jupyterlab_of_an_installed_package_opens_a_copy_of_its_notebooks_that_stays_the_users(installed):
    code = "from smae_utils.run_notebook import notebooks_to_open; print(notebooks_to_open())"
    mine = installed.here / "notebooks" / "00_data.ipynb"
    mine.parent.mkdir()
    mine.write_text("mine", encoding="utf-8")
    done = installed(code=code)
    assert done.stdout.strip() == str(installed.here / "notebooks"), done.stderr
    assert {p.name for p in mine.parent.iterdir()} == {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert mine.read_text(encoding="utf-8") == "mine"


def test_jupyterlab_of_a_clone_opens_the_notebooks_where_they_are():
    from smae_utils.run_notebook import notebooks_to_open

    assert notebooks_to_open() == ROOT / "notebooks"


def closure(names: list[str]) -> set[str]:
    """Distributions that these need, and those that they need in turn, as installed here."""
    from packaging.requirements import Requirement

    found, todo = set(), [(Requirement(n).name.lower().replace("_", "-"), ()) for n in names]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        for one in map(Requirement, wanted):
            if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in (*extras, "")):
                todo.append((one.name.lower().replace("_", "-"), tuple(sorted(one.extras))))
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def bare_install(tmp_path_factory) -> dict[str, str]:
    """Environment of a process in which nothing can be imported that only the extras bring, as after a plain
    pip install.
    """
    needed = closure(PROJECT["dependencies"])
    assert {"torch", "monai", "timm"} <= needed and not {
        "papermill",
        "jupyterlab",
        "ipywidgets",
        "nbconvert",
    } & needed
    hidden = {
        top
        for top, owners in packages_distributions().items()
        if not needed & {o.lower().replace("_", "-") for o in owners}
    }
    hidden -= {"smae_utils", "pip", "setuptools", "pkg_resources", "_distutils_hack"}
    assert {
        "papermill",
        "nbformat",
        "nbconvert",
        "nbclient",
        "ipywidgets",
        "IPython",
        "traitlets",
        "jupyterlab",
    } <= hidden
    folder = tmp_path_factory.mktemp("hide")
    # Python imports a module of this name at its start. Both ways of asking for a package end at a finder.
    (folder / "sitecustomize.py").write_text(
        f"""import sys
HIDDEN = {sorted(hidden)!r}
class Hide:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(f) for f in sys.meta_path]
""",
        encoding="utf-8",
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_plain_install_trains_and_says_in_one_line_what_notebooks_need(bare_install, tmp_path):
    def smae(*words) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "smae_utils", *map(str, words)],
            cwd=tmp_path,
            env=bare_install,
            capture_output=True,
            text=True,
        )

    done = smae("--help")
    assert done.returncode == 0 and "pretrain" in done.stdout, done.stderr
    done = smae("phantom", "--task", "brats", "--out", tmp_path / "data", "--n", 1)
    assert done.returncode == 0 and list((tmp_path / "data").rglob("*.nii.gz")), done.stderr
    for words in (("run", "01_masking"), ("lab",)):
        done = smae(*words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
            done.stderr
        )
        assert "pip install 'smae-utils[notebooks]'" in done.stderr


@pytest.mark.slow
def test_every_module_but_the_explorer_can_be_imported_after_a_plain_install(bare_install, tmp_path):
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / "smae_utils").rglob("*.py"))
    ]
    names = [n.removesuffix(".__init__") for n in names if not n.endswith(("__main__", ".explorer"))]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=bare_install, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built as pip builds it; pip fetches hatchling for that."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and re.search(
        r"(No matching distribution|Could not find a version).*hatchling", done.stdout + done.stderr
    ):
        pytest.skip("hatchling, which builds the wheel, cannot be fetched here")
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("smae_utils-*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_ships_and_nothing_of_the_repository_besides(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    expected = {"smae_utils/py.typed"}
    for folder, pattern in (("smae_utils", "*.py"), ("presets", "*.yaml"), ("notebooks", "*.ipynb")):
        files = [
            p.relative_to(ROOT).as_posix()
            for p in tracked_files()
            if p.is_relative_to(ROOT / folder) and p.match(pattern)
        ]
        assert files
        expected |= {f if folder == "smae_utils" else f"smae_utils/{f}" for f in files}
    assert {"smae_utils/presets/demo.yaml", "smae_utils/notebooks/01_masking.ipynb"} <= expected <= names
    assert not any("study" in n or n.startswith("tools") for n in names)
    assert all(n.startswith("smae_utils/") and "__pycache__" not in n for n in names)
    assert "Provides-Extra: notebooks" in metadata and "Typing :: Typed" in metadata
    assert not re.search(r"^Requires-Dist: (jupyterlab|papermill|ipywidgets|nbconvert)[^;]*$", metadata, re.M)


@pytest.mark.slow
def test_the_installed_wheel_runs_apart_from_the_clone(wheel, tmp_path):
    place, here = tmp_path / "venv", tmp_path / "here"
    here.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    # What the package depends on is taken from the environment of the tests; a clone that is installed there
    # is not seen through a .pth file.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # Pages of nbconvert lie there.
    env |= {"OMP_NUM_THREADS": "1", "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}

    def smae(*words) -> str:
        done = subprocess.run(
            [str(python.with_name("smae")), *map(str, words)],
            cwd=here,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return done.stdout

    code = (
        "import smae_utils.cli; from smae_utils.places import is_clone; "
        "print(smae_utils.cli.__file__, is_clone())"
    )
    where = subprocess.run(
        [str(python), "-c", code], cwd=here, env=env, capture_output=True, text=True
    ).stdout.strip()
    assert where == f"{site / 'smae_utils' / 'cli.py'} False"
    assert "pretrain" in smae("--help")
    assert smae("--version").strip() == f"smae-utils {PROJECT['version']}"
    smae("phantom", "--task", "btcv", "--out", "data", "--n", 6)
    assert list((here / "data").rglob("*.nii.gz"))
    smae(
        "run",
        "01_masking",
        "-p",
        "task",
        "btcv",
        "-p",
        "data_dir",
        here / "data",
        "-p",
        "preset",
        ROOT / "tests" / "tiny.yaml",
        "--out",
        "built",
    )
    assert (here / "built" / "01_masking.html").stat().st_size > 100_000


def test_words_after_test_go_to_pytest_as_they_are(monkeypatch):
    from tools import environment
    from tools.__main__ import main

    calls = []
    monkeypatch.setattr(
        environment.subprocess,
        "run",
        lambda command, **more: calls.append(command) or subprocess.CompletedProcess(command, 5),
    )
    assert main(["test", "-m", "not slow", "tests/test_cost.py", "-k", "flops"]) == 5
    (command,) = calls
    assert command[1:3] == ["-m", "pytest"] and command[-5:] == [
        "-m",
        "not slow",
        "tests/test_cost.py",
        "-k",
        "flops",
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '$(TOOLS) test -m "not slow" $(TESTS)' in makefile


@pytest.mark.parametrize("fetched", [True, False], ids=["fetched", "offline"])
@pytest.mark.parametrize("root", [True, False], ids=["root", "user"])
def test_a_browser_is_installed_on_request_only_and_the_system_is_changed_only_as_root(
    root, fetched, monkeypatch, capsys
):
    from tools import environment
    from tools.__main__ import main

    calls = []
    monkeypatch.setattr(environment, "make_environment", lambda: None)
    monkeypatch.setattr(environment.os, "geteuid", lambda: 0 if root else 1000, raising=False)
    monkeypatch.setattr(
        environment.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None
    )

    def run(command, **more):
        calls.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0 if fetched else 1, "", "")

    monkeypatch.setattr(environment.subprocess, "run", run)
    assert main(["env"]) == 0 and calls == []
    assert main(["env", "--browser"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no Chromium") and said.count("\n") == 1 and "install-deps chromium" in said
    assert any("playwright install chromium" in call for call in calls)
    assert any("playwright install-deps" in call for call in calls) == (root and fetched)
    assert any(call.startswith("apt-get install") for call in calls) == (root and not fetched)


def test_no_test_installs_anything_on_the_machine():
    files = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    assert not [p for p in files if "apt-get" in p.read_text(encoding="utf-8")]


def test_code_passes_ruff():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_names_what_most_people_need_and_loads_it_when_it_is_used():
    code = (
        "import sys, smae_utils; assert 'torch' not in sys.modules and set(smae_utils.__all__) <= "
        "set(dir(smae_utils)); print(smae_utils.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == PROJECT["version"], done.stderr
    for name in smae_utils.__all__:
        assert getattr(smae_utils, name) is not None
    with pytest.raises(AttributeError, match="MaskedAutoencoda"):
        smae_utils.MaskedAutoencoda  # noqa: B018


def test_old_names_of_modules_lead_to_the_new_ones_and_say_so():
    from smae_utils.moved import MOVED

    code = "import sys, importlib, warnings; warnings.simplefilter('ignore')\n" + "\n".join(
        f"assert importlib.import_module('smae_utils.{old}') is "
        f"importlib.import_module('smae_utils.{new}'), '{old}'"
        for old, new in MOVED.items()
        if " " not in new  # of those that were divided see test_architecture.py
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    said = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import smae_utils.mae"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stderr
    assert "smae_utils.mae is now smae_utils.method.mae" in said
