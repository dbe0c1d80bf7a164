"""The command line: the whole chain works, and each mistake gives one line that says what to do, exit code 2
and nothing half-written.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from smae_utils.cli import main
from smae_utils.data.tasks import get_task
from smae_utils.work.build import build_splits
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings
from tools.__main__ import main as tools_main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def smae(capsys, tiny, bare):
    """Call the command line in this process: (exit code, standard output, standard error)."""

    def call(*words, command=main) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, out, err

    def train(stage: str, task: str, data: Path, out: Path, *words, **override) -> tuple[int, str, str]:
        values = {**tiny[task, stage], "steps": 2, **override}
        return call(
            stage,
            "--task",
            task,
            "--data",
            data,
            "--preset",
            bare,
            "--out",
            out,
            *words,
            "--set",
            *(f"{k}={v}" for k, v in values.items()),
        )

    call.train = train
    call.tools = partial(call, command=tools_main)
    return call


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """One line, exit code 2, and the words a user needs."""
    code, _, err = answer
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


@pytest.mark.slow
def test_the_chain_of_the_readme_from_phantoms_to_the_table(smae, tmp_path):
    data, runs = tmp_path / "data", tmp_path / "runs"
    assert smae("phantom", "--task", "brats", "--out", data, "--n", 8, "--seed", 3)[0] == 0
    assert smae.train("pretrain", "brats", data, runs / "pre")[0] == 0
    code, out, err = smae.train("finetune", "brats", data, runs / "self", "--init", runs / "pre")
    assert code == 0 and "loaded" in out, err
    assert smae.train("finetune", "brats", data, runs / "scratch")[0] == 0
    for arm in ("self", "scratch"):
        assert smae("evaluate", runs / arm)[0] == 0
    code, out, err = smae("compare", runs / "scratch", runs / "self")
    assert code == 0 and all(
        word in out for word in ("scratch", "self", "difference", "dsc", "hd95_mm", "WT", "TC", "ET")
    )


def test_unknown_words(smae, brats, tmp_path):
    refused(smae("phantom", "--task", "btvc", "--out", tmp_path, "--n", 3), "btvc", "btcv")
    refused(smae("phantom", "--task", "btcv", "--out", tmp_path, "--n", 3, "--size", "huge"), "huge", "full")
    refused(smae("phantom", "--task", "btcv", "--out", tmp_path, "--n", 0), "0")
    refused(
        smae.train("pretrain", "brats", brats, tmp_path / "run", mask_ration=0.5), "mask_ration", "mask_ratio"
    )
    refused(
        smae("pretrain", "--task", "brats", "--data", brats, "--out", tmp_path / "run", "--preset", "huge"),
        "huge",
        "demo",
    )
    refused(smae("run", "07_nothing"), "07_nothing", "01_masking")
    refused(smae("run", "01_masking", "-p", "sed", "1"), "sed", "seed: int")
    refused(smae("run", "01_masking", "-p", "seed", "many"), "seed must be int", "many")
    refused(smae.tools("demo", "--task", "btvc", "--out", tmp_path / "demo"), "btvc", "btcv")
    assert not (tmp_path / "run").exists() and not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"mask_ratio": 0}, ["mask_ratio"]),
        ({"mask_ratio": 1}, ["mask_ratio"]),
        ({"crop_size": "[20,16,16]"}, ["20", "patch"]),
        ({"crop_size": "[16,16]"}, ["crop_size", "3"]),
        ({"num_heads": 5}, ["num_heads", "5"]),
        ({"batch_size": 100}, ["batch_size", "100"]),
        ({"batch_size": 0}, ["batch_size"]),
        ({"precision": "fp8"}, ["precision", "fp8"]),
        ({"steps": -3}, ["steps"]),
        ({"spacing_mm": "[0,1,1]"}, ["spacing_mm"]),
        ({"fold": 7}, ["fold", "7"]),
        ({"patch_size": 6}, ["patch"]),
        ({"decoder_num_heads": 7}, ["decoder_num_heads", "7"]),
        ({"log_every": 0}, ["log_every"]),
        ({"cache_rate": 2}, ["cache_rate"]),
        ({"seed": -1}, ["seed"]),
        ({"betas": "[0.9]"}, ["betas", "two numbers"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(smae, brats, tmp_path, override, words):
    refused(smae.train("pretrain", "brats", brats, tmp_path / "run", **override), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [({"overlap": 1.0}, ["overlap"]), ({"patch_size": 6, "crop_size": "[12,12,12]"}, ["patch"]),
     ({"drop_path": 1.5}, ["drop_path"]),
     ({"select": "worst"}, ["select", "worst"])],
)  # fmt: skip
def test_settings_of_finetuning_that_cannot_work(smae, brats, tmp_path, override, words):
    refused(smae.train("finetune", "brats", brats, tmp_path / "run", **override), *words)
    assert not (tmp_path / "run").exists()


def test_missing_places(smae, brats, tmp_path):
    refused(
        smae.train("pretrain", "brats", tmp_path / "nowhere", tmp_path / "run"),
        "nowhere",
        "does not exist",
        "phantom",
    )
    (tmp_path / "empty").mkdir()
    refused(smae.train("pretrain", "brats", tmp_path / "empty", tmp_path / "run"), "empty", "dataset.json")
    refused(smae.train("finetune", "brats", brats, tmp_path / "run", "--init", tmp_path / "typo"), "typo")
    refused(smae("evaluate", tmp_path / "typo"), "typo")
    refused(smae("compare", tmp_path / "typo", tmp_path / "typo2"), "typo")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_in_the_way(smae, brats, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(smae.train("pretrain", "brats", brats, tmp_path / "file"), "file")
    refused(smae("phantom", "--task", "brats", "--out", tmp_path / "file", "--n", 3), "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def first_case(task: str, data: Path, part: str = "train") -> dict:
    return build_splits(get_task(task), data, FinetuneSettings())[part][0]


def cut(path: str, keep: float = 0.5) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


def test_a_nifti_that_is_cut_short_empty_or_no_gzip(smae, btcv, spoil, tmp_path):
    folder = spoil(btcv)
    image = first_case("btcv", folder)["image"]
    whole = Path(image).read_bytes()
    for number, content in enumerate(
        (whole[: len(whole) // 2], b"", b"no gzip at all", gzip.compress(b"\0" * 400), whole[:20])
    ):
        Path(image).write_bytes(content)
        refused(smae.train("pretrain", "btcv", folder, tmp_path / str(number)), image)


def test_a_label_on_another_grid_and_labels_that_are_none(smae, btcv, spoil, tmp_path):
    folder = spoil(btcv)
    case = first_case("btcv", folder)
    stored = nib.load(case["label"])
    label = np.asarray(stored.dataobj).copy()
    nib.save(nib.Nifti1Image(label[:, :, :-3], stored.affine), case["label"])
    refused(smae.train("finetune", "btcv", folder, tmp_path / "shape"), case["label"], str(label.shape))
    for name, wrong in (
        ("value", np.full(label.shape, 14, np.int16)),
        ("float", label + 0.5),
        ("negative", label.astype(np.int16) - 1),
    ):
        nib.save(nib.Nifti1Image(wrong, stored.affine), case["label"])
        refused(smae.train("finetune", "btcv", folder, tmp_path / name), case["label"], "0 .. 13")


def test_a_label_that_lies_elsewhere_by_its_affine_is_refused_in_training_and_in_scoring(
    smae, brats, spoil, tmp_path
):
    folder = spoil(brats)
    assert smae.train("finetune", "brats", folder, tmp_path / "run")[0] == 0
    for part, command in (("train", ()), ("test", ("evaluate", tmp_path / "run"))):
        case = first_case("brats", folder, part)
        stored = nib.load(case["label"])
        moved = stored.affine.copy()
        moved[:3, 3] += 30
        nib.save(nib.Nifti1Image(np.array(stored.dataobj), moved), case["label"])
        answer = smae(*command) if command else smae.train("finetune", "brats", folder, tmp_path / "again")
        refused(answer, case["label"], "mm away", "resample")


def test_test_labels_with_values_that_are_none_are_refused(smae, brats, spoil, tmp_path):
    folder = spoil(brats)
    assert smae.train("finetune", "brats", folder, tmp_path / "run")[0] == 0
    case = first_case("brats", folder, "test")
    stored = nib.load(case["label"])
    nib.save(nib.Nifti1Image(np.array(stored.dataobj) * 85, stored.affine), case["label"])
    refused(smae("evaluate", tmp_path / "run"), case["label"], "0 .. 3")


def test_cases_that_training_saw_are_not_scored_and_an_encoder_that_saw_test_cases_is_refused(
    smae, brats, spoil, tmp_path
):
    folder = spoil(brats)
    assert smae.train("pretrain", "brats", folder, tmp_path / "pre")[0] == 0
    refused(
        smae.train("finetune", "brats", folder, tmp_path / "run", "--init", tmp_path / "pre", fold=1),
        "pre",
        "test cases",
        "fold",
    )
    assert smae.train("finetune", "brats", folder, tmp_path / "run", "--init", tmp_path / "pre")[0] == 0
    index = folder / "Task01_BrainTumour" / "dataset.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["training"] = content["training"][::-1]  # the same cases in another order: another split
    index.write_text(json.dumps(content), encoding="utf-8")
    refused(smae("evaluate", tmp_path / "run"), "used in training")


def test_swapped_arms_are_refused(smae, brats, tmp_path):
    assert smae.train("pretrain", "brats", brats, tmp_path / "pre")[0] == 0
    for name, more in (("self", ("--init", tmp_path / "pre")), ("scratch", ())):
        assert smae.train("finetune", "brats", brats, tmp_path / name, *more)[0] == 0
        assert smae("evaluate", tmp_path / name)[0] == 0
    refused(smae("compare", tmp_path / "self", tmp_path / "scratch"), "scratch first")


def test_the_demo_deletes_only_what_it_made(smae, tmp_path):
    mine = tmp_path / "demo" / "btcv" / "data"
    mine.mkdir(parents=True)
    (mine / "RawData.zip").write_text("mine", encoding="utf-8")
    refused(smae.tools("demo", "--task", "btcv", "--out", tmp_path / "demo"), "did not make")
    refused(smae.tools("demo", "--task", "btcv", "--out", tmp_path / "demo", "--preset", "dmeo"), "dmeo")
    assert (mine / "RawData.zip").read_text(encoding="utf-8") == "mine"


def test_a_file_that_is_no_notebook(smae, tmp_path):
    (tmp_path / "text.md").write_text("# text", encoding="utf-8")
    (tmp_path / "cut.ipynb").write_text('{"cells": [', encoding="utf-8")
    for name in ("text.md", "cut.ipynb"):
        refused(smae("run", tmp_path / name, "--out", tmp_path / "out"), name, "no notebook")


def test_images_that_are_not_finite_or_of_another_kind(smae, brats, spoil, tmp_path):
    folder = spoil(brats)
    image = first_case("brats", folder)["image"]
    stored = nib.load(image)
    voxels = np.asarray(stored.dataobj).astype(np.float32)
    spoiled = voxels.copy()
    spoiled[3, 3, 3, 0] = np.nan
    nib.save(nib.Nifti1Image(spoiled, stored.affine), image)
    refused(smae.train("pretrain", "brats", folder, tmp_path / "nan"), image, "NaN")
    nib.save(nib.Nifti1Image(voxels[..., :3], stored.affine), image)
    refused(smae.train("pretrain", "brats", folder, tmp_path / "three"), image, "3 channels", "expects 4")
    nib.save(nib.Nifti1Image(voxels[..., 0], stored.affine), image)
    refused(smae.train("pretrain", "brats", folder, tmp_path / "one"), image, "expects 4")


def test_an_error_inside_a_loading_process_is_one_line_too(smae, btcv, spoil, tmp_path):
    folder = spoil(btcv)
    image = first_case("btcv", folder)["image"]
    cut(image)
    refused(smae.train("pretrain", "btcv", folder, tmp_path / "run", num_workers=1), image)


def test_a_broken_test_case_is_named_by_evaluate(smae, brats, spoil, tmp_path):
    folder = spoil(brats)
    assert smae.train("finetune", "brats", folder, tmp_path / "run")[0] == 0
    case = first_case("brats", folder, "test")
    whole, stored = Path(case["label"]).read_bytes(), nib.load(case["label"])
    nib.save(nib.Nifti1Image(np.array(stored.dataobj)[:-2], stored.affine), case["label"])
    refused(smae("evaluate", tmp_path / "run"), case["label"], "one grid")
    Path(case["label"]).write_bytes(whole)
    cut(case["label"])
    refused(smae("evaluate", tmp_path / "run"), case["label"])
    Path(case["label"]).write_bytes(whole)
    cut(case["image"])
    refused(smae("evaluate", tmp_path / "run"), case["image"])
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_radiograph_that_cannot_be_read_and_tables_with_faults(smae, cxr14, spoil, tmp_path):
    folder = spoil(cxr14)
    image = first_case("cxr14", folder)["image"]
    whole = Path(image).read_bytes()
    Path(image).write_bytes(whole[:200])
    refused(smae.train("pretrain", "cxr14", folder, tmp_path / "png", batch_size=20), image)
    Path(image).write_bytes(whole)
    table = folder / "Data_Entry_2017.csv"
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace("Finding Labels", "Findings"), encoding="utf-8")
    refused(smae.train("pretrain", "cxr14", folder, tmp_path / "column"), "Finding Labels")
    table.write_text(text.replace("Effusion", "Efusion"), encoding="utf-8")
    refused(smae.train("pretrain", "cxr14", folder, tmp_path / "finding"), "Efusion")
    # BOM and Windows line ends are no mistake.
    table.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert smae.train("pretrain", "cxr14", folder, tmp_path / "windows")[0] == 0


def test_a_checkpoint_of_another_task_or_cut_short(smae, brats, btcv, tmp_path):
    assert smae.train("pretrain", "brats", brats, tmp_path / "pre")[0] == 0
    refused(
        smae.train("finetune", "btcv", btcv, tmp_path / "run", "--init", tmp_path / "pre"),
        "patch_embed",
        "pre",
    )
    cut(str(tmp_path / "pre" / "model.safetensors"))
    refused(
        smae.train("finetune", "brats", brats, tmp_path / "run", "--init", tmp_path / "pre"),
        "model.safetensors",
    )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_whose_files_are_damaged(smae, brats, tmp_path):
    assert smae.train("finetune", "brats", brats, tmp_path / "run")[0] == 0
    (tmp_path / "run" / "config.yaml").write_text("stage: [finetune", encoding="utf-8")
    refused(smae("evaluate", tmp_path / "run"), "config.yaml")


@pytest.mark.skipif(os.name != "posix" or not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(smae, brats, tmp_path, monkeypatch):
    def full(self, **entry):
        with Path("/dev/full").open("w") as handle:
            handle.write("x" * 100_000)

    monkeypatch.setattr(Run, "log", full)
    refused(smae.train("pretrain", "brats", brats, tmp_path / "run"), "No space left", "disk space")


def test_help_and_mistyped_words_answer_without_loading_torch():
    code = "import sys; from smae_utils.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "pretrain" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "smae_utils", "pretrian"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "pretrain" in done.stderr and "Traceback" not in done.stderr


def broken(*args, **kwargs):
    raise KeyError("oops\nand more")


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_the_whole_traceback_is_shown_when_asked_for(place, smae, tmp_path, monkeypatch):
    words = ["evaluate", tmp_path / "typo"]
    assert "Traceback" not in smae(*words)[2]
    if place == "environment":
        monkeypatch.setenv("SMAE_TRACEBACK", "1")
    code, _, err = smae(
        *{"before": ["--traceback", *words], "after": [*words, "--traceback"]}.get(place, words)
    )
    assert (
        code == 2
        and "Traceback" in err
        and "run_folder.py" in err
        and err.splitlines()[-1].startswith("error: ")
    )


def test_a_traceback_shows_the_error_that_a_line_for_the_user_replaced(smae, brats, tmp_path):
    (tmp_path / "p.yaml").write_text("all: [1", encoding="utf-8")
    words = (
        "pretrain",
        "--task",
        "brats",
        "--data",
        brats,
        "--preset",
        tmp_path / "p.yaml",
        "--out",
        tmp_path / "run",
    )
    assert "ParserError" in smae(*words, "--traceback")[2]
    refused(smae(*words), "not valid YAML")


def test_a_fault_of_this_package_is_told_as_such_in_one_line_with_its_place(
    smae, brats, tmp_path, monkeypatch
):
    monkeypatch.setattr("smae_utils.work.pretrain.build_mae", broken)
    code, _, err = smae.train("pretrain", "brats", brats, tmp_path / "run")
    assert code == 1 and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("internal error: KeyError: ") and "oops" in err and "--traceback" in err
    assert "pretrain.py:" in err  # the last place in this package
    code, _, err = smae.train("pretrain", "brats", brats, tmp_path / "run", "--traceback")
    assert code == 1 and "in broken" in err
    assert not (tmp_path / "run").exists()


def test_a_users_mistake_is_no_value_error():
    # Else the `except ValueError` around a reader or parser would take it for its own.
    from smae_utils.errors import UserError

    assert not issubclass(UserError, (ValueError, OSError, RuntimeError))


@pytest.mark.parametrize(
    "error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")]
)
def test_lack_of_memory_says_what_to_make_smaller(error, smae, brats, tmp_path, monkeypatch):
    def full(*args):
        raise error

    monkeypatch.setattr("smae_utils.work.pretrain.build_mae", full)
    refused(smae.train("pretrain", "brats", brats, tmp_path / "run"), "out of memory", "batch_size")


def test_the_version_is_that_of_the_package(smae, capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and version("smae-utils") in capsys.readouterr().out


def test_pretraining_can_start_from_weights(smae, brats, tmp_path):
    assert smae.train("pretrain", "brats", brats, tmp_path / "a")[0] == 0
    code, out, err = smae.train(
        "pretrain", "brats", brats, tmp_path / "b", "--init", tmp_path / "a", "--adapt"
    )
    assert code == 0 and "loaded" in out, err
    refused(
        smae.train("pretrain", "brats", brats, tmp_path / "c", "--init", tmp_path / "typo"),
        "typo",
        "no weights",
    )
    assert not (tmp_path / "c").exists()


def notebook(path: Path, line: str) -> Path:
    import nbformat

    cell = nbformat.v4.new_code_cell(line, metadata={"tags": ["parameters"]})
    made = nbformat.v4.new_notebook(cells=[cell])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@pytest.mark.parametrize(
    ("line", "given", "value"),
    [
        ("x: int = 0", "7", 7), ("x: int = 0", "1e3", 1000), ("x: int = 0", "1.0", 1),
        ("x: float = 1.0", "1e-4", 1e-4), ("x: float = 1.0", "3", 3.0),
        ("x: bool = True", "False", False), ("x: bool = True", "no", False), ("x: str = 'a'", "1e3", "1e3"),
        ("x: str = 'a'", "", ""),
        ("x: str = 'a'", "None", "None"), ("x: str = 'a'", " b ", " b "), ("x: list = []", "[1, 2]", [1, 2]),
        ("x: list[int] = []", "[1, 2.0]", [1, 2]),
        ("x: Optional[int] = None", "null", None), ("x: Optional[int] = None", "4", 4), ("x = 0", "5", 5),
        ("x = 'a'", "5", "5"), ("x = None", "5", 5),
    ],
)  # fmt: skip
def test_parameters_of_a_notebook_arrive_in_their_declared_type(line, given, value, tmp_path):
    from smae_utils.run_notebook import check_parameters

    made = check_parameters(notebook(tmp_path / "one.ipynb", line), {"x": given})["x"]
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("x: int = 0", "True"), ("x: int = 0", "None"), ("x: int = 0", "[1, 2]"), ("x: int = 0", ""),
        ("x: int = 0", "1.5"), ("x: int = 0", ".inf"),
        ("x: float = 0.0", "fast"), ("x: bool = True", "2"), ("x: list = []", "3"),
        ("x: list[int] = []", "[a]"), ("x = 0", "many"),
    ],
)  # fmt: skip
def test_parameters_of_another_type_are_refused_with_the_list_of_the_right_ones(line, given, tmp_path):
    from smae_utils.errors import UserError
    from smae_utils.run_notebook import check_parameters

    with pytest.raises(UserError, match="^x must be .*one.ipynb takes: x"):
        check_parameters(notebook(tmp_path / "one.ipynb", line), {"x": given})


def test_output_into_a_closed_pipe_is_no_traceback(tmp_path):
    command = f"{sys.executable} -m smae_utils phantom --task cxr14 --out {tmp_path / 'd'} --n 12 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
