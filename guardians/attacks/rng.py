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
        index: int64 tensor of shape (N,) on the host, the position of each sample in the data set.
    """

    def __init__(self, seed: int, index: Tensor, restart: int = 0) -> None:
        self.index = index
        self._seed, self._restart = seed, restart

    @cached_property
    def _streams(self) -> list[Generator]:
        key, counter = self._seed << 64, self._restart << 192
        return [Generator(Philox(key=key + position, counter=counter)) for position in self.index.tolist()]

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Float64 tensor (N, *shape), uniform in [0, 1)."""
        return self._draw(lambda stream: stream.random(shape))

    def gamma(self, concentration: float, shape: tuple[int, ...]) -> Tensor:
        """Float64 tensor (N, *shape), Gamma(concentration, scale 1)."""
        return self._draw(lambda stream: stream.standard_gamma(concentration, shape))

    def _draw(self, draw: Callable[[Generator], np.ndarray | float]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(draw(stream)) for stream in self._streams]))
