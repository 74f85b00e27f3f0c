"""Random numbers that belong to a sample, not to a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

__all__ = ["SampleRng"]


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
