"""A task from one list file, without any code: JSON in the style of MSD, nnU-Net and MONAI, or CSV.

JSON:
    {"name": "liver_ct", "labels": {"0": "background", "1": "liver", "2": "tumour"}, "modality": {"0": "CT"},
     "window": [-100, 240], "spacing_mm": [1.5, 1.5, 2], "sided": false,
     "training": [{"image": "img/1.nii.gz", "label": "lab/1.nii.gz", "patient": "p1"}, ...],
     "validation": [...], "test": [...]}

    `image` may be a list of files, one a channel. A DICOM series is its folder, or folder#series.
    `label` is a mask file; for classification a class, several joined by |, a list of classes, the number
    of a class, or zeros and ones (-1: unknown).
    `labels` may also be nnU-Net's {"liver": 1, "whole": [1, 2], "ignore": 3}. Mask values are any integers.
    `like` names a task (btcv, brats, cxr14) whose presets, spacing and window fit, and whose classes and
    channels count where the list has none of its own.
    `settings` holds what differs from those presets.
    `fold` of an entry is MONAI's.
CSV:
    columns `image`, and `label=liver|tumour` (a mask file; the header names the values 1, 2, ...) or `label`
    or `class` (one word, several joined by |) or one 0/1 column a class; `split` (train, val, test),
    `patient`, `case` and `fold` may follow.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from smae_utils.data.case import files_of
from smae_utils.data.tasks.list_cases import no_reader, splits_of_list
from smae_utils.data.tasks.list_files import read_list
from smae_utils.data.tasks.list_labels import class_names, mask_classes
from smae_utils.data.tasks.record import Task
from smae_utils.data.tasks.registry import named_task
from smae_utils.errors import UserError
from smae_utils.paths import FLAT_ENDINGS, VOLUME_ENDINGS, is_dicom

SIDES = re.compile(r"(?:^|[^a-z])(?:left|right|[lr]h?)(?:[^a-z]|$)", re.IGNORECASE)


def is_list(name: str) -> bool:
    """Whether a task's name is the path of a list file."""
    return str(name).lower().endswith((".json", ".csv"))


def task_from_list(path: str | Path) -> Task:
    """The record of the task that a list file describes.

    Raises:
        UserError: naming the file and the entry, for whatever is missing or contradictory in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"list file {path} does not exist: expected a JSON or CSV list of scans, "
            "see the documentation of own data"
        )
    content = read_list(path)
    cases, notes = content["cases"], content["notes"]
    if not any(cases.values()):
        raise UserError(
            f"{path} lists no scans: expected a list 'training' of entries with 'image' and 'label'"
        )
    base, own_classes = _base(path, content)
    over = _said(path, content, base)
    sided, note = _sided(content, base, own_classes)
    return replace(
        base,
        name=str(path.absolute()),  # a link (DVC, DataLad) keeps its own name and ending
        title=str(content.get("title") or content.get("name") or content.get("description") or path.stem),
        read_splits=partial(splits_of_list, path, cases, base),
        like=base.name if content.get("like") else base.like,
        settings={
            **_spacing(base, over, bool(content.get("like"))),
            **_mapping(path, content.get("settings") or {}),
        },
        sided=sided,
        notes=(*notes, *([note] if note else []), *_split_notes(cases)),
        **over,
    )


def _base(path: Path, content: dict[str, Any]) -> tuple[Task, bool]:
    """The task before the list's spacing, window and sides; and whether the classes are the list's own."""
    if not (like := content.get("like")):
        return _guess_task(path, content), True
    if not isinstance(like, str) or is_list(like):
        raise UserError(f"{path}: 'like' must be the name of a task as btcv, brats or cxr14, got {like!r}")
    try:
        base = named_task(like)
    except UserError as error:
        raise UserError(f"{path}, 'like': {error}") from None
    if not (content.get("labels") or content.get("classes")):
        return base, False
    # The list has classes of its own; how scans are prepared is the other task's.
    own = _guess_task(path, content)
    if own.kind != base.kind or own.spatial_dims != base.spatial_dims:
        raise UserError(
            f"{path} is a {own.spatial_dims}D {own.kind} list, 'like' names {like}, "
            f"a {base.spatial_dims}D {base.kind} task"
        )
    channels = base.channels if own.in_chans in (1, base.in_chans) else own.channels
    labels = {"stored_labels": own.stored_labels, "ignored_labels": own.ignored_labels}
    return replace(
        base, classes=own.classes, regions=own.regions, subset=(), channels=channels, **labels
    ), True


def _said(path: Path, content: dict[str, Any], base: Task) -> dict[str, Any]:
    """Window, spacing and channels that the list says."""
    over: dict[str, Any] = {}
    if "window" in content:
        over["window"] = None if content["window"] is None else _numbers(path, "window", content["window"], 2)
        if over["window"] and over["window"][0] >= over["window"][1]:
            raise UserError(
                f"{path}: 'window' must be two numbers, the smaller first, got {content['window']!r}"
            )
        if over["window"] and base.spatial_dims == 2:
            raise UserError(
                f"{path}: 'window' is for 3D scans; 2D images are scaled by their own range or "
                "by the window in their DICOM file"
            )
    if content.get("spacing_mm") is not None:
        over["spacing_mm"] = _numbers(path, "spacing_mm", content["spacing_mm"], base.spatial_dims)
        if min(over["spacing_mm"]) <= 0:
            raise UserError(f"{path}: 'spacing_mm' must be above 0, got {content['spacing_mm']!r}")
    if not isinstance(content.get("sided", False), bool):
        raise UserError(f"{path}: 'sided' must be true or false, got {content['sided']!r}")
    if "channels" in content:
        over["channels"] = content["channels"]
    return over


def _sided(content: dict[str, Any], base: Task, own_classes: bool) -> tuple[bool, str]:
    """Whether images are kept from being mirrored left-right, and a note on what was assumed."""
    named = [name for name in base.classes if SIDES.search(name)]
    if "sided" in content:
        note = (
            f'"sided" is false though {named[0]!r} names a side: training mirrors images left-right'
            if named and not content["sided"]
            else ""
        )
        return content["sided"], note
    if not own_classes:
        return base.sided, ""
    if not base.classes:
        return True, ""
    why = (
        f"the class {named[0]!r} names a side"
        if named
        else "the list does not say whether labels tell left from right"
    )
    return (
        True,
        f'{why}: training does not mirror images left-right; "sided": false in the list, or --set '
        "mirror=true, allows it",
    )


def _split_notes(cases: dict[str, list[dict]]) -> list[str]:
    notes = []
    folds = any("fold" in e for e in cases["train"])
    if folds and not cases["val"]:
        notes.append("entries have a fold: those of --set fold=N (0 when not said) are the validation cases")
    elif folds:
        notes.append("'fold' is not used: the list has validation cases")
    elif not cases["val"] and len(cases["train"]) > 1:
        notes.append(
            "no validation cases are listed: a tenth of the training patients, "
            "drawn by split_seed, is held out"
        )
    return notes


def _spacing(base: Task, over: dict, like: bool) -> dict:
    """The list's voxel size goes before the preset's; another task's preset counts only with `like`."""
    if base.spatial_dims == 2:
        return {}
    if "spacing_mm" in over:
        return {"spacing_mm": list(over["spacing_mm"])}
    return {} if like else {"spacing_mm": []}


