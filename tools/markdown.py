"""Tables of the documents, and the lines that say how a file of results was made.

`DataFrame.to_markdown` would do for the tables: it needs one more package, and pads the cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd


def facts_of(file: Path) -> str:
    """The `# ` lines of a file of results, a line each."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return "".join(f"\n{line[2:]}  " for line in lines if line.startswith("# "))


def details_of(files: Iterable[Path]) -> str:
    """The same of several files, folded up."""
    facts = "".join(facts_of(file) for file in files if file.is_file())
    return f"\n\n<details><summary>Commands, machines, dates, commits</summary>\n{facts}\n\n</details>"


def table_of(frame: pd.DataFrame) -> str:
    """A table with three digits behind the point, one from 10 on."""
    text = frame.map(
        lambda v: (f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}") if isinstance(v, float) else str(v)
    )
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def span(low: float, high: float) -> str:
    """An interval in words."""
    return f"{low:+.3f} to {high:+.3f}" if pd.notna(low) else "one unit only"
