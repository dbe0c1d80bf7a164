"""A task from one list file: JSON in the style of the Medical Segmentation Decathlon and MONAI, or CSV. No code to edit.

JSON:
    {"name": "liver_ct", "labels": {"0": "background", "1": "liver", "2": "tumour"}, "modality": {"0": "CT"},
     "window": [-100, 240], "spacing_mm": [1.5, 1.5, 2], "sided": false,
     "training": [{"image": "img/1.nii.gz", "label": "lab/1.nii.gz", "patient": "p1"}, ...], "validation": [...], "test": [...]}
    `image` may be a list of files, one a channel. `labels` may also be nnU-Net's {"liver": 1, "whole": [1, 2]}, lists making
    overlapping regions. Classification: `label` is a class, a list of classes, or zeros and ones; `classes` names them.
    `like` names a task whose presets, spacing and window fit (btcv, brats, cxr14), and whose classes and channels, where the
    list has none of its own; `settings` holds what they should have differently.
CSV:
    columns `image`, and `label=liver|tumour` (a mask file; the header names the values 1, 2, ...) or `class` (one word, several
    joined by |) or one 0/1 column a class; `split` (train, val, test) and `patient` may follow.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smae_utils.errors import UserError
from smae_utils.tasks import Case, Splits, Task, get_task, hold_out
from smae_utils.tasks.list_files import read_list

MASK_ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".png")
FLAT_ENDINGS = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


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
        raise UserError(f"list file {path} does not exist: expected a JSON or CSV list of scans, see the documentation of own data")
    content = read_list(path)
    cases = content["cases"]
    if not any(cases.values()):
        raise UserError(f"{path} lists no scans: expected a list 'training' of entries with 'image' and 'label'")
    if like := content.get("like"):
        if not isinstance(like, str) or is_list(like):
            raise UserError(f"{path}: 'like' must be the name of a task as btcv, brats or cxr14, got {like!r}")
        try:
            base = get_task(like)
        except UserError as error:
            raise UserError(f"{path}, 'like': {error}") from None
        if content.get("labels") or content.get("classes"):  # classes of its own; how scans are prepared is the other task's
            own = _guess_task(path, content)
            if own.kind != base.kind:
                raise UserError(f"{path} is a {own.kind} list, 'like' names {like}, a {base.kind} task")
            channels = base.channels if own.in_chans in (1, base.in_chans) else own.channels
            base = replace(base, classes=own.classes, regions=own.regions, subset=(), sided=False, channels=channels)
    else:
        base = _guess_task(path, content)
    over: dict[str, Any] = {}
    if "window" in content:
        over["window"] = None if content["window"] is None else _numbers(path, "window", content["window"], 2)
        if over["window"] and over["window"][0] >= over["window"][1]:
            raise UserError(f"{path}: 'window' must be two numbers, the smaller first, got {content['window']!r}")
    if content.get("spacing_mm") is not None:
        over["spacing_mm"] = _numbers(path, "spacing_mm", content["spacing_mm"], base.spatial_dims)
        if min(over["spacing_mm"]) <= 0:
            raise UserError(f"{path}: 'spacing_mm' must be above 0, got {content['spacing_mm']!r}")
    if not isinstance(content.get("sided", False), bool):
        raise UserError(f"{path}: 'sided' must be true or false, got {content['sided']!r}")
    if "channels" in content:
        over["channels"] = content["channels"]
    return replace(
        base,
        name=str(path.resolve()),
        title=str(content.get("title") or content.get("description") or content.get("name") or path.stem),
        read_splits=partial(_splits, path, cases, base.kind, base.classes),
        like=base.name if like else base.like,
        settings={**_spacing(base, over, bool(like)), **_mapping(path, content.get("settings") or {})},
        **({"sided": content["sided"]} if "sided" in content else {}),
        **over,
    )


FIELDS = ("title", "kind", "spatial_dims", "channels", "classes", "spacing_mm", "window", "regions", "sided", "like", "settings")


def record_of(task: Task) -> dict[str, Any]:
    """What a run has to remember of a list's task, as plain values: it must mean the same when the list was changed or is gone."""
    return json.loads(json.dumps({name: getattr(task, name) for name in FIELDS}))


