"""From files to batches: tasks and lists, readers, transforms, crops.

Of the method it knows the patches only.
"""

from __future__ import annotations

from typing import Any

__all__ = ["read_case"]


def __getattr__(name: str) -> Any:
    # What most imports of the old module `data` asked for; loaded only then, since torch comes with it.
    if name in __all__:
        from smae_utils.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
