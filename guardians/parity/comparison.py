"""Native against reference, on the same model, images, labels and start.

Two free runs of an iterative attack drift apart from the first pixel on whose gradient rounding decides, so their last
images alone prove little. The comparison is therefore made twice:

- *step by step*: from each iterate of the reference, the native attack takes one step of its own (its query, its
  gradient, its update), which must land where the reference landed. A pixel may differ only where the reference's
  gradient is within rounding of zero (norm inf) or of the largest (norm 1).
- *freely in float64*, where the toolkit can compute in it: both run from the same start to the end, and the last images
  agree within 1e-10, with no exceptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from guardians.adapters.implementations import AttackSpec, build_attack
from guardians.attacks import ProjectedGradientDescent
from guardians.attacks.base import State
from guardians.attacks.engine import value_and_gradient
from guardians.attacks.rng import SampleRng
from guardians.attacks.victim import undisturbed
from guardians.benchmark.counting import CountingModel
from guardians.parity.rules import OneCoordinateStep, native_class

__all__ = ["FLOAT64_TOLERANCE", "Steps", "Trajectory", "compare_steps", "free_run", "native_attack", "record"]

FLOAT64_TOLERANCE = 1e-10
_STEP_TOLERANCE = {float("inf"): 5e-7, 2.0: 1e-5, 1.0: 1e-5}
_GRADIENT_ROUNDING = 1e-5
"""Of the largest gradient in the image: float32's 6e-8 after the layers of a network forwards and backwards."""


@dataclass(frozen=True)
class Trajectory:
    """What an iterative attack did: the iterates at which it asked for gradients, the gradients, the last image.

    Attributes:
        iterates: x_0 to x_(T-1), each (N, C, H, W).
        gradients: of the toolkit's own loss at each of them.
        x_adv: the images that it returned, x_T.
        passes: images through the model forwards plus backwards.
        seconds: of the run, recording included.
    """

    iterates: list[Tensor]
    gradients: list[Tensor]
    x_adv: Tensor
    passes: int
    seconds: float


@dataclass(frozen=True)
class Steps:
    """Outcome of the comparison step by step.

    Attributes:
        mismatches: pixels, over all steps, that differ by more than rounding.
        unexplained: those of them where the reference's gradient does not excuse it; 0 is agreement.
        max_abs_diff: the largest difference at any pixel that is not excused.
    """

    mismatches: int
    unexplained: int
    max_abs_diff: float

    def __add__(self, other: Steps) -> Steps:
        """The outcome over the images of both."""
        return Steps(
            self.mismatches + other.mismatches,
            self.unexplained + other.unexplained,
            max(self.max_abs_diff, other.max_abs_diff),
        )


class _Recorder(CountingModel):
    """A model that keeps the inputs for which gradients are asked, and these gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.iterates: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.iterates.append(x.detach().clone())
            x.register_hook(lambda gradient: self.gradients.append(gradient.detach().clone()))
        return super().forward(x)


def record(
    reference: str, spec: AttackSpec, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int, seed: int
) -> Trajectory:
    """Run a toolkit's attack on one batch and keep its trajectory."""
    recorder = _Recorder(model)
    shape = tuple(x.shape[1:])
    attack = build_attack(
        reference, spec, recorder, nb_classes=nb_classes, input_shape=shape, batch_size=len(x), seed=seed
    )
    x_adv, seconds = _timed(lambda: attack(x, y))
    if not len(recorder.iterates) == len(recorder.gradients) == spec.steps:
        raise RuntimeError(f"{reference} took {len(recorder.gradients)} gradients for {spec.steps} steps: {spec}")
    passes = recorder.forward_samples + recorder.backward_samples
    return Trajectory(recorder.iterates, recorder.gradients, x_adv.detach(), passes, seconds)


def native_attack(
    spec: AttackSpec, model: nn.Module, batch_size: int, reference: str | None = None
) -> ProjectedGradientDescent:
    """Native FGSM or PGD that starts where it is told, with a toolkit's rules where a reference is named."""
    attack_class = native_class(spec, reference)
    attack = attack_class(model, spec.norm, spec.eps, targeted=spec.targeted, batch_size=batch_size, verbose=False)
    if spec.attack != "FGSM":
        attack.set_params(eps_step=spec.eps_step, max_iter=spec.steps)
    return attack


def compare_steps(attack: ProjectedGradientDescent, reference: Trajectory, x: Tensor, y: Tensor) -> Steps:
    """Let the native attack take each step of the reference from the reference's own iterate."""
    p = float(attack.norm)
    mismatches = unexplained = 0
    largest = 0.0
    with undisturbed(attack.victim.module), torch.no_grad():
        rng = SampleRng(0, torch.arange(len(x)))
        state = attack.start(x, y, rng, x_adv_init=reference.iterates[0])
        largest = float((attack.query(state) - reference.iterates[0]).abs().max())
        unexplained += int(((attack.query(state) - reference.iterates[0]).abs() > _STEP_TOLERANCE[p]).sum())
        landings = [*reference.iterates[1:], reference.x_adv]
        for iterate, gradient, landing in zip(reference.iterates, reference.gradients, landings, strict=True):
            stepped = _step_from(attack, state, iterate, y)
            difference = (stepped - landing).abs()
            differs = difference > _STEP_TOLERANCE[p]
            excused = differs & _within_rounding(gradient, p, one_coordinate=isinstance(attack, OneCoordinateStep))
            mismatches += int(differs.sum())
            unexplained += int((differs & ~excused).sum())
            largest = max(largest, float(difference.masked_fill(excused, 0).max()))
    return Steps(mismatches, unexplained, largest)


def free_run(
    spec: AttackSpec, reference: str | None, model: nn.Module, x: Tensor, y: Tensor, start: Tensor
) -> tuple[Tensor, int, float]:
    """The native attack's own images from the same start, the passes that it made, and the seconds that it took."""
    counting = CountingModel(model)
    attack = native_attack(spec, counting, len(x), reference)
    x_adv, seconds = _timed(lambda: attack(x, y, x_adv_init=start))
    return x_adv, counting.forward_samples + counting.backward_samples, seconds


def _step_from(attack: ProjectedGradientDescent, state: State, iterate: Tensor, y: Tensor) -> Tensor:
    state["x_adv"] = iterate
    logits, gradient = value_and_gradient(attack, attack.query(state), y, state)
    attack.update(state, logits, gradient)
    return attack.query(state)


def _within_rounding(gradient: Tensor, p: float, *, one_coordinate: bool) -> Tensor:
    """Where rounding of the gradient decides the step: about zero for a sign, about the largest for one coordinate."""
    size = gradient.abs()
    largest = size.amax(dim=(1, 2, 3), keepdim=True)
    if p == np.inf:
        return size <= _GRADIENT_ROUNDING * largest
    if one_coordinate:
        return size >= (1 - _GRADIENT_ROUNDING) * largest
    return torch.zeros_like(size, dtype=torch.bool)


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = run()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result, time.perf_counter() - start