def _mapping(path: Path, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: 'settings' must be a mapping like a task's section of a preset, got {value!r}"
        )
    for key in ("pretrain", "finetune", "scratch", "self"):
        if key in value:
            _mapping(path, value[key])
    return value


def _numbers(path: Path, key: str, value: Any, count: int) -> tuple[float, ...]:
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    ):
        raise UserError(f"{path}: {key!r} must be a list of {count} numbers, got {value!r}")
    return tuple(map(float, value))


def _is_flat(path: Path, content: dict[str, Any], file: str) -> bool:
    """Whether the images are 2D: as the list says, or by their ending, or as a single DICOM file."""
    dims = content.get("spatial_dims")
    if dims not in (None, 2, 3):
        raise UserError(f"{path}: 'spatial_dims' must be 2 or 3, got {dims!r}")
    if dims:
        return dims == 2
    return file.lower().endswith(FLAT_ENDINGS) or is_dicom(path.parent / file)


def _guess_task(path: Path, content: dict[str, Any]) -> Task:
    """Kind, dimensions, classes and channels from what the entries look like."""
    entries = [e for part in content["cases"].values() for e in part]
    first = entries[0]["image"]
    files = files_of(first)
    flat = _is_flat(path, content, str(files[0]))
    if flat and len(files) > 1:
        raise UserError(f"{path}: a 2D image is one file, got {files}")
    labels = [e["label"] for e in entries if "label" in e]
    endings = FLAT_ENDINGS if flat else VOLUME_ENDINGS
    masks = [isinstance(v, str) and v.lower().endswith(endings) for v in labels]
    if any(masks) and not all(masks):
        raise UserError(
            f"{path}: some labels are mask files, others are not, as {labels[masks.index(False)]!r}: "
            f"expected one kind ({', '.join(endings)})"
        )
    channels = content.get("channels") or tuple(f"channel {i + 1}" for i in range(len(files)))
    dims = 2 if flat else 3
    shared = {
        "like": "cxr14" if flat else "btcv",
        "spacing_mm": () if flat else named_task("btcv").spacing_mm,
    }
    if any(masks) or not labels:
        kind = "segmentation" if any(masks) or not flat else "classification"
        classes, more = (
            mask_classes(path, content.get("labels"))
            if any(masks) or (content.get("labels") and labels)
            else ((), {})
        )
        stored = [v for of in more.get("stored_labels", ()) for v in of]
        if flat and stored and not 0 <= min(stored) <= max(stored) < 2**16:
            raise UserError(
                f'{path}: masks of 2D images hold values 0 .. 65535, "labels" names {min(stored)} to '
                f"{max(stored)}: write them anew"
            )
        return Task("", "", kind, dims, channels, classes, no_reader, **shared, **more)
    for value in labels:
        if isinstance(value, str) and ("/" in value or (path.parent / value).exists()):
            raise UserError(
                f"{path}: label {value!r} is no mask file that is read here "
                f"({', '.join(endings)}) and no class: convert it first"
            )
    return Task(
        "", "", "classification", dims, channels, class_names(path, content, labels), no_reader, **shared
    )
