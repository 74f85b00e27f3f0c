"""The two interfaces of every attack, native or adapted: ART's `generate` and `attack(images, labels)`."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.estimators import BaseEstimator, LossGradientsMixin
from art.estimators.classification import ClassifierMixin, PyTorchClassifier
from torch import Tensor, nn

from guardians.engine.checks import (
    check_device,
    check_integer,
    check_summary_writer,
    checked_images,
    labels_from,
    mask_from,
    probabilities_from,
)
from guardians.engine.parameters import Parameters
from guardians.engine.report import Report
from guardians.engine.rng import ForkedGenerators, hashed, row_keys
from guardians.engine.victim import Victim, isolated, undisturbed

__all__ = ["ClassifierAttack", "Estimator"]

Estimator = PyTorchClassifier | LossGradientsMixin | nn.Module

logger = logging.getLogger(__name__)


class ClassifierAttack(Parameters, EvasionAttack):
    """An evasion attack on a PyTorch classifier, called as ART calls one or with tensors.

    A subclass is its arguments as annotated fields, see `Parameters`, and one method, `_run`, which is given arguments
    that are checked. The first field is the estimator: an ART `PyTorchClassifier`, whose preprocessing and
    `clip_values` are honoured as they are at each call, or an `nn.Module` that returns logits for images in [0, 1]. It
    is attacked in evaluation mode and comes back bit for bit as it was. Other ART classifiers with a `loss_gradient`
    (randomised smoothing, ensembles, estimated gradients) are attacked through it, in numpy and so slower.

    Attributes:
        report: what the last call did, see `Report`; None before the first.

    Raises:
        EstimatorError: the estimator is none of these.
        TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """

    attack_params: ClassVar[list[str]] = list(EvasionAttack.attack_params)
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassifierMixin)
    _options: ClassVar[tuple[str, ...]] = ()
    """What the interfaces take besides images and labels, of "mask" and "x_adv_init"."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.attack_params = [*EvasionAttack.attack_params, *cls.parameters()[1:]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        values = self._bound(arguments, options)
        estimator = values.pop(self.parameters()[0])
        if isinstance(estimator, torch.export.ExportedProgram):
            raise TypeError("estimator of type ExportedProgram: must be the module of it, program.module()")
        writer = values.pop("summary_writer", False)
        check_summary_writer("summary_writer", writer)
        super().__init__(
            estimator=estimator, summary_writer=os.fspath(writer) if isinstance(writer, os.PathLike) else writer
        )
        self.victim = Victim(estimator)
        self.report: Report | None = None
        if self.victim.has_own_gradients:
            logger.warning(
                "estimator of type %s: is attacked through its own loss_gradient and predict, which takes longer",
                type(estimator).__name__,
            )
        for name, value in values.items():
            setattr(self, name, value)
        self._check_params()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Fields are declared by each attack."""

    def set_params(self, **changes: Any) -> None:
        """Change arguments of the constructor.

        Raises:
            TypeError, ValueError: one is unknown or outside what is allowed; then none is changed.
        """
        known = [name for name in self.attack_params if name != "summary_writer"]
        for name in changes:
            if name not in known:
                raise ValueError(f"{name}: cannot be set for {type(self).__name__}; known are {', '.join(known)}")
        before = dict(vars(self))
        try:
            for name, value in changes.items():
                setattr(self, name, value)
            self._check_params()
        except Exception:
            self.__dict__ = before
            raise

    @staticmethod
    def is_estimator_valid(estimator: Any, estimator_requirements: tuple[type, ...]) -> bool:
        """Accept a bare `nn.Module` besides what ART accepts."""
        return isinstance(estimator, nn.Module) or EvasionAttack.is_estimator_valid(estimator, estimator_requirements)

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Adversarial images, as ART's attacks return them.

        Args:
            x: images (N, C, H, W), or (N, ...) as the model takes them, within `clip_values`; those that are a little
                outside are attacked from the clipped image, which the log says. They are computed on, and returned, in
                float32, or in float64 for a float64 model.
            y: labels as indices (N,), or one-hot or probability rows (N, classes); the targets of a targeted attack.
                Native FGSM and PGD ascend the loss of the probabilities, where it is defined for them, as ART's do; for
                all other ends and attacks the largest counts. None takes the model's predictions, which avoids label
                leaking (Kurakin et al. 2017, section 4.1).
            kwargs: of native attacks: `mask`, broadcastable to `x`, where it is zero pixels are not perturbed;
                `x_adv_init`, images of the shape of `x` at which the search starts; and `first_index`, the position of
                the first image in the data, on which draws depend. Others are ignored, as ART does, with a warning.

        Returns:
            Array of the shape of `x`.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed; checked before any work.
        """
        unknown = sorted(set(kwargs) - set(self._options))
        if unknown:
            logger.warning("generate() ignores %s; known are %s", ", ".join(unknown), self._known())
        options = {name: value for name, value in kwargs.items() if name not in unknown}
        images = self._from_array("x", x)
        if options.get("x_adv_init") is not None:
            options["x_adv_init"] = self._from_array("x_adv_init", options["x_adv_init"])
        return self._checked_run(images, y, options, self.victim.device or torch.device("cpu")).numpy()

    def __call__(self, x: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Adversarial images (N, C, H, W) for images of the model's dtype on the model's device; see `generate`.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed, or unknown; checked before any work.
        """
        check_device("x", x, self.victim)
        if kwargs.get("x_adv_init") is not None:
            check_device("x_adv_init", kwargs["x_adv_init"], self.victim)
        unknown = sorted(set(kwargs) - set(self._options))
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; known are {self._known()}")
        return self._checked_run(x, y, kwargs, x.device)

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor], device: torch.device, first_index: int) -> Tensor:
        """Adversarial images where `inputs["x"]` is, computed on `device`.

        `inputs` may have labels "y" (N,), without which the predictions are taken, "probabilities" (N, classes) where
        they were given so, and what `_options` names.
        """

    def _known(self) -> str:
        return ", ".join(("x", "y", *self._options))

    def _from_array(self, name: str, x: Any) -> Tensor:
        array = np.asarray(x)
        if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
            raise TypeError(f"{name} has dtype {array.dtype}: must be numbers, images within clip_values")
        dtype = self.victim.dtype if self.victim.dtype == torch.float64 else torch.float32
        return torch.as_tensor(np.require(array, requirements=["C", "W"]), dtype=dtype, device="cpu")

    def _checked_run(self, x: Tensor, y: Any, options: dict[str, Any], device: torch.device) -> Tensor:
        first_index = options.get("first_index", 0)
        check_integer("first_index", first_index, low=0)
        inputs = self._checked_inputs(x, y, options)
        with undisturbed(self.victim.module), isolated(device):
            return self._run(inputs, device, int(first_index))

    def _checked_inputs(self, x: Tensor, y: Any, options: dict[str, Any]) -> dict[str, Tensor]:
        """The images "x" and, where they are given, "y" as labels (N,), "probabilities", "mask" and "x_adv_init"."""
        if y is None and self.targeted:
            raise ValueError("y=None: a targeted attack needs the target labels")
        with isolated(x.device):
            inputs = {"x": checked_images("x", x, self.victim)}
            if options.get("mask") is not None:
                inputs["mask"] = mask_from(options["mask"], x)
            if options.get("x_adv_init") is not None:
                start = options["x_adv_init"]
                inputs["x_adv_init"] = checked_images("x_adv_init", start, self.victim)
                if start.shape != x.shape:
                    raise ValueError(f"x_adv_init has shape {tuple(start.shape)}: x has {tuple(x.shape)}")
            self._check_call(x)
            if self.victim.nb_classes is None or self.victim.has_single_output is None:
                self._see_classes(inputs["x"][:1])
            if self.victim.nb_classes == 1:
                raise ValueError(
                    "the model returns a single logit for an image: needed is one for each class, two or more"
                )
            if y is not None:
                inputs["y"] = labels_from(y, len(x), self.victim.nb_classes)
                if (rows := probabilities_from(y)) is not None:
                    inputs["probabilities"] = rows
        return inputs

    def _see_classes(self, x: Tensor) -> None:
        """Ask a bare module about an image; the draws of a random one stay where they are."""
        device = self.victim.device or x.device
        with undisturbed(self.victim.module), ForkedGenerators(0, device), row_keys(hashed(0, np.arange(1))):
            self.victim.predict(x.to(device, copy=True))

    def _check_params(self) -> None:
        """Raise on constructor arguments that are not allowed; `set_params` calls it too."""
        super()._check_params()
        self._check_fields()

    def _check_call(self, x: Tensor) -> None:
        """Raise on constructor arguments that do not fit the images, for example per-pixel arrays of another shape."""
