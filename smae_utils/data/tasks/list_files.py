"""A list file to plain values: JSON and CSV become the same mapping.

What its entries mean is said in `lists`.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smae_utils.errors import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
KEYS = (
    "name", "title", "description", "like", "labels", "classes", "modality", "channel_names", "window",
    "spacing_mm", "sided", "settings",
    "spatial_dims",
)  # fmt: skip
# What lists of the Decathlon and of nnU-Net say besides; it changes nothing here.
INFORMATION = (
    "reference", "licence", "license", "release", "relase", "tensorImageSize", "numTraining", "numTest",
    "file_ending", "dataset", "version",
    "overwrite_image_reader_writer", "converted_by", "citation", "authors", "dataset_name", "date",
)  # fmt: skip
# How lists call an entry's fields, in small letters and without signs between.
ALIASES = {
    "image": "image", "images": "image", "imagepath": "image", "imagefile": "image", "imageindex": "image",
    "label": "label", "labels": "label", "mask": "label", "seg": "label", "segmentation": "label",
    "class": "class", "classes": "class", "findinglabels": "class",
    "patient": "patient", "patientid": "patient", "subject": "patient", "subjectid": "patient",
    "participant": "patient", "participantid": "patient",
    "case": "case", "caseid": "case", "split": "split", "fold": "fold",
}  # fmt: skip
# Columns that people keep beside zeros and ones and that are no finding.
OTHER_COLUMNS = (
    "age",
    "sex",
    "gender",
    "view",
    "site",
    "scanner",
    "study",
    "series",
    "date",
    "index",
    "id",
    "height",
    "width",
    "weight",
)
UNKNOWN = ("", "-1", "-1.0", "nan", "na", "n/a", "none", "null")
TRUTH = {
    "0": 0,
    "1": 1,
    "0.0": 0,
    "1.0": 1,
    "true": 1,
    "false": 0,
    "yes": 1,
    "no": 0,
    **dict.fromkeys(UNKNOWN),
}


def read_list(path: Path) -> dict[str, Any]:
    """What a list file says: `cases` ({train, val, test: [entry, ...]}), `notes`, and those of `KEYS` it has.

    An entry holds `image`, and `label`, `patient`, `case`, `fold` where they are said.

    Raises:
        UserError: naming the file and the entry or line that cannot be understood.
    """
    return _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)


def canonical(name: str) -> str:
    """The field that a column or key means, or its own name."""
    return ALIASES.get(re.sub(r"[^a-z0-9]", "", str(name).lower()), str(name))


def unused(what: str, name: str, known: Iterable[str]) -> str:
    """A note on a word that is not understood, with the nearest one that is."""
    close = (
        []
        if str(name).lower() in OTHER_COLUMNS
        else difflib.get_close_matches(str(name).lower(), list(known), 1, 0.7)
    )
    return f"{what} {name!r} is not used here" + (f": did you mean {close[0]!r}?" if close else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold an object with 'training' and more, got a {type(content).__name__}"
        )
    cases: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    notes: list[str] = []
    if not any(content.get(key) for key in SPLITS) and ("file_ending" in content or "numTraining" in content):
        cases = _nnunet_cases(path, content)
    for key, entries in content.items():
        if key not in SPLITS:
            if key not in (*KEYS, *INFORMATION):
                notes.append(unused("key", key, (*KEYS, *SPLITS)))
            continue
        if not isinstance(entries, list):
            raise UserError(f"{path}: {key!r} must be a list of entries, got {type(entries).__name__}")
        cases[SPLITS[key]] += [
            _entry(path, key, number, entry, notes) for number, entry in enumerate(entries)
        ]
    out = {key: content[key] for key in KEYS if key in content}
    channels = content.get("channel_names", content.get("modality"))
    if isinstance(channels, dict):
        out["channels"] = tuple(
            str(channels[key]) for key in sorted(channels, key=lambda k: int(k) if str(k).isdigit() else 0)
        )
    elif isinstance(channels, list):
        out["channels"] = tuple(map(str, channels))
    return {**out, "cases": cases, "notes": list(dict.fromkeys(notes))}


def _entry(path: Path, key: str, number: int, entry: Any, notes: list[str]) -> dict[str, Any]:
    """One entry with the names of this package."""
    entry = {"image": entry} if isinstance(entry, (str, list)) else entry
    if not isinstance(entry, dict):
        raise UserError(f"{path}: entry {number} of {key!r} must be an object with 'image', got {entry!r}")
    out: dict[str, Any] = {}
    for name, value in entry.items():
        field = canonical(name)
        if field not in ("image", "label", "class", "patient", "case", "fold"):
            notes.append(unused(f"in entries of {key!r}, key", name, ALIASES))
        elif value is not None:  # null is nothing
            out[field] = value
    if isinstance(out.get("fold"), str) and out["fold"].strip().isdigit():
        out["fold"] = int(out["fold"])
    if "class" in out:
        if "label" in out:
            raise UserError(
                f"{path}: entry {number} of {key!r} has a label and a class: "
                "keep the one that is to be learned"
            )
        out["label"] = out.pop("class")
    files = out.get("image") if isinstance(out.get("image"), list) else [out.get("image")]
    if "image" not in out:
        raise UserError(f"{path}: entry {number} of {key!r} must be an object with 'image', got {entry!r}")
    if not files or not all(isinstance(f, str) and f for f in files):
        raise UserError(
            f"{path}: 'image' of entry {number} of {key!r} must be a path or a list "
            f"of paths, got {out['image']!r}"
        )
    if isinstance(out.get("label"), str) and not out["label"].strip():
        del out["label"]
    return out


def _nnunet_cases(path: Path, content: dict) -> dict[str, list[dict]]:
    """The cases that lie in nnU-Net's folders, one file a channel (`CASE_0000`, `CASE_0001`, ...).

    Its second version lists no scans.
    """
    ending = str(content.get("file_ending", ".nii.gz"))
    cases: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    if isinstance(content.get("dataset"), dict):
        for name, entry in content["dataset"].items():
            if not isinstance(entry, dict) or "images" not in entry:
                raise UserError(
                    f"{path}: {name!r} of 'dataset' must hold 'images' and 'label', got {entry!r}"
                )
            cases["train"].append(
                {
                    "case": name,
                    "image": entry["images"],
                    **({"label": entry["label"]} if "label" in entry else {}),
                }
            )
        return cases
    for split, folder, labels in (("train", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs")):
        channels: dict[str, list[str]] = {}
        for file in (
            sorted((path.parent / folder).glob(f"*{ending}")) if (path.parent / folder).is_dir() else []
        ):
            if (
                found := re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(ending))
            ) and not file.name.startswith("._"):
                channels.setdefault(found[1], []).append(f"{folder}/{file.name}")
        for name, files in channels.items():
            label = f"{labels}/{name}{ending}"
            cases[split].append(
                {
                    "case": name,
                    "image": files,
                    **({"label": label} if (path.parent / label).is_file() else {}),
                }
            )
    if not cases["train"]:
        raise UserError(
            f"{path} lists no scans: it has no 'training', "
            f"and beside it there are no files imagesTr/CASE_0000{ending}"
        )
    return cases


def _read_csv(path: Path) -> dict[str, Any]:
    header, rows = _table(path)
    notes: list[str] = []
    content: dict[str, Any] = {"notes": notes}
    if named := next((h for h in header if h.replace(" ", "").startswith("label=")), None):
        content["labels"] = {
            str(i): name.strip() for i, name in enumerate(named.partition("=")[2].split("|"), start=1)
        }
    fields = {h: "label" if h == named else canonical(h) for h in header}
    for field in ("image", "label", "class", "patient", "case", "split", "fold"):
        if len(said := [h for h in header if fields[h] == field]) > 1:
            raise UserError(f"{path} has several columns for {field!r}: {', '.join(said)}: keep one")
    if "image" not in fields.values():
        raise UserError(
            f"{path} has the columns {', '.join(header) or '(none)'}: a column 'image' is needed, and "
            "'label', 'class' or 0/1 columns"
        )
    if {"label", "class"} <= set(fields.values()):
        raise UserError(
            f"{path} has a column for labels and one for classes: keep the one that is to be learned"
        )
    worded = bool({"label", "class"} & set(fields.values()))
    others = [
        h for h in header if fields[h] not in ("image", "label", "class", "patient", "case", "split", "fold")
    ]
    findings = [] if worded else [h for h in others if _is_finding(path, h, rows)]
    for name in others:
        if name in findings:
            continue
        if not name or re.fullmatch(r"Unnamed: \d+", name):
            notes.append(
                f"the column {name!r} without a name is left out (row numbers of a "
                "program that wrote the table)"
            )
        else:
            notes.append(unused("column", name, ALIASES))
    cases: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for line, row in rows:
        said = {fields[h]: row[h] for h in header if h not in findings and fields[h] in ALIASES.values()}
        cases[_split(path, line, said.get("split", ""))].append(
            _row(path, line, said, {h: row[h] for h in findings})
        )
    for name in findings:
        if rows and all(TRUTH[row[name].lower()] is None for _, row in rows):
            line, row = rows[0]
            raise UserError(
                f"{path}, line {line}: column {name!r} holds {row[name]!r}, and no line holds a 0 or 1: "
                "expected 0 or 1, and -1 or nothing only for unknown"
            )
    if findings:
        content["classes"] = findings
    return {**content, "cases": cases}


def _table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header and rows with their line numbers; commas, semicolons or tabs, UTF-8 or UTF-16."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise csv.Error("it holds zero bytes, as UTF-16 without a byte order mark does")
        first = text.split("\n", 1)[0]
        separator = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        header = [h.strip() for h in next(reader, [])]
        rows = []
        for cells in reader:
            if any(c.strip() for c in cells):
                rows.append(
                    (reader.line_num, dict(zip(header, [c.strip() for c in cells] + [""] * len(header))))
                )
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable CSV: {error}: save it as UTF-8") from None
    if twice := next((h for h in header if h and header.count(h) > 1), ""):
        raise UserError(f"{path} has two columns {twice!r}: keep one")
    return header, rows


def _is_finding(path: Path, name: str, rows: list[tuple[int, dict[str, str]]]) -> bool:
    """Whether a column is a class of zeros and ones: most of its cells are."""
    if not name or re.fullmatch(r"Unnamed: \d+", name) or name.lower() in OTHER_COLUMNS:
        return False
    strange = [(line, row[name]) for line, row in rows if row[name].lower() not in TRUTH]
    if 2 * len(strange) >= len(rows) > 0:
        return False
    if strange:
        line, value = strange[0]
        raise UserError(
            f"{path}, line {line}: column {name!r} holds {value!r}, "
            "expected 0 or 1, or -1 or nothing for unknown"
        )
    return True


def _split(path: Path, line: int, said: str) -> str:
    if (said or "train").lower() not in SPLITS:
        raise UserError(f"{path}, line {line}: split {said!r} is none of train, val, test")
    return SPLITS[(said or "train").lower()]


def _row(path: Path, line: int, said: dict[str, str], findings: dict[str, str]) -> dict[str, Any]:
    """One line of a table as an entry."""
    if not said["image"]:
        raise UserError(f"{path}, line {line}: the column 'image' is empty")
    entry: dict[str, Any] = {
        "image": [f.strip() for f in said["image"].split("|")] if "|" in said["image"] else said["image"]
    }
    entry |= {key: said[key] for key in ("patient", "case") if said.get(key)}
    if said.get("fold"):
        if not re.fullmatch(r"\d+(\.0)?", said["fold"]):
            raise UserError(f"{path}, line {line}: fold {said['fold']!r} is no number: expected 0, 1, 2, ...")
        entry["fold"] = int(float(said["fold"]))
    if (label := said.get("label") or said.get("class") or "").lower() not in UNKNOWN:
        entry["label"] = label
    truth = {name: TRUTH[value.lower()] for name, value in findings.items()}
    if any(value is not None for value in truth.values()):
        entry["label"] = truth
    return entry
