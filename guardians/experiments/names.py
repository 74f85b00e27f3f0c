"""Names with arguments, as users write them: "PGD-40", "rse(sigma_init=0.8, n=10)", "torchattacks:APGD(steps=20)"."""

from __future__ import annotations

import ast
import operator
from typing import Any

__all__ = ["parsed", "written"]

_OPERATORS = {ast.Div: operator.truediv, ast.Mult: operator.mul}


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and its arguments: literals, "inf", and numbers such as 8/255.

    Raises:
        ValueError: it is no name, or what follows is no arguments by name in brackets.
    """
    name, bracket, rest = text.strip().partition("(")
    problem = f"{text!r}: must be a name, or a name and arguments as in name(steps=20, eps=8/255)"
    if not name or (bracket and not rest.endswith(")")):
        raise ValueError(problem)
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        arguments = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
        assert "None" not in arguments
    except (SyntaxError, ValueError, AssertionError, TypeError, ZeroDivisionError):
        raise ValueError(problem) from None
    return name.strip(), arguments


def written(name: str, arguments: dict[str, Any]) -> str:
    """The text that `parsed` takes apart, with the arguments in alphabetical order."""
    inside = ", ".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))
    return f"{name}({inside})" if inside else name


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.Name) and node.id == "inf":
        return float("inf")
    return ast.literal_eval(node)
