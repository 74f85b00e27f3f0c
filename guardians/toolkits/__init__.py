"""Attacks of the other toolkits under our two interfaces, and ART's attacks as callables on tensors.

torchattacks and foolbox are optional (`pip install guardians[parity]`); each is imported when its adapter is.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["ArtAttack", "FoolboxAttack", "TorchattacksAttack"]

_MODULES = {"ArtAttack": "art", "FoolboxAttack": "foolbox", "TorchattacksAttack": "torchattacks"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
