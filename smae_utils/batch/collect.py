"""The results of a batch on one page and in one table."""

from __future__ import annotations

import base64
import io
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from smae_utils.atomic import write_text
from smae_utils.batch.runs import Batch, line_of, minutes, read_record, reason
from smae_utils.errors import UserError

THUMBNAIL = 320  # pixels

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:left;vertical-align:top}
tr:nth-child(even){background:#f4f4f4}img{max-width:320px}.failed,.blocked,.stopped{color:#a00}</style>
<h1>{{ title }}</h1><p>{{ summary }} <a href="results.csv">results.csv</a></p>
<table><tr><th>run<th>state<th>minutes<th>results<th></tr>
{% for run in runs %}<tr><td>
{% if run.page %}<a href="{{ run.page }}">{{ run.name }}</a>{% else %}{{ run.name }}{% endif %}
<td class="{{ run.state }}">{{ run.state }}{% if run.why %}<br>{{ run.why }}{% endif %}
<td>{{ run.minutes }}<td>{% for line in run.results %}{{ line }}<br>{% endfor %}
<td>{% if run.picture %}
<img alt="first picture of {{ run.name }}" src="data:image/jpeg;base64,{{ run.picture }}">
{% endif %}</tr>
{% endfor %}</table></html>
"""


def status(out: str | Path) -> pd.DataFrame:
    """A row a run: name, state, minutes, and where its training is or why it is not done."""
    batch = Batch.open(out)
    rows = []
    for name, state in batch.states().items():
        took = minutes(read_record(batch.out, batch.of(name)))
        said = {"running": line_of, "failed": reason, "blocked": reason, "stopped": reason}.get(state)
        text = said(batch, name) if said else ""
        rows.append((name, state, None if took is None or state == "stopped" else round(took, 1), text))
    return pd.DataFrame(rows, columns=["run", "state", "minutes", "note"])


def collect(out: str | Path) -> pd.DataFrame:
    """Write results.csv, a row for each figure of each finished run, and index.html.

    Returns:
        run, notebook, the parameters, training (which arm), metric, value.

    Raises:
        UserError: where there is no batch.
    """
    batch = Batch.open(out)
    rows: list[dict[str, Any]] = []
    shown = []
    for row in status(out).itertuples():
        run = batch.of(row.run)
        figures = _figures(run.trains_in, read_record(batch.out, run)) if row.state == "done" else []
        about = {"run": run.name, "notebook": run.program, **run.parameters}
        rows += [{**about, **figure} for figure in figures]
        page = batch.out / run.name / f"{run.name}.html"
        shown.append(
            {
                "name": run.name,
                "state": row.state,
                "why": row.note if row.state != "done" else "",
                "minutes": "" if pd.isna(row.minutes) else row.minutes,
                "page": f"{run.name}/{page.name}" if page.is_file() else "",
                "picture": _thumbnail(page.with_suffix(".ipynb")),
                "results": [f"{f['training']}: {f['metric']} {f['value']:.4g}" for f in figures],
            }
        )
    names = list(dict.fromkeys(key for row in rows for key in row))
    table = pd.DataFrame(rows, columns=names or ["run", "metric", "value"])
    write_text(batch.out / "results.csv", table.to_csv(index=False))
    write_text(batch.out / "index.html", _page(batch.out.name, shown))
    return table


def _figures(folder: Path | None, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean figures that were scored in the training folders of a run between its start and its end."""
    begin, end = (datetime.fromisoformat(record[key]).timestamp() for key in ("start_time", "end_time"))
    files = sorted(folder.glob("*/metrics.json")) if folder else []
    out = []
    for file in (f for f in files if begin <= f.stat().st_mtime <= end + 1):
        means = json.loads(file.read_text(encoding="utf-8"))["mean"]
        out += [
            {"training": file.parent.name, "metric": name, "value": value}
            for name, value in means.items()
            if value is not None
        ]
    return out


def _thumbnail(notebook: Path) -> str:
    """The last picture of an executed notebook, small, as base64; "" when there is none."""
    import nbformat
    from PIL import Image

    if not notebook.is_file():
        return ""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (ValueError, OSError):  # the copy that a kill cut short
        return ""
    pictures = [
        o.data["image/png"] for c in cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})
    ]
    if not pictures:
        return ""
    image = Image.open(io.BytesIO(base64.b64decode(pictures[-1]))).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _page(title: str, runs: list[dict[str, Any]]) -> str:
    try:
        from jinja2 import Environment
    except ImportError:
        raise UserError("the page needs jinja2: pip install 'smae-utils[notebooks]'") from None
    done = sum(run["state"] == "done" for run in runs)
    text = Environment(autoescape=True).from_string(PAGE)
    return text.render(title=title, summary=f"{done} of {len(runs)} runs are done.", runs=runs)
