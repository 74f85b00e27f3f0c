"""Arguments of a constructor, written once: signature, attributes, checks, `set_params`, `attack_params` and `repr`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import partial, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, get_args, get_origin

import numpy as np
from torch import Tensor
from typing_extensions import dataclass_transform

from guardians.engine.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_seed,
    optional,
)

__all__ = [
    "KW_ONLY",
    "PRECISIONS",
    "Count",
    "Flag",
    "Fraction",
    "Number",
    "OptionalCount",
    "OptionalNumber",
    "Parameters",
    "Positive",
    "PositiveArray",
    "Precision",
    "Radius",
    "Seed",
    "Size",
]

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

Flag = Annotated[bool, check_flag]
Count = Annotated[int, partial(check_integer, low=1)]
"""1 or more."""
OptionalCount = Annotated[int | None, optional(partial(check_integer, low=1))]
Size = Annotated[int, partial(check_integer, low=0)]
"""0 or more."""
Number = Annotated[float, partial(check_number, low=0, single=True)]
"""0 or more."""
OptionalNumber = Annotated[float | None, optional(partial(check_number, low=0, single=True))]
Fraction = Annotated[float, partial(check_number, low=0, exclusive=True, single=True, below=1)]
"""Between 0 and 1."""
Positive = Annotated[float, partial(check_number, low=0, exclusive=True, single=True)]
Radius = Annotated[float | np.ndarray | Tensor, partial(check_number, low=0, finite=False)]
"""0 or more, infinity included; a number, or an array that broadcasts to the images."""
PositiveArray = Annotated[float | np.ndarray | Tensor, partial(check_number, low=0, exclusive=True)]
Seed = Annotated[int | None, optional(check_seed)]
Precision = Annotated[str, partial(check_choice, known=PRECISIONS)]


@dataclass_transform()
class Parameters:
    """A class whose constructor takes its annotated fields, as a dataclass does.

    A field is written `name: type = default` in the body of a class, with its check in the type
    (`Annotated[int, check]`, where `check(name, value)` raises); those after `_: KW_ONLY` are keyword-only. Positional
    ones are not inherited, because each attack has its own order; keyword-only ones are.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed, or unknown; checked before any work.
    """

    _fields: ClassVar[dict[str, inspect.Parameter]] = {}
    """Those of a class's own body."""
    _checks: ClassVar[dict[str, Callable[[str, Any], None]]] = {}
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._fields, cls._checks = {}, dict(cls._checks)
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        for name, annotation in inspect.get_annotations(cls, eval_str=True).items():
            if annotation is KW_ONLY:
                kind = inspect.Parameter.KEYWORD_ONLY
            elif ClassVar not in (annotation, get_origin(annotation)):
                default = vars(cls).get(name, inspect.Parameter.empty)
                if name in vars(cls):
                    delattr(cls, name)  # it would hide a property of a base
                if get_origin(annotation) is Annotated:
                    annotation, cls._checks[name] = get_args(annotation)[:2]
                cls._fields[name] = inspect.Parameter(name, kind, default=default, annotation=annotation)
        bodies = [vars(base).get("_fields", {}) for base in cls.__mro__]
        positional = next(filter(None, (_of_kind(fields, "POSITIONAL_OR_KEYWORD") for fields in bodies)), {})
        keywords = [_of_kind(fields, "KEYWORD_ONLY") for fields in reversed(bodies)]
        cls.__signature__ = inspect.Signature(list(reduce(or_, keywords, positional).values()))
        cls._checks = reduce(or_, (vars(base).get("_checks", {}) for base in reversed(cls.__mro__)), {})

    @classmethod
    def parameters(cls) -> list[str]:
        """The names of the constructor's arguments, in its order."""
        return list(cls.__signature__.parameters)

    @classmethod
    def _bound(cls, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the constructor by name, with defaults."""
        try:
            bound = cls.__signature__.bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}; known are {', '.join(cls.parameters())}") from None
        bound.apply_defaults()
        return dict(bound.arguments)

    def _check_fields(self) -> None:
        """Raise on a field that its check does not allow."""
        for name, check in self._checks.items():
            if name in self.__signature__.parameters:
                check(name, getattr(self, name))

    def __repr__(self) -> str:
        """The class with the arguments that are not at their defaults."""
        shown = []
        for name, parameter in self.__signature__.parameters.items():
            value = getattr(self, name, parameter.default)
            if isinstance(value, (np.ndarray, Tensor)):
                shown.append(f"{name}=<{type(value).__name__} {tuple(value.shape)}>")
            elif name in self._checks and not (value is parameter.default or value == parameter.default):
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _of_kind(fields: dict[str, inspect.Parameter], kind: str) -> dict[str, inspect.Parameter]:
    return {name: parameter for name, parameter in fields.items() if parameter.kind.name == kind}
