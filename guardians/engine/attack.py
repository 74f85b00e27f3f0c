"""The attack contract: a small state machine over samples that the engine runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.engine import loop
from guardians.engine.checks import check_flag, check_integer
from guardians.engine.interfaces import ClassifierAttack
from guardians.engine.loop import Finished, Report
from guardians.engine.rng import SampleRng
from guardians.engine.search import check_precision
from guardians.engine.victim import undisturbed

__all__ = ["Attack", "State"]

State = dict[str, Any]
"""All that an attack knows of its samples, a row each: tensors on the device, and numpy arrays for what steers the loop
(step counts), which are read without waiting for the device. The engine drops, overwrites and reorders rows, so no two
tensors share memory. It keeps what it knows there too: "x", "y" and "mask" as `start` was given them, "x_adv_init",
"index", "restart", "asked", "doubted" and "at_fixed_point"."""


class Attack(ClassifierAttack):
    """A native attack: `start`, `query`, `objective`, `update` and `result`; the engine does the rest.

    Args:
        estimator: an ART `PyTorchClassifier` or an `nn.Module`, see `ClassifierAttack`. The loss of an estimator is
            honoured too.
        targeted: whether the labels are targets to reach rather than labels to leave.
        batch_size: images in one forward pass. It does not change the result beyond rounding.
        summary_writer: only False; ART's argument for TensorBoard.
        verbose: show a progress bar of finished images, and the share of them that stands.
        seed: of all randomness. The numbers of a sample depend on (seed, index of the sample) alone. None draws a new
            seed from torch's global generator at every call, so `torch.manual_seed` makes a program repeatable.
        early_stop: let an image go as soon as the model is fooled by it, at which it is often in the middle of the
            ball, rather than after the last step. Robust accuracy is what an attacker who keeps the best iterate gets,
            so never higher, and most of the work is saved. False is the classical algorithm bit for bit.
        precision: what the search computes in: "float32", "bfloat16", "float16", or "auto", the fastest that the
            device has. The search may ask a copy of the model with batch norm folded into the convolutions, in
            channels_last, under autocast; the model itself judges. With `early_stop=False`, where nothing is judged,
            "auto" and "float32" ask the model itself. For models in other dtypes than float32 there is only their own.
        judge_samples: draws of a random model that judge an image: it is fooled when most of them are, and leaves
            before the last step when all are. They are none of those that the search has seen. None is 1, or 9 for a
            model whose logits differ between two passes.
        eot_samples: evaluations whose mean gradient is the gradient of a random model (expectation over
            transformation, Athalye et al. 2018). They share batches.

    Attributes:
        report: what the last call did, see `Report`; None before the first.

    Raises:
        EstimatorError: the estimator is neither.
        TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """

    attack_params: ClassVar[list[str]] = [
        *ClassifierAttack.attack_params,
        "seed",
        "early_stop",
        "precision",
        "judge_samples",
        "eot_samples",
    ]
    _options: ClassVar[tuple[str, ...]] = ("mask", "x_adv_init")

    def __init__(
        self,
        estimator: PyTorchClassifier | nn.Module,
        *,
        targeted: bool = False,
        batch_size: int = 32,
        summary_writer: Any = False,
        verbose: bool = False,
        seed: int | None = None,
        early_stop: bool = False,
        precision: str = "auto",
        judge_samples: int | None = None,
        eot_samples: int = 1,
    ) -> None:
        super().__init__(estimator, targeted=targeted, batch_size=batch_size, verbose=verbose)
        if summary_writer:
            raise ValueError(f"summary_writer={summary_writer!r}: only False; native attacks write no TensorBoard logs")
        self.seed = seed
        self.early_stop = early_stop
        self.precision = precision
        self.judge_samples = judge_samples
        self.eot_samples = eot_samples
        self.report: Report | None = None

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
    def update(self, state: State, logits: Tensor, gradient: Tensor | None) -> np.ndarray | Tensor:
        """Take the model's answer at the query, advance `state`, and say which samples are done: bool (N,).

        `logits` are the mean over the draws of EOT.
        """

    @abstractmethod
    def result(self, state: State) -> Tensor:
        """Adversarial images (N, ...), inside the norm ball and `clip_values` to the last bit.

        They are kept while the search goes on, so `update` does not write into their memory.
        """

    def needs_gradient(self, state: State) -> bool:
        """Whether the next `update` wants the gradient, or the logits alone."""
        return True

    @property
    def is_memoryless(self) -> bool:
        """Whether the next query follows from the last one alone, so that one that does not move never will."""
        return False

    @property
    def uses_success(self) -> bool:
        """Whether `update` itself looks for images that fool the model; what it finds in a cheap search is judged."""
        return False

    @property
    def minimises_norm(self) -> bool:
        """Whether it looks for the smallest perturbation that fools the model; where it finds none, the image stays."""
        return False

    @property
    def restarts(self) -> int:
        """How often the search is started for an image that still stands."""
        return 1

    def stream(self, batches: Iterable[tuple[Tensor, Tensor] | Tensor]) -> Iterator[Finished]:
        """Adversarial images of a data set of any size, in the order in which they are finished.

        Batches are read when the search has room, so memory is bounded by `batch_size` and theirs. Between two results
        the model is as it was. `report` counts along.

        Args:
            batches: such as a `DataLoader`'s: pairs of images (N, C, H, W) and labels (N,), or images alone, whose
                labels are then the model's predictions. Images are of the model's dtype, on any device. Arguments of
                the attack that differ from sample to sample do not fit a stream.

        Raises:
            TypeError, ValueError: a batch is outside what is allowed.
        """
        yield from self._search(self._checked_batches(batches))

    def _checked_batches(self, batches: Iterable[tuple[Tensor, Tensor] | Tensor]) -> Iterator[dict[str, Tensor]]:
        names, shape = None, None  # of the first batch
        for batch in batches:
            x, y = (batch, None) if isinstance(batch, (Tensor, np.ndarray)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"x of type {type(x).__name__}: batches must be of tensors")
            inputs = self._checked_inputs(x, y, {})
            for n in (2, 3):  # what fits two lengths fits any
                self._check_call(x[:1].expand(n, *x.shape[1:]))
            names, shape = names or inputs.keys(), shape or x.shape[1:]
            if x.shape[1:] != shape:
                raise ValueError(f"x has shape {tuple(x.shape)}: images of earlier batches have {tuple(shape)}")
            if inputs.keys() != names:
                raise ValueError(
                    f"y is {'missing' if y is None else 'given'}: labels must be in all batches or in none"
                )
            yield inputs

    def _run(self, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
        x = inputs["x"]
        x_adv, fooled, judged = torch.empty_like(x), np.zeros(len(x), dtype=bool), True
        for finished in self._search([inputs], device, len(x)):
            x_adv[torch.from_numpy(finished.index).to(x.device)] = finished.x_adv.to(x.device)
            if finished.fooled is None:
                judged = False
            else:
                fooled[finished.index] = finished.fooled
        assert self.report is not None
        self.report.fooled = fooled if judged else None
        return x_adv

    def _search(
        self,
        batches: Iterable[dict[str, Tensor]],
        device: torch.device | None = None,
        total: int | None = None,
    ) -> Iterator[Finished]:
        """Run the engine with the model `undisturbed` while it searches, but not between two results."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else int(self.seed)
        device = device or self.victim.device
        self.report = Report()
        search = loop.stream(self, batches, seed=seed, device=device, report=self.report)
        done = fooled = 0
        with tqdm(total=total, desc=type(self).__name__, unit="image", disable=not self.verbose, leave=False) as bar:
            while True:
                with undisturbed(self.victim.module), torch.inference_mode(False), torch.no_grad():
                    finished = next(search, None)
                if finished is None:
                    return
                bar.update(len(finished.index))
                if finished.fooled is not None and self.verbose:
                    done, fooled = done + len(finished.fooled), fooled + int(finished.fooled.sum())
                    bar.set_postfix_str(f"robust accuracy {1 - fooled / done:.1%}")
                yield finished

    def _check_params(self) -> None:
        super()._check_params()
        if self.seed is not None:
            check_integer("seed", self.seed, low=0)
            if self.seed >= 2**64:
                raise ValueError(f"seed={self.seed}: must be below 2**64")
        check_flag("early_stop", self.early_stop)
        check_precision(self.precision)
        if self.judge_samples is not None:
            check_integer("judge_samples", self.judge_samples, low=1)
        check_integer("eot_samples", self.eot_samples, low=1)
