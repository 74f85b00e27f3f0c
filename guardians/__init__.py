"""Guardians: adversarial attacks for PyTorch, native, drop-in for ART, and cross-checked against the toolkits."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Audit", "Evaluation", "audit", "evaluate"]
_FROM = {
    "guardians.evaluation": ("Evaluation", "evaluate"),
    "guardians.experiments.audit": ("Audit", "audit"),
}


def __getattr__(name: str) -> Any:
    """`evaluate`, `audit` and what they return, imported with all that they need when they are asked for."""
    for module, names in _FROM.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
