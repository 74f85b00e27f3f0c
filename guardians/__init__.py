"""Guardians: adversarial attacks for PyTorch, native, drop-in for ART, and cross-checked against the toolkits."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Audit", "Evaluation", "audit", "evaluate", "evaluation_page"]
_FROM = {
    "guardians.evaluation": ("Evaluation", "evaluate"),
    "guardians.experiments.audit": ("Audit", "audit"),
    "guardians.experiments.page": ("evaluation_page",),
}


def __getattr__(name: str) -> Any:
    """What is in `__all__`, imported with all that it needs when it is asked for."""
    for module, names in _FROM.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
