"""FAB (Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from guardians.attacks.hyperplanes import to_hyperplane
from guardians.attacks.norms import CommonNorm, as_norm, dual, free_gradient, lp_norm, random_in_ball, widest
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_number, optional
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Fraction, OptionalCount, Size
from guardians.engine.run import margin, rounding
from guardians.engine.state import Answer, Progress, Query, State, per_image

__all__ = ["FAB", "FastAdaptiveBoundary"]

_RADIUS = {np.inf: 0.3, 2.0: 1.0, 1.0: 5.0}
"""The authors' `eps`, for images in [0, 1]."""


def _check_eta(name: str, value: Any) -> None:
    check_number(name, value, low=1, single=True)


def _check_alpha_max(name: str, value: Any) -> None:
    check_number(name, value, low=0, single=True)
    if value > 1:
        raise ValueError(f"{name}={value!r}: must be at most 1")


def _check_eps(name: str, value: Any) -> None:
    check_number(name, value, low=0, exclusive=True, single=True)


class FastAdaptiveBoundary(Attack):
    """FAB and FAB-T: the smallest ||delta||_p that fools the model, by projections onto the linearised boundary.

        d       =  the shortest way from x_i to the hyperplane f + <g, z - x_i> = 0 within `clip_values`
        d_orig  =  the same from x
        alpha   =  min(||d||_p / (||d||_p + ||d_orig||_p), alpha_max)
        x_(i+1) =  clip((1 - alpha) (x_i + eta d) + alpha (x + eta d_orig)),
                   and, where that fools the model, (1 - beta) x + beta x_(i+1)

    with f the logit of a target class less that of the label at x_i, and g its gradient (Croce and Hein 2020, algorithm
    1). Target after target is taken, in the order of their logits at the image (Croce and Hein, "Reliable evaluation of
    adversarial robustness with an ensemble of diverse parameter-free attacks", 2020), so that the work of a step does
    not grow with the classes; or, with `n_targets=0`, each step goes to the class that is nearest at x_i, of smallest
    |f| / ||g||_q with q the dual norm, for a gradient of every other class. At last the way between the image and the
    nearest that fools the model is searched for where the margin is zero, by `final_search` linear interpolations. The
    nearest image that fools the model is returned, and the image itself where none does, see `report.fooled`.

    A step asks for logits at x_(i+1), and the next for the gradients at the point to which that leads.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        max_iter: steps of each start.
        eps: how near is near enough, in the unit of the images: an image is done as soon as one that fools the model is
            found within it. Random starts are no farther than half of it. None looks for the nearest, with random
            starts within half of 0.3, 1 or 5 for norm inf, 2 or 1 and images in [0, 1], in proportion to `clip_values`.
        alpha_max: the largest alpha, from 0 to 1.
        eta: by how much steps overshoot, 1 or more.
        beta: how far it is gone back towards the image from where the model is fooled, between 0 and 1.
        n_targets: target classes; all others where there are fewer. 0 for none.
        num_random_init: random starts, of each target, after the one at the image. They are at half of the smallest
            distance so far, or of `eps` where that is less.
        targeted: reach the labels rather than leave them: f is then the logit of the label less the largest other one.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        final_search: interpolations of the final search.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`; "auto" is "float32".

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    norm: CommonNorm = np.inf
    max_iter: Count = 100
    eps: Annotated[float | None, optional(_check_eps)] = None
    alpha_max: Annotated[float, _check_alpha_max] = 0.1
    eta: Annotated[float, _check_eta] = 1.05
    beta: Fraction = 0.9
    n_targets: Size = 9
    num_random_init: Size = 0
    targeted: Flag = False
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    final_search: Size = 3

    keeps: ClassVar[str] = "nearest"
    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")

    @property
    def targets(self) -> int:
        """How many classes are targets of an image, one after the other."""
        return 1 if self.targeted or not self.n_targets else max(1, min(self.n_targets, self._others))

    @property
    def _planes(self) -> int:
        """How many hyperplanes a step looks at."""
        return 1 if self.targeted or self.n_targets else self._others

    @property
    def _others(self) -> int:
        return (self.victim.nb_classes or self.n_targets + 2) - 1

    @property
    def restarts(self) -> int:
        """All targets from the image, then again from random points."""
        return self.targets * (1 + self.num_random_init)

    def near_enough(self, state: State) -> Tensor:
        """Within `eps`, or where that is None at the image."""
        return state.best_distance <= (self.eps or 0)

    def start(self, state: State) -> None:
        """At the image, whose logits are asked first."""
        state.x_adv = state.x.clone()
        state.asked_before = np.zeros(len(state), dtype=np.int64)
        state.target = torch.zeros_like(state.y)
        state.plane = torch.zeros_like(state.x)
        state.gap, state.nearest = (torch.zeros_like(state.best_distance) for _ in range(2))
        state.inner, state.outer = (torch.zeros_like(state.best_distance) for _ in range(2))
        state.inner_at, state.asked_at = (torch.zeros_like(state.best_distance) for _ in range(2))

    def query(self, state: State) -> Query:
        """The iterate: before a step with its gradients, after it without."""
        steps, cycle = state.asked_before, self._planes + 1
        return Query(state.x_adv, gradient=(steps % cycle > 0) & (steps < cycle * self.max_iter))

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """f, zero on the boundary and above where the target has the larger logit."""
        if self.targeted:
            return margin(logits, y, targeted=True)
        return (logits.gather(1, state.target[:, None]) - logits.gather(1, y[:, None]))[:, 0]

    def update(self, state: State, answer: Answer) -> Progress:
        """Choose the target, step, judge the step, or search the last way; done after `max_iter` steps."""
        x, asked, cycle = state.x, state.asked_before, self._planes + 1
        state.asked_before, last = asked + 1, cycle * self.max_iter
        chooses, looks, searches = asked == 0, (asked % cycle > 0) & (asked < last), asked >= last
        steps, goes_back = looks & (asked % cycle == self._planes), ~chooses & ~looks & ~searches

        def where(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(rows).to(x.device)

        if chooses.any():
            self._choose(state, answer, where(chooses))
        if looks.any():
            self._look(state, answer, where(looks), where(asked % cycle == 1))
        if steps.any():
            state.x_adv = torch.where(per_image(where(steps), x), self._step(state), state.x_adv)
        if self._planes > 1:
            number = torch.from_numpy((asked + 1) % cycle - 1).to(x.device).clamp_min(0)
            state.target = number + (number >= state.y).long()
        if goes_back.any():
            back = where(goes_back) & answer.fooled
            state.x_adv = torch.where(per_image(back, x), torch.lerp(x, state.x_adv, self.beta), state.x_adv)
        extra = np.where(state.restart + 1 == self.restarts, 1 + self.final_search if self.final_search else 0, 0)
        if searches.any():
            self._search_on(state, answer, where(asked > last), where(searches))
        lost = where(searches) & ~state.best_distance.isfinite()
        return Progress(where(asked >= last + extra) | lost | self.near_enough(state))

    def _choose(self, state: State, answer: Answer, rows: Tensor) -> None:
        """The target, the margin at the image, and the first iterate."""
        x, random = state.x, torch.from_numpy(state.restart >= self.targets).to(state.x.device)
        others = answer.logits.nan_to_num().scatter(1, state.y[:, None], -torch.inf)
        rank = torch.from_numpy(state.restart % self.targets).to(x.device)
        ranked = others.argsort(dim=1, descending=True, stable=True).gather(1, rank[:, None])[:, 0]
        state.target = torch.where(rows, ranked, state.target)
        state.inner = torch.where(rows, margin(answer.logits, state.y, targeted=self.targeted), state.inner)
        if random.any():
            p = as_norm(self.norm)
            drawn = random_in_ball(x, x.new_ones((len(x), *(1,) * (x.ndim - 1)), dtype=torch.float64), p, state.rng)
            drawn = free_gradient(drawn, state.mask)
            norm = lp_norm(drawn, p)
            eps = self.eps or _RADIUS[p] * widest(x, self.victim.clip_values)
            radius = per_image(state.best_distance.clamp_max(eps) / 2, x)
            point = self.victim.clip(x + radius * drawn / norm.masked_fill(norm == 0, 1))
            state.x_adv = torch.where(per_image(rows & random, x), point, state.x_adv)

    def _look(self, state: State, answer: Answer, rows: Tensor, first: Tensor) -> None:
        """Keep f and g of the nearest hyperplane of this step.

        Where rounding hides on which side of it x_i is, no step would be left: it is then taken to lie beyond.
        """
        assert answer.gradient is not None
        g = free_gradient(answer.gradient, state.mask)
        f, hidden = answer.value.nan_to_num(posinf=0, neginf=0), rounding(answer.logits)
        f = torch.where(f.abs() <= hidden, f - 2 * hidden, f)
        slope = lp_norm(g, dual(as_norm(self.norm))).flatten()
        distance = (f.abs() / slope).nan_to_num(nan=torch.inf, posinf=torch.inf)
        nearer = rows & (first | (distance < state.nearest))
        state.plane = torch.where(per_image(nearer, g), g, state.plane)
        state.gap, state.nearest = (
            torch.where(nearer, new, old) for new, old in ((f, state.gap), (distance, state.nearest))
        )

    def _step(self, state: State) -> Tensor:
        """x_(i+1), before it is known whether it fools the model."""
        x, x_i, p = state.x, state.x_adv, as_norm(self.norm)
        g, f = state.plane, state.gap
        d = self._projected(x_i, g, -f, p)
        d_orig = self._projected(x, g, -f + (g * (x_i - x)).flatten(1).sum(1), p)
        near, far = lp_norm(d, p), lp_norm(d_orig, p)
        alpha = (near / (near + far).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(self.alpha_max)
        return self.victim.clip(torch.lerp(x_i + self.eta * d, x + self.eta * d_orig, alpha))

    def _projected(self, z: Tensor, g: Tensor, gap: Tensor, p: float) -> Tensor:
        """From z to where g has added `gap`."""
        bounds = self.victim.clip_values
        if bounds is None:
            return to_hyperplane(g, gap, torch.full_like(z, -torch.inf), torch.full_like(z, torch.inf), p)
        low, high = (bound.to(z) for bound in bounds)
        return to_hyperplane(g, gap, low - z, high - z, p)

    def _search_on(self, state: State, answer: Answer, asked: Tensor, rows: Tensor) -> None:
        """The next point between the image, at 0, and the nearest that fools the model, at 1.

        The margin is known at both ends of what is left, and is aimed at where a line between them is zero, or above
        it by what rounding takes away.
        """
        x, at = state.x, state.asked_at
        value = margin(answer.logits, state.y, targeted=self.targeted)
        outer, inner = asked & answer.fooled, asked & ~answer.fooled
        state.inner_at = torch.where(outer, state.inner_at / at, torch.where(inner, at, state.inner_at))
        state.outer = torch.where(outer, value, state.outer)
        state.inner = torch.where(inner, value, state.inner)
        share = (2 * rounding(answer.logits) - state.inner) / (state.outer - state.inner)
        share = share.nan_to_num(nan=1, posinf=1).clamp(0, 1)
        share = torch.where(asked, share, 1)
        state.asked_at = torch.where(rows, state.inner_at + share * (1 - state.inner_at), at)
        point = self.victim.clip(torch.lerp(x, state.best, per_image(state.asked_at, x)))
        state.x_adv = torch.where(per_image(rows, x), point, state.x_adv)


FAB = FastAdaptiveBoundary


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    return FAB, {"norm": spec.norm, **spec.arguments("alpha_max", "eta", "beta", "n_targets", steps="max_iter")}


register(
    Family(
        "FAB",
        norms=(np.inf, 2, 1),
        parameters=("steps", "alpha_max", "eta", "beta", "n_targets"),
        native=_native,
        counts_steps=True,
        minimises_norm=True,
        agreements=tuple(
            Agreement("dominance", Spec("FAB", norm, params={"steps": 100}), ("torchattacks",), (False,))
            for norm in (np.inf, 2)
        ),
    )
)
