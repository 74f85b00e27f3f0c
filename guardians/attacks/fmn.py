"""FMN (Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints", 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from guardians.attacks.norms import (
    CommonNorm,
    annealed,
    as_norm,
    dual,
    farthest,
    free_gradient,
    lp_norm,
    nearest_in_ball,
    steepest_ascent,
    widest,
)
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import Count, Flag, Fraction, OptionalCount, OptionalNumber, Positive
from guardians.engine.run import margin, rounding
from guardians.engine.state import Answer, Progress, State, per_image

__all__ = ["FMN", "FastMinimumNorm"]


class FastMinimumNorm(Attack):
    """FMN: the smallest ||delta||_p that fools the model, by steps of the margin within a ball whose radius follows.

        eps_k   =  ||delta_(k-1)||_p + |L| / ||g||_q             where no image has fooled the model yet
                   (1 + gamma_k) eps_(k-1)                       where x_(k-1) does not, but one has
                   min((1 - gamma_k) eps_(k-1), ||delta*||_p)    where x_(k-1) fools it
        delta_k =  clip(x + Proj(delta_(k-1) + alpha_k g / ||g||_2)) - x

    with L the difference of the logits that decide, g its gradient, q the dual norm, delta* the nearest so far, and
    Proj the Euclidean projection onto the p-norm ball of radius eps_k; gamma and alpha fall along cosines (Pintor et
    al. 2021, algorithm 1). The nearest image that fools the model is returned, and the image itself where none does,
    see `report.fooled`. Where `clip_values` cut off much of a step that is large beside the distance, the radius can
    come to rest short of the boundary; a smaller `max_stepsize` helps.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        max_iter: steps K, of a gradient each.
        max_stepsize: alpha_1, for images in [0, 1]; in proportion to `clip_values`.
        min_stepsize: the alpha to which it falls; None is a hundredth of the first.
        gamma: gamma_1, between 0 and 1; it falls to 0.001.
        targeted: reach the labels rather than leave them.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`; "auto" is "float32".

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    norm: CommonNorm = np.inf
    max_iter: Count = 100
    max_stepsize: Positive = 1.0
    min_stepsize: OptionalNumber = None
    gamma: Fraction = 0.05
    targeted: Flag = False
    batch_size: OptionalCount = None
    verbose: Flag = True

    keeps: ClassVar[str] = "nearest"
    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")

    def start(self, state: State) -> None:
        """At the image, in a ball that is not known yet."""
        state.x_adv = state.x.clone()
        state.steps = np.zeros(len(state), dtype=np.int64)
        state.farthest = farthest(state.x, self.victim.clip_values, as_norm(self.norm))
        state.epsilon = torch.full_like(state.farthest, torch.inf)

    def query(self, state: State) -> Tensor:
        """The iterate x_k."""
        return state.x_adv

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """-L, which is above zero where the model is fooled."""
        return margin(logits, y, targeted=self.targeted)

    def update(self, state: State, answer: Answer) -> Progress:
        """The radius, then a step within it; done after `max_iter`."""
        assert answer.gradient is not None
        assert answer.distance is not None
        x, p, gradient = state.x, as_norm(self.norm), free_gradient(answer.gradient, state.mask)
        gamma, alpha = (
            annealed(first, last, state.steps / self.max_iter, x)
            for first, last in ((self.gamma, 1e-3), (self.max_stepsize, self._last_step))
        )
        gamma, epsilon, best = gamma.flatten(), state.epsilon, state.best_distance
        beyond = answer.value.abs() + 2 * rounding(answer.logits)  # a step that ends on the boundary fools nobody
        to_boundary = (beyond / lp_norm(gradient, dual(p)).flatten()).nan_to_num(nan=torch.inf)
        outside = torch.where(best.isfinite(), epsilon * (1 + gamma), answer.distance + to_boundary)
        inside = torch.minimum(epsilon * (1 - gamma), best)
        state.epsilon = torch.minimum(torch.where(answer.fooled, inside, outside), state.farthest)
        alpha = alpha * widest(x, self.victim.clip_values)
        delta = state.x_adv - x + alpha * steepest_ascent(gradient, 2)
        state.x_adv = self.victim.clip(x + self.projected(delta, per_image(state.epsilon, x)))
        state.steps = state.steps + 1
        return Progress(torch.from_numpy(state.steps >= self.max_iter).to(x.device) | (best == 0))

    def projected(self, delta: Tensor, epsilon: Tensor) -> Tensor:
        """The nearest perturbation within the ball."""
        return nearest_in_ball(delta, epsilon, as_norm(self.norm))

    @property
    def _last_step(self) -> float:
        return self.max_stepsize / 100 if self.min_stepsize is None else self.min_stepsize


FMN = FastMinimumNorm


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    arguments = spec.arguments("max_stepsize", "min_stepsize", "gamma", steps="max_iter")
    return FMN, {"norm": spec.norm, **arguments}


register(
    Family(
        "FMN",
        norms=(np.inf, 2, 1),
        parameters=("steps", "max_stepsize", "min_stepsize", "gamma"),
        native=_native,
        counts_steps=True,
        minimises_norm=True,
        agreements=tuple(
            Agreement("exact", Spec("FMN", norm, params={"steps": 20}), ("foolbox",)) for norm in (np.inf, 2, 1)
        ),
    )
)
