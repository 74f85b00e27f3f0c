"""Random numbers that belong to a sample, not to a batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

__all__ = [
    *("ForkedGenerators", "SampleRng", "bits", "fresh_seed"),
    *("given_keys", "hashed", "keys_on", "row_keys", "with_normal"),
]

_SEED_AT_IMPORT = torch.initial_seed()
"""Of torch's global generator."""
_NUMBERS = 16
"""Keeps hashed numbers apart from the keys of `guardians.engine.run`, whose second part is smaller."""
_GAMMA = 0x9E3779B97F4A7C15
"""What SplitMix64 adds to its state."""
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""By what it shifts it, and what it multiplies it by."""
_SLAB = 2**17
"""Normal numbers that share a part of the stream."""
_ON_A_CPU, _ON_A_GPU = 2**18, 2**21
"""Normal numbers that are drawn at once by each thread of a CPU, and on a GPU."""
_KEYS: ContextVar[np.ndarray | None] = ContextVar("row_keys", default=None)


class SampleRng:
    """One independent random stream for each sample of a batch.

    The stream of a sample is a function of (seed, sample index, restart, step) alone: Philox (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", 2011) keyed with the seed and the index, whose counter begins at the restart
    and the step. Numbers are drawn in float64 on the host, so they are the same on every device.

    Attributes:
        index: int64 array (N,), the position of each sample in the data set.
    """

    def __init__(self, seed: int, index: np.ndarray, restart: np.ndarray | int = 0, step: np.ndarray | int = 0) -> None:
        self.index, self._seed = index, seed
        self._counters = [np.array(np.broadcast_to(number, index.shape)) for number in (restart, step)]

    @cached_property
    def _streams(self) -> list[Generator]:
        numbers = zip(self.index.tolist(), *(counter.tolist() for counter in self._counters), strict=True)
        return [
            Generator(Philox(key=(self._seed << 64) + i, counter=(restart << 192) + (step << 128)))
            for i, restart, step in numbers
        ]

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Float64 tensor (N, *shape), uniform in [0, 1)."""
        return self._draw(lambda stream: stream.random(shape))

    def gamma(self, concentration: float, shape: tuple[int, ...]) -> Tensor:
        """Float64 tensor (N, *shape), Gamma(concentration, scale 1)."""
        return self._draw(lambda stream: stream.standard_gamma(concentration, shape))

    def numbers(self, count: int) -> np.ndarray:
        """Float64 array (N, count), uniform in [0, 1): hashes, for a few numbers a step, where streams cost more.

        The same at each call, as they are functions of (seed, sample index, restart, step, number).
        """
        parts = (part[:, None] for part in (self.index, *self._counters))
        return (hashed(self._seed, _NUMBERS, *parts, np.arange(count)) >> np.uint64(11)) * 2.0**-53

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
            state = _mixed(state + np.asarray(low).astype(np.uint64) + np.uint64(_GAMMA))
    return state


def keys_on(device: torch.device, keys: np.ndarray) -> Tensor:
    """Keys (N,), uint64, as `bits` and `add_normal` take them: int64 with the same bits, on a device."""
    return torch.from_numpy(keys.view(np.int64)).to(device, non_blocking=True)


def bits(keys: Tensor, stream: int, first: int, last: int) -> Tensor:
    """Numbers `first` to `last` - 1, of 64 random bits, of a stream of each key: int64 (N, last - first) beside `keys`.

    Number i is number i of SplitMix64 seeded with number `stream` of SplitMix64 seeded with the key. SplitMix64 is
    counter-based, as its number i is a hash of seed + (i + 1) gamma: all rows are a few operations on whole tensors,
    and exact on every device. Two rows of L numbers overlap somewhere with a probability of about L / 2**63.

    Args:
        keys: int64 (N,), well mixed (`hashed`, `keys_on`).
        stream: at least 0.
        first, last: at least 0.
    """
    seeds = _mixed_tensor(keys + _signed((stream + 1) * _GAMMA))
    return _mixed_tensor(seeds[:, None] + torch.arange(first + 1, last + 1, device=keys.device) * _signed(_GAMMA))


def with_normal(x: Tensor, keys: Tensor, stream: int, sigma: float) -> Tensor:
    """`x` (N, C, H, ...) and noise ~ N(0, sigma^2), which for a row is a function of (key, stream, shape) alone.

    Box and Muller, "A note on the generation of random normal deviates", 1958, in float32, from the numbers of `bits`:
    of the L numbers of a slab (as many lines, in channels_last order, as hold 2**17), i and i + (L + 1) // 2 share one.
    The radius has 32 bits, for up to 6.7 standard deviations. Devices differ by the rounding of logarithm, sine and
    cosine.

    Beside the result it takes at most 64 MB of memory, on a CPU 8 MB for each thread of torch; where one line of an
    image has more than 2**17 numbers, 32 bytes for each of them. Nothing is kept, for a gradient either.

    Args:
        x: of a floating-point type, in any memory format.
        keys: int64 (N,) on the device of `x`, as for `bits`.
        stream: at least 0.
        sigma: standard deviation.
    """
    if not x.numel():
        return x
    # Autograd sees the clone alone, whose gradient is that of the sum.
    noisy = x.clone() if x.requires_grad and torch.is_grad_enabled() else torch.empty_like(x)
    lines, line = x.shape[2], math.prod(x.shape[3:]) * x.shape[1]
    step = max(1, _SLAB // line)
    at_once = _ON_A_GPU if x.device.type == "cuda" else _ON_A_CPU * torch.get_num_threads()
    size = max(1, at_once // (line * min(step, lines)))
    for number, top in enumerate(range(0, lines, step)):
        for row in range(0, len(x), size):
            rows, slab = slice(row, row + size), slice(top, top + step)
            old, new = (part.detach()[rows, :, slab].movedim(1, -1) for part in (x, noisy))
            noise = _normal(keys[rows], stream, number * ((step * line + 1) // 2), old[0].numel())
            torch.add(old, noise.view(old.shape), alpha=sigma, out=new)
    return noisy


def _normal(keys: Tensor, stream: int, first: int, length: int) -> Tensor:
    """Standard normal numbers (N, length), float32, for keys (N,), from number `first` of `bits` on."""
    half = (length + 1) // 2
    drawn = bits(keys, stream, first, first + half)
    angle = drawn.to(torch.int32).to(torch.float32).mul_(math.pi * 2.0**-31)
    radius = drawn.bitwise_right_shift_(32).bitwise_and_(2**32 - 1).to(torch.float32).add_(0.5).mul_(2.0**-32)
    radius.log_().mul_(-2).sqrt_()
    numbers = torch.empty(len(keys), length, device=keys.device)
    torch.mul(radius, angle.cos(), out=numbers[:, :half])
    torch.mul(radius[:, : length - half], angle.sin_()[:, : length - half], out=numbers[:, half:])
    return numbers


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's hash of states, uint64, in their place."""
    for shift, factor in _MIXING:
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    return state


def _mixed_tensor(state: Tensor) -> Tensor:
    """The same of int64, whose shifts fill in the sign."""
    shifted = torch.empty_like(state)
    for shift, factor in _MIXING:
        torch.bitwise_right_shift(state, shift, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if factor != 1:
            state.mul_(_signed(factor))
    return state


def _signed(number: int) -> int:
    """Modulo 2**64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def fresh_seed() -> int:
    """A new seed, from torch's global generator, or where that was never seeded from numpy's, which ART draws from."""
    if torch.initial_seed() == _SEED_AT_IMPORT >= 2**32:  # 64 random bits, with which torch starts, not a user's
        return int(np.random.randint(2**62, dtype=np.int64))  # noqa: NPY002
    return int(torch.randint(2**62, (), device="cpu"))


class ForkedGenerators:
    """A context in which torch's global generators are others, seeded once and carried on when it is entered again.

    For models that draw random numbers of their own: outside it is as if nothing had been drawn. Contexts of several
    threads may overlap in any way; while they do, they draw from the generators of the one that was entered last.
    """

    _lock: ClassVar = threading.Lock()
    _entered: ClassVar[list[ForkedGenerators]] = []

    def __init__(self, seed: int, device: torch.device | None) -> None:
        devices = [torch.device("cpu"), *([device] if device is not None and device.type == "cuda" else [])]
        self._inside = {kind: torch.Generator(kind).manual_seed(seed % 2**63).get_state() for kind in devices}
        self._outside: dict[torch.device, Tensor] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._outside = {device: _generator_state(device) for device in self._inside}
            for device, state in self._inside.items():
                _set_generator_state(device, state)
            self._entered.append(self)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            position = self._entered.index(self)
            later = self._entered[position + 1 :]
            for device, state in self._outside.items():
                above = next((other for other in later if device in other._outside), None)
                if above is None:
                    self._inside[device] = _generator_state(device)
                    _set_generator_state(device, state)
                else:  # what was outside of this one is to be restored by the other
                    self._inside[device], above._outside[device] = above._outside[device], state
            del self._entered[position]


def _generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


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
