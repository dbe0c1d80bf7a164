"""Compares what weights were trained on with what they are wanted for: channels, voxel size, intensities."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Channel names that say nothing: "channel 1", "1", "image_2".
GENERIC = re.compile(r"(channel|modality|image)?[ _-]*\d*", re.IGNORECASE)


def compare_facts(facts: Mapping[str, Any], expect: Mapping[str, Any]) -> list[str]:
    """What weights were trained on against what they are wanted for: a note for each difference.

    Compared are `channels`, `spacing_mm`, `window` and `normalisation`, where both sides say them.
    """
    notes = []
    theirs, ours = channels_of(facts), channels_of(expect)
    if theirs and ours and sorted(theirs) != sorted(ours):
        notes.append(
            f"made with channels {listed(facts['channels'])}, this model's are {listed(expect['channels'])}"
        )
    for key in ("spacing_mm", "window", "normalisation"):
        if key in facts and key in expect and not _same(facts[key], expect[key]):
            notes.append(f"made with {key} {listed(facts[key])}, this model has {listed(expect[key])}")
    return notes


def channels_of(facts: Mapping[str, Any]) -> list[str]:
    """Channel names to compare by; [] where they are unknown or one of them is only a number."""
    names = [str(name).strip().casefold() for name in facts.get("channels") or []]
    return [] if any(GENERIC.fullmatch(name) for name in names) else names


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two))
    numbers = all(isinstance(value, (int, float)) for value in (one, two))
    return abs(one - two) <= 1e-3 * abs(one) if numbers else one == two


def listed(value: Any) -> str:
    """Numbers and names in words, joined by commas."""
    if isinstance(value, (list, tuple)):
        return ", ".join(listed(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
