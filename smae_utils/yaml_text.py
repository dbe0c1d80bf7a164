"""YAML as people write it, read and written in one way everywhere."""

from __future__ import annotations

import re
from typing import Any

import yaml

# A float of YAML 1.2. PyYAML reads YAML 1.1, which needs a dot and a signed exponent: there 1e-4 and 1.5e3
# are words.
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that everybody writes, in which a name twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [k.value for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
            raise yaml.YAMLError(f"{twice!r} stands twice in one mapping, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what `_Loader` would not read as text: a case called 018 stays one."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def write_yaml(values: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text; 1e-4 is a number.

    Raises:
        yaml.YAMLError: if it is none.
    """
    try:
        return yaml.load(text, _Loader)
    # A number or date by its form that is none, as 2024-02-31.
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from None
