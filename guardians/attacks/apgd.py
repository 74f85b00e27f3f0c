"""APGD (Croce and Hein, "Reliable evaluation of adversarial robustness", 2020; for norm 1 "Mind the box", 2021)."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from art.attacks import evasion
from torch import Tensor
from torch.nn.functional import cross_entropy

from guardians.attacks.norms import (
    as_norm,
    ball_bounds,
    free_gradient,
    lp_norm,
    nearest_in_ball_and_box,
    project,
    pull_into_ball,
    random_in_ball,
    rows_of,
    steepest_ascent,
)
from guardians.attacks.objectives import largest_other, logit_gap
from guardians.attacks.registry import Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Fraction, OptionalCount, OptionalNumber, Radius, Size
from guardians.engine.state import Answer, Progress, Query, State, on_device, per_image

__all__ = ["APGD", "LOSSES", "AutoProjectedGradientDescent"]

LOSSES = ("cross_entropy", "difference_logits_ratio", "margin")
_MOMENTUM = 0.75
"""The alpha of Croce and Hein 2020, equation 3."""
_SHRINKS, _SLOWEST = 1.5, 10
"""In norm 1, what the step is divided by where the support of the best point has stayed, and by what at most."""


def _check_norm(name: str, value: Any) -> None:
    check_choice(name, as_norm(value), (1.0, 2.0, np.inf))


def _check_loss(name: str, value: Any) -> None:
    check_choice(name, value, (None, *LOSSES))


class AutoProjectedGradientDescent(Attack):
    """APGD: projected gradient ascent with momentum, whose step size follows from how the loss goes.

        z       = P(x_k + eta g_k / ||g_k||)                              (its sign for norm inf)
        x_(k+1) = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_(k-1)))

    with P onto the ball and `clip_values` (Croce and Hein 2020, section 3.1). At checkpoints, which come ever closer,
    eta is halved and the search goes on from the best point so far where the loss rose in at most `rho` of the steps,
    or where neither eta nor the best loss have changed since the last checkpoint (algorithm 1).

    In norm 1 there is no momentum: a step goes along the signs of the largest k entries of the gradient, and is
    followed by the Euclidean projection onto the intersection of ball and box; at checkpoints k follows the number of
    pixels in which the best point differs from the image (Croce and Hein 2021, algorithm 1).

    With `n_targets` the attack is APGD-T: the classes with the largest other logits at the image are aimed at one after
    the other. `early_stop` returns the first point that fools the model; without it what comes back is the last
    point that did, or that of the highest loss.

    Takes the arguments of `art.attacks.evasion.AutoProjectedGradientDescent` with their meaning and order.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        eps: radius of the ball, in the unit of the images, see `ProjectedGradientDescent`.
        eps_step: half of the first step eta, in norm 1 all of it; None is `eps`, as in the papers.
        max_iter: steps.
        targeted: reach the labels rather than leave them.
        nb_random_init: starts on the surface of the ball, for each target; 0 starts at the image.
        batch_size: images in one forward pass; None chooses it.
        loss_type: "cross_entropy", "difference_logits_ratio" (equation 6; for targets equation 8), "margin" (the
            difference of the two logits), or None, the loss of the estimator.
        verbose: show a progress bar.
        n_targets: how many classes are aimed at; 0 for none in particular.
        rho: see above.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`; also where a loss compares more classes than there are.
    """

    estimator: Estimator
    norm: Annotated[float | str, _check_norm] = np.inf
    eps: Radius = 0.3
    eps_step: OptionalNumber = None
    max_iter: Count = 100
    targeted: Flag = False
    nb_random_init: Size = 5
    batch_size: OptionalCount = None
    loss_type: Annotated[str | None, _check_loss] = None
    verbose: Flag = True
    _: KW_ONLY
    n_targets: Size = 0
    rho: Fraction = 0.75

    def start(self, state: State) -> None:
        """Where the search begins; nothing is known of the loss."""
        x, p, n = state.x, as_norm(self.norm), len(state)
        state.eps = rows_of(self.eps, state)
        bounds = ball_bounds(x, state.eps) if p == np.inf else (torch.full_like(x, b) for b in (-np.inf, np.inf))
        state.low, state.high = (self.victim.clip(bound) for bound in bounds)
        state.x_adv = self._first(state)
        state.x_before, state.x_best, state.x_fooling = (state.x_adv.clone() for _ in range(3))
        state.gradient_best = torch.zeros_like(x)
        state.loss_best, state.loss_last, state.loss_at_check = (x.new_full((n,), -torch.inf) for _ in range(3))
        state.rises = x.new_zeros(n)
        state.has_fooled = torch.zeros(n, dtype=torch.bool, device=x.device)
        state.was_reduced = torch.ones(n, dtype=torch.bool, device=x.device)
        step = self.eps if self.eps_step is None else self.eps_step
        state.eta = rows_of(step, state).to(x.dtype).amax(dim=tuple(range(1, x.ndim))) * (1 if p == 1 else 2)
        state.first_eta = state.eta.clone()
        state.support = x.new_full((n,), float(x[0].numel()))
        state.largest = state.support * 0.2
        state.target = state.y.clone()
        state.steps = np.full(n, -1 if self.n_targets else 0)  # the classes are ranked at the image

    def query(self, state: State) -> Query:
        """The iterate; where classes are to be ranked the image."""
        ranking = on_device(state.steps < 0, state.x)
        points = torch.where(per_image(ranking, state.x), state.x, state.x_adv) if self.n_targets else state.x_adv
        return Query(points, (state.steps >= 0) & (state.steps < self.max_iter))

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The loss that is ascended."""
        aims = self.targeted or bool(self.n_targets)
        wanted = y if self.targeted else state.target if self.n_targets else largest_other(logits, y)
        unwanted = largest_other(logits, y) if self.targeted else y
        if self.loss_type == "cross_entropy":
            return (
                -cross_entropy(logits, wanted, reduction="none") if aims else cross_entropy(logits, y, reduction="none")
            )
        if self.loss_type is None:
            return -self.victim.loss(logits, wanted) if aims else self.victim.loss(logits, y)
        difference = -logit_gap(logits, wanted, unwanted)
        if self.loss_type == "margin":
            return difference
        ordered = logits.topk(4 if aims else 3, dim=1).values
        scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 if aims else ordered[:, 0] - ordered[:, 2]
        return difference / (scale + 1e-12)

    def update(self, state: State, answer: Answer) -> Progress:
        """Book-keeping of the loss, at checkpoints the step size, then the step."""
        x, steps = state.x, state.steps
        gradient = free_gradient(torch.zeros_like(x) if answer.gradient is None else answer.gradient, state.mask)
        if (ranked := steps < 0).any():
            self._choose_target(state, answer.logits, on_device(ranked, x))
        searched = on_device(~ranked, x)
        value = answer.value.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        fooling = searched & answer.fooled
        state.x_fooling = torch.where(per_image(fooling, x), state.x_adv, state.x_fooling)
        state.has_fooled = state.has_fooled | fooling
        better = searched & (value > state.loss_best)
        state.x_best = torch.where(per_image(better, x), state.x_adv, state.x_best)
        state.gradient_best = torch.where(per_image(better, x), gradient, state.gradient_best)
        state.loss_best = torch.where(better, value, state.loss_best)
        began = on_device(steps == 0, x)
        state.rises = state.rises + (searched & ~began & (value > state.loss_last))
        state.loss_last = torch.where(searched, value, state.loss_last)
        state.loss_at_check = torch.where(began, value, state.loss_at_check)

        x_adv, periods = state.x_adv, self._periods()[steps.clip(0, self.max_iter)] * ~ranked
        if (checked := periods > 0).any():
            back = per_image(self._check(state, on_device(checked, x), torch.from_numpy(periods).to(x)), x)
            x_adv, gradient = torch.where(back, state.x_best, x_adv), torch.where(back, state.gradient_best, gradient)
        moved = self._step(x_adv, gradient, state, per_image(began, x))
        state.x_before = torch.where(per_image(searched, x), x_adv, state.x_before)
        state.x_adv = torch.where(per_image(searched, x), moved, state.x_adv)
        state.steps = steps + 1
        return Progress(steps >= self.max_iter)

    def result(self, state: State) -> Tensor:
        """The last point that fooled the model, or the one of the highest loss."""
        return self.returned(torch.where(per_image(state.has_fooled, state.x), state.x_fooling, state.x_best), state)

    def returned(self, points: Tensor, state: State) -> Tensor:
        """Free of the rounding with which a projection leaves a ball of finite p."""
        p = as_norm(self.norm)
        return points if p == np.inf else pull_into_ball(points.clamp(state.low, state.high), state.x, state.eps, p)

    @property
    def restarts(self) -> int:
        """The random starts of each target."""
        return max(1, self.nb_random_init) * (self._n_targets or 1)

    @property
    def _n_targets(self) -> int:
        return min(self.n_targets, (self.victim.nb_classes or self.n_targets + 1) - 1)

    def _first(self, state: State) -> Tensor:
        x, p = state.x, as_norm(self.norm)
        x_adv = x.clone() if state.x_adv_init is None else state.x_adv_init.clone()
        if state.x_adv_init is None and self.nb_random_init:
            direction = random_in_ball(x, torch.ones_like(state.eps), p, state.rng)
            x_adv = x + state.eps.to(x.dtype) * direction / lp_norm(direction, p)
        if state.mask is not None:
            x_adv = torch.where(state.mask, x_adv, x)
        return self._inside(x_adv, state)

    def _choose_target(self, state: State, logits: Tensor, rows: Tensor) -> None:
        order = logits.scatter(1, state.y[:, None], -torch.inf).topk(self._n_targets, dim=1).indices
        place = torch.from_numpy(state.restart // max(1, self.nb_random_init)).to(order.device)
        state.target = torch.where(rows, order.gather(1, place[:, None])[:, 0], state.target)

    def _periods(self) -> np.ndarray:
        """For each step the number of steps since the last checkpoint where it is one, else 0."""
        total = self.max_iter
        period, least, less = (max(int(share * total), 1) for share in (0.22, 0.06, 0.03))
        if as_norm(self.norm) == 1:
            period, least, less = max(int(0.04 * total), 1), 1, 0
        periods, step = np.zeros(total + 1, dtype=np.int64), 0
        while (step := step + period) <= total:
            periods[step] = period
            period = max(period - less, least)
        return periods

    def _check(self, state: State, rows: Tensor, period: Tensor) -> Tensor:
        """Adapt the step size of `rows`; which of them go back to their best point."""
        if as_norm(self.norm) == 1:
            change, rounding = (state.x_best - state.x).abs(), 8 * torch.finfo(state.x.dtype).eps
            support = (change > rounding * (state.x.abs() + state.eps)).flatten(1).sum(1).to(state.x.dtype)
            back = rows & (support < 0.95 * state.support)
            eta = torch.where(back, state.first_eta, (state.eta / _SHRINKS).clamp_min(state.first_eta / _SLOWEST))
            state.eta = torch.where(rows, eta, state.eta)
            state.support = torch.where(rows, support, state.support)
            state.largest = torch.where(rows, support / _SHRINKS, state.largest)
            return back
        unchanged = ~state.was_reduced & (state.loss_at_check >= state.loss_best)
        reduced = rows & ((state.rises <= self.rho * period) | unchanged)
        state.was_reduced = torch.where(rows, reduced, state.was_reduced)
        state.loss_at_check = torch.where(rows, state.loss_best, state.loss_at_check)
        state.rises = state.rises.masked_fill(rows, 0)
        state.eta = torch.where(reduced, state.eta / 2, state.eta)
        return reduced

    def _step(self, x_adv: Tensor, gradient: Tensor, state: State, began: Tensor) -> Tensor:
        p, eta = as_norm(self.norm), per_image(state.eta, x_adv)
        if p == 1:
            return self._inside(x_adv + eta * self._sparse_signs(gradient, state), state)
        z = self._inside(x_adv + eta * steepest_ascent(gradient, p), state)
        share = torch.where(began, 1.0, _MOMENTUM).to(x_adv.dtype)
        return self._inside(x_adv + share * (z - x_adv) + (1 - share) * (x_adv - state.x_before), state)

    def _sparse_signs(self, gradient: Tensor, state: State) -> Tensor:
        """The signs of the largest entries of the gradient, of 1-norm 1."""
        size = gradient.flatten(1).abs()
        rank = (size.shape[1] - state.largest).clamp(0, size.shape[1] - 1).long()
        threshold = size.sort(dim=1).values.gather(1, rank[:, None])
        signs = (gradient.flatten(1) * (size >= threshold)).sign()
        return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

    def _inside(self, x_adv: Tensor, state: State) -> Tensor:
        """In the ball and in `clip_values`; for norm 1 the nearest point that is."""
        p, x, eps = as_norm(self.norm), state.x, state.eps.to(x_adv.dtype)
        if p == 1:
            return x + nearest_in_ball_and_box(x_adv - x, state.low - x, state.high - x, eps)
        if p == 2:
            x_adv = x + project(x_adv - x, eps, p)
        return x_adv.clamp(state.low, state.high)

    def _check_params(self) -> None:
        super()._check_params()
        if self.targeted and self.n_targets:
            raise ValueError(f"n_targets={self.n_targets}: must be 0 with targeted=True, whose labels are the targets")

    def _checked_inputs(self, x: Tensor, y: Any, options: dict[str, Any]) -> dict[str, Tensor]:
        inputs = super()._checked_inputs(x, y, options)
        classes, needed = self.victim.nb_classes, 4 if self.targeted or self.n_targets else 3
        if self.loss_type == "difference_logits_ratio" and classes is not None and classes < needed:
            raise ValueError(
                f"loss_type={self.loss_type!r}: compares {needed} logits, and the model has {classes} classes; "
                "margin needs two"
            )
        return inputs


evasion.AutoProjectedGradientDescent.register(AutoProjectedGradientDescent)
APGD = AutoProjectedGradientDescent


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    start = {"nb_random_init": int(spec.get("random_start", True))}
    return APGD, {
        "norm": spec.norm,
        "eps": spec.eps,
        **start,
        **spec.arguments("n_targets", loss="loss_type", steps="max_iter"),
    }


register(Family("APGD", (np.inf, 2, 1), ("steps", "random_start", "n_targets", "loss"), _native, counts_steps=True))