def task_from_record(name: str, record: dict[str, Any]) -> Task:
    """The task that `record_of` remembered; its cases are still read from the list."""

    def tuples(value: Any) -> Any:
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    values = {k: v if k == "settings" else tuples(v) for k, v in record.items()}
    return Task(name=name, read_splits=lambda *args: task_from_list(name).read_splits(*args), **values)


def _spacing(base: Task, over: dict, like: bool) -> dict:
    """The list's voxel size goes before the preset's; that of another task's preset counts only where `like` asks for it."""
    if base.spatial_dims == 2:
        return {}
    if "spacing_mm" in over:
        return {"spacing_mm": list(over["spacing_mm"])}
    return {} if like else {"spacing_mm": []}


def _mapping(path: Path, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path}: 'settings' must be a mapping like a task's section of a preset, got {value!r}")
    for key in ("pretrain", "finetune", "scratch", "self"):
        if key in value:
            _mapping(path, value[key])
    return value


def _numbers(path: Path, key: str, value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
        raise UserError(f"{path}: {key!r} must be a list of {count} numbers, got {value!r}")
    return tuple(map(float, value))


def _guess_task(path: Path, content: dict[str, Any]) -> Task:
    """Kind, dimensions, classes and channels from what the entries look like."""
    entries = [e for part in content["cases"].values() for e in part]
    first = entries[0]["image"]
    files = first if isinstance(first, list) else [first]
    flat = content.get("spatial_dims", 2 if str(files[0]).lower().endswith(FLAT_ENDINGS) else 3) == 2
    if flat and len(files) > 1:
        raise UserError(f"{path}: a 2D image is one file, got {files}")
    labels = [e["label"] for e in entries if "label" in e]
    masks = bool(labels) and all(isinstance(v, str) and v.lower().endswith(MASK_ENDINGS) for v in labels)
    channels = content.get("channels") or tuple(f"channel {i + 1}" for i in range(len(files)))
    if masks or not labels:
        if flat and masks:
            raise UserError(f"{path}: masks of 2D images cannot be segmented here yet: expected 3D scans, or classes for 2D images")
        classes, regions = _classes(path, content.get("labels"), bool(labels))
        kind = "segmentation" if not flat else "classification"
        like, spacing = ("cxr14", ()) if flat else ("btcv", get_task("btcv").spacing_mm)
        return Task("", "", kind, 2 if flat else 3, channels, classes, _no_reader, regions=regions, like=like, spacing_mm=spacing)
    classes = content.get("classes") or []
    if not isinstance(classes, list) or len(set(map(str, classes))) < len(classes):
        raise UserError(f"{path}: 'classes' must be a list of different names, got {classes!r}")
    classes = classes or sorted({name for v in labels for name in (v if isinstance(v, list) else [v]) if isinstance(name, str)})
    if not flat:
        raise UserError(f"{path}: classes of 3D scans cannot be learned here yet: expected masks for 3D scans, or 2D images")
    if not classes:
        raise UserError(f'{path}: labels are zeros and ones without names: add "classes": [...] in their order')
    return Task("", "", "classification", 2, channels, tuple(map(str, classes)), _no_reader, like="cxr14")


def _no_reader(*_) -> Splits:
    raise NotImplementedError


def _classes(path: Path, labels: Any, labelled: bool) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...] | None]:
    """MSD's {"1": "liver"} or nnU-Net's {"liver": 1, "whole": [1, 2]} -> class names, and regions where lists overlap."""
    if not labelled:
        return (), None
    if not isinstance(labels, dict) or not labels:
        wanted = '{"0": "background", "1": "liver"}' if path.suffix.lower() == ".json" else "the header label=liver|tumour for the masks' column"
        raise UserError(f'{path}: "labels" must say what the mask values mean, for example {wanted}')
    pairs: list[tuple[str, tuple[int, ...]]] = []
    try:
        for key, value in labels.items():
            if isinstance(value, str):
                pairs.append((value, (int(key),)))
            else:
                pairs.append((str(key), tuple(int(v) for v in (value if isinstance(value, list) else [value]))))
    except (TypeError, ValueError):
        raise UserError(f'{path}: "labels" must map numbers to names or names to numbers, got {labels!r}') from None
    pairs = [(name, values) for name, values in pairs if values != (0,)]
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError(f'{path}: "labels" gives one name to several values, got {labels!r}: a class needs a name of its own')
    if all(len(values) == 1 for _, values in pairs):
        pairs.sort(key=lambda p: p[1])
        if [v for _, (v,) in pairs] != list(range(1, len(pairs) + 1)):
            raise UserError(f"{path}: mask values {[v for _, (v,) in pairs]} must be 1 .. {len(pairs)} without gaps: renumber the masks")
        return tuple(name for name, _ in pairs), None
    for (wide, outer), (narrow, inner) in zip(pairs, pairs[1:]):
        if not set(inner) < set(outer):
            raise UserError(f"{path}: regions must be nested, from the widest to the narrowest: {narrow} {inner} is not inside {wide} {outer}")
    return tuple(name for name, _ in pairs), tuple(values for _, values in pairs)


