"""Mixup Inference as an ART classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import Tensor, nn

from guardians.defences.mixup_inference import MixupInference
from guardians.estimators.defended import DefendedClassifier

__all__ = ["MixupInferenceClassifier"]


class MixupInferenceClassifier(DefendedClassifier):
    """An ART classifier that predicts with, and is attacked as, a `MixupInference`; `fit` trains the model itself.

    `classifier.model` is the defence; `get_activations` is of the layers of `model`, without mixing.

    Args:
        model: as of `PyTorchClassifier`.
        pool: clean images (M, ...) and their labels (M,), see `MixupInference`.
        loss, input_shape, nb_classes, optimizer: as of `PyTorchClassifier`; the loss is given log-probabilities, for
            which cross-entropy is right.
        method, lam, num_samples, detection_lam, detection_samples, threshold, chunk_size, seed: as of `MixupInference`.
        **options: the other arguments of `PyTorchClassifier`, such as `clip_values`. Normalisation belongs into the
            model: with `preprocessing`, processed images would be mixed with those of the pool as they are.

    Raises:
        TypeError, ValueError: see `MixupInference` and `PyTorchClassifier`; a ValueError also for `preprocessing`.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: tuple[Tensor, Tensor],
        loss: Any,
        input_shape: tuple[int, ...],
        nb_classes: int,
        optimizer: Any = None,
        *,
        method: str = "MI-OL",
        lam: float = 0.5,
        num_samples: int = 30,
        detection_lam: float = 0.5,
        detection_samples: int = 5,
        threshold: float = 0.2,
        chunk_size: int = 512,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        _check_preprocessing(options)
        defence = MixupInference(
            model,
            pool,
            method,
            lam,
            num_samples,
            detection_lam=detection_lam,
            detection_samples=detection_samples,
            threshold=threshold,
            chunk_size=chunk_size,
            seed=seed,
        )
        super().__init__(model, defence, loss, input_shape, nb_classes, optimizer, **options)

    def set_params(self, **kwargs: Any) -> None:
        """As of `PyTorchClassifier`; with the check of `preprocessing`."""
        _check_preprocessing(kwargs)
        super().set_params(**kwargs)

    def defence_arguments(self) -> dict[str, Any]:
        """The pool, mixing and seed."""
        names = ("method", "lam", "num_samples", "detection_lam", "detection_samples", "threshold")
        arguments = {name: getattr(self.model, name) for name in (*names, "chunk_size", "seed")}
        return arguments | {"pool": (self.model.pool, self.model.pool_labels)}


def _check_preprocessing(options: dict[str, Any]) -> None:
    """Whether images are left as they are.

    Raises:
        ValueError: they are not.
    """
    preprocessing = options.get("preprocessing")
    mean_and_std = preprocessing
    if isinstance(preprocessing, (StandardisationMeanStd, StandardisationMeanStdPyTorch)):
        mean_and_std = preprocessing.mean, preprocessing.std
    if isinstance(mean_and_std, tuple) and len(mean_and_std) == 2:
        mean, std = (np.asarray(value) for value in mean_and_std)
        if (mean == 0).all() and (std == 1).all():
            return
    if preprocessing is not None:
        raise ValueError(f"preprocessing={preprocessing!r}: must be left out; normalise in the model")
