"""ART estimators that predict or differentiate in a way of their own, asked through numpy as ART's attacks ask them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

__all__ = ["EstimatorModule", "is_plain"]


def is_plain(estimator: Any) -> bool:
    """Whether an estimator predicts and differentiates as `PyTorchClassifier` does, so that its module tells all."""
    own = type(estimator)
    return isinstance(estimator, PyTorchClassifier) and all(
        getattr(own, name) is getattr(PyTorchClassifier, name) for name in ("predict", "loss_gradient")
    )


class EstimatorModule(nn.Module):
    """An ART estimator as a module: `predict` for images, differentiable by its `class_gradient`.

    The estimator does its own preprocessing. Its torch modules are submodules, as they are to be left as they are.

    Args:
        estimator: with `predict`, `loss_gradient` and for gradients of the predictions `class_gradient`.
    """

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator
        self.parts = nn.ModuleList(_modules(estimator))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (N, classes) for images (N, ...).

        Raises:
            TypeError: under autocast, which is not the estimator's way.
        """
        if torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{type(self.estimator).__name__} is not asked under autocast")
        predictions: Tensor = _Predictions.apply(x, self)
        vars(predictions)["asked"] = x
        return predictions

    def loss(self, predictions: Tensor, y: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """The loss of labels (N,), whose gradient is the estimator's `loss_gradient` at the images asked about.

        ART has it of whole batches, often of their mean, so it is known up to a factor. The values (N,) are the
        cross-entropy of the predictions, as not every estimator tells its loss.

        Args:
            predictions: of `forward`, or a part of its rows.
            y: their labels (N,).
            probabilities: rows (N, classes) that the estimator is given in the place of one-hot ones.

        Raises:
            ValueError: the predictions are not of `forward`.
        """
        whole = predictions if predictions._base is None else predictions._base
        asked = vars(whole).get("asked")
        if asked is None or whole.shape[1] != predictions.shape[1]:
            raise ValueError(f"logits: must be those that {type(self.estimator).__name__} has returned, or some rows")
        first = predictions.storage_offset() // whole.shape[1]
        value = cross_entropy(predictions.detach(), y, reduction="none")
        rows = one_hot(y, self.estimator.nb_classes) if probabilities is None else probabilities
        loss: Tensor = _Loss.apply(asked[first : first + len(predictions)], value, rows, self)
        return loss

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """With autograd, which is off in a `Function`; ART clears the gradients of parameters, which come back."""
        before = [(parameter, parameter.grad) for parameter in self.parameters()]
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient


class _Predictions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: EstimatorModule) -> Tensor:
        ctx.module, ctx.images = module, _array(x)
        predictions = np.array(module.estimator.predict(ctx.images), order="C")  # in memory of its own, row after row
        return torch.from_numpy(predictions).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_predictions, estimator = gradients[0], ctx.module.estimator
        try:
            with ctx.module.differentiating():
                jacobian = np.asarray(estimator.class_gradient(ctx.images))
        except (AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"estimator of type {type(estimator).__name__}: has no class_gradient; it can be attacked through its "
                "loss_gradient alone, as FGSM and PGD do"
            ) from error
        jacobian_of = torch.from_numpy(jacobian).to(of_predictions)
        return torch.einsum("nc,nc...->n...", of_predictions, jacobian_of), None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, rows: Tensor, module: EstimatorModule) -> Tensor:
        if ctx.needs_input_grad[0]:
            labels = rows.cpu().numpy().astype(np.float32)
            with module.differentiating():
                gradient = module.estimator.loss_gradient(x=_array(x), y=labels)
            ctx.save_for_backward(torch.from_numpy(np.asarray(gradient)).to(x))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].view(-1, *(1,) * (gradient.ndim - 1)), None, None, None


def _array(x: Tensor) -> np.ndarray:
    """A copy, as estimators may write into it."""
    return np.array(x.detach().cpu().numpy(), order="C")


def _modules(estimator: Any) -> list[nn.Module]:
    """The torch modules of an estimator, or of the members of an ensemble."""
    members = getattr(estimator, "classifiers", None)
    if members is not None:
        return [module for member in members for module in _modules(member)]
    model = getattr(estimator, "model", None)
    return [model] if isinstance(model, nn.Module) else []
