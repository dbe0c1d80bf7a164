"""Self pre-training with masked autoencoders for medical images (Zhou et al., arXiv 2203.05573).

What most people need is imported when it is first used: `from smae_utils import MaskedAutoencoder`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smae_utils import moved

# Name -> the module that defines it. torch and the rest are loaded only when one is asked for.
_DEFINED_IN = {
    "MaskedAutoencoder": "method.mae",
    "ViTClassifier": "method.vit",
    "UNETR": "method.unetr",
    "pretrain": "work.pretrain",
    "finetune": "work.finetune",
    "evaluate": "work.evaluation",
    "compare": "work.comparison",
    "Predictor": "work.predictor",
    "predict": "predict_files",
    "explore": "show.explorer",
}
__all__ = [*_DEFINED_IN, "__version__"]

try:
    __version__ = version("smae-utils")
except PackageNotFoundError:  # a folder on the path, not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name in _DEFINED_IN:
        return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFINED_IN})


moved.install()
