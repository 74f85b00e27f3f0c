"""Random Self-Ensemble as an ART classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from guardians.defences.random_self_ensemble import RandomSelfEnsemble
from guardians.estimators.defended import DefendedClassifier

__all__ = ["RandomSelfEnsembleClassifier"]


class RandomSelfEnsembleClassifier(DefendedClassifier):
    """An ART classifier that predicts with, is attacked as, and trains as a `RandomSelfEnsemble`.

    `fit` trains the parameters of `model` itself, those that an optimizer is made with; its layers stay as they are.
    `classifier.model` is the ensemble; `get_activations` is of the layers of `model`, without noise.

    Args:
        model, loss, input_shape, nb_classes, optimizer: as of `PyTorchClassifier`; the loss is given log-probabilities,
            for which cross-entropy is right.
        sigma_init, sigma_inner, n, chunk_size, seed: as of `RandomSelfEnsemble`.
        **options: the other arguments of `PyTorchClassifier`, such as `clip_values`.

    Raises:
        TypeError, ValueError: see `RandomSelfEnsemble` and `PyTorchClassifier`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        input_shape: tuple[int, ...],
        nb_classes: int,
        optimizer: Any = None,
        *,
        sigma_init: float = 0.2,
        sigma_inner: float = 0.1,
        n: int = 10,
        chunk_size: int = 512,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, nn.Module) and options.get("device_type") != "cpu" and torch.cuda.is_available():
            model.to("cuda")  # where ART takes it: buffers that are moved later are shared no more
        ensemble = RandomSelfEnsemble(
            model, sigma_init, sigma_inner, n, chunk_size=chunk_size, seed=seed, share_parameters=True
        )
        super().__init__(model, ensemble, loss, input_shape, nb_classes, optimizer, **options)

    def defence_arguments(self) -> dict[str, Any]:
        """Noise, passes and seed."""
        names = ("sigma_init", "sigma_inner", "n", "chunk_size", "seed")
        return {name: getattr(self.model, name) for name in names}
