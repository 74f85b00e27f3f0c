"""What is known of the samples under search, a row each, and what an attack and the model say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guardians.engine.rng import SampleRng

__all__ = [
    "Answer",
    "Columns",
    "Progress",
    "Query",
    "State",
    "on_device",
    "on_host",
    "per_image",
    "rounded_towards",
    "select",
]

Columns = dict[str, Any]
"""By name: tensors on the device, and numpy arrays for what steers the loop, each (N, ...)."""


class State:
    """Samples under search. What an attack knows of them are its attributes, each a column with a row a sample.

    A column is a tensor on the device of the images, or a numpy array for what steers the loop (step counts), which is
    read without waiting for the device. An attack makes its columns in `start` and writes to them in `update`; the
    engine drops, overwrites and reorders rows. What the engine knows is in `known`, and cannot be overwritten.

    Attributes:
        x: images (N, ...).
        y: labels, or targets of a targeted attack, (N,).
        probabilities: of the classes (N, classes), where the labels were given so; else None.
        mask: bool (N, ...), true where pixels may be perturbed; None where there is no mask.
        x_adv_init: images (N, ...) at which the search starts the first time, or None.
        index: int64 array (N,), the positions of the samples among those of the call.
        restart: int64 array (N,), how often the search was started before.
        best: the nearest images that fool the model so far (N, ...), the images themselves where there is none; for
            attacks that keep them.
        best_distance: their distances (N,), infinite where there is none; likewise.
        rng: a random stream for each row, another one at `start` and at every step.
    """

    def __init__(self, known: Columns, rng: SampleRng | None = None) -> None:
        self.__dict__.update(known=known, _rng=rng, _has_started=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ENGINES:
            raise AttributeError(f"column {name!r} is the engine's; an attack needs another name")
        if self._has_started and name not in self.__dict__:  # rows that are put here later would not have it
            raise AttributeError(f"column {name!r} is new: an attack makes all its columns in start")
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if "known" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        raise AttributeError(f"no column {name!r}; there are {', '.join([*self.known, *self.own])}")

    def __len__(self) -> int:
        return len(self.known["index"])

    x = property(lambda state: state.known["x"])
    y = property(lambda state: state.known["y"])
    probabilities = property(lambda state: state.known.get("probabilities"))
    mask = property(lambda state: state.known.get("mask"))
    x_adv_init = property(lambda state: None if state.known["restart"].any() else state.known.get("x_adv_init"))
    restart = property(lambda state: state.known["restart"])
    index = property(lambda state: state.known["index"])
    best = property(lambda state: state.known["best"])
    best_distance = property(lambda state: state.known["best_distance"])
    rng = property(lambda state: state._rng)

    @property
    def own(self) -> Columns:
        """The columns of the attack."""
        return {name: value for name, value in self.__dict__.items() if name not in ("known", "_rng", "_has_started")}

    def rng_is(self, rng: SampleRng) -> None:
        """Give the rows another random stream."""
        self.__dict__["_rng"] = rng

    def rows(self, rows: np.ndarray) -> State:
        """Those with these numbers, or where a mask is true, in memory of their own unless it is all of them."""
        return self._of({name: select(value, rows) for name, value in part.items()} for part in (self.known, self.own))

    def put(self, rows: np.ndarray, new: State) -> None:
        """Overwrite rows.

        Raises:
            ValueError: the new rows have other columns, so that something of the old ones would stay.
        """
        self._check_columns(new)
        seen: set[int] = set()
        for columns, others in ((self.known, new.known), (self.__dict__, new.own)):
            for name, other in others.items():
                value = columns[name]
                if isinstance(value, np.ndarray):
                    value[rows] = other
                    continue
                if (memory := _memory(value)) in seen:  # two columns that are one tensor so far
                    value = columns[name] = value.clone()
                seen |= {memory} - {0}
                value.index_copy_(0, torch.from_numpy(rows).to(value.device, non_blocking=True), other)

    def joined(self, other: State) -> State:
        """These rows, and after them those of `other`.

        Raises:
            ValueError: as `put`.
        """
        self._check_columns(other)
        pairs = ((self.known, other.known), (self.own, other.own))
        return self._of({name: join([one[name], two[name]]) for name in one} for one, two in pairs)

    def _check_columns(self, new: State) -> None:
        if self.own.keys() != new.own.keys():
            names = ", ".join(map(repr, sorted(self.own.keys() ^ new.own.keys())))
            raise ValueError(f"columns {names} are made at some starts alone: must be made at all, or at none")

    @staticmethod
    def _of(parts: Any) -> State:
        known, own = parts
        state = State(known)
        state.__dict__.update(own, _has_started=True)
        return state

    def has_started(self, attack: str) -> None:
        """Take no new columns from now on.

        Raises, unless those of the attack are what the engine can work with:
            TypeError: a column is neither a tensor nor a numpy array, or is on another device.
            ValueError: it has not a row a sample, or shares memory, between its rows or with another column.
        """
        memory = {_memory(value): name for name, value in self.known.items()}
        for name, value in self.own.items():
            where = f"{attack}.start: column {name!r}"
            if not isinstance(value, (Tensor, np.ndarray)):
                raise TypeError(f"{where} is of type {type(value).__name__}: must be a tensor or a numpy array")
            if value.ndim == 0 or len(value) != len(self):
                raise ValueError(f"{where} has shape {tuple(value.shape)}: the first dimension must be {len(self)}")
            if isinstance(value, Tensor) and value.device != self.x.device:
                raise TypeError(f"{where} is on {value.device}: must be on {self.x.device}, as the images are")
            strides = value.stride() if isinstance(value, Tensor) else value.strides
            if any(stride == 0 and size > 1 for stride, size in zip(strides, value.shape, strict=True)):
                raise ValueError(f"{where} is expanded, so that entries share memory: must be cloned")
            other = memory.setdefault(_memory(value), name)
            if other != name and _memory(value):
                raise ValueError(f"{where} shares memory with {other!r}: must be cloned")
        self.__dict__["_has_started"] = True


_ENGINES = {name for name, value in vars(State).items() if isinstance(value, property)} | {
    *("asked", "backward", "doubted", "forward", "known", "stuck", "_rng", "_has_started"),
    *("rows", "put", "joined", "has_started", "rng_is"),
}


@dataclass(frozen=True)
class Query:
    """Where the model is evaluated next.

    Attributes:
        points: one for each row (N, ...), or several (N, K, ...).
        gradient: whether the next `update` wants the gradient there, or the logits alone; or for each row, bool (N,).
    """

    points: Tensor
    gradient: bool | np.ndarray = True


@dataclass(frozen=True)
class Answer:
    """What the model says at the points of a query, which are (N, ...), or (N, K, ...).

    Attributes:
        logits: (N, classes), or (N, K, classes); the mean over the draws of EOT.
        value: of the objective, (N,) or (N, K).
        fooled: bool, likewise: whether the point fools the model, as `Attack.reached` says.
        gradient: of the objective, of the shape of the points; zero in rows for which it was not asked, and None where
            it was asked for none.
        distance: of each point to its image, likewise, for attacks that keep the nearest; else None.
    """

    logits: Tensor
    value: Tensor
    fooled: Tensor
    gradient: Tensor | None
    distance: Tensor | None = None


class Progress(NamedTuple):
    """Where the search of each sample stands after a step, bool (N,) as a tensor or an array.

    Attributes:
        done: it is over.
        stuck: the next step will be as the last, which led nowhere, as long as the model is not random.
    """

    done: np.ndarray | Tensor
    stuck: np.ndarray | Tensor | None = None


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), to broadcast against images."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def on_host(values: Tensor | np.ndarray) -> np.ndarray:
    """Where the loop waits for the device."""
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def on_device(values: np.ndarray, x: Tensor) -> Tensor:
    """A numpy column on the device of the images."""
    return torch.from_numpy(values).to(x.device, non_blocking=True)


def select(values: Any, rows: np.ndarray) -> Any:
    """The rows with these numbers, or where a mask is true; `values` itself where that is all."""
    if rows.dtype == bool:
        if rows.all():
            return values
        rows = rows.nonzero()[0]
    if isinstance(values, np.ndarray):
        return values[rows]
    return values.index_select(0, torch.from_numpy(rows).to(values.device, non_blocking=True))


def rounded_towards(x: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in another dtype, rounded towards `x`, so that they stay inside any box or ball that holds both.

    `x` is exact in that dtype.
    """
    rounded = images.to(dtype)
    outwards = (rounded.double() - x.double()).abs() > (images.double() - x.double()).abs()
    return torch.where(outwards, rounded.nextafter(x.to(dtype)), rounded)


def join(parts: list[Any]) -> Any:
    """One column after the other."""
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)


def _memory(values: Tensor | np.ndarray) -> int:
    """Where its entries are; 0 where they are nowhere."""
    if isinstance(values, Tensor):
        return int(values.untyped_storage()._cdata) if values.numel() else 0
    while isinstance(values.base, np.ndarray):
        values = values.base
    return int(values.ctypes.data) if values.size else 0
