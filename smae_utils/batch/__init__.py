"""Many runs of notebooks from one YAML file: what is done stays done, what was stopped goes on."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    """Until version 0.3: what the module of this name held before, see `run_notebook`."""
    from smae_utils import run_notebook

    if name.startswith("_") or not hasattr(run_notebook, name):
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(run_notebook, name)
