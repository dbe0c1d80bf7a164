"""Drop-ins for the real downloads: the same layouts, made from a seed.

With them everything runs where the data cannot be had.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from smae_utils.errors import UserError

MODULES = {"btcv": "ct", "cxr14": "xray", "brats": "mri"}
SIZES = ("demo", "full")
# Scans of a demo data set: BTCV has 30; the others are as many as a few minutes on two cores can use.
DEFAULT_N = {"btcv": 30, "cxr14": 700, "brats": 36}


def write_phantoms(
    task: str,
    out: str | Path,
    n: int,
    seed: int = 0,
    size: str = "demo",
    context: float = 1.0,
    clean: bool = False,
) -> list[Path]:
    """Write `n` phantom scans of a task in the layout of its real download.

    The same seed gives the same bytes.

    Args:
        size: "demo" (small, for a CPU) or "full" (the real data's matrix sizes).
        clean: leave the noise out: this twin says how much of an image can be predicted at all.
        context: 1 ties every structure to the patient's latents, 0 draws each on its own.

    Returns:
        The image files.

    Raises:
        UserError: for a task without phantom, another size, or a folder that is not empty.
    """
    out = Path(out)
    if task not in MODULES:
        raise UserError(f"no phantom for task {task!r}: expected one of {', '.join(MODULES)}")
    if size not in SIZES or n < 1 or seed < 0 or not 0 <= context <= 1:
        raise UserError(
            f"expected size in {SIZES}, n >= 1, seed >= 0 and 0 <= context <= 1, got {size!r}, n={n}, "
            f"seed={seed}, context={context}"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, so that no data is mixed or overwritten")
    return importlib.import_module(f"{__name__}.{MODULES[task]}").write(out, n, seed, size, context, clean)
