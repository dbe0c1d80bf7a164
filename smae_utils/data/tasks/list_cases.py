"""The cases of a list: their names, files and splits, and what contradicts itself in them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from smae_utils.data.case import Case, Splits, files_of
from smae_utils.data.splits import hold_out
from smae_utils.data.tasks.list_files import read_list
from smae_utils.data.tasks.list_labels import class_vector
from smae_utils.data.tasks.record import Task
from smae_utils.errors import UserError
from smae_utils.paths import case_name, split_series


def no_reader(*_) -> Splits:
    """Stands in for `Task.read_splits` until the list's own reader takes its place."""
    raise NotImplementedError


def splits_of_list(
    path: Path,
    cases: dict[str, list[dict]],
    task: Task,
    data_dir: Path,
    seed: int = 0,
    fold: int | None = 0,
    strict: bool = True,
) -> Splits:
    """The splits of a list; a tenth of the training patients is held out when no validation is listed.

    Paths are relative to `data_dir`, or to the list file where that is "" or ".".

    Args:
        fold: the fold that validates, where entries have one; None: entries stay where they are.
        strict: True refuses class names that the task does not have; False leaves them out.

    Raises:
        UserError: for files that are not there, cases or files listed twice, or a patient in two splits.
    """
    root = path.parent if str(data_dir) in ("", ".") else Path(data_dir)
    cases = _by_fold(path, cases, fold)
    out: Splits = {}
    seen: dict[str, str] = {}
    files: dict[str, str] = {}
    every = [entry for entries in cases.values() for entry in entries]
    _all_there(path, root, every, task.kind)
    names = dict(zip(map(id, every), _names(every)))
    for split, entries in cases.items():
        out[split] = []
        for entry in entries:
            case = _case(path, root, {"case": names[id(entry)], **entry}, task, strict)
            if case["case"].casefold() in seen:
                where = f"{seen[case['case'].casefold()]} and {split}"
                raise UserError(
                    f"{path} lists {case['case']} twice ({where}): each scan once; add 'case' where names "
                    "clash"
                )
            seen[case["case"].casefold()] = split
            for file in files_of(case["image"]):
                place = _resolved(file)
                if place in files:
                    raise UserError(
                        f"{path} lists {file} twice, as {files[place]} and as {case['case']}: each scan once"
                    )
                files[place] = case["case"]
            out[split].append(case)
    patients = {split: {c["patient"] for c in cases} for split, cases in out.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := patients[a] & patients[b]:
            raise UserError(
                f"{path}: patient {min(shared)} is in {a} and in {b}: the figures would flatter; keep a "
                "patient in one split"
            )
    if not out["val"] and len(patients["train"]) > 1:
        out["train"], out["val"] = hold_out(out["train"], 0.1, seed)
    return out


def _names(entries: list[dict]) -> list[str]:
    """A name for each entry: its own `case`, or its file's.

    Files of one name in several folders (`p1/t1.nii`, `p2/t1.nii`) get as many folders before
    it as tell them apart.
    """
    images = [entry["image"][0] if isinstance(entry["image"], list) else entry["image"] for entry in entries]
    names = [str(entry.get("case") or case_name(image)) for entry, image in zip(entries, images)]
    for depth in range(2, 8):
        counts = Counter(name.casefold() for name in names)
        for i, (entry, image) in enumerate(zip(entries, images)):
            if counts[names[i].casefold()] > 1 and "case" not in entry:
                folders = [part for part in Path(image).parts[-depth:-1] if part not in ("..", ".", "/")]
                names[i] = "_".join([*folders, case_name(image)])
    return names


def _by_fold(path: Path, cases: dict[str, list[dict]], fold: int | None) -> dict[str, list[dict]]:
    """Training entries may have a fold, as in MONAI's lists: one fold validates, the others train.

    With None nobody trains, so all stay where they are.
    """
    folds = {e["fold"] for e in cases["train"] if "fold" in e}
    if not folds or cases["val"] or fold is None:
        return cases
    if fold not in folds:
        raise UserError(
            f"{path}: no training entry has fold {fold}: there are {', '.join(map(str, sorted(folds)))}; "
            "choose by --set fold=N"
        )
    train = [e for e in cases["train"] if e.get("fold") != fold]
    return {
        "train": train,
        "val": [e for e in cases["train"] if e.get("fold") == fold],
        "test": cases["test"],
    }


def images_of(path: str | Path) -> list[Case]:
    """All images that a list names, whatever their split, for prediction; masks and patients are not read.

    Raises:
        UserError: naming the images that are not there.
    """
    path = Path(path)
    entries = itertools.chain(*read_list(path)["cases"].values())
    every = [{k: v for k, v in entry.items() if k != "label"} for entry in entries]
    _all_there(path, path.parent, every, "")
    bare = Task("", "", "segmentation", 3, (), (), no_reader)
    return [
        _case(path, path.parent, {"case": name, **entry}, bare, False)
        for name, entry in zip(_names(every), every)
    ]


def _resolved(file: str) -> str:
    """Where a file really lies: links and `..` followed."""
    folder, series = split_series(file)
    return f"{folder.resolve()}#{series}"


def _all_there(path: Path, root: Path, entries: Iterable[dict], kind: str) -> None:
    """Refuse a list whose files are not all there, naming them: a mistake in a path is seldom alone."""
    missing = []
    for entry in entries:
        names = files_of(entry["image"])
        missing += [str(root / n) for n in names if not split_series(root / n)[0].exists()]
        if "label" in entry and kind == "segmentation" and not (root / str(entry["label"])).is_file():
            missing.append(str(root / str(entry["label"])))
    if missing := list(dict.fromkeys(missing)):
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"{path} names {some}, which {'does' if len(missing) == 1 else 'do'} not exist: paths are "
            f"relative to {root}"
        )


def _case(path: Path, root: Path, entry: dict, task: Task, strict: bool) -> Case:
    images = [str(root / name) for name in files_of(entry["image"])]
    case: Case = {"case": str(entry["case"]), "image": images if len(images) > 1 else images[0]}
    if not case["case"] or "/" in case["case"] or "\\" in case["case"]:
        raise UserError(
            f"{path}: 'case' names files of results, so it can hold no slash, got {case['case']!r}"
        )
    case["patient"] = str(entry.get("patient", case["case"]))
    if "label" not in entry:
        return case
    if task.kind == "segmentation":
        case["label"] = str(root / str(entry["label"]))
        return case
    case["label"] = class_vector(path, case["case"], entry["label"], task.classes, strict)
    if np.isnan(case["label"]).all():
        del case["label"]
    return case
