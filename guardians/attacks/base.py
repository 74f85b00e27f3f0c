"""The attack contract: a small state machine over samples that the engine runs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.estimators import BaseEstimator, LossGradientsMixin
from art.estimators.classification import ClassifierMixin, PyTorchClassifier
from art.estimators.pytorch import PyTorchEstimator
from torch import Tensor, nn

from guardians.attacks import engine
from guardians.attacks.checks import check_images, check_integer, check_label_range, labels_from
from guardians.attacks.rng import SampleRng
from guardians.attacks.victim import Victim, undisturbed

__all__ = ["Attack", "State"]

State = dict[str, Tensor]
"""All that an attack knows of its samples: tensors whose first dimension is the sample, so that the engine may drop and
reorder samples. What only steers the loop (step counts) is kept on the host, so that reading it waits for no device."""


class Attack(EvasionAttack):
    """An evasion attack with two interfaces: ART's `generate` (numpy) and `attack(images, labels)` (tensors).

    A subclass is one state machine, `start`, `query`, `objective`, `update` and `result`; the engine owns batching,
    devices, gradients, restarts and the protection of the user's model.

    Args:
        estimator: an ART `PyTorchClassifier`, whose preprocessing, loss and `clip_values` are honoured, or an
            `nn.Module` that returns logits for images in [0, 1]. It is attacked in evaluation mode and comes back
            bit for bit as it was.
        targeted: whether the labels are targets to reach rather than labels to leave.
        batch_size: images in one forward pass. It does not change the result beyond rounding.
        seed: of all randomness. The numbers of a sample depend on (seed, index of the sample) alone. None draws a new
            seed from torch's global generator at every call, so `torch.manual_seed` makes a program repeatable.
        verbose: show a progress bar.

    Raises:
        EstimatorError: the estimator is neither.
        TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """

    attack_params = [*EvasionAttack.attack_params, "targeted", "batch_size", "seed", "verbose"]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassifierMixin, PyTorchEstimator)

    def __init__(
        self,
        estimator: PyTorchClassifier | nn.Module,
        *,
        targeted: bool = False,
        batch_size: int = 32,
        summary_writer: Any = False,
        seed: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(estimator=estimator, summary_writer=False)
        if summary_writer:
            raise ValueError(f"summary_writer={summary_writer!r}: only False; native attacks write no TensorBoard logs")
        self._targeted = targeted
        self.batch_size = batch_size
        self.seed = seed
        self.verbose = verbose
        self.victim = Victim(estimator)

    @staticmethod
    def is_estimator_valid(estimator: Any, estimator_requirements: tuple[type, ...]) -> bool:
        """Accept a bare `nn.Module` besides what ART accepts."""
        return isinstance(estimator, nn.Module) or EvasionAttack.is_estimator_valid(estimator, estimator_requirements)

    # The state machine

    @abstractmethod
    def start(self, x: Tensor, y: Tensor, rng: SampleRng, **options: Tensor) -> State:
        """State for images (N, ...) with labels (N,). `options` may hold `mask` and `x_adv_init`, both (N, ...)."""

    @abstractmethod
    def query(self, state: State) -> Tensor:
        """The points (N, ...) at which the model is evaluated next."""

    @abstractmethod
    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """What `update` ascends, per sample (N,), differentiable with respect to `logits`."""

    @abstractmethod
    def update(self, state: State, logits: Tensor, gradient: Tensor | None) -> Tensor:
        """Take the model's answer at the query, advance `state`, and say which samples are done: bool (N,)."""

    @abstractmethod
    def result(self, state: State) -> Tensor:
        """Adversarial images (N, ...), inside the norm ball and `clip_values` to the last bit."""

    def needs_gradient(self, state: State) -> bool:
        """Whether the next `update` wants the gradient, or the logits alone."""
        return True

    @property
    def restarts(self) -> int:
        """How often the search is started for an image that still stands."""
        return 1

    # The interfaces

    def generate(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        x_adv_init: np.ndarray | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Adversarial images, as ART's attacks return them.

        Args:
            x: images (N, C, H, W), or (N, ...) as the estimator's `input_shape` says, within `clip_values`. They are
                computed on, and returned, in the model's dtype.
            y: labels as indices (N,) or one-hot rows (N, classes); the targets of a targeted attack. None takes the
                model's predictions, which avoids label leaking (Kurakin et al. 2017, section 4.1).
            mask: broadcastable to `x`; pixels where it is zero are not perturbed.
            x_adv_init: images of the shape of `x` from which the search starts in place of `x` or a random point.

        Returns:
            Array of the shape of `x`.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed; checked before any work.
        """
        if kwargs:
            raise TypeError(f"generate() got unknown arguments {sorted(kwargs)}; known are x, y, mask, x_adv_init")
        device = self.victim.device or torch.device("cpu")
        images = self._images_from(x, "x")
        start = None if x_adv_init is None else self._images_from(x_adv_init, "x_adv_init")
        return self._attack(images, y, mask, start, device).numpy()

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        x_adv_init: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images (N, C, H, W) for images of the model's dtype on the model's device; see `generate`."""
        for name, value in (("x", x), ("x_adv_init", x_adv_init)):
            if not isinstance(value, Tensor) and not (value is None and name != "x"):
                raise TypeError(f"{name} of type {type(value).__name__}: must be a tensor; arrays go to generate()")
        if self.victim.device is not None and x.device != self.victim.device:
            raise ValueError(f"x is on {x.device}, the model on {self.victim.device}: they must be on the same device")
        return self._attack(x.detach(), y, mask, None if x_adv_init is None else x_adv_init.detach(), x.device)

    def _images_from(self, x: Any, name: str) -> Tensor:
        array = np.asarray(x)
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"{name} has dtype {array.dtype}: must be floating point, images within clip_values")
        dtype = self.victim.dtype if self.victim.dtype == torch.float64 else torch.float32
        return torch.as_tensor(array, dtype=dtype)

    def _attack(self, x: Tensor, y: Any, mask: Any, x_adv_init: Tensor | None, device: torch.device) -> Tensor:
        victim = self.victim
        check_images(x, victim)
        if y is None and self.targeted:
            raise ValueError("y=None: a targeted attack needs the target labels")
        labels = None if y is None else labels_from(y, len(x), victim.nb_classes)
        if victim.nb_classes is None:  # a bare module: one image tells what it returns
            with undisturbed(victim.module):
                victim.predict(x[:1].to(device))
            if labels is not None:
                check_label_range(labels, victim.nb_classes)
        self._check_call(x)
        if mask is not None:
            mask = _mask_from(mask, x)
        if x_adv_init is not None:
            check_images(x_adv_init, victim, "x_adv_init")
            if x_adv_init.shape != x.shape:
                raise ValueError(f"x_adv_init has shape {tuple(x_adv_init.shape)}: x has {tuple(x.shape)}")
        seed = int(torch.randint(2**62, ())) if self.seed is None else int(self.seed)
        return engine.run(
            self,
            victim,
            x,
            labels,
            seed=seed,
            batch_size=int(self.batch_size),
            device=device,
            restarts=self.restarts,
            mask=mask,
            x_adv_init=x_adv_init,
            verbose=self.verbose,
        )

    # Checks

    def _check_params(self) -> None:
        """Raise on constructor arguments that are not allowed; `set_params` calls it too."""
        check_integer("batch_size", self.batch_size, low=1)
        for name in ("targeted", "verbose"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.seed is not None:
            check_integer("seed", self.seed, low=0)

    def _check_call(self, x: Tensor) -> None:
        """Raise on constructor arguments that do not fit the images, for example per-pixel arrays of another shape."""


def _mask_from(mask: Any, x: Tensor) -> Tensor:
    """Boolean mask of the shape of `x`, without copying what is broadcast."""
    tensor = torch.as_tensor(mask)
    if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"mask has dtype {tensor.dtype}: must be bool or floating point")
    if tensor.is_floating_point() and not (tensor >= 0).all():
        raise ValueError("mask has entries that are negative or NaN: each must be zero or positive")
    try:
        return (tensor != 0).to(x.device).expand(x.shape)
    except RuntimeError:
        raise ValueError(f"mask has shape {tuple(tensor.shape)}: must be broadcastable to {tuple(x.shape)}") from None
