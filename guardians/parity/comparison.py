"""Native against reference, on the same model, images, labels and start.

Two free runs of an iterative attack drift apart from the first pixel on whose gradient rounding decides, so their last
images alone prove little. The comparison is therefore made twice:

- *step by step*: from each iterate of the reference, the native attack takes one step of its own (its query, its
  gradient, its update), which must land where the reference landed. A pixel may differ only where the reference's
  gradient is within rounding of zero (norm inf) or of the largest (norm 1). The native attack's own run must be a chain
  of the same steps, up to the images that it returns.
- *freely in float64*, where the toolkit can compute in it: both run from the same start to the end, and the last images
  agree within 1e-10, with no exceptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guardians.attacks.pgd import SteepestAscent
from guardians.attacks.registry import Spec, family_of
from guardians.engine.rng import SampleRng
from guardians.engine.run import evaluate
from guardians.engine.state import Answer, State
from guardians.engine.victim import undisturbed
from guardians.experiments.counting import CountingModel
from guardians.parity.rules import OneCoordinateStep, native_class
from guardians.toolkits.build import build_attack

__all__ = [
    "FLOAT64_TOLERANCE",
    "Recorder",
    "Steps",
    "Trajectory",
    "compare_steps",
    "free_run",
    "native_attack",
    "record",
    "replay",
]

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

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each step the iterate, the gradient there, and where the step landed."""
        return zip(self.iterates, self.gradients, [*self.iterates[1:], self.x_adv], strict=True)


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


class Recorder(CountingModel):
    """A model that keeps the inputs for which gradients are asked, and these gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.iterates: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The logits; a query is known by the gradient that it asks for."""
        if x.requires_grad:
            self.iterates.append(x.detach().clone())
            x.register_hook(lambda gradient: self.gradients.append(gradient.detach().clone()))
        return super().forward(x)

    def trajectory(self, run: Callable[[], Tensor]) -> Trajectory:
        """Run an attack on this model, and say what it did."""
        self.iterates, self.gradients = [], []
        self.reset()
        start = time.perf_counter()
        x_adv = run().detach()
        if x_adv.is_cuda:
            torch.cuda.synchronize(x_adv.device)
        seconds = time.perf_counter() - start
        return Trajectory(self.iterates, self.gradients, x_adv, self.forward_samples + self.backward_samples, seconds)


def record(
    reference: str, spec: Spec, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int, seed: int, **options: Any
) -> Trajectory:
    """The run of a toolkit's attack on one batch; `options` are of its call, as ART's `mask`.

    Raises:
        RuntimeError: it took another number of gradients than the steps asked for.
    """
    recorder = Recorder(model)
    shape = tuple(x.shape[1:])
    attack = build_attack(
        reference, spec, recorder, nb_classes=nb_classes, input_shape=shape, batch_size=len(x), seed=seed
    )
    trajectory = recorder.trajectory(lambda: attack(x, y, **options))
    steps = spec.get("steps", 1)
    if not len(trajectory.iterates) == len(trajectory.gradients) == steps:
        raise RuntimeError(f"{reference} took {len(trajectory.gradients)} gradients for {steps} steps: {spec}")
    return trajectory


def native_attack(spec: Spec, model: nn.Module, batch_size: int, reference: str | None = None) -> Any:
    """The native attack, from where it is told or the image, with a toolkit's rules where a reference is named."""
    _, arguments = family_of(spec).native(spec.having(random_start=None))
    options: dict[str, Any] = {"targeted": spec.targeted, "batch_size": batch_size, "precision": "float32", "seed": 0}
    return native_class(spec, reference)(model, **arguments, **options, verbose=False)


def compare_steps(
    attack: SteepestAscent, reference: Trajectory, x: Tensor, y: Tensor, mask: Tensor | None = None
) -> Steps:
    """Let the native attack take each step of the reference from the reference's own iterate."""
    p = float(attack.norm)
    with undisturbed(attack.victim.module), torch.no_grad():
        state = _start(attack, x, y, reference, mask)
        steps = _differences(state.x_adv, reference.iterates[0], p)
        for iterate, gradient, landing in reference.steps():
            state.x_adv = iterate
            attack.update(state, _answer(evaluate(attack, attack.victim.logits, iterate, state)[2]))
            excused = _within_rounding(gradient, p, one_coordinate=isinstance(attack, OneCoordinateStep))
            steps = steps + _differences(state.x_adv, landing, p, excused)
    return steps


def replay(
    attack: SteepestAscent, native: Trajectory, x: Tensor, y: Tensor, steps_asked: int, mask: Tensor | None = None
) -> Steps:
    """Whether a free native run is a chain of the native steps that were compared, up to the images returned."""
    p = float(attack.norm)
    if len(native.iterates) != steps_asked:
        return Steps(0, x.numel(), float("inf"))
    with torch.no_grad():
        state = _start(attack, x, y, native, mask)
        steps = _differences(state.x_adv, native.iterates[0], p)
        for iterate, gradient, landing in native.steps():
            state.x_adv = iterate
            attack.update(
                state, Answer(torch.empty(0), torch.empty(0), torch.zeros_like(y, dtype=torch.bool), gradient)
            )
            steps = steps + _differences(state.x_adv, landing, p)
    return steps


def free_run(
    spec: Spec, reference: str | None, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, **options: Any
) -> Trajectory:
    """The native attack's own run from the same start, with a toolkit's rules where a reference is named."""
    recorder = Recorder(model)
    attack = native_attack(spec, recorder, len(x), reference)
    with undisturbed(model):
        attack.victim.predict(x[:1])  # tells it the number of classes, which is no part of the run
    return recorder.trajectory(lambda: attack(x, y, x_adv_init=start, **options))


def _start(attack: SteepestAscent, x: Tensor, y: Tensor, trajectory: Trajectory, mask: Tensor | None) -> State:
    index = np.arange(len(x))
    given = {"x": x, "y": y, "x_adv_init": trajectory.iterates[0], "index": index, "restart": np.zeros_like(index)}
    if mask is not None:
        given["mask"] = mask.expand(x.shape)
    state = State(given, SampleRng(0, index))
    attack.start(state)
    return state


def _answer(gradient: Tensor | None) -> Answer:
    """All that a step of FGSM and PGD takes from the model."""
    nothing = torch.empty(0)
    return Answer(nothing, nothing, nothing, gradient)


def _differences(native: Tensor, reference: Tensor, p: float, excused: Tensor | None = None) -> Steps:
    """Compare one iterate; NaN differs from everything."""
    difference = (native - reference).abs().nan_to_num(nan=torch.inf)
    differs = difference > _STEP_TOLERANCE[p]
    unexcused = differs if excused is None else differs & ~excused
    largest = difference if excused is None else difference.masked_fill(excused, 0)
    return Steps(int(differs.sum()), int(unexcused.sum()), float(largest.max()))


def _within_rounding(gradient: Tensor, p: float, *, one_coordinate: bool) -> Tensor:
    """Where rounding of the gradient decides the step: about zero for a sign, about the largest for one coordinate."""
    size = gradient.abs()
    largest = size.amax(dim=(1, 2, 3), keepdim=True)
    if p == np.inf:
        return size <= _GRADIENT_ROUNDING * largest
    if one_coordinate:
        return size >= (1 - _GRADIENT_ROUNDING) * largest
    return torch.zeros_like(size, dtype=torch.bool)
