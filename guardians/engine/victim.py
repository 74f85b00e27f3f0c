"""The model under attack: what an attack may ask of an `nn.Module` or of an ART estimator."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import one_hot

__all__ = ["Victim", "predicted_labels", "undisturbed"]


class Victim:
    """Differentiable logits and the loss of a classifier, with ART's preprocessing and loss where there are any.

    Attributes:
        module: the user's model.
        clip_values: bounds of valid images as tensors that broadcast to one image, or None where the estimator has
            none. Images of a bare module are in [0, 1].
        input_shape: the shape of one image, or None where it is not known.
        nb_classes: number of classes, or None until the first forward pass.
        device, dtype: of the model's first floating-point parameter or buffer; None where it has none.

    Raises:
        ValueError: the estimator has a `loss_gradient` of its own, such as ART's for randomised smoothing.
    """

    def __init__(self, estimator: PyTorchClassifier | nn.Module) -> None:
        self.module: nn.Module
        self.clip_values: tuple[Tensor, Tensor] | None
        self.input_shape: tuple[int, ...] | None
        self.nb_classes: int | None
        if isinstance(estimator, nn.Module):
            self._estimator = None
            self._loss = _PerSampleLoss(nn.CrossEntropyLoss())
            self.module, self.input_shape, self.nb_classes = estimator, None, None
            self.clip_values = (torch.tensor(0.0), torch.tensor(1.0))
        else:
            if type(estimator).loss_gradient is not PyTorchClassifier.loss_gradient:
                raise ValueError(
                    f"estimator of type {type(estimator).__name__}: has a loss_gradient of its own, which would be "
                    "bypassed; allowed are estimators with that of PyTorchClassifier, and nn.Modules"
                )
            self._estimator = estimator
            self._loss = _PerSampleLoss(estimator.loss)
            self.module, self.nb_classes = estimator.model, estimator.nb_classes
            self.input_shape = tuple(estimator.input_shape)
            self.clip_values = _clip_tensors(estimator.clip_values, self.input_shape)

    @property
    def device(self) -> torch.device | None:
        """Of the model's first floating-point parameter or buffer; None where it has none."""
        weight = self._weight
        return None if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype | None:
        """As `device`."""
        weight = self._weight
        return None if weight is None else weight.dtype

    @property
    def _weight(self) -> Tensor | None:
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point()), None)

    def logits(self, x: Tensor, module: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits (N, classes) of images (N, ...), differentiable with respect to `x`.

        Args:
            x: images.
            module: what to ask in the place of the user's model, after the same preprocessing.

        Raises:
            ValueError: the model does not return one row of logits for each image.
        """
        logits = (module or self.module)(x if self._estimator is None else self._preprocess(x))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model returned {got} for {len(x)} images; needed are logits (N, classes)")
        if module is None:
            self.nb_classes = logits.shape[1]
        return logits

    def clip(self, x: Tensor) -> Tensor:
        """`x` clamped to `clip_values`."""
        return x if self.clip_values is None else x.clamp(*(bound.to(x) for bound in self.clip_values))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, for labels (N,): cross-entropy, or the loss of the estimator.

        A loss that cannot be had per sample comes back as it is; its sum has the same gradient direction.
        """
        if self._estimator is None:
            return self._loss(logits, y)
        return self._loss(logits, self._estimator.reduce_labels(one_hot(y, logits.shape[1]).to(logits.dtype)))

    def predict(self, x: Tensor) -> Tensor:
        """Labels (N,) that the model gives to images (N, ...)."""
        with torch.no_grad():
            return self.logits(x).argmax(1)

    def _preprocess(self, x: Tensor) -> Tensor:
        estimator = self._estimator
        assert estimator is not None
        if estimator.all_framework_preprocessing:
            preprocessed: Tensor = estimator._apply_preprocessing(x, y=None, fit=False, no_grad=False)[0]
            return preprocessed
        output: Tensor = _NumpyPreprocessing.apply(x, estimator)
        return output


class _NumpyPreprocessing(torch.autograd.Function):
    """ART preprocessors that exist in numpy only, with the gradient estimates that they come with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: PyTorchClassifier) -> Tensor:
        array = x.detach().cpu().numpy()
        ctx.estimator, ctx.array = estimator, array
        return torch.from_numpy(np.asarray(estimator._apply_preprocessing(array, y=None, fit=False)[0])).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        with torch.enable_grad():  # ART's estimates differentiate; autograd is off in a backward pass
            estimated = ctx.estimator._apply_preprocessing_gradient(ctx.array, gradient.cpu().numpy())
        return torch.from_numpy(np.asarray(estimated)).to(gradient), None


class _PerSampleLoss:
    """A loss without its reduction, where it has one."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss
        if hasattr(loss, "reduction"):
            self._loss = copy.copy(loss)
            self._loss.reduction = "none"

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = self._loss(logits, target)
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss


def _clip_tensors(clip_values: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    if clip_values is None:
        return None
    low, high = (torch.as_tensor(np.asarray(bound, dtype=np.float64)) for bound in clip_values)
    # ART lets the bounds of single features come flat or in the shape of an image.
    low, high = (bound.reshape(shape if bound.numel() > 1 else ()) for bound in (low, high))
    return low, high


def predicted_labels(module: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Labels (N,) that a module, in evaluation mode, gives to images (N, ...)."""
    with undisturbed(module), torch.no_grad():
        return torch.cat([module(batch).argmax(1) for batch in images.split(batch_size)])


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside, everything as it was outside.

    The flags are set directly, so a module that overrides `train` does not notice.
    """
    modes = [(part, part.training) for part in module.modules()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        _set_modes((part, False) for part, _ in modes)
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        _set_modes(modes)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        if part.training != training:  # to set an attribute of a module takes long
            part.training = training
