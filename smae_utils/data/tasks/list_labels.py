"""What the labels of a list mean: values of masks as classes or regions, words and numbers as classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smae_utils.errors import UserError

NO_FINDING = "no finding"
UNKNOWN = -1
MOST_LABELS = 250


def class_names(path: Path, content: dict[str, Any], labels: list[Any]) -> tuple[str, ...]:
    """Names of the classes: as the list says, else the words that its labels hold, sorted."""
    said = content.get("classes")
    if said is not None and (not isinstance(said, list) or len(set(map(str, said))) < len(said)):
        raise UserError(f"{path}: 'classes' must be a list of different names, got {said!r}")
    if said:
        return tuple(map(str, said))
    labels = [v for v in labels if v != UNKNOWN]
    if all(isinstance(v, int) and not isinstance(v, bool) for v in labels) and not set(labels) <= {0, 1}:
        return tuple(str(v) for v in sorted(set(labels)))
    names = {
        name for v in labels for name in words_of(v) if isinstance(name, str) and name.lower() != NO_FINDING
    }
    if not names and any(isinstance(name, str) for v in labels for name in words_of(v)):
        raise UserError(
            f"{path}: every label is {NO_FINDING!r}: there is no class to learn; "
            "leave the labels out to pre-train only"
        )
    if not names:
        raise UserError(
            f'{path}: labels are zeros and ones without names: add "classes": [...] in their order'
        )
    return tuple(sorted(names, key=lambda n: (0, int(n), "") if n.isdigit() else (1, 0, n)))


def words_of(label: Any) -> list[Any]:
    """`A | B`, a list of names, or one name -> names; numbers stay numbers."""
    if isinstance(label, str):
        return [name.strip() for name in label.split("|") if name.strip()]
    return [
        v.strip() if isinstance(v, str) else v
        for v in (label if isinstance(label, (list, dict)) else [label])
    ]


def mask_classes(path: Path, labels: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """MSD's {"1": "liver"} or nnU-Net's {"liver": 1, "whole": [1, 2]} -> class names, and fields of `Task`.

    The fields are `regions` (where lists overlap), `stored_labels` and `ignored_labels`.
    """
    if not isinstance(labels, dict) or not labels:
        wanted = (
            '{"0": "background", "1": "liver"}'
            if path.suffix.lower() == ".json"
            else "the header label=liver|tumour for the masks' column"
        )
        raise UserError(f'{path}: "labels" must say what the mask values mean, for example {wanted}')
    pairs: list[tuple[str, tuple[int, ...]]] = []
    try:
        for key, value in labels.items():
            if isinstance(value, str):
                pairs.append((value, (int(key),)))
            else:
                pairs.append(
                    (str(key), tuple(int(v) for v in (value if isinstance(value, list) else [value])))
                )
    except (TypeError, ValueError):
        raise UserError(
            f'{path}: "labels" must map numbers to names or names to numbers, got {labels!r}'
        ) from None
    background = {0, *(v for name, of in pairs if name.lower() == "background" for v in of)}
    ignored = {v for name, of in pairs if name.lower() == "ignore" for v in of}
    pairs = [(name, of) for name, of in pairs if of != (0,) and name.lower() not in ("background", "ignore")]
    if not pairs:
        raise UserError(f'{path}: "labels" names no class beside the background, got {labels!r}')
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError(
            f'{path}: "labels" gives one name to several values, got {labels!r}: a class needs a name of '
            "its own"
        )
    used = [v for _, of in pairs for v in of]
    if clash := (background | ignored) & set(used):
        raise UserError(
            f'{path}: "labels" uses value {min(clash)} for a class and for background or ignore, got '
            f"{labels!r}"
        )
    if len(set(used)) > MOST_LABELS:
        raise UserError(
            f'{path}: "labels" names {len(set(used))} values: at most {MOST_LABELS} are learned at once'
        )
    first = (0, *sorted(background - {0}))
    if len(set(used)) == len(used):
        pairs.sort(key=lambda p: min(p[1]))
        stored, regions = (first, *(of for _, of in pairs)), None
    else:
        for (wide, outer), (narrow, inner) in zip(pairs, pairs[1:]):
            if not set(inner) < set(outer):
                raise UserError(
                    f"{path}: regions must be nested, from the widest to the narrowest: "
                    f"{narrow} {inner} is not inside {wide} {outer}"
                )
        values = sorted(set(used))
        number = {value: i for i, value in enumerate(values, start=1)}
        stored = (first, *((v,) for v in values))
        regions = tuple(tuple(map(number.__getitem__, of)) for _, of in pairs)
    plain = stored == tuple((i,) for i in range(len(stored)))
    return tuple(name for name, _ in pairs), {
        "regions": regions, "stored_labels": () if plain else stored,
        "ignored_labels": tuple(sorted(ignored)),
    }  # fmt: skip


def class_vector(
    path: Path, case: str, label: Any, classes: tuple[str, ...], strict: bool = True
) -> np.ndarray:
    """What an entry says of each class: (classes,) float32 of 1, 0 and NaN for unknown."""
    values = words_of(label)
    if label == UNKNOWN:
        return np.full(len(classes), np.nan, np.float32)
    if isinstance(label, dict):
        known = {str(k): v for k, v in label.items()}
        if wrong := [v for v in known.values() if v not in (0, 1, UNKNOWN, None)]:
            raise UserError(
                f"{path}: label of {case} holds {wrong[0]!r}, expected 0, 1, or -1 for unknown for each class"
            )
        return np.array(
            [np.nan if known.get(name) in (None, UNKNOWN) else float(known[name]) for name in classes],
            np.float32,
        )
    if len(values) == len(classes) and all(
        v is None or (isinstance(v, (int, float)) and v in (0, 1, -1)) for v in values
    ):
        return np.array([np.nan if v is None or v == -1 else float(v) for v in values], np.float32)
    numbers = [v for v in values if isinstance(v, (int, float))]
    if numbers and isinstance(label, list):
        raise UserError(
            f"{path}: label of {case} is {values}, expected names, "
            f"or {len(classes)} zeros and ones (-1 for unknown), one a class"
        )
    if numbers and str(numbers[0]) not in classes:
        if not isinstance(label, int) or not 0 <= label < len(classes):
            raise UserError(
                f"{path}: label of {case} is {label!r}, expected some of {', '.join(classes)}, "
                f"or the index 0 .. {len(classes) - 1} of one"
            )
        return np.eye(len(classes), dtype=np.float32)[label]
    names = [str(v) for v in values if str(v).lower() != NO_FINDING or str(v) in classes]
    unknown = [v for v in names if v not in classes]
    if unknown and strict:
        raise UserError(
            f"{path}: label of {case} holds {unknown[0]!r}, expected some of {', '.join(classes)}"
        )
    return np.asarray([name in names for name in classes], np.float32)
