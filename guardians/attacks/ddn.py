"""Decoupled direction and norm (Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial
attacks and defenses", 2019)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from guardians.attacks.norms import annealed, farthest, lp_norm, random_in_ball, steepest_ascent, widest
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_integer, optional
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Fraction, OptionalCount, Positive
from guardians.engine.state import Answer, Progress, State, per_image

__all__ = ["DDN", "DecoupledDirectionNorm"]


class DecoupledDirectionNorm(Attack):
    """DDN: the smallest ||delta||_2 that fools the model, by steps of the loss on a sphere whose radius follows.

        delta   <- delta_(k-1) + alpha_k g / ||g||_2
        eps_k   =  (1 - gamma) eps_(k-1) where x_(k-1) fools the model, (1 + gamma) eps_(k-1) where it does not
        x_k     =  clip(x + eps_k delta / ||delta||_2),    delta_k = x_k - x

    with g the gradient of the loss at x_(k-1), and alpha falling from 1 to 0.01 along a cosine (Rony et al. 2019,
    algorithm 1, and their code, in which delta goes on from the clipped image, and the direction is random where the
    gradient is zero). The nearest image that fools the model is returned, and the image itself where none does, see
    `report.fooled`.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        max_iter: steps K, of a gradient each.
        init_epsilon: the first radius eps_0; it and the steps are for images in [0, 1], in proportion to `clip_values`.
        gamma: by which the radius changes, between 0 and 1.
        targeted: reach the labels rather than leave them.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        levels: round images to so many values of a pixel, as the paper does with 256; None does not.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`; "auto" is "float32".

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    max_iter: Count = 100
    init_epsilon: Positive = 1.0
    gamma: Fraction = 0.05
    targeted: Flag = False
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    levels: Annotated[int | None, optional(partial(check_integer, low=2))] = None

    norm = 2.0
    keeps: ClassVar[str] = "nearest"
    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")

    def start(self, state: State) -> None:
        """At the image, with the first radius."""
        state.x_adv = state.x.clone()
        state.steps = np.zeros(len(state), dtype=np.int64)
        state.farthest = farthest(state.x, self.victim.clip_values, 2)
        state.epsilon = torch.full_like(state.farthest, self.init_epsilon) * widest(state.x, self.victim.clip_values)

    def query(self, state: State) -> Tensor:
        """The iterate x_k."""
        return state.x_adv

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The victim's loss, negated for targets."""
        loss = self.victim.loss(logits, y)
        return -loss if self.targeted else loss

    def update(self, state: State, answer: Answer) -> Progress:
        """A step along the gradient, onto the sphere of the new radius; done after `max_iter`."""
        assert answer.gradient is not None
        x, gradient = state.x, answer.gradient.nan_to_num(nan=0.0)
        is_flat = (gradient == 0).flatten(1).all(1)
        if is_flat.any():
            drawn = random_in_ball(x, torch.ones_like(per_image(state.farthest, x)), 2, state.rng)
            gradient = torch.where(per_image(is_flat, x), drawn, gradient)
        if state.mask is not None:
            gradient = gradient.masked_fill(~state.mask, 0)
        alpha = widest(x, self.victim.clip_values) * annealed(1.0, 0.01, state.steps / self.max_iter, x)
        delta = state.x_adv - x + alpha * self.direction(gradient)
        state.epsilon = torch.minimum(self.rescaled(state.epsilon, answer.fooled), state.farthest)
        length = lp_norm(delta, 2)
        state.x_adv = self.victim.clip(x + delta * (per_image(state.epsilon, x) / length.masked_fill(length == 0, 1)))
        if self.levels is not None:
            state.x_adv = self._rounded(state, self.levels)
        state.steps = state.steps + 1
        nearest = state.best_distance == 0  # nothing can be nearer
        return Progress(torch.from_numpy(state.steps >= self.max_iter).to(x.device) | nearest)

    def direction(self, gradient: Tensor) -> Tensor:
        """Along which a step goes, of 2-norm 1."""
        return steepest_ascent(gradient, 2)

    def rescaled(self, epsilon: Tensor, fooled: Tensor) -> Tensor:
        """The next radius (N,)."""
        return torch.where(fooled, epsilon * (1 - self.gamma), epsilon * (1 + self.gamma))

    def _rounded(self, state: State, levels: int) -> Tensor:
        """The iterate on the grid of `levels` values between `clip_values`, or of [0, 1]; masked pixels stay."""
        low, high = (bound.to(state.x) for bound in self.victim.clip_values or (torch.zeros(()), torch.ones(())))
        number = ((state.x_adv - low) / (high - low) * (levels - 1)).round()
        rounded = self.victim.clip(low + number * (high - low) / (levels - 1))
        return rounded if state.mask is None else torch.where(state.mask, rounded, state.x)


DDN = DecoupledDirectionNorm


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    return DDN, spec.arguments("init_epsilon", "gamma", steps="max_iter")


register(
    Family(
        "DDN",
        norms=(2,),
        parameters=("steps", "init_epsilon", "gamma"),
        native=_native,
        counts_steps=True,
        minimises_norm=True,
        agreements=(Agreement("exact", Spec("DDN", 2, params={"steps": 20}), ("foolbox",)),),
    )
)
