"""Tasks of the Medical Segmentation Decathlon: `dataset.json` says what exists.

The folders do not: macOS leaves `._*` files there.
"""

from __future__ import annotations

import json
from pathlib import Path

from smae_utils.data.case import Case
from smae_utils.data.tasks.registry import existing_folder
from smae_utils.errors import UserError


def read_cases(data_dir: Path, folder: str) -> list[Case]:
    """The labelled cases of a Decathlon task in `data_dir` or in its folder `folder`.

    The test part has no labels.

    Raises:
        UserError: where the list or one of its files is missing.
    """
    index = existing_folder(data_dir, "dataset.json", f"{folder}/dataset.json")
    try:
        entries = json.loads(index.read_text(encoding="utf-8-sig"))["training"]
        pairs = [(index.parent / e["image"], index.parent / e["label"]) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index} is no MSD list (expected 'training' with 'image' and 'label' entries): {error!r}"
        ) from None
    cases = []
    for image, label in pairs:
        if not (image.is_file() and label.is_file()):
            raise UserError(
                f"{index} names {image if not image.is_file() else label}, which does not exist: unpack the "
                "download again"
            )
        name = image.name.split(".")[0]
        cases.append({"case": name, "patient": name, "image": str(image), "label": str(label)})
    return cases
