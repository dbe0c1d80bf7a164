"""The one place that knows papermill.

A notebook run is a function of the notebook, its parameters, the version of this package, and its folder.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smae_utils.atomic import write_text
from smae_utils.errors import UserError
from smae_utils.places import ROOT, is_clone, need_notebook_packages, shipped
from smae_utils.work.settings import coerce, parse_value

# papermill and its like are imported inside functions: they come with the extra `notebooks`, and the other
# commands work without it.

# Words that the type of a parameter may be written with.
TYPES = {
    **{kind.__name__: kind for kind in (str, int, float, bool, list, tuple)},
    **{name: getattr(typing, name) for name in ("List", "Tuple", "Optional", "Union")},
}


def notebook_path(name: str | Path) -> Path:
    """A notebook by path, or by name in the notebooks folder of the clone.

    Raises:
        UserError: listing the notebooks there are.
    """
    folder = shipped("notebooks")
    for path in (Path(name), folder / str(name), folder / f"{name}.ipynb"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in folder.glob("*.ipynb")))
    raise UserError(f"no notebook {name}: expected a path or one of {known}")


def check_parameters(notebook: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Values in the types that the notebook's `parameters` cell declares.

    papermill itself only warns of an unknown name.

    Raises:
        UserError: for an unknown parameter or a wrong type, listing the right
            ones; without the notebook packages.
    """
    need_notebook_packages("papermill", "nbconvert", "ipykernel")
    import papermill
    from nbformat.reader import NotJSONError
    from nbformat.validator import ValidationError

    try:
        with _with_kernel(notebook) as file:
            known = papermill.inspect_notebook(str(file))
    except (NotJSONError, ValidationError, ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"{notebook} is no notebook ({' '.join(str(error).split())[:120]}): expected an .ipynb file"
        ) from None
    listing = "; ".join(
        f"{name}: {p['inferred_type_name']} = {p['default']}  ({p['help']})" for name, p in known.items()
    )
    out = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{notebook.name} has no parameter {name!r}. It takes: {listing}")
        kind = _declared(known[name]["inferred_type_name"], known[name]["default"])
        try:
            out[name] = _typed(value, kind, name)
        except UserError as error:
            raise UserError(f"{error}. {notebook.name} takes: {listing}") from None
    return out


@contextmanager
def _with_kernel(notebook: Path) -> Iterator[Path]:
    """The notebook, or a copy with this environment's kernel where it names none: papermill asks for one."""
    import nbformat

    more = _kernel_for(notebook)
    if not more:
        yield notebook
        return
    content = nbformat.read(notebook, as_version=4)
    content.metadata["kernelspec"] = {
        "name": more["kernel_name"],
        "language": more["language"],
        "display_name": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / notebook.name
        nbformat.write(content, copy)
        yield copy


def _declared(annotation: str, default: str) -> Any:
    """The type of a parameter: as annotated, else that of its default; None where neither tells."""
    try:
        kind = eval(annotation, {"__builtins__": {}}, TYPES)  # of a notebook, all of which will be executed
    except Exception:  # a type of the notebook's own
        return None
    if kind is not None:
        return kind
    try:
        kind = type(ast.literal_eval(default))
    except (ValueError, SyntaxError):
        return None
    return kind if kind in TYPES.values() else None


def _typed(value: Any, kind: Any, name: str) -> Any:
    """`value`, which from the command line is text, as `kind`; read as YAML where that is not text."""
    if kind is str:
        return coerce(value, str, name)
    if isinstance(value, str):
        value = parse_value(value)
    return value if kind is None else coerce(value, kind, name)


def run_notebook(
    notebook: str | Path, out_dir: str | Path, parameters: dict[str, Any], name: str | None = None
) -> Path:
    """Execute a notebook headlessly and write the executed copy and its HTML.

    Output of its cells is printed as it comes. On failure the executed copy is kept up to the failed cell.

    Returns:
        The executed notebook.

    Raises:
        UserError: with the notebook's last error, if a cell failed; or without the packages of the notebooks.
    """
    source = notebook_path(notebook)
    values = check_parameters(source, parameters)
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name or source.stem}.ipynb"
    failure = None
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters=values,
            **_kernel_for(source),
            progress_bar=False,
            stdout_file=sys.stdout,
            coalesce_streams=True,
            iopub_timeout=60,
            # Else each kernel warns that loopback is not encrypted.
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
    except PapermillExecutionError as error:
        # A UserError's text is the whole story; anything else needs its type.
        text = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
        failure = (
            f"{source.name} stopped at cell {error.exec_count}: "
            f"{' '.join(text.split())[:600]}. The executed copy is {target}"
        )
    except DeadKernelError:
        failure = (
            f"the kernel of {source.name} died, most likely for lack of memory: use a smaller preset or "
            f"batch. The executed copy is {target}"
        )
    _drop_widget_state(target)
    write_html(target)
    if failure:
        raise UserError(failure)
    return target


def _kernel_for(notebook: Path) -> dict[str, str]:
    """This environment's kernel, where a notebook names none, as one that a program wrote."""
    import nbformat

    return (
        {}
        if nbformat.read(notebook, as_version=4).metadata.get("kernelspec")
        else {"kernel_name": "python3", "language": "python"}
    )


def _drop_widget_state(notebook: Path) -> None:
    """Remove the state of widgets, which are dead in an executed copy, and keep their pictures.

    papermill's own switch for it breaks cells with output widgets.
    """
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)
    for output in (o for cell in content.cells for o in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
    nbformat.write(content, notebook)


def write_html(notebook: Path) -> Path:
    """The notebook as one HTML file that loads nothing from outside."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True)
    # Without these, the page asks other hosts for scripts when it is opened.
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = exporter.mermaid_js_url = ""
    body, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    target = notebook.with_suffix(".html")
    write_text(target, body)
    return target


def open_lab(args: list[str]) -> int:
    """JupyterLab on the notebooks, see `notebooks_to_open`; returns its exit code.

    Raises:
        UserError: without the packages of the notebooks.
    """
    need_notebook_packages("jupyterlab")
    folder = notebooks_to_open()
    command = [sys.executable, "-m", "jupyter", "lab", "--notebook-dir", str(folder), *args]
    return subprocess.run(command, cwd=folder.parent).returncode


def notebooks_to_open() -> Path:
    """The clone's notebooks; of an installed package a copy in `notebooks/` of the current folder.

    The copy is for changing: a notebook that is there already stays as it is.
    """
    if is_clone():
        return ROOT / "notebooks"
    folder = Path.cwd() / "notebooks"
    folder.mkdir(exist_ok=True)
    for source in sorted(shipped("notebooks").glob("*.ipynb")):
        if not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)
    return folder
