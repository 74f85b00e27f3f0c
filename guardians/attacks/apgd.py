"""Auto-PGD (Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", 2020) and l1-APGD (Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks", 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from art.attacks import evasion
from torch import Tensor
from torch.nn.functional import cross_entropy

from guardians.attacks.norms import (
    CommonNorm,
    as_norm,
    free_gradient,
    nearest_in_ball_and_box,
    random_on_sphere,
    steepest_ascent,
    widest,
)
from guardians.attacks.objectives import largest_other
from guardians.attacks.pgd import SteepestAscent
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_number, optional
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Flag, Fraction, Number, OptionalCount, Size
from guardians.engine.rng import ForkedGenerators, hashed
from guardians.engine.run import evaluate
from guardians.engine.state import Answer, Progress, Query, State, per_image

__all__ = ["APGD", "AutoProjectedGradientDescent", "checkpoints"]

LOSS_TYPES = (None, "cross_entropy", "difference_logits_ratio", "margin")


class AutoProjectedGradientDescent(SteepestAscent):
    """APGD: gradient ascent with momentum, whose step size halves where it makes no progress.

        z_(k+1) = P(x_k + eta s_k)
        x_(k+1) = P(x_k + alpha (z_(k+1) - x_k) + (1 - alpha) (x_k - x_(k-1))),    alpha = 0.75, first 1

    with s_k the steepest ascent of the loss f in the norm, and P onto the ball and `clip_values` (Croce and Hein 2020,
    algorithm 1). At the checkpoints w_j, after 22, 41, 57, 70, 80, 87, 93 and 99 % of the steps, eta is halved and the
    search goes back to the point of the highest loss, where since the last checkpoint

    1. f rose in fewer than `rho` (w_j - w_(j-1)) of the steps, or
    2. eta was not halved at w_(j-1) and the highest loss is still what it was there.

    For norm 1 (Croce and Hein 2021, and where it is silent their code), P is the Euclidean projection onto the
    ball and the box, there is no momentum, and a step is of equal size on the k pixels of the largest gradients. After
    every 4 % of the steps k becomes two thirds of the pixels that the best point changes; at first it is a fifth of
    all, or two thirds of those that `x_adv_init` changes.
    Where they are fewer than 95 % of those before, eta becomes `eps_step` again and the search goes back to the best
    point; else eta is divided by 1.5, down to a tenth of `eps_step`.

    Takes the arguments of `art.attacks.evasion.AutoProjectedGradientDescent` with their meaning and order.

    Of a run, the point of the highest loss among those that fool the model is returned, and where none does that of
    the highest loss of all. ART returns the last iterate, or where it does not fool the model the start; torchattacks
    the last that fooled it, or the image. With `early_stop` it is the first that fools. All restarts are made for
    images that none has fooled so far.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        eps: radius of the ball, in the unit of the images.
        eps_step: the first step size eta, likewise; None is the papers', 2 * eps, for norm 1 eps.
        max_iter: number of steps; a run asks the model once more, for the loss at the last point.
        targeted: ascend to target labels rather than away from the labels.
        nb_random_init: random starts, on the surface of the ball as in AutoAttack, then clipped; for norm 1 Gaussian
            noise, as wide as the range of `clip_values`, projected. 0 starts at the image.
        batch_size: images in one forward pass; None chooses it.
        loss_type: f. None, the estimator's loss, or cross-entropy; "cross_entropy"; "difference_logits_ratio" (DLR,
            equations 6 and 8, for 3 classes or more, with targets 4 or more); or "margin", the numerator of DLR. With
            `targeted` the class to leave, of which equation 8 knows the label, is the largest other one.
        verbose: show a progress bar.
        n_targets: where it is above 0, the r-th start goes from the label to the class with the r-th largest other
            logit at the image, of `n_targets` or all there are; `nb_random_init` times. The classes are ranked by the
            model itself and, for a random one, by the same draws at each start.
        rho: of condition 1.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    norm: CommonNorm = np.inf
    eps: Number = 0.3
    eps_step: Annotated[float | None, optional(partial(check_number, low=0, exclusive=True, single=True))] = None
    max_iter: Size = 100
    targeted: Flag = False
    nb_random_init: Size = 5
    batch_size: OptionalCount = None
    loss_type: Annotated[str | None, partial(check_choice, known=LOSS_TYPES)] = None
    verbose: Flag = True
    _: KW_ONLY
    n_targets: Size = 0
    rho: Fraction = 0.75

    decay: ClassVar[None] = None
    _alpha: ClassVar[float] = 0.75

    def start(self, state: State) -> None:
        """At the start, of which nothing is known yet."""
        super().start(state)
        x_adv, n = state.x_adv, len(state)
        state.previous, state.x_max, state.kept = x_adv.clone(), x_adv.clone(), x_adv.clone()
        state.gradient_max = torch.zeros_like(x_adv)
        state.f, state.f_checked = x_adv.new_full((n,), torch.inf), x_adv.new_full((n,), torch.nan)
        state.f_max, state.f_kept = (x_adv.new_full((n,), -torch.inf) for _ in range(2))
        state.rises = torch.zeros_like(state.y)
        state.halved, state.kept_fools = (torch.zeros_like(state.y, dtype=torch.bool) for _ in range(2))
        if as_norm(self.norm) == 1:
            pixels = x_adv[0].numel()
            given = (x_adv != state.x).flatten(1).sum(1) * (state.x_adv_init is not None)
            state.changed = given.masked_fill(given == 0, pixels)
            state.sparsity = torch.where(given == 0, -(-pixels // 5), _two_thirds(given))
        if self.n_targets:
            state.target = state.y.clone()
            rank = torch.from_numpy(state.restart % self._targets).to(x_adv.device)
            state.target = self._ranked(state).gather(1, rank[:, None])[:, 0]

    def query(self, state: State) -> Query:
        """The iterate x_k; of the last there is no need for a gradient."""
        return Query(state.x_adv, gradient=bool((state.steps < self.max_iter).any()))

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The loss f, which is ascended."""
        if self.loss_type in (None, "cross_entropy"):
            loss = self.victim.loss if self.loss_type is None else partial(cross_entropy, reduction="none")
            if self.n_targets:
                return -loss(logits, state.target)
            return -loss(logits, y) if self.targeted else loss(logits, y)
        if self.n_targets:
            wanted, unwanted = state.target, y
        else:
            other = largest_other(logits, y)
            wanted, unwanted = (y, other) if self.targeted else (other, y)
        gap = (logits.gather(1, wanted[:, None]) - logits.gather(1, unwanted[:, None]))[:, 0]
        return gap if self.loss_type == "margin" else gap / (self._spread(logits) + 1e-12)

    def update(self, state: State, answer: Answer) -> Progress:
        """One step; done after `max_iter`."""
        f = answer.value.to(state.f).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self._keep(state, answer.fooled, f)
        done = state.steps >= self.max_iter
        if answer.gradient is None:
            return Progress(done)
        x, gradient = state.x_adv, free_gradient(answer.gradient, state.mask)
        higher = f > state.f_max
        state.f_max = torch.maximum(f, state.f_max)
        state.x_max = torch.where(per_image(higher, x), x, state.x_max)
        state.gradient_max = torch.where(per_image(higher, x), gradient, state.gradient_max)
        state.rises, state.f = state.rises + self.rises(f, state), f
        interval = _intervals(self.checkpoints(), self.max_iter)[np.minimum(state.steps, self.max_iter)]
        if (interval >= 0).any():
            adapt = self._adapt_sparsity if as_norm(self.norm) == 1 else self._adapt_step
            back = per_image(adapt(state, torch.from_numpy(interval).to(x.device)), x)
            x, gradient = torch.where(back, state.x_max, x), torch.where(back, state.gradient_max, gradient)
        state.x_adv, before = self._stepped(x, gradient, state), state.x_adv
        state.previous, state.steps = x, state.steps + 1
        still = (gradient == 0) & (state.x_adv == before) & (state.x_adv == state.x_max)
        return Progress(done, still.flatten(1).all(1))

    def result(self, state: State) -> Tensor:
        """The best point of the run."""
        return self.returned(state.kept, state)

    @property
    def starts_at_random(self) -> bool:
        """Whether the search begins at a random point of the surface of the ball."""
        return self.nb_random_init > 0

    @property
    def restarts(self) -> int:
        """As many as there are random starts, for each target."""
        return max(1, self.nb_random_init) * self._targets

    def random_start(self, state: State) -> Tensor:
        """On the surface of the ball; for norm 1 noise that is yet to be projected."""
        x, p = state.x, as_norm(self.norm)
        if p != 1:
            return x + random_on_sphere(x, state.eps, p, state.rng)
        size, shape = widest(x, self.victim.clip_values), x.shape[1:]
        normal = torch.where(state.rng.uniform(shape) < 0.5, -1.0, 1.0) * (2 * state.rng.gamma(0.5, shape)).sqrt()
        return x + size * normal.to(x)

    def inside(self, x_adv: Tensor, state: State) -> Tensor:
        """P; for norm 2 clipped, and then scaled onto the ball."""
        if as_norm(self.norm) != 1:
            return super().inside(x_adv, state)
        x = state.x
        return x + nearest_in_ball_and_box(x_adv - x, x, state.low, state.high, state.eps.to(x.dtype))

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """Of steepest ascent; for norm 1 along the `sparsity` largest entries of the gradient, and those equal."""
        if as_norm(self.norm) != 1:
            return radius * steepest_ascent(gradient, as_norm(self.norm))
        size = gradient.flatten(1).abs()
        last = size.sort(dim=1, descending=True).values.gather(1, (state.sparsity - 1)[:, None])
        direction = gradient.sign() * (size >= last).view_as(gradient)
        return radius * direction / per_image(direction.flatten(1).abs().sum(1).clamp_min(1), x)

    def checkpoints(self) -> tuple[int, ...]:
        """The steps after which the step size is looked at: w_0 to w_n, or for norm 1 after every 4 %."""
        if as_norm(self.norm) == 1:
            every = max(self.max_iter // 25, 1)
            return tuple(range(every, self.max_iter + 1, every))
        return checkpoints(self.max_iter)

    def rises(self, f: Tensor, state: State) -> Tensor:
        """Whether the loss is higher than at the iterate before: bool (N,)."""
        return f > state.f

    def oscillates(self, state: State, interval: Tensor) -> Tensor:
        """Condition 1, for intervals of this many steps (N,): bool (N,)."""
        return state.rises < self.rho * interval.double()

    def _adapt_step(self, state: State, interval: Tensor) -> Tensor:
        """Halve eta where a checkpoint asks for it, and say where: bool (N,)."""
        at = interval >= 0
        stalls = ~state.halved & (state.f_max == state.f_checked)
        halve = at & (self.oscillates(state, interval) | stalls)
        state.eps_step = torch.where(per_image(halve, state.x), state.eps_step / 2, state.eps_step)
        state.halved = torch.where(at, halve, state.halved)
        state.f_checked = torch.where(at, state.f_max, state.f_checked)
        state.rises = state.rises.masked_fill(at, 0)
        return halve

    def _adapt_sparsity(self, state: State, interval: Tensor) -> Tensor:
        """k and eta at a checkpoint, and where the best point has become sparser: bool (N,)."""
        at, changed = interval >= 0, (state.x_max != state.x).flatten(1).sum(1)
        sparser = at & (changed < 0.95 * state.changed.double())
        first = self._radii(state)[1].to(state.eps_step)
        shorter = torch.maximum(state.eps_step / 1.5, first / 10)
        eta = torch.where(per_image(at, state.x), shorter, state.eps_step)
        state.eps_step = torch.where(per_image(sparser, state.x), first, eta)
        state.sparsity = torch.where(at, _two_thirds(changed), state.sparsity)
        state.changed = torch.where(at, changed, state.changed)
        return sparser

    def _stepped(self, x: Tensor, gradient: Tensor, state: State) -> Tensor:
        """x_(k+1), for x_k."""
        z = self.inside(x + self.step(gradient, x, state.eps_step, state), state)
        if as_norm(self.norm) == 1:
            return z
        alpha = per_image(torch.from_numpy(np.where(state.steps == 0, 1.0, self._alpha)).to(x), x)
        return self.inside(x + alpha * (z - x) + (1 - alpha) * (x - state.previous), state)

    def _keep(self, state: State, fooled: Tensor, f: Tensor) -> None:
        """Keep the iterate where it is better than what is kept: it fools the model, or has a higher loss."""
        better = torch.where(fooled == state.kept_fools, f > state.f_kept, fooled)
        state.kept = torch.where(per_image(better, state.x), state.x_adv, state.kept)
        state.f_kept = torch.where(better, f, state.f_kept)
        state.kept_fools = state.kept_fools | fooled

    def _spread(self, logits: Tensor) -> Tensor:
        """The denominator of DLR: z_1 - z_3, or with targets z_1 - (z_3 + z_4) / 2, the logits in descending order."""
        z = logits.topk(4 if self._has_targets else 3).values
        return z[:, 0] - z[:, 2:].mean(1)

    def _ranked(self, state: State) -> Tensor:
        """The classes but the label, the largest logit at the image first: (N, targets)."""
        keys = hashed(0, state.rng.index)
        with ForkedGenerators(0, state.x.device), torch.no_grad():
            draws, *_ = evaluate(self, self.victim.logits, state.x, state, gradient=False, keys=keys)
        if self.report is not None:
            self.report.search_forward += self.eot_samples * len(state)
        others = draws.mean(0).scatter(1, state.y[:, None], -torch.inf)
        return others.sort(dim=1, descending=True, stable=True).indices[:, : self._targets]

    @property
    def _targets(self) -> int:
        """Classes that are gone to, one after the other."""
        classes = self.victim.nb_classes
        return max(1, self.n_targets if classes is None else min(self.n_targets, classes - 1))

    @property
    def _has_targets(self) -> bool:
        return self.targeted or self.n_targets > 0

    def _radii(self, state: State) -> tuple[Tensor, Tensor]:
        """Radius and first step size in float64, (N, 1, ..., 1)."""
        factor = 1 if as_norm(self.norm) == 1 else 2
        eps_step = factor * self.eps if self.eps_step is None else self.eps_step
        radii = torch.tensor([self.eps, eps_step], dtype=torch.float64, device=state.x.device)
        eps, first = (per_image(radius.repeat(len(state)), state.x) for radius in radii)
        return eps, first

    def _check_params(self) -> None:
        super()._check_params()
        if self.targeted and self.n_targets:
            raise ValueError(f"n_targets={self.n_targets}: must be 0 with targeted=True, whose labels are the targets")
        self._check_classes()

    def _check_classes(self) -> None:
        classes, needed = self.victim.nb_classes, 4 if self._has_targets else 3
        if self.loss_type == "difference_logits_ratio" and classes is not None and classes < needed:
            how = "with targets " if self._has_targets else ""
            raise ValueError(
                f"loss_type='difference_logits_ratio': {how}needs a model of at least {needed} classes, this one has "
                f"{classes}; 'margin' works with 2"
            )

    def _check_call(self, x: Tensor) -> None:
        """Radii are numbers, which fit any images."""

    def _checked_inputs(self, x: Tensor, y: Any, options: dict[str, Any]) -> dict[str, Tensor]:
        inputs = super()._checked_inputs(x, y, options)  # by now the classes are known
        self._check_classes()
        return inputs


evasion.AutoProjectedGradientDescent.register(AutoProjectedGradientDescent)
APGD = AutoProjectedGradientDescent


@cache
def checkpoints(steps: int) -> tuple[int, ...]:
    """w_0 to w_n of a run of so many steps, those that coincide once.

    w_j = ceil(p_j steps) with p_0 = 0, p_1 = 0.22 and p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06) (Croce and Hein
    2020, section 3), in exact arithmetic.
    """
    percent, gap = [0], 22
    while percent[-1] + gap <= 100:
        percent.append(percent[-1] + gap)
        gap = max(gap - 3, 6)
    return tuple(sorted({-(-p * steps // 100) for p in percent}))


@cache
def _intervals(steps: tuple[int, ...], last: int) -> np.ndarray:
    """For 0 to `last` steps those since the checkpoint before, where it is one of these checkpoints, else -1."""
    intervals = np.full(last + 1, -1)
    intervals[list(steps)] = np.diff(steps, prepend=0)
    return intervals


def _two_thirds(changed: Tensor) -> Tensor:
    """Of numbers of pixels, rounded up, at least one."""
    return ((2 * changed + 2) // 3).clamp_min(1)


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    start = {"nb_random_init": int(spec.get("random_start", False))}
    arguments = spec.arguments("n_targets", "rho", steps="max_iter", loss="loss_type")
    return APGD, {"norm": spec.norm, "eps": spec.eps, **start, **arguments}


def _agreements() -> Iterator[Agreement]:
    """Of torchattacks, which always starts at random, and takes no targets."""
    for (norm, eps), (steps, loss) in product(
        ((np.inf, 8 / 255), (2, 0.5)), ((100, LOSS_TYPES[1]), (20, LOSS_TYPES[2]))
    ):
        params = {"random_start": True, "steps": steps, "loss": loss}
        yield Agreement("exact", Spec("APGD", norm, eps, params=params), ("torchattacks",), targeted=(False,))


register(
    Family(
        "APGD",
        norms=(np.inf, 2, 1),
        parameters=("random_start", "steps", "loss", "n_targets", "rho"),
        native=_native,
        counts_steps=True,
        agreements=tuple(_agreements()),
    )
)
