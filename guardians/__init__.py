"""Guardians: adversarial attacks for PyTorch, native, drop-in for ART, and cross-checked against the toolkits."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    """`evaluate` and what it returns, imported with all that they need when they are asked for."""
    if name in __all__:
        return getattr(import_module("guardians.evaluation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
