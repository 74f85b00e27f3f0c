"""Checks of what users pass in, made before any work; each error names the argument, its value and what is allowed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from art.summary_writer import SummaryWriter
from torch import Tensor

from guardians.engine.victim import Victim

__all__ = [
    "ArgumentTypeError",
    "check_choice",
    "check_device",
    "check_flag",
    "check_integer",
    "check_number",
    "check_seed",
    "check_summary_writer",
    "checked_images",
    "labels_from",
    "mask_from",
    "optional",
    "probabilities_from",
]


logger = logging.getLogger(__name__)


class ArgumentTypeError(TypeError, ValueError):
    """An argument of a wrong type; ART raises the one error for some arguments and the other for others."""


def optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """A check that lets None pass too."""
    return lambda name, value: None if value is None else check(name, value)


def check_number(
    name: str,
    value: Any,
    *,
    low: float,
    below: float | None = None,
    exclusive: bool = False,
    single: bool = False,
    finite: bool = True,
) -> None:
    """Raise unless `value` is a number, array or tensor with all entries >= `low` (> with `exclusive`), < `below`.

    Raises:
        TypeError: it is none of these, or with `single` an array or a tensor that has dimensions.
        ValueError: an entry is out of range, NaN, or with `finite` infinite.
    """
    if isinstance(value, (str, bool)) or value is None:
        raise ArgumentTypeError(f"{name}={value!r}: must be a number, an array or a tensor")
    try:
        entries = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"{name}={value!r}: must be a number, an array or a tensor") from None
    if single and entries.ndim:
        raise ArgumentTypeError(f"{name} has shape {entries.shape}: must be a single number")
    allowed = entries > low if exclusive else entries >= low
    bounds = f"{'above' if exclusive else 'at least'} {low:g}"
    if below is not None:
        allowed, bounds = allowed & (entries < below), f"{bounds} and below {below:g}"
    elif finite:
        allowed, bounds = allowed & np.isfinite(entries), f"{bounds} and finite"
    if not allowed.all():
        got = repr(value) if entries.ndim == 0 else f"an array with {float(entries[~allowed].flat[0])}"
        raise ValueError(f"{name}={got}: must be {bounds}")


def check_integer(name: str, value: Any, *, low: int) -> None:
    """Raise unless `value` is an integer >= `low`.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is too low.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(f"{name}={value!r}: must be an integer")
    if value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")


def check_seed(name: str, value: Any) -> None:
    """Raise unless `value` is an integer of 64 bits that is not negative.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    check_integer(name, value, low=0)
    if value >= 2**64:
        raise ValueError(f"{name}={value}: must be below 2**64")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name}={value!r}: must be True or False")


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise unless `value` is one of `known`.

    Raises:
        ValueError: it is not.
    """
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, known))}")


def check_summary_writer(name: str, value: Any) -> None:
    """Raise unless `value` is True, False, a path, or an ART `SummaryWriter`.

    Raises:
        TypeError: it is none of these.
    """
    if not isinstance(value, (bool, str, os.PathLike, SummaryWriter)):
        raise ArgumentTypeError(f"{name}={value!r}: must be True, False, a path or an ART SummaryWriter")


