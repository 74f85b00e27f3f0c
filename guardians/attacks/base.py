"""The attack contract: a small state machine over samples that the engine runs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.attacks import engine
from guardians.attacks.checks import check_integer
from guardians.attacks.interfaces import ClassifierAttack
from guardians.attacks.rng import SampleRng

__all__ = ["Attack", "State"]

State = dict[str, Tensor]
"""All that an attack knows of its samples: tensors whose first dimension is the sample, so that the engine may drop and
reorder samples. What only steers the loop (step counts) is kept on the host, so that reading it waits for no device."""


class Attack(ClassifierAttack):
    """A native attack: `start`, `query`, `objective`, `update` and `result`; the engine does the rest.

    Args:
        estimator: an ART `PyTorchClassifier` or an `nn.Module`, see `ClassifierAttack`. The loss of an estimator is
            honoured too.
        targeted: whether the labels are targets to reach rather than labels to leave.
        batch_size: images in one forward pass. It does not change the result beyond rounding.
        summary_writer: only False; ART's argument for TensorBoard.
        seed: of all randomness. The numbers of a sample depend on (seed, index of the sample) alone. None draws a new
            seed from torch's global generator at every call, so `torch.manual_seed` makes a program repeatable.
        verbose: show a progress bar of finished images.

    Raises:
        EstimatorError: the estimator is neither.
        TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """

    attack_params: ClassVar[list[str]] = [*ClassifierAttack.attack_params, "seed"]
    _options: ClassVar[tuple[str, ...]] = ("mask", "x_adv_init")

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
        super().__init__(estimator, targeted=targeted, batch_size=batch_size, verbose=verbose)
        if summary_writer:
            raise ValueError(f"summary_writer={summary_writer!r}: only False; native attacks write no TensorBoard logs")
        self.seed = seed

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

    def _run(self, x: Tensor, y: Tensor | None, device: torch.device, **options: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, ())) if self.seed is None else int(self.seed)
        return engine.run(self, x, y, seed=seed, device=device, **options)

    def _check_params(self) -> None:
        super()._check_params()
        if self.seed is not None:
            check_integer("seed", self.seed, low=0)
            if self.seed >= 2**64:
                raise ValueError(f"seed={self.seed}: must be below 2**64")
