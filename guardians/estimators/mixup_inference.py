"""Mixup Inference as an ART classifier."""

from __future__ import annotations

from typing import Any

from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.defences.mixup_inference import MixupInference

__all__ = ["MixupInferenceClassifier"]


class MixupInferenceClassifier(PyTorchClassifier):
    """An ART classifier that predicts with, and is attacked as, a `MixupInference`; `fit` trains the model itself.

    `classifier.model` is the defence.

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
        if options.get("preprocessing") not in (None, (0.0, 1.0), (0, 1)):
            raise ValueError(f"preprocessing={options['preprocessing']!r}: must be left out; normalise in the model")
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
        super().__init__(defence, loss, input_shape, nb_classes, optimizer, **options)
