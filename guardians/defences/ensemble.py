"""What the randomised defences share: draws that belong to an image, and many passes in batches of bounded size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from guardians.engine.checks import check_integer
from guardians.engine.rng import given_keys, hashed
from guardians.engine.search import InPrecision, folded_view, has_hooks, works_in
from guardians.engine.victim import Victim

__all__ = ["RandomEnsemble", "log_probabilities"]

_FITS_CACHES = 64
"""Passes of small images at once that a CPU makes fastest, measured."""


class RandomEnsemble(nn.Module):
    """A model asked several times about each image, with other random numbers each time; see the subclasses.

    Args:
        model: returns logits. On a CPU, where no gradient of its parameters is wanted, batch norm is folded into the
            convolutions, if that gives the same logits up to rounding.
        chunk_size: passes that the model makes at once.
        seed: of all draws; None draws one from torch's global generator.
    """

    def __init__(self, model: nn.Module, *, chunk_size: int, seed: int | None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model of type {type(model).__name__}: must be a torch.nn.Module")
        check_integer("chunk_size", chunk_size, low=1)
        if seed is not None:
            check_integer("seed", seed, low=0)
        self.model = model
        self.training = model.training
        self.chunk_size = int(chunk_size)
        self.seed = int(torch.randint(2**62, ())) if seed is None else int(seed)
        self.images_seen = 0
        self._parts: list[nn.Module] = []
        self._asked: list[nn.Module] = []  # a list, because they are no parts of this module

    @property
    def passes(self) -> int:
        """Random passes that an answer is the mean of, in evaluation mode."""
        raise NotImplementedError

    def keys(self, n: int) -> np.ndarray:
        """The seeds (n,) of the draws for a batch of `n` images, uint64.

        They come from the keys that a native attack gives (`guardians.engine.rng.row_keys`), or else from the numbers
        of the images among all that the module was given: a data set that is read in order has the same draws in
        batches of any size.
        """
        keys = given_keys(n)
        if keys is None:
            keys = np.arange(self.images_seen, self.images_seen + n)
            self.images_seen += n
        return hashed(self.seed, keys)

    def undefended(self) -> nn.Module:
        """A copy of the model without the defence, which shares no tensor with it."""
        return copy.deepcopy(self.model)

    def mean_over_passes(
        self, one_pass: Callable[[Tensor, Any], Tensor], x: Tensor, draws: np.ndarray | Tensor
    ) -> Tensor:
        """Logarithm of the mean over the passes of the probabilities (N, classes).

        Args:
            one_pass: log-probabilities (M, classes) of images (M, ...) and of what was drawn for each (M,).
            x: images (N, ...).
            draws: (N, passes).
        """
        n, passes = draws.shape
        image, draws = np.repeat(np.arange(n), passes), draws.reshape(-1)
        size = min(self.chunk_size, _FITS_CACHES) if x.device.type == "cpu" else self.chunk_size
        if self.training:  # batch norm has to see the whole batch
            size = len(draws)
        answers = []
        for first in range(0, max(1, len(draws)), max(1, size)):
            rows = slice(first, first + size)
            images = x.index_select(0, torch.from_numpy(image[rows]).to(x.device, non_blocking=True))
            if first >= self.chunk_size and torch.is_grad_enabled():
                answers.append(checkpoint(one_pass, images, draws[rows], use_reentrant=False))
            else:
                answers.append(one_pass(images, draws[rows]))
        return torch.cat(answers).view(n, passes, answers[0].shape[1]).logsumexp(1) - math.log(passes)

    def fast_model(self, x: Tensor) -> nn.Module:
        """What a pass of images (N, ...) asks: the model; on a CPU it or its folded view, in the fastest format."""
        if x.device.type != "cpu" or not len(x):
            return self.model
        parts = list(self.model.modules())
        if parts != self._parts:
            with torch.inference_mode(False):
                images = x[:8].detach().clone()
                channels_last = works_in(Victim(self.model), images, torch.float32, channels_last=True)
                modules = self.model, folded_view(self.model, images)
                self._asked = [InPrecision(m, torch.float32, channels_last=channels_last) for m in modules]
                self._parts = parts
        trains = any(part.training for part in parts)
        trains |= torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters())
        return self._asked[0 if trains or has_hooks(self.model) else 1]


def log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """Of one pass of images (N, ...): (N, classes), in float32 or higher."""
    logits = model(x)
    return log_softmax(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits, dim=1)
