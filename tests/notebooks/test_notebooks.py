"""Every notebook runs headlessly on tiny parameters, in the order of the demo, for every task, and needs no
network.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from test_four_kinds import write_list

from smae_utils.errors import UserError
from smae_utils.phantoms import write_phantoms
from smae_utils.run_notebook import check_parameters, notebook_path, run_notebook
from tools.demo import NOTEBOOKS as CHAIN
from tools.demo import demo

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "tiny.yaml")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COUNT = {"btcv": 8, "cxr14": 48, "brats": 8}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["btcv", "cxr14", "brats"])
def test_demo_runs_every_notebook_and_leaves_pages_and_a_summary(task, tmp_path):
    demo(tmp_path, [task], preset=TINY, n=COUNT[task])
    for name in CHAIN:
        executed = nbformat.read(tmp_path / task / f"{name}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
        assert "widgets" not in executed.metadata
        page = (tmp_path / task / f"{name}.html").read_text()
        assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?https?:""", page), (
            "the page would load something from outside"
        )
        assert f"{name}.html" in (tmp_path / "index.html").read_text()
    summary = pd.read_csv(tmp_path / "summary.csv", comment="#")
    assert list(summary.columns) == ["task", "init", "seed", "metric", "value"]
    assert set(summary.init) == {"scratch", "self"} and set(summary.task) == {task}
    assert set(summary.metric) == ({"mauc"} if task == "cxr14" else {"dsc", "hd95_mm"})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["example4d", "mni152"])
@pytest.mark.parametrize("name", ["01_masking", "02_self_pretraining"])
def test_masking_and_pretraining_run_on_real_scans_that_come_inside_packages(task, name, tmp_path):
    if task == "mni152":
        pytest.importorskip("nilearn", reason="nilearn, of the examples extra, is not installed")
    run_notebook(name, tmp_path, {"task": task, "preset": TINY, "run_dir": str(tmp_path / "runs")})
    assert (tmp_path / f"{name}.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mni152", "btcv", "cxr14"])
def test_own_data_goes_from_a_list_to_a_prediction(task, tmp_path):
    data = tmp_path / "data"
    if task == "mni152":
        pytest.importorskip("nilearn", reason="nilearn, of the examples extra, is not installed")
    else:
        write_phantoms(task, data, COUNT[task])
    values = {
        "task": task,
        "preset": TINY,
        "run_dir": str(tmp_path / "runs"),
        "data_dir": "" if task == "mni152" else str(data),
    }
    run_notebook("05_your_own_data", tmp_path, values)
    assert list((tmp_path / "runs" / "new").glob("probabilities.csv" if task == "cxr14" else "*.nii.gz"))


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "kind"), [(2, "segmentation"), (3, "classification")])
def test_notebooks_take_lists_of_masks_of_2d_images_and_of_classes_of_3d_scans(dims, kind, tmp_path):
    task = write_list(tmp_path / "data", dims, kind)
    for name in ("00_data", "02_self_pretraining", "03_fine_tuning", "04_evaluation"):
        run_notebook(
            name, tmp_path / "out", {"task": str(task), "preset": TINY, "run_dir": str(tmp_path / "runs")}
        )
    assert (tmp_path / "runs" / "self" / "metrics.json").is_file()


@pytest.mark.slow
def test_notebooks_run_without_any_network(tmp_path):
    isolate = ["unshare", "-rn", "sh", "-c", 'ip link set lo up 2>/dev/null || true; exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*isolate, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot make a network namespace here")
    command = [
        sys.executable,
        "-m",
        "smae_utils",
        "run",
        "02_self_pretraining",
        "-p",
        "task",
        "example4d",
        "-p",
        "preset",
        TINY,
    ]
    done = subprocess.run(
        [*isolate, *command, "-p", "run_dir", str(tmp_path / "run"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "pretrain" / "model.safetensors").is_file()


def test_an_unknown_parameter_or_a_wrong_type_is_an_error_that_lists_the_right_ones():
    path = notebook_path("01_masking")
    for bad in ({"sed": 1}, {"seed": "many"}):
        with pytest.raises(UserError, match="preset: str"):
            check_parameters(path, bad)
    assert check_parameters(path, {"seed": "3", "task": "brats"}) == {"seed": 3, "task": "brats"}


@pytest.mark.slow
def test_a_failing_notebook_keeps_its_executed_copy_and_names_the_error(tmp_path):
    with pytest.raises(UserError, match="data folder .*nowhere does not exist"):
        run_notebook("00_data", tmp_path, {"data_dir": "/nowhere", "preset": TINY})
    executed = nbformat.read(tmp_path / "00_data.ipynb", as_version=4)
    assert any(
        o.output_type == "error" for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_stripped_and_keep_the_house_rules(path):
    content = nbformat.read(path, as_version=4)
    first, parameters = content.cells[0], content.cells[1]
    assert first.cell_type == "markdown" and "What you will see" in first.source
    assert parameters.metadata.tags == ["parameters"]
    assert all(re.fullmatch(r"\w+: \w+ = .+  # .+", line) for line in parameters.source.splitlines())
    assert [line.split(":")[0] for line in parameters.source.splitlines()] == [
        "task",
        "data_dir",
        "run_dir",
        "preset",
        "seed",
    ]
    for cell in content.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 15
        assert not re.search(r"^\s*(class |for .*:\n(.*\n){8})", cell.source, re.M)
