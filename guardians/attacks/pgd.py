"""Projected gradient descent (Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from scipy.stats import truncnorm
from torch import Tensor
from torch.nn.functional import one_hot

from guardians.attacks.norms import (
    Norm,
    as_norm,
    ball_bounds,
    free_gradient,
    lp_norm,
    project,
    pull_into_ball,
    random_in_ball,
    steepest_ascent,
    steepest_ascent_in_box,
)
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import ArgumentTypeError
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import Flag, OptionalCount, OptionalNumber, PositiveArray, Radius, Size
from guardians.engine.report import Finished
from guardians.engine.state import Answer, Progress, Query, State

__all__ = ["PGD", "ProjectedGradientDescent", "SteepestAscent", "register_ascent"]

_THREAT_MODELS = {np.inf: (8 / 255, 2 / 255), 2: (0.5, 0.1), 1: (6.0, 0.9)}
"""For each norm the radius and the step size of the parity cases, radii that papers use.

In norm 1 a step is shorter than a pixel's range, so that its length shows.
"""


class SteepestAscent(Attack):
    """Steps of steepest ascent of the loss in the p-norm, each projected onto the p-norm ball and `clip_values`.

    What FGSM and PGD share; their arguments are their own.
    """

    _batch = _step = -1
    """Where the summary is."""

    def start(self, state: State) -> None:
        """Place the iterate, and the box that every iterate is clamped to: `clip_values`, for inf within the ball."""
        x, p = state.x, as_norm(self.norm)
        state.eps, eps_step = self._radii(state)
        state.eps_step = eps_step.to(x.dtype, copy=True)
        bounds = (
            ball_bounds(x, state.eps) if p == np.inf else (torch.full_like(x, bound) for bound in (-np.inf, np.inf))
        )
        state.low, state.high = (self.victim.clip(bound) for bound in bounds)
        state.steps = np.zeros(len(x), dtype=np.int64)
        if self.decay is not None:
            state.momentum = torch.zeros_like(x)

        x_adv = x if state.x_adv_init is None else state.x_adv_init
        if self.starts_at_random and x_adv is x:
            x_adv = self.random_start(state)
        if state.mask is not None:
            x_adv = torch.where(state.mask, x_adv, x)
        state.x_adv = self.inside(x_adv, state)

    def query(self, state: State) -> Tensor | Query:
        """The iterate x_t."""
        return state.x_adv

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The victim's loss, negated for targets."""
        loss = self.victim.loss(logits, y, state.probabilities)
        return -loss if self.targeted else loss

    def update(self, state: State, answer: Answer) -> Progress:
        """One step; done after `max_iter`, and stuck where it led nowhere and no momentum will change that."""
        assert answer.gradient is not None
        done = state.steps >= self.max_iter
        if done.all():  # no step was asked for
            return Progress(done)
        self.write_summary(state, answer.gradient)
        before = state.x_adv
        step = self.step(self._ascended(answer.gradient, state), before, state.eps_step, state)
        state.x_adv = self.inside(before + step, state)
        state.steps = state.steps + 1
        stuck = (state.x_adv == before).flatten(1).all(1) if self.decay is None else None
        return Progress(state.steps >= self.max_iter, stuck)

    def returned(self, points: Tensor, state: State) -> Tensor:
        """Free of the rounding with which a projection leaves the box or a ball of finite p."""
        p = as_norm(self.norm)
        if p == np.inf:
            return points
        return pull_into_ball(points.clamp(state.low, state.high), state.x, state.eps, p)

    @property
    def starts_at_random(self) -> bool:
        """Whether the search begins at a random point of the ball."""
        return self.num_random_init > 0

    @property
    def restarts(self) -> int:
        """One, or as many as there are random starts."""
        return max(1, self.num_random_init)

    def random_start(self, state: State) -> Tensor:
        """Uniform in the ball, not clamped yet."""
        return state.x + random_in_ball(state.x, state.eps, as_norm(self.norm), state.rng)

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """The step from `x`, of p-norm `radius`, along which `gradient` promises most."""
        p = as_norm(self.norm)
        if p == 1:
            return steepest_ascent_in_box(gradient, x, state.low, state.high, radius)
        return radius * steepest_ascent(gradient, p)

    def inside(self, x_adv: Tensor, state: State) -> Tensor:
        """`x_adv` clamped to the box, and for finite p then projected onto the ball."""
        x_adv = x_adv.clamp(state.low, state.high)
        p = as_norm(self.norm)
        if p == np.inf:
            return x_adv
        return state.x + project(x_adv - state.x, state.eps.to(x_adv.dtype), p)

    def write_summary(self, state: State, gradient: Tensor) -> None:
        """Tell the summary writer what ART's attacks tell theirs, where there is one.

        A batch is what is searched from where all rows are at their first step, which with `early_stop` changes on the
        way, and its steps are the gradients since. Of a bare module, which has no `compute_loss`, the loss is not told.
        """
        if self.summary_writer is None:
            return
        if not state.steps.any():
            self._batch, self._step = self._batch + 1, -1
        self._step += 1
        if self.victim.averages_loss:
            gradient = gradient / len(state)
        rows = one_hot(state.y, self.victim.nb_classes or -1) if state.probabilities is None else state.probabilities
        self.summary_writer.update(
            batch_id=self._batch,
            global_step=self._step,
            grad=gradient.cpu().numpy(),
            estimator=self.estimator,
            x=state.x_adv.cpu().numpy(),
            y=rows.cpu().numpy().astype(np.float32),
            targeted=self.targeted,
        )

    def _search(self, *arguments: Any, **options: Any) -> Iterator[Finished]:
        self._batch = self._step = -1
        yield from super()._search(*arguments, **options)
        if self.summary_writer is not None:
            self.summary_writer.reset()

    def _ascended(self, gradient: Tensor, state: State) -> Tensor:
        """What is ascended: the gradient without NaN and fixed pixels, or the momentum that it adds to."""
        gradient = free_gradient(gradient, state.mask)
        if self.decay is not None:
            norm = lp_norm(gradient, 1)
            state.momentum = self.decay * state.momentum + gradient / norm.masked_fill(norm == 0, 1)
            gradient = state.momentum
        return gradient

    def _radii(self, state: State) -> tuple[Tensor, Tensor]:
        """Radius and step size of each sample in float64, (N, ...) broadcastable to the images."""
        eps, eps_step = (_rows(radius, state) for radius in (self.eps, self.eps_step))
        if self.random_eps:
            quantile = state.rng.uniform((1,) * (state.x.ndim - 1)).numpy()
            fraction = torch.from_numpy(truncnorm.ppf(quantile, 0, 2, scale=0.5)).to(state.x.device)
            eps, eps_step = fraction * eps, fraction * eps_step
        return eps, eps_step

    def _check_params(self) -> None:
        super()._check_params()
        if (np.ndim(self.eps) == 0) != (np.ndim(self.eps_step) == 0):
            shapes = f"eps has shape {np.shape(self.eps)} and eps_step {np.shape(self.eps_step)}"
            raise ArgumentTypeError(f"{shapes}: both must be numbers, or both arrays")
        if self.starts_at_random and not _is_finite(self.eps):
            raise ValueError(f"eps={self.eps}: must be finite for random starts")

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


