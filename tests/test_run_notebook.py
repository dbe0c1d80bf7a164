"""Notebooks that a user wrote run headlessly; progress moves on in one place."""

from __future__ import annotations

import nbformat
import pytest

from smae_utils.run_notebook import run_notebook


@pytest.mark.slow
def test_a_notebook_that_names_no_kernel_runs_and_steps_share_one_place_for_each_training(tmp_path):
    training = (
        "from smae_utils.work.progress import ProgressLine, say\nfor k in 'ab':\n    say(f'begin {k}')\n"
    )
    training += "    for i in range(30):\n        say(ProgressLine(f'step {i} {k}'))"
    cells = [nbformat.v4.new_code_cell(code) for code in (training, "say(ProgressLine('step 9'))")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "mine.ipynb")
    done = nbformat.read(run_notebook(tmp_path / "mine.ipynb", tmp_path / "out", {}), as_version=4)
    shown = [
        [output.get("text") or output["data"]["text/plain"] for output in cell.outputs] for cell in done.cells
    ]
    kept = ["\n".join(f"step {i} {k}" for i in (0, 4, 8, 12, 16, 20, 24, 28, 29)) for k in "ab"]
    assert shown == [["begin a\nbegin b\n", *kept], ["step 9"]]
