"""Projected gradient descent (Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from scipy.stats import truncnorm
from torch import Tensor, nn

from guardians.attacks.norms import (
    as_norm,
    ball_bounds,
    lp_norm,
    project,
    pull_into_ball,
    random_in_ball,
    steepest_ascent,
    steepest_ascent_in_box,
)
from guardians.engine.attack import Attack, State
from guardians.engine.checks import check_flag, check_integer, check_number
from guardians.engine.rng import SampleRng

__all__ = ["PGD", "ProjectedGradientDescent"]


class ProjectedGradientDescent(Attack):
    """PGD: steepest ascent of the loss in the p-norm, projected onto the p-norm ball and `clip_values` at each step.

        x_0     = x, or uniform in the ball where num_random_init > 0
        x_(t+1) = Proj(clip(x_t + d_t)),    d_t = argmax <g_t, d> over ||d||_p <= eps_step

    with g_t the gradient of the loss at x_t (Madry et al. 2018, section 2.1), or with `decay` the momentum
    g_t = decay * g_(t-1) + gradient / ||gradient||_1 (Dong et al. 2018, equation 6). For p = 1 the maximum is taken
    over steps that also stay within `clip_values`: without that, it is one coordinate, which is soon used up (see
    `steepest_ascent_in_box`).

    Takes the arguments of `art.attacks.evasion.ProjectedGradientDescent` with their meaning and order.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, any real p >= 1, inf or "inf".
        eps: radius of the ball, in the unit of the images; a number, or an array that broadcasts to them: per sample
            (N, 1, 1, 1), per pixel (C, H, W) or both. For finite p it must be constant within a sample.
        eps_step: p-norm of a step, likewise.
        decay: momentum; None for none.
        max_iter: number of steps.
        targeted: descend the loss of target labels rather than ascend the loss of the labels.
        num_random_init: random starts; 0 starts at the image. The second and later ones run only for images that
            none has fooled so far.
        batch_size: images in one forward pass.
        random_eps: for each sample, draw eps from a normal distribution of standard deviation eps / 2 truncated to
            [0, eps], with eps_step in proportion (Kurakin et al. 2017, section 3).
        summary_writer: only False.
        verbose: show a progress bar.
        seed: of the random starts and `random_eps`.
        early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    attack_params: ClassVar[list[str]] = [
        *Attack.attack_params,
        "norm",
        "eps",
        "eps_step",
        "decay",
        "max_iter",
        "num_random_init",
        "random_eps",
    ]

    def __init__(
        self,
        estimator: PyTorchClassifier | nn.Module,
        norm: float | str = np.inf,
        eps: float | np.ndarray | Tensor = 0.3,
        eps_step: float | np.ndarray | Tensor = 0.1,
        decay: float | None = None,
        max_iter: int = 100,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        random_eps: bool = False,
        summary_writer: Any = False,
        verbose: bool = True,
        *,
        seed: int | None = None,
        early_stop: bool = False,
        precision: str = "auto",
        judge_samples: int | None = None,
        eot_samples: int = 1,
    ) -> None:
        super().__init__(
            estimator,
            targeted=targeted,
            batch_size=batch_size,
            summary_writer=summary_writer,
            verbose=verbose,
            seed=seed,
            early_stop=early_stop,
            precision=precision,
            judge_samples=judge_samples,
            eot_samples=eot_samples,
        )
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.decay = decay
        self.max_iter = max_iter
        self.num_random_init = num_random_init
        self.random_eps = random_eps
        self._check_params()

    def start(self, x: Tensor, y: Tensor, rng: SampleRng, **options: Tensor) -> State:
        """Place the iterate, and the box that every iterate is clamped to: `clip_values`, for inf within the ball."""
        p = as_norm(self.norm)
        eps, eps_step = self._radii(x, rng)
        if p == np.inf:
            low, high = (self.victim.clip(bound) for bound in ball_bounds(x, eps))
        else:
            low, high = (self.victim.clip(torch.full_like(x, bound)) for bound in (-np.inf, np.inf))
        state: State = {"x": x, "eps": eps, "eps_step": eps_step.to(x.dtype), "low": low, "high": high}
        state["steps"] = np.zeros(len(x), dtype=np.int64)
        if self.decay is not None:
            state["momentum"] = torch.zeros_like(x)

        x_adv = options.get("x_adv_init", x)
        if self.starts_at_random and x_adv is x:
            x_adv = x + random_in_ball(x, eps, p, rng)
        if "mask" in options:
            state["fixed"] = ~options["mask"]
            x_adv = torch.where(state["fixed"], x, x_adv)
        state["x_adv"] = self.inside(x_adv, state)
        return state

    def query(self, state: State) -> Tensor:
        """The iterate x_t."""
        return state["x_adv"]

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The victim's loss, negated for targets."""
        loss = self.victim.loss(logits, y)
        return -loss if self.targeted else loss

    def update(self, state: State, logits: Tensor, gradient: Tensor | None) -> np.ndarray:
        """One step; done after `max_iter`."""
        assert gradient is not None
        step = self.step(self._ascended(gradient, state), state["x_adv"], state["eps_step"], state)
        state["x_adv"] = self.inside(state["x_adv"] + step, state)
        state["steps"] += 1
        done: np.ndarray = state["steps"] >= self.max_iter
        return done

    def result(self, state: State) -> Tensor:
        """The last iterate, free of the rounding with which a projection leaves the box or a ball of finite p."""
        p = as_norm(self.norm)
        if p == np.inf:
            return state["x_adv"]
        return pull_into_ball(state["x_adv"].clamp(state["low"], state["high"]), state["x"], state["eps"], p)

    @property
    def starts_at_random(self) -> bool:
        """Whether the search begins at a random point of the ball."""
        return self.num_random_init > 0

    @property
    def is_memoryless(self) -> bool:
        """Without momentum."""
        return self.decay is None

    @property
    def restarts(self) -> int:
        """One, or as many as there are random starts."""
        return max(1, self.num_random_init)

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """The step from `x`, of p-norm `radius`, along which `gradient` promises most."""
        p = as_norm(self.norm)
        if p == 1:
            return steepest_ascent_in_box(gradient, x, state["low"], state["high"], radius)
        return radius * steepest_ascent(gradient, p)

    def inside(self, x_adv: Tensor, state: State) -> Tensor:
        """`x_adv` clamped to the box, and for finite p then projected onto the ball."""
        x_adv = x_adv.clamp(state["low"], state["high"])
        p = as_norm(self.norm)
        if p == np.inf:
            return x_adv
        return state["x"] + project(x_adv - state["x"], state["eps"].to(x_adv.dtype), p)

    def _ascended(self, gradient: Tensor, state: State) -> Tensor:
        """What is ascended: the gradient without NaN and fixed pixels, or the momentum that it adds to."""
        gradient = gradient.nan_to_num(nan=0.0)
        if "fixed" in state:
            gradient = gradient.masked_fill(state["fixed"], 0)
        if self.decay is not None:
            norm = lp_norm(gradient, 1)
            state["momentum"] = self.decay * state["momentum"] + gradient / norm.masked_fill(norm == 0, 1)
            gradient = state["momentum"]
        return gradient

    def _radii(self, x: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Radius and step size of each sample in float64, (N, ...) broadcastable to `x`."""
        eps, eps_step = (_rows(radius, x, rng) for radius in (self.eps, self.eps_step))
        if self.random_eps:
            quantile = rng.uniform((1,) * (x.ndim - 1)).numpy()
            fraction = torch.from_numpy(truncnorm.ppf(quantile, 0, 2, scale=0.5)).to(x.device)
            eps, eps_step = fraction * eps, fraction * eps_step
        return eps, eps_step

    def _check_params(self) -> None:
        super()._check_params()
        as_norm(self.norm)
        check_number("eps", self.eps, low=0)
        check_number("eps_step", self.eps_step, low=0, exclusive=True)
        check_integer("max_iter", self.max_iter, low=1)
        check_integer("num_random_init", self.num_random_init, low=0)
        if self.decay is not None:
            check_number("decay", self.decay, low=0)
        check_flag("random_eps", self.random_eps)

    def _check_call(self, x: Tensor) -> None:
        for name in ("eps", "eps_step"):
            radius = torch.as_tensor(getattr(self, name))
            try:
                radius.expand(x.shape)
            except RuntimeError:
                raise ValueError(
                    f"{name} has shape {tuple(radius.shape)}: must be broadcastable to {tuple(x.shape)}"
                ) from None
            if as_norm(self.norm) != np.inf and not _constant_in_sample(radius, x):
                raise ValueError(f"{name} varies within a sample: norm={self.norm} needs one number for each")


PGD = ProjectedGradientDescent


def _rows(radius: float | np.ndarray | Tensor, x: Tensor, rng: SampleRng) -> Tensor:
    """The rows of `radius`, which broadcasts to the data set, that belong to the batch `x`: (N, ...) in float64."""
    rows = torch.as_tensor(radius, dtype=torch.float64)
    rows = rows.reshape((1,) * (x.ndim - rows.ndim) + rows.shape)
    rows = rows[rng.index] if len(rows) > 1 else rows.repeat(len(x), *(1,) * (rows.ndim - 1))
    return rows.to(x.device)


def _constant_in_sample(radius: Tensor, x: Tensor) -> bool:
    samples = radius.reshape((1,) * (x.ndim - radius.ndim) + radius.shape).flatten(1)
    return bool((samples == samples[:, :1]).all())