class ProjectedGradientDescent(SteepestAscent):
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
        eps_step: p-norm of a step, likewise; an array where `eps` is one.
        decay: momentum; None for none.
        max_iter: number of steps.
        targeted: descend the loss of target labels rather than ascend the loss of the labels.
        num_random_init: random starts; 0 starts at the image. The second and later ones run only for images that
            none has fooled so far.
        batch_size: images in one forward pass; None chooses it.
        random_eps: for each sample, draw eps from a normal distribution of standard deviation eps / 2 truncated to
            [0, eps], with eps_step in proportion (Kurakin et al. 2017, section 3).
        summary_writer: TensorBoard logs as ART's attacks write them, for at most one random start; True, a folder, or
            an ART `SummaryWriter`.
        verbose: show a progress bar.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
        ImportError: `summary_writer` needs tensorboardX, which is not installed.
    """

    estimator: Estimator
    norm: Norm = np.inf
    eps: Radius = 0.3
    eps_step: PositiveArray = 0.1
    decay: OptionalNumber = None
    max_iter: Size = 100
    targeted: Flag = False
    num_random_init: Size = 0
    batch_size: OptionalCount = None
    random_eps: Flag = False
    summary_writer: Any = False
    verbose: Flag = True

    def _check_params(self) -> None:
        super()._check_params()
        if self.summary_writer is not None and self.num_random_init > 1:
            raise ValueError(f"num_random_init={self.num_random_init}: must be at most 1 with a summary_writer")


evasion.ProjectedGradientDescent.register(ProjectedGradientDescent)
PGD = ProjectedGradientDescent


def _rows(radius: float | np.ndarray | Tensor, state: State) -> Tensor:
    """The rows of `radius`, which broadcasts to the images of the call, that belong to these: (N, ...) in float64."""
    rows = torch.as_tensor(radius, dtype=torch.float64)
    rows = rows.reshape((1,) * (state.x.ndim - rows.ndim) + rows.shape)
    rows = rows[state.index] if len(rows) > 1 else rows.repeat(len(state), *(1,) * (rows.ndim - 1))
    return rows.to(state.x.device)


def _is_finite(radius: float | np.ndarray | Tensor) -> bool:
    return bool(torch.as_tensor(radius, device="cpu").isfinite().all())


def _constant_in_sample(radius: Tensor, x: Tensor) -> bool:
    samples = radius.reshape((1,) * (x.ndim - radius.ndim) + radius.shape).flatten(1)
    return bool((samples == samples[:, :1]).all())


def register_ascent(name: str, attack: type[SteepestAscent], steps: Sequence[int] = ()) -> None:
    """Make FGSM, or with the numbers of `steps` of its parity cases PGD, known by name."""

    def native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
        start = {"num_random_init": int(spec.get("random_start", False))}
        return attack, {"norm": spec.norm, "eps": spec.eps, **start, **spec.arguments("eps_step", steps="max_iter")}

    parameters = ("random_start", "steps", "eps_step") if steps else ("random_start",)
    agreements = []
    for (norm, (eps, eps_step)), number, random_start in product(
        _THREAT_MODELS.items(), steps or (None,), (False, True)
    ):
        params = {"random_start": random_start, "steps": number, "eps_step": eps_step if number else None}
        agreements.append(Agreement("exact", Spec(name, norm, eps, params=params)))
    register(Family(name, tuple(_THREAT_MODELS), parameters, native, bool(steps), agreements=tuple(agreements)))


register_ascent("PGD", PGD, steps=(10, 40))
