"""The two interfaces of every attack, native or adapted: ART's `generate` and `attack(images, labels)`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.estimators import BaseEstimator, LossGradientsMixin
from art.estimators.classification import ClassifierMixin, PyTorchClassifier
from art.estimators.pytorch import PyTorchEstimator
from torch import Tensor, nn

from guardians.engine.checks import check_device, check_flag, check_images, check_integer, labels_from, mask_from
from guardians.engine.rng import hashed, row_keys
from guardians.engine.victim import Victim, undisturbed

__all__ = ["ClassifierAttack"]


class ClassifierAttack(EvasionAttack):
    """An evasion attack on a PyTorch classifier, called as ART calls one or with tensors.

    A subclass is one method, `_run`, which is given arguments that are checked.

    Args:
        estimator: an ART `PyTorchClassifier`, whose preprocessing and `clip_values` are honoured, or an `nn.Module`
            that returns logits for images in [0, 1]. It is attacked in evaluation mode and comes back bit for bit as
            it was.
        targeted: whether the labels are targets to reach rather than labels to leave.
        batch_size: images in one forward pass.
        verbose: show a progress bar of finished images.

    Raises:
        EstimatorError: the estimator is neither.
        TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """

    attack_params: ClassVar[list[str]] = [
        *EvasionAttack.attack_params,
        "targeted",
        "batch_size",
        "summary_writer",
        "verbose",
    ]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassifierMixin, PyTorchEstimator)
    _options: ClassVar[tuple[str, ...]] = ()
    """What the interfaces take besides images and labels, of "mask" and "x_adv_init"."""

    def __init__(
        self, estimator: PyTorchClassifier | nn.Module, *, targeted: bool, batch_size: int, verbose: bool
    ) -> None:
        super().__init__(estimator=estimator, summary_writer=False)
        self._targeted = targeted
        self.batch_size = batch_size
        self.verbose = verbose
        self.victim = Victim(estimator)

    @staticmethod
    def is_estimator_valid(estimator: Any, estimator_requirements: tuple[type, ...]) -> bool:
        """Accept a bare `nn.Module` besides what ART accepts."""
        return isinstance(estimator, nn.Module) or EvasionAttack.is_estimator_valid(estimator, estimator_requirements)

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Adversarial images, as ART's attacks return them.

        Args:
            x: images (N, C, H, W), or (N, ...) as the estimator's `input_shape` says, within `clip_values`. They are
                computed on, and returned, in float32, or in float64 for a float64 model.
            y: labels as indices (N,) or one-hot rows (N, classes); the targets of a targeted attack. None takes the
                model's predictions, which avoids label leaking (Kurakin et al. 2017, section 4.1).
            kwargs: of native attacks: `mask`, broadcastable to `x`, where it is zero pixels are not perturbed; and
                `x_adv_init`, images of the shape of `x` at which the search starts.

        Returns:
            Array of the shape of `x`.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed; checked before any work.
        """
        images = self._from_array("x", x)
        if kwargs.get("x_adv_init") is not None:
            kwargs["x_adv_init"] = self._from_array("x_adv_init", kwargs["x_adv_init"])
        return self._checked_run(images, y, kwargs, self.victim.device or torch.device("cpu")).numpy()

    def __call__(self, x: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Adversarial images (N, C, H, W) for images of the model's dtype on the model's device; see `generate`."""
        check_device("x", x, self.victim)
        if kwargs.get("x_adv_init") is not None:
            check_device("x_adv_init", kwargs["x_adv_init"], self.victim)
        return self._checked_run(x, y, kwargs, x.device)

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
        """Adversarial images where `inputs["x"]` is, computed on `device`.

        `inputs` may have labels "y" (N,), without which the predictions are taken, and what `_options` names.
        """

    def _from_array(self, name: str, x: Any) -> Tensor:
        array = np.asarray(x)
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"{name} has dtype {array.dtype}: must be floating point, images within clip_values")
        dtype = self.victim.dtype if self.victim.dtype == torch.float64 else torch.float32
        return torch.as_tensor(np.require(array, requirements=["C", "W"]), dtype=dtype)

    def _checked_run(self, x: Tensor, y: Any, options: dict[str, Any], device: torch.device) -> Tensor:
        unknown = sorted(set(options) - set(self._options))
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; known are {', '.join(('x', 'y', *self._options))}")
        inputs = self._checked_inputs(x, y, options)
        # What is made outside inference mode can be differentiated, wherever the caller stands.
        with undisturbed(self.victim.module), torch.inference_mode(False):
            return self._run(inputs, device)

    def _checked_inputs(self, x: Tensor, y: Any, options: dict[str, Any]) -> dict[str, Tensor]:
        """The images "x" and, where they are given, "y" as labels (N,), "mask" and "x_adv_init"."""
        check_images("x", x, self.victim)
        if y is None and self.targeted:
            raise ValueError("y=None: a targeted attack needs the target labels")
        inputs = {"x": x.detach()}
        if options.get("mask") is not None:
            inputs["mask"] = mask_from(options["mask"], x)
        if options.get("x_adv_init") is not None:
            start = options["x_adv_init"]
            check_images("x_adv_init", start, self.victim)
            if start.shape != x.shape:
                raise ValueError(f"x_adv_init has shape {tuple(start.shape)}: x has {tuple(x.shape)}")
            inputs["x_adv_init"] = start.detach()
        self._check_call(x)
        with undisturbed(self.victim.module), torch.inference_mode(False):
            if self.victim.nb_classes is None:  # a bare module: one image tells
                with row_keys(hashed(0, np.arange(1))):  # so that a random model's own draws stay where they are
                    self.victim.predict(x[:1].detach().to(self.victim.device or x.device, copy=True))
            if self.victim.nb_classes == 1:
                raise ValueError(
                    "the model returns a single logit for an image: needed is one for each class, two or more"
                )
            if y is not None:
                inputs["y"] = labels_from(y, len(x), self.victim.nb_classes)
        return inputs

    def _check_params(self) -> None:
        """Raise on constructor arguments that are not allowed; `set_params` calls it too."""
        check_integer("batch_size", self.batch_size, low=1)
        check_flag("targeted", self.targeted)
        check_flag("verbose", self.verbose)

    def _check_call(self, x: Tensor) -> None:
        """Raise on constructor arguments that do not fit the images, for example per-pixel arrays of another shape."""
