"""A list file to plain values: JSON and CSV become the same mapping; what its entries mean is said in `lists`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from smae_utils.errors import UserError

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
KEYS = (
    "name",
    "title",
    "description",
    "like",
    "labels",
    "classes",
    "modality",
    "channel_names",
    "window",
    "spacing_mm",
    "sided",
    "settings",
    "spatial_dims",
)


def read_list(path: Path) -> dict[str, Any]:
    """What a list file says: `cases` ({train, val, test: [entry, ...]}) and whichever of `KEYS` it has.

    Raises:
        UserError: naming the file and the entry or line that cannot be understood.
    """
    return _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object with 'training' and more, got a {type(content).__name__}")
    cases: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for key, entries in content.items():
        if key not in SPLITS:
            continue
        if not isinstance(entries, list):
            raise UserError(f"{path}: {key!r} must be a list of entries, got {type(entries).__name__}")
        for number, entry in enumerate(entries):
            entry = {"image": entry} if isinstance(entry, (str, list)) else entry
            if not isinstance(entry, dict) or "image" not in entry:
                raise UserError(f"{path}: entry {number} of {key!r} must be an object with 'image', got {entry!r}")
            files = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
            if not files or not all(isinstance(f, str) and f for f in files):
                raise UserError(f"{path}: 'image' of entry {number} of {key!r} must be a path or a list of paths, got {entry['image']!r}")
            cases[SPLITS[key]].append({k: v for k, v in entry.items() if v is not None})  # null is nothing
    out = {key: content[key] for key in KEYS if key in content}
    channels = content.get("channel_names", content.get("modality"))
    if isinstance(channels, dict):
        out["channels"] = tuple(str(channels[key]) for key in sorted(channels, key=lambda k: int(k) if str(k).isdigit() else 0))
    return {**out, "cases": cases}


def _read_csv(path: Path) -> dict[str, Any]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            header, rows = [h.strip() for h in reader.fieldnames or []], [{k.strip(): (v or "").strip() for k, v in r.items() if k} for r in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable CSV: {error}: save it as UTF-8") from None
    if "image" not in header:
        raise UserError(f"{path} has the columns {', '.join(header) or '(none)'}: a column 'image' is needed, and 'label', 'class' or 0/1 columns")
    content: dict[str, Any] = {}
    if named := next((h for h in header if h.startswith("label=")), None):
        content["labels"] = {str(i): name.strip() for i, name in enumerate(named.removeprefix("label=").split("|"), start=1)}
        header = ["label" if h == named else h for h in header]
        rows = [{"label" if k == named else k: v for k, v in row.items()} for row in rows]
    own = [h for h in header if h and h not in ("image", "label", "class", "split", "patient", "case")]
    cases: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for line, row in enumerate(rows, start=2):
        if not row["image"]:
            raise UserError(f"{path}, line {line}: the column 'image' is empty")
        split = row.get("split") or "train"
        if split.lower() not in SPLITS:
            raise UserError(f"{path}, line {line}: split {split!r} is none of train, val, test")
        entry: dict[str, Any] = {"image": row["image"].split("|") if "|" in row["image"] else row["image"]}
        entry.update({key: row[key] for key in ("patient", "case", "label") if row.get(key)})
        if "class" in header:
            entry["label"] = [name for name in row["class"].split("|") if name]
        elif own and "label" not in header:
            if bad := [name for name in own if row[name] not in ("0", "1", "0.0", "1.0")]:
                raise UserError(f"{path}, line {line}: column {bad[0]!r} holds {row[bad[0]]!r}, expected 0 or 1")
            entry["label"] = [name for name in own if float(row[name])]
        cases[SPLITS[split.lower()]].append(entry)
    content["cases"] = cases
    if "class" in header:
        content["classes"] = sorted({name for entries in cases.values() for e in entries for name in e["label"]})
    elif own and "label" not in header:
        content["classes"] = own
    return content
