"""Notebooks that a user wrote run headlessly; progress is one line that moves."""

from __future__ import annotations

import nbformat
import pytest

from smae_utils.run_notebook import run_notebook


@pytest.mark.slow
def test_a_notebook_that_names_no_kernel_runs_and_steps_share_one_line_for_each_training(tmp_path):
    training = "from smae_utils.work.progress import say\nfor k in 'ab':\n    say(f'begin {k}')\n"
    training += "    for i in range(5):\n        say(f'step {i}/4 {k}')"
    cells = [nbformat.v4.new_code_cell(code) for code in (training, "say('step 9/9')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "mine.ipynb")
    done = nbformat.read(run_notebook(tmp_path / "mine.ipynb", tmp_path / "out", {}), as_version=4)
    shown = [
        [output.get("text") or output["data"]["text/plain"] for output in cell.outputs] for cell in done.cells
    ]
    assert shown == [["begin a\nbegin b\n", "step 4/4 a", "step 4/4 b"], ["step 9/9"]]
