"""Names of attacks and implementations, as users write them and as tables have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["canonical"]


def canonical(name: Any, known: Iterable[str]) -> Any:
    """The one of `known` that is `name` but for upper and lower case; `name` itself where there is none."""
    return next((other for other in known if other.casefold() == str(name).casefold()), name)
