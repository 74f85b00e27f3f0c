"""Random numbers that belong to a sample, not to a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

__all__ = ["SampleRng", "given_keys", "hashed", "row_keys"]

_KEYS: ContextVar[np.ndarray | None] = ContextVar("row_keys", default=None)


class SampleRng:
    """One independent random stream for each sample of a batch.

    The stream of a sample is a function of (seed, sample index, restart) alone: Philox (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", 2011) keyed with the seed and the index. Numbers are drawn in float64 on the
    host, so they are the same on every device.

    Attributes:
        index: int64 array (N,), the position of each sample in the data set.
    """

    def __init__(self, seed: int, index: np.ndarray, restart: np.ndarray | int = 0) -> None:
        self.index = index
        self._seed, self._restart = seed, np.broadcast_to(restart, index.shape)

    @cached_property
    def _streams(self) -> list[Generator]:
        keys = zip(self.index.tolist(), self._restart.tolist(), strict=True)
        return [Generator(Philox(key=(self._seed << 64) + i, counter=restart << 192)) for i, restart in keys]

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Float64 tensor (N, *shape), uniform in [0, 1)."""
        return self._draw(lambda stream: stream.random(shape))

    def gamma(self, concentration: float, shape: tuple[int, ...]) -> Tensor:
        """Float64 tensor (N, *shape), Gamma(concentration, scale 1)."""
        return self._draw(lambda stream: stream.standard_gamma(concentration, shape))

    def _draw(self, draw: Callable[[Generator], np.ndarray | float]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(draw(stream)) for stream in self._streams]))


def hashed(*parts: np.ndarray | int) -> np.ndarray:
    """A 64-bit number for each combination of integers, which broadcast: uint64.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, figure 16), whose state
    takes in one part after the other.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        for part in parts:
            low = part % 2**64 if isinstance(part, int) else part
            state = state + np.asarray(low).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


@contextmanager
def row_keys(keys: np.ndarray) -> Iterator[None]:
    """Tell random models inside which key (uint64) each row of the next batch has, the seed of its draws.

    A random model that honours them (`given_keys`) draws the same numbers for a sample in any batch.
    """
    token = _KEYS.set(keys)
    try:
        yield
    finally:
        _KEYS.reset(token)


def given_keys(n: int) -> np.ndarray | None:
    """The keys that `row_keys` gives to a batch of `n` rows; None where there are none for it."""
    keys = _KEYS.get()
    return keys if keys is not None and len(keys) == n else None