def _splits(path: Path, cases: dict[str, list[dict]], kind: str, classes: tuple[str, ...], data_dir: Path, seed: int = 0, fold: int = 0) -> Splits:
    """Paths relative to `data_dir`, or to the list file where that is its own folder; a tenth of the patients is held out when nothing is."""
    root = path.parent if str(data_dir) in ("", ".") else Path(data_dir)
    out: Splits = {}
    seen: dict[str, str] = {}
    files: dict[str, str] = {}
    _all_there(path, root, [entry for entries in cases.values() for entry in entries], kind)
    for split, entries in cases.items():
        out[split] = []
        for entry in entries:
            case = _case(path, root, entry, kind, classes)
            if case["case"] in seen:
                raise UserError(f"{path} lists {case['case']} twice ({seen[case['case']]} and {split}): each scan once; add 'case' where names clash")
            seen[case["case"]] = split
            first = case["image"] if isinstance(case["image"], str) else case["image"][0]
            if first in files:
                raise UserError(f"{path} lists {first} twice, as {files[first]} and as {case['case']}: each scan once")
            files[first] = case["case"]
            out[split].append(case)
    patients = {split: {c["patient"] for c in cases} for split, cases in out.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := patients[a] & patients[b]:
            raise UserError(f"{path}: patient {min(shared)} is in {a} and in {b}: the figures would flatter; keep a patient in one split")
    if not out["val"] and len(patients["train"]) > 1:
        out["train"], out["val"] = hold_out(out["train"], 0.1, seed)
    return out


def _all_there(path: Path, root: Path, entries: list[dict], kind: str) -> None:
    """Refuse a list whose files are not all there, naming them: a mistake in a path is seldom alone."""
    names = [name for e in entries for name in (e["image"] if isinstance(e["image"], list) else [e["image"]])]
    masks = [str(e["label"]) for e in entries if "label" in e and kind == "segmentation"]
    missing = [str(root / n) for n in names if not (root / n).exists()] + [str(root / n) for n in masks if not (root / n).is_file()]
    if missing := list(dict.fromkeys(missing)):
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(f"{path} names {some}, which {'does' if len(missing) == 1 else 'do'} not exist: paths are relative to {root}")


def _case(path: Path, root: Path, entry: dict, kind: str, classes: tuple[str, ...]) -> Case:
    images = [str(root / name) for name in (entry["image"] if isinstance(entry["image"], list) else [entry["image"]])]
    stem = Path(images[0]).name.split(".")[0]
    case: Case = {"case": str(entry.get("case", stem)), "image": images if len(images) > 1 else images[0]}
    if not case["case"] or "/" in case["case"] or "\\" in case["case"]:
        raise UserError(f"{path}: 'case' names files of results, so it can hold no slash, got {case['case']!r}")
    case["patient"] = str(entry.get("patient", case["case"]))
    if "label" not in entry:
        return case
    if kind == "segmentation":
        case["label"] = str(root / str(entry["label"]))
    else:
        case["label"] = _vector(path, case["case"], entry["label"], classes)
    return case


def _vector(path: Path, case: str, label: Any, classes: tuple[str, ...]) -> np.ndarray:
    values = label if isinstance(label, list) else [label]
    if len(values) == len(classes) and all(isinstance(v, (int, float)) for v in values):
        if set(values) <= {0, 1}:
            return np.asarray(values, np.float32)
        raise UserError(f"{path}: label of {case} is {values}, expected zeros and ones")
    unknown = [v for v in values if v not in classes]
    if unknown:
        raise UserError(f"{path}: label of {case} holds {unknown[0]!r}, expected some of {', '.join(classes)}")
    return np.asarray([name in values for name in classes], np.float32)


__all__ = ["is_list", "task_from_list"]
