"""Killed, or with a full disk: the next start ends with the result of an undisturbed run. `python -m tools
faults` is the long version of this.
"""

from __future__ import annotations

import errno
import os
import sys

import pytest

from smae_utils.atomic import new_file
from smae_utils.errors import UserError
from tools import fault_works, faults

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in Linux's /proc")
ONE_PROCESS = ("pretrain", "finetune", "evaluate", "predict")


@pytest.mark.slow
def test_works_that_are_killed_end_as_if_they_were_not(tmp_path):
    table = faults.try_faults(
        tmp_path / "out", None, kills=8, full_disks=0, works=ONE_PROCESS, report=[].append
    )
    assert table.equal.all() and (table.ended == "killed").sum() >= 4


@pytest.mark.slow
def test_works_that_meet_a_full_disk_say_so_and_end_well_when_there_is_room(tmp_path):
    try:
        with faults.small_disk(tmp_path / "disk"):
            pass
    except UserError as error:
        pytest.skip(str(error))
    table = faults.try_faults(
        tmp_path / "out", None, kills=0, full_disks=4, works=ONE_PROCESS, report=[].append
    )
    assert table.equal.all() and (table.ended == "2").sum() >= 2


def test_a_result_that_differs_or_a_file_that_is_left_counts_as_wrong(tmp_path):
    right = faults.Tried("predict", "kill", 0.5, "killed", again=0, equal=True)
    assert right.right
    for wrong in ({"again": 2}, {"equal": False}, {"left_behind": "run/.lock"}, {"orphans": 1}):
        assert not faults.Tried(**{**vars(right), **wrong}).right
    work = fault_works.Work(["predict"], lambda place: "this", forks=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".part_mask.nii.gz").touch()
    tried = faults._again(right, work, tmp_path, wanted="that")
    assert (tried.equal, tried.left_behind) == (False, "out/.part_mask.nii.gz")


@pytest.mark.parametrize(
    "text", ["[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", os.strerror(errno.ENOSPC)]
)
def test_a_full_disk_is_called_so_whatever_the_library_says(tmp_path, text):
    with pytest.raises(OSError, match="No space left.*weights"), new_file(tmp_path / "weights"):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="other"), new_file(tmp_path / "weights"):
        raise RuntimeError("other")
    assert not list(tmp_path.iterdir())
