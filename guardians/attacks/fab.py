"""FAB (Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020b)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from guardians.attacks.norms import (
    as_norm,
    free_gradient,
    lp_norm,
    project_onto_hyperplane,
    random_in_ball,
)
from guardians.attacks.objectives import largest_other, logit_gap
from guardians.attacks.registry import Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_number, optional
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import Count, Flag, Fraction, Number, OptionalCount, Size
from guardians.engine.state import Answer, Progress, Query, State, on_device, on_host, per_image

__all__ = ["FAB", "FastAdaptiveBoundary"]

_CLOSEST = 1e-8
"""The least length of a step, which keeps the share of the two from 0 / 0."""


def _check_norm(name: str, value: Any) -> None:
    check_choice(name, as_norm(value), (1.0, 2.0, np.inf))


class FastAdaptiveBoundary(Attack):
    """FAB-T: the smallest ||delta||_p that fools the model, by projections onto the linearised boundary to a class.

        d(z)    = the least step from z, within `clip_values`, to {z_t - z_y = 0}, linearised at x_k
        a       = min(||d(x_k)|| / (||d(x_k)|| + ||d(x)||), alpha_max)
        x_(k+1) = clip((1 - a) (x_k + eta d(x_k)) + a (x + eta d(x)))

    and where that fools the model, a step back towards the image, x + beta (x_(k+1) - x) (Croce and Hein 2020b,
    algorithm 1). The classes t with the largest other logits at the image are taken one after the other (Croce and
    Hein, "Reliable evaluation of adversarial robustness", 2020, section 5). The nearest image that fools the model is
    returned, and the image itself where none does, see `report.fooled`.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        max_iter: steps at each class, from each start.
        eps: near enough: an image that is fooled at no more than this is done. None looks for the nearest of all.
        alpha_max, eta, beta: see above.
        n_targets: how many classes are taken.
        num_random_init: starts for each class, at random in half of the ball of radius `eps`, or of the nearest so far;
            0 starts at the image.
        targeted: reach the labels, from the class with the largest other logit; then `n_targets` has no effect.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`; "auto" is "float32".

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    norm: Annotated[float | str, _check_norm] = np.inf
    max_iter: Count = 100
    eps: Annotated[float | None, optional(partial(check_number, low=0, exclusive=True, single=True))] = None
    alpha_max: Fraction = 0.1
    eta: Number = 1.05
    beta: Fraction = 0.9
    n_targets: Count = 9
    num_random_init: Size = 0
    targeted: Flag = False
    batch_size: OptionalCount = None
    verbose: Flag = True

    keeps: ClassVar[str] = "nearest"
    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")

    def start(self, state: State) -> None:
        """At the image, or at random; the classes are ranked at the image first."""
        x = state.x
        state.x_adv = self._first(state)
        state.target = state.y.clone()
        low, high = (torch.full_like(x, bound) for bound in (-torch.inf, torch.inf))
        state.low, state.high = self.victim.clip(low), self.victim.clip(high)
        if state.mask is not None:
            state.low, state.high = (torch.where(state.mask, bound, x) for bound in (state.low, state.high))
        state.is_back = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        state.steps = np.full(len(x), -1)

    def query(self, state: State) -> Query:
        """The iterate; for the ranking the image."""
        ranking = on_device(state.steps < 0, state.x)
        return Query(torch.where(per_image(ranking, state.x), state.x, state.x_adv), state.steps >= 0)

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """z_t - z_y."""
        if self.targeted:
            return -logit_gap(logits, y, largest_other(logits, y))
        return -logit_gap(logits, state.target, y)

    def update(self, state: State, answer: Answer) -> Progress:
        """A step back where the model is fooled, else one to the boundary; done after `max_iter` or near enough."""
        x, x_adv, p, ranked = state.x, state.x_adv, as_norm(self.norm), state.steps < 0
        if ranked.any() and not self.targeted:
            order = answer.logits.scatter(1, state.y[:, None], -torch.inf).topk(self._n_targets, dim=1).indices
            place = torch.from_numpy(state.restart // max(1, self.num_random_init)).to(x.device)
            target = order.gather(1, place[:, None])[:, 0]
            state.target = torch.where(on_device(ranked, x), target, state.target)
        searched = on_device(~ranked, x)
        gradient = free_gradient(torch.zeros_like(x) if answer.gradient is None else answer.gradient, state.mask)
        back = searched & answer.fooled & ~state.is_back
        steps_on = searched & ~back
        to_boundary = answer.value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        way = -to_boundary, -to_boundary + ((x_adv - x) * gradient).flatten(1).sum(1)
        one, two = (
            project_onto_hyperplane(point, gradient, length, state.low, state.high, p)
            for point, length in zip((x_adv, x), way, strict=True)
        )
        first, second = (lp_norm(step, p).clamp_min(_CLOSEST) for step in (one, two))
        share = (first / (first + second)).clamp_max(self.alpha_max)
        moved = self.victim.clip((x_adv + self.eta * one) * (1 - share) + (x + self.eta * two) * share)
        returned = x + (x_adv - x) * self.beta
        x_adv = torch.where(per_image(steps_on, x), moved, torch.where(per_image(back, x), returned, x_adv))
        state.x_adv = x_adv if state.mask is None else torch.where(state.mask, x_adv, x)
        done = state.steps >= self.max_iter
        state.is_back = back
        state.steps = np.where(ranked | on_host(steps_on), state.steps + 1, state.steps)
        return Progress(done | self.near_enough(state))

    def near_enough(self, state: State) -> np.ndarray:
        """Within `eps`."""
        if self.eps is None:
            return super().near_enough(state)
        return on_host(state.best_distance <= self.eps)

    @property
    def restarts(self) -> int:
        """The starts of each class."""
        return max(1, self.num_random_init) * (1 if self.targeted else self._n_targets)

    @property
    def _n_targets(self) -> int:
        return min(self.n_targets, (self.victim.nb_classes or self.n_targets + 1) - 1)

    def _first(self, state: State) -> Tensor:
        x, p = state.x, as_norm(self.norm)
        if not self.num_random_init:
            return x.clone()
        radius = state.best_distance.clamp_max(self.eps)
        direction = random_in_ball(x, per_image(torch.ones_like(radius), x), p, state.rng)
        x_adv = self.victim.clip(x + per_image(radius, x) / 2 * direction / lp_norm(direction, p))
        return x_adv if state.mask is None else torch.where(state.mask, x_adv, x)

    def _check_params(self) -> None:
        super()._check_params()
        if self.num_random_init and self.eps is None:
            raise ValueError(f"num_random_init={self.num_random_init}: needs eps, the radius of random starts")


FAB = FastAdaptiveBoundary


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    return FAB, {"norm": spec.norm, **spec.arguments("n_targets", steps="max_iter")}


register(Family("FAB", (np.inf, 2, 1), ("steps", "n_targets"), _native, counts_steps=True, minimises_norm=True))
