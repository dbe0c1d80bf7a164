"""The pages on command line, Python interface and modules, written from the parsers and the docstrings.

So they cannot say anything else than these do.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smae_utils
from smae_utils.cli import make_parser
from smae_utils.method.mae import MAEOutput
from smae_utils.work.predictor import Segmented

SECTIONS = ("Args", "Attributes", "Returns", "Raises")
# Methods of classes that are of use beside calling an object.
METHODS = {"Predictor": ("from_run", "__call__", "segment", "classify"), "MaskedAutoencoder": ("forward",)}
# What such methods give.
GIVEN = {"Predictor": Segmented, "MaskedAutoencoder": MAEOutput}


def commands_block(root: Path) -> str:
    """Each command with its arguments, in the groups of `smae --help`."""
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    groups: dict[str, list[str]] = {}
    for name, command in commands.items():
        groups.setdefault(command.get_default("group"), []).append(_command(name, command))
    return "\n\n".join("\n\n".join([f"## {group.capitalize()}", *of]) for group, of in groups.items())


def _command(name: str, command: argparse.ArgumentParser) -> str:
    arguments = [a for a in command._actions if a.dest not in ("help", "traceback")]
    usage = _wrapped(" ".join(["smae", name, *map(_usage, arguments)]))
    rows = [f"* `{_words(a)}`: {a.help}{_default(a)}" for a in arguments if a.help]
    parts = [f"### {name}", _sentence(command.description or ""), f"```\n{usage}\n```", "\n".join(rows)]
    return "\n\n".join(filter(None, parts))


def _usage(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    words = action.option_strings[-1] + ("" if action.nargs == 0 else f" {_value(action)}")
    return words if action.required else f"[{words}]"


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    name = action.metavar or "|".join(action.choices or ()) or action.dest.upper()
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def _words(action: argparse.Action) -> str:
    return ", ".join(action.option_strings) or _value(action)


def _default(action: argparse.Action) -> str:
    plain = action.option_strings and action.nargs != 0 and action.default not in (None, "", [])
    return f" (default: {action.default})" if plain else ""


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def modules_block(root: Path) -> str:
    """Each module of the package and of `tools` with the first sentence of its docstring, a list a folder."""
    folders: dict[str, list[str]] = {}
    for file in sorted(f for top in ("smae_utils", "tools") for f in (root / top).rglob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        sentence = re.split(r"(?<=\.)(?<!al\.)\s", " ".join(text.split()), maxsplit=1)[0]
        folder = file.parent.relative_to(root).as_posix()
        if file.name == "__init__.py":
            folders[folder] = [f"## {folder}\n\n{sentence}\n", *folders.get(folder, [])]
        else:
            folders.setdefault(folder, []).append(f"* `{file.stem}`: {sentence}")
    return "\n\n".join("\n".join(lines) for _, lines in sorted(folders.items()))


def api_block(root: Path) -> str:
    """What `smae_utils` gives by name: signatures and docstrings."""
    return "\n\n".join(part for name in smae_utils.__all__ for part in _entry(name))


def _entry(name: str) -> Iterator[str]:
    thing = getattr(smae_utils, name)
    if isinstance(thing, str):
        return
    yield f"## {name}\n\n{_described(thing, name)}"
    for method in METHODS.get(name, ()):
        function = inspect.getattr_static(thing, method)
        yield f"### {name}.{method}\n\n{_described(getattr(function, '__func__', function), method)}"
    if given := GIVEN.get(name):
        yield f"### {given.__name__}\n\n{_docstring(given)}"


def _described(thing: Any, name: str) -> str:
    return f"```python\n{_signature(thing, name)}\n```\n\n{_docstring(thing)}"


def _signature(thing: Any, name: str) -> str:
    """One line a parameter where they do not fit into one line."""
    signature = inspect.signature(thing)
    written = [_parameter(p) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    gives = signature.return_annotation
    end = ")" if inspect.isclass(thing) or gives is signature.empty else f") -> {gives}"
    line = f"{name}({', '.join(written)}{end}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {text}," for text in written), end])


def _parameter(p: inspect.Parameter) -> str:
    name = f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
    said = "" if p.annotation is p.empty else f": {p.annotation}"
    if p.default is p.empty:
        return name + said
    plain = f'"{p.default}"' if isinstance(p.default, str) else repr(p.default)
    value = getattr(p.default, "__name__", plain)
    return f"{name}{said} = {value}" if said else f"{name}={value}"


def _docstring(thing: Any) -> str:
    """A docstring's paragraphs, and its sections as lists."""
    out, section = [], ""
    text = inspect.getdoc(thing) or ""
    # A star means itself; code is left as it is.
    for line in re.sub(r"(`[^`]*`)|\*", lambda m: m[1] or r"\*", text).splitlines():
        if line.removesuffix(":") in SECTIONS:
            section = line.removesuffix(":")
            out += [f"**{section}**", ""]
        elif not section or section == "Returns" or not line.startswith("    "):
            out.append(line.strip())
        elif said := re.match(r" {4}(\w[\w, \\*]*): (.*)", line):
            out.append(f"* `{said[1]}`: {said[2]}")
        else:  # an item goes on
            out.append(f"  {line.strip()}")
    return "\n".join(out)
