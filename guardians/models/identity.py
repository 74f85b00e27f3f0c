"""By which models are told apart: `digest(module)`."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

__all__ = ["digest"]

_KNOWN_BY_VERSION = ("torch", "torchvision", "guardians", "builtins", "abc", "typing")


def digest(module: nn.Module) -> str:
    """The first 8 hexadecimal digits of a SHA-256 digest of a model, by which tables know it whatever its name.

    Two models with the same digest give the same answers, but for what is not seen, see below. Into it go

    - the names, types, shapes and values of all parameters and buffers;
    - the names and classes of all layers, and as far as it can be found the source of their classes,
      or the code of what `torch.fx` or TorchScript made;
    - their configuration: arguments of a constructor that a layer keeps under their names, other public attributes
      that are real numbers, texts, truth values or tuples, and `extra_repr()`.

    Not seen are: functions and global variables that a `forward` uses, hooks, and other attributes, such as integers
    that no argument is named after, which may be counters. Nor is the source of classes of torch, torchvision and
    guardians, which versions tell apart. Device, training mode and `requires_grad` do not matter.
    """
    hashed = hashlib.sha256()
    for name, part in module.named_modules(remove_duplicate=False):
        for value in (name, type(part).__qualname__, _configuration(part), _source(part)):
            hashed.update(_as_bytes(value))
    for item in _tensors(module).items():
        hashed.update(_as_bytes(item))
    return hashed.hexdigest()[:8]


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, also those that no state dict has, and whatever else its state dict has."""
    return {**dict(module.named_buffers()), **module.state_dict()}


def _configuration(part: nn.Module) -> dict[str, Any]:
    constructors = [vars(kind)["__init__"] for kind in type(part).__mro__ if "__init__" in vars(kind)]
    parameters = [name for constructor in constructors for name in inspect.signature(constructor).parameters]
    arguments = {*parameters, *(f"_{name}" for name in parameters)}
    found = {
        name: value
        for name, value in sorted(vars(part).items())
        if name in arguments or (not name.startswith("_") and isinstance(value, (bool, float, str, tuple)))
    }
    found.pop("training", None)
    if _package_of(type(part)) != "torch":  # whose versions have other texts
        found["extra_repr()"] = part.extra_repr()
    return {name: value for name, value in found.items() if value is not None}


def _source(part: nn.Module) -> list[str]:
    """Of its class and of those that this is made of."""
    if isinstance(part, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return [str(getattr(part, "code", ""))]
    found = []
    for kind in type(part).__mro__:
        if _package_of(kind) not in _KNOWN_BY_VERSION:
            try:
                found.append(inspect.getsource(kind))
            except (OSError, TypeError):  # as of a class that was typed in
                continue
    return found


def _package_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _as_bytes(value: Any) -> bytes:
    """The same for equal values, in any process."""
    if isinstance(value, nn.Module):  # not its digest: it may hold the module that holds it
        return _as_bytes((type(value).__qualname__, str(value), _tensors(value)))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    if isinstance(value, Tensor):
        value = getattr(value, "full_tensor", lambda: value)()  # of a DTensor, which other processes share
        value = (value.dequantize() if value.is_quantized else value.to_dense()).detach().cpu()
        return f"{value.dtype} {tuple(value.shape)} ".encode() + value.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return _as_bytes(list(value.items()))
    if isinstance(value, (list, tuple)):
        return b"(" + b"".join(_as_bytes(item) + b"," for item in value) + b")"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()