def check_device(name: str, x: Any, victim: Victim) -> None:
    """Raise unless `x` is a tensor where the victim is.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is on another device than the model.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} of type {type(x).__name__}: must be a tensor; arrays go to generate()")
    if victim.device is not None and x.device != victim.device:
        raise ValueError(f"{name} is on {x.device}, the model on {victim.device}: they must be on the same device")


def checked_images(name: str, x: Tensor, victim: Victim) -> Tensor:
    """A batch of images that the victim can be given, detached, with pixels a little outside `clip_values` clipped.

    Raises:
        TypeError: the images are not floating point, or in another dtype than the model.
        ValueError: the batch is empty or of a wrong shape, or has entries that are NaN, infinite, or outside
            `clip_values` by their whole range or more.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: must be floating point, images in the range of clip_values")
    if victim.dtype in (torch.float32, torch.float64) and x.dtype != victim.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, the model {victim.dtype}: they must be the same")
    shape = tuple(x.shape)
    if victim.input_shape is None and x.ndim != 4:
        raise ValueError(f"{name} has shape {shape}: must be images (N, C, H, W)")
    if victim.input_shape is not None and x.ndim != 1 + len(victim.input_shape):
        raise ValueError(f"{name} has shape {shape}: the estimator's input_shape is {victim.input_shape}")
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {shape}: the batch is empty")
    if victim.input_shape is not None and shape[1:] != victim.input_shape:
        logger.warning("%s has shape %s, though the estimator's input_shape is %s", name, shape, victim.input_shape)
    lowest, highest = (bound.item() for bound in x.aminmax())
    if not (math.isfinite(lowest) and math.isfinite(highest)):  # aminmax passes NaN on
        raise ValueError(f"{name} has NaN or infinite entries: all must be finite")
    x = x.detach()
    clipped = victim.clip(x)
    if victim.clip_values is None or torch.equal(clipped, x):
        return x
    low, high = (bound.to(x) for bound in victim.clip_values)
    if ((clipped - x).abs() >= high - low).any():
        raise ValueError(
            f"{name} has entries from {lowest:g} to {highest:g}: "
            f"must be within clip_values, {low.min().item():g} to {high.max().item():g}"
        )
    logger.warning(
        "%s has entries from %g to %g, outside clip_values: the clipped images are attacked", name, lowest, highest
    )
    return clipped


def labels_from(y: Any, n: int, nb_classes: int | None) -> Tensor:
    """Labels (N,) as int64, from indices (N,) or (N, 1), or rows (N, classes): one-hot, or probabilities.

    Raises:
        TypeError: they are neither an array nor a tensor nor a sequence of numbers.
        ValueError: their number is not `n`, a row is not of probabilities, or an index is not in [0, nb_classes).
    """
    try:
        y = torch.as_tensor(y).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"y of type {type(y).__name__}: must be labels as an array or a tensor") from error
    if y.ndim not in (1, 2) or len(y) != n:
        raise ValueError(f"y has shape {tuple(y.shape)}: must be indices ({n},) or one-hot rows ({n}, classes)")
    if y.ndim == 2 and y.shape[1] > 1:
        if nb_classes is not None and y.shape[1] != nb_classes:
            raise ValueError(f"y has shape {tuple(y.shape)}: the model has {nb_classes} classes")
        if not ((y >= 0).all() and ((y.double().sum(1) - 1).abs() < 1e-3).all()):
            raise ValueError("y has rows that are not one-hot, nor probabilities: each must sum to 1")
        if ((y != 0) & (y != 1)).any():
            logger.warning("y has rows of probabilities: the class of the largest is the label that success goes by")
        return y.to(torch.float64).argmax(1)
    indices = y.reshape(n).long()
    if y.is_floating_point() and not (y.reshape(n) == indices).all():
        raise ValueError("y has entries that are not integers: labels are class indices")
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or (nb_classes is not None and highest >= nb_classes):
        allowed = "[0, classes)" if nb_classes is None else f"[0, {nb_classes})"
        raise ValueError(f"y has labels from {lowest} to {highest}: must be in {allowed}")
    return indices


def probabilities_from(y: Any) -> Tensor | None:
    """The rows (N, classes) of labels that `labels_from` has checked, in float64, where they are not all one-hot."""
    y = torch.as_tensor(y).detach()
    if y.ndim != 2 or y.shape[1] == 1 or not ((y != 0) & (y != 1)).any():
        return None
    return y.to(torch.float64)


def mask_from(mask: Any, x: Tensor) -> Tensor:
    """Boolean mask of the shape of `x`, true where `mask` is not zero; what is broadcast is not copied.

    Raises:
        TypeError: the mask is neither bool nor floating point.
        ValueError: it has negative or NaN entries, or does not broadcast to `x`.
    """
    tensor = torch.as_tensor(mask)
    if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ArgumentTypeError(f"mask has dtype {tensor.dtype}: must be bool or floating point")
    if tensor.is_floating_point() and not (tensor >= 0).all():
        raise ValueError("mask has entries that are negative or NaN: each must be zero or positive")
    try:
        return (tensor != 0).to(x.device).expand(x.shape)
    except RuntimeError:
        raise ValueError(f"mask has shape {tuple(tensor.shape)}: must be broadcastable to {tuple(x.shape)}") from None
