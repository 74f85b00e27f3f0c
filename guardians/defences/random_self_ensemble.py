"""Random Self-Ensemble (Liu et al., "Towards robust neural networks via random self-ensemble", 2018)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from guardians.defences.ensemble import RandomEnsemble, log_probabilities
from guardians.engine.checks import check_flag, check_integer, check_number
from guardians.engine.rng import hashed, keys_on, with_normal

__all__ = ["GaussianNoise", "RandomSelfEnsemble"]

logger = logging.getLogger(__name__)


class RandomSelfEnsemble(RandomEnsemble):
    """A model with Gaussian noise in front of each convolution, asked `n` times (Liu et al. 2018, algorithm 1).

        p(x) = 1/n sum_k softmax(f(x, e_k)),    e_k ~ N(0, sigma^2) on the input of each convolution

    In training mode it is the noisy model itself, asked once, which is how it is trained (same algorithm). The noise is
    in the unit of what a convolution is given: behind a layer that divides images by a standard deviation of 0.25, a
    `sigma_init` of 0.8 is noise of 0.2 on the images. Noise is in front of convolutions that a forward pass calls as
    modules; where it computes with the weights of one itself, the log warns that there is none.

    Args:
        model: returns logits (N, classes) for images (N, ...). It is copied and stays as it is.
        sigma_init: standard deviation of the noise in front of the convolution that comes first in a forward pass.
        sigma_inner: of that in front of all others.
        n: noisy passes whose probabilities are averaged.
        chunk_size: passes that the model makes at once. It bounds memory, for gradients too, where all but the first
            chunk are then computed twice; it does not change the result beyond rounding.
        seed: of the noise; None draws one from torch's global generator. The noise of an image depends on (seed, its
            number among the images that the module was given), in native attacks on (seed, sample, query) instead.
        share_parameters: keep the parameters and buffers of `model` itself, so that training one trains the other.

    Attributes:
        model: the copy with its noise layers, which are silent when it is called by itself.

    Raises:
        TypeError: `model` is no `nn.Module`, or another argument is of a wrong type.
        ValueError: an argument is out of range, or the model has no convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_init: float = 0.2,
        sigma_inner: float = 0.1,
        n: int = 10,
        *,
        chunk_size: int = 512,
        seed: int | None = None,
        share_parameters: bool = False,
    ) -> None:
        super().__init__(model, chunk_size=chunk_size, seed=seed)
        check_number("sigma_init", sigma_init, low=0, single=True)
        check_number("sigma_inner", sigma_inner, low=0, single=True)
        check_integer("n", n, low=1)
        check_flag("share_parameters", share_parameters)
        if not any(isinstance(layer, _ConvNd) for layer in model.modules()):
            raise ValueError(f"model of type {type(model).__name__}: must have a convolution to put noise in front of")
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.n = int(n)
        self._shapes: set[tuple[int, ...]] = set()  # of images of which it is known which layers they reach
        self.model = copy.deepcopy(model, shared if share_parameters else {})
        self._source = _NoiseSource(float(sigma_init), float(sigma_inner))
        layers = list(self.model.named_modules(remove_duplicate=False))  # a layer may have several names
        noisy = {layer: _Noisy(GaussianNoise(self._source), layer) for _, layer in layers if isinstance(layer, _ConvNd)}
        for path, layer in layers:
            parent, _, name = path.rpartition(".")
            if layer is self.model and layer in noisy:
                self.model = noisy[layer]
            elif layer in noisy:
                setattr(self.model.get_submodule(parent), name, noisy[layer])

    @property
    def passes(self) -> int:
        """`n`."""
        return self.n

    @property
    def sigma_init(self) -> float:
        """Standard deviation of the noise in front of the first convolution."""
        return self._source.sigma_init

    @property
    def sigma_inner(self) -> float:
        """Standard deviation of that in front of all others."""
        return self._source.sigma_inner

    def undefended(self) -> nn.Module:
        """A copy of the model without noise layers, which shares no tensor with it."""
        model = super().undefended()
        if isinstance(model, _Noisy):
            return model[1]
        for path, layer in list(model.named_modules(remove_duplicate=False)):
            parent, _, name = path.rpartition(".")
            if isinstance(layer, _Noisy):
                setattr(model.get_submodule(parent), name, layer[1])
        return model

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, classes) of images (N, ...); in training mode those of a single noisy pass."""
        passes = 1 if self.training else self.passes
        keys = hashed(self.keys(len(x))[:, None], np.arange(passes))
        return self.mean_over_passes(self._noisy_pass, x, keys)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"sigma_init={self.sigma_init:g}, sigma_inner={self.sigma_inner:g}, n={self.n}"

    def _noisy_pass(self, x: Tensor, keys: np.ndarray) -> Tensor:
        """Log-probabilities of images (M, ...), each with the noise of its key."""
        shape, model = tuple(x.shape[1:]), self.fast_model(x)
        self._source.reached.clear()
        with self._source.drawing(keys, x.device):
            answers = log_probabilities(model, x)
        if shape not in self._shapes:
            self._shapes.add(shape)
            parts = self.model.named_modules()
            silent = [name for name, part in parts if isinstance(part, _Noisy) and part[0] not in self._source.reached]
            if silent:
                logger.warning("a forward pass does not call %s: no noise is in front of them", ", ".join(silent))
        return answers


class _Noisy(nn.Sequential):
    """Noise and the convolution behind it; it has the attributes of the convolution for a model that reads them."""

    def __init__(self, noise: nn.Module, convolution: nn.Module) -> None:
        super().__init__()
        self.append(noise).append(convolution).train(convolution.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "reset_parameters":  # who resets all layers finds the convolution itself
                raise
            return getattr(super().__getattr__("1"), name)


class GaussianNoise(nn.Module):
    """The noise layer of a `RandomSelfEnsemble`, which says how strong the noise is and draws it for all layers."""

    def __init__(self, source: _NoiseSource) -> None:
        super().__init__()
        self._source = source

    def forward(self, x: Tensor) -> Tensor:
        """`x` with noise on it."""
        return self._source.add_noise(x, self)


class _NoiseSource:
    """The noise of one pass, drawn layer by layer as each is reached, and kept by none.

    The noise of an image in a layer is a function of the key of its pass and the number of the layer in it. Positions
    count as in a channels_last tensor.

    Attributes:
        sigma_init, sigma_inner: standard deviations in the first layer and in the others.
        reached: the noise layers that a pass has called.
    """

    def __init__(self, sigma_init: float, sigma_inner: float) -> None:
        self.sigma_init, self.sigma_inner = sigma_init, sigma_inner
        self.reached: set[nn.Module] = set()
        self._keys: Tensor | None = None
        self._layers_passed = 0

    def add_noise(self, x: Tensor, layer: nn.Module) -> Tensor:
        """`x` (N, C, ...) with the noise of the next layer; `x` itself outside of a pass."""
        if self._keys is None:
            return x
        self.reached.add(layer)
        number, self._layers_passed = self._layers_passed, self._layers_passed + 1
        sigma = self.sigma_inner if number else self.sigma_init
        return with_normal(x, self._keys, number, sigma) if sigma else x

    @contextmanager
    def drawing(self, keys: np.ndarray, device: torch.device) -> Iterator[None]:
        """The noise of one pass of images with these keys (N,) inside."""
        self._keys, self._layers_passed = keys_on(device, keys), 0
        try:
            yield
        finally:
            self._keys = None
