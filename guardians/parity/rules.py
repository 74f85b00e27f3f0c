"""Where a toolkit's rule differs from the native one: each difference is one overridden hook of a native attack.

The exact cases of the harness run the native attack with the rules of the toolkit that it is held against, so that all
the rest is compared bit for bit. `docs/deviations.md` has a row for each class here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from guardians.attacks import AutoProjectedGradientDescent, CarliniWagnerL2, DecoupledDirectionNorm, FastMinimumNorm
from guardians.attacks.boxes import Box, ChangeOfVariables
from guardians.attacks.norms import as_norm, lp_norm, project, steepest_ascent
from guardians.attacks.pgd import SteepestAscent
from guardians.attacks.registry import Spec, family_of
from guardians.engine.attack import Attack
from guardians.engine.parameters import KW_ONLY, Flag
from guardians.engine.state import Query, State, per_image

__all__ = ["OneCoordinateStep", "goes_step_by_step", "native_class", "rules_for"]


class ProjectThenClip(SteepestAscent):
    """foolbox, torchattacks PGDL2: onto the ball first, then clipped; native clips first, so the ball is used up."""

    def inside(self, x_adv: Tensor, state: State) -> Tensor:
        """Clip last."""
        delta = project(x_adv - state.x, state.eps.to(x_adv.dtype), as_norm(self.norm))
        return (state.x + delta).clamp(state.low, state.high)


class OneCoordinateStep(SteepestAscent):
    """ART, norm 1: the largest coordinate alone, even where a bound stops it; native goes on to the next ones."""

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """The steepest ascent that knows no box."""
        return radius * steepest_ascent(gradient, 1)


class ProportionalStep(SteepestAscent):
    """foolbox, norm 1: along the gradient itself; native uses the largest coordinates up to their bounds."""

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """The gradient scaled to 1-norm `radius`."""
        return radius * gradient / lp_norm(gradient, 1).clamp_min(1e-12)


class FlooredStep(SteepestAscent):
    """foolbox, norm 2: gradients of a norm below 1e-12 give shorter steps; native steps have the same length always."""

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """The gradient over its norm or 1e-12, whichever is larger."""
        return radius * gradient / lp_norm(gradient, 2).clamp_min(1e-12)


class DampedStep(SteepestAscent):
    """torchattacks PGDL2: 1e-10 is added to the norm of the gradient of the batch's *mean* loss.

    Steps of images that the model is sure of are shorter, the more so the larger the batch.
    """

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """The gradient over its norm plus 1e-10 for each image of the batch."""
        return radius * gradient / (lp_norm(gradient, 2) + len(gradient) * 1e-10)


class _WholeInterval(ChangeOfVariables):
    """tanh of the box itself, of which images are scaled by `shrink`."""

    shrink = 1.0

    def from_unit(self, unit: Tensor) -> Tensor:
        """Infinite for pixels at a bound, unless they are scaled."""
        return (self.shrink * unit).atanh()

    def to_unit(self, variable: Tensor) -> Tensor:
        """Of scaled images."""
        return variable.tanh()

    def slope(self, variable: Tensor) -> Tensor:
        """Next to nothing, or nothing, at a bound."""
        return 1 - variable.tanh() ** 2

    def confine(self, variable: Tensor) -> Tensor:
        """Anywhere."""
        return variable


class _ScaledInterval(_WholeInterval):
    shrink = 0.999999

    def offset(self, variable: Tensor, x: Tensor) -> Tensor:
        """To the scaled image."""
        return self.image(variable) - self.image(self.variable(x))


class _PaperCarliniWagner(CarliniWagnerL2):
    """The paper's search to its last step."""

    _: KW_ONLY
    adaptive: Flag = False
    abort_early: Flag = False


class FoolboxCarliniWagner(_PaperCarliniWagner):
    """foolbox: images are scaled by 0.999999 before arctanh, and c is rounded to float32."""

    def start(self, state: State) -> None:
        """At the scaled image."""
        super().start(state)
        state.image = self.boundary(state.x).image(state.variable)

    def boundary(self, x: Tensor) -> Box:
        """The scaled one."""
        assert self.victim.clip_values is not None
        return _ScaledInterval(self.victim.clip_values, x)

    def descend(
        self, state: State, of_model: Tensor, of_distance: Tensor, rate: Tensor, betas: tuple[float, float]
    ) -> None:
        """With the rounded c."""
        const = state.const
        state.const = const.float().to(const)
        super().descend(state, of_model, of_distance, rate, betas)
        state.const = const


class TorchattacksCarliniWagner(_PaperCarliniWagner):
    """torchattacks: arctanh of the image itself, and a maximum of the other logits that is never below zero."""

    def boundary(self, x: Tensor) -> Box:
        """The box itself."""
        assert self.victim.clip_values is not None
        return _WholeInterval(self.victim.clip_values, x)

    def f(self, name: str, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """f6 of logits that are zeroed where they should be left out."""
        is_own = torch.zeros_like(logits).scatter(1, y[:, None], 1)
        own, other = (is_own * logits).amax(1), ((1 - is_own) * logits).amax(1)
        return (other - own if self.targeted else own - other).clamp_min(-self.confidence)


class RoundedFactors(DecoupledDirectionNorm):
    """foolbox: 1 - gamma and 1 + gamma are rounded to float32, for a float64 model too."""

    def rescaled(self, epsilon: Tensor, fooled: Tensor) -> Tensor:
        """By the rounded factors."""
        shrink, grow = (torch.tensor(1 + sign * self.gamma, dtype=torch.float32).item() for sign in (-1, 1))
        return torch.where(fooled, epsilon * shrink, epsilon * grow)


class FlooredDirection(DecoupledDirectionNorm):
    """foolbox: gradients of a norm below 1e-12 give shorter steps; native steps have the same length always."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient over its norm or 1e-12, whichever is larger."""
        return gradient / lp_norm(gradient, 2).clamp_min(1e-12)


class UnprojectedFastMinimumNorm(FastMinimumNorm):
    """foolbox, norm 2: the projection divides a norm by itself, so that no step is ever drawn back into the ball."""

    def projected(self, delta: Tensor, epsilon: Tensor) -> Tensor:
        """The step as it is."""
        return delta


class TorchattacksAutoPGD(AutoProjectedGradientDescent):
    """torchattacks: other checkpoints and conditions, radii in float32, clipped last, and the last image that fools.

    Intervals are 22 % of the steps, rounded down, then 3 % shorter each, also rounded down, and at least 6 %. The loss
    after the first step is compared with 0 rather than with that at the start, condition 1 holds for exactly `rho` of
    the steps too, and condition 2 does not count at the first checkpoint. Where nothing fools the image comes back.
    """

    def start(self, state: State) -> None:
        """With radii in float32, of which a start that is given uses all."""
        super().start(state)
        if state.x_adv_init is not None:
            state.x_adv, state.previous, state.x_max, state.kept = (state.x_adv_init.clone() for _ in range(4))
        state.halved = torch.ones_like(state.halved)
        state.eps_step = state.eps_step.float().to(state.x)
        if as_norm(self.norm) == 2:
            state.eps = state.eps.float().double()

    def query(self, state: State) -> Query:
        """The gradient at the last iterate too."""
        return Query(state.x_adv)

    def inside(self, x_adv: Tensor, state: State, slack: float = 0.0) -> Tensor:
        """For norm 2 projected with 1e-12 added to the norm that is divided by, then clipped."""
        if as_norm(self.norm) != 2:
            return super().inside(x_adv, state)
        delta = x_adv - state.x
        norm = _root_of_squares(delta)
        return (state.x + delta / (norm + 1e-12) * (norm + slack).minimum(state.eps.to(norm))).clamp(
            state.low, state.high
        )

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """For norm 2 the gradient over its norm plus 1e-12."""
        if as_norm(self.norm) == 2:
            return radius * gradient / (_root_of_squares(gradient) + 1e-12)
        return super().step(gradient, x, radius, state)

    def checkpoints(self) -> tuple[int, ...]:
        """Sums of the intervals."""
        interval, shorter, shortest = (max(int(share * self.max_iter), 1) for share in (0.22, 0.03, 0.06))
        found = [interval] if self.max_iter else []
        while found and found[-1] + (interval := max(interval - shorter, shortest)) <= self.max_iter:
            found.append(found[-1] + interval)
        return tuple(found)

    def rises(self, f: Tensor, state: State) -> Tensor:
        """In float32, and the first above 0."""
        first = torch.from_numpy((state.steps == 1) & (self.max_iter > 1)).to(f.device)
        return f.float() > state.f.masked_fill(first, 0).float()

    def oscillates(self, state: State, interval: Tensor) -> Tensor:
        """At most, rather than less than, `rho` of the steps."""
        return state.rises <= self.rho * interval.double()

    def result(self, state: State) -> Tensor:
        """The image where nothing fools."""
        return torch.where(per_image(state.kept_fools, state.x), super().result(state), state.x)

    def _stepped(self, x: Tensor, gradient: Tensor, state: State) -> Tensor:
        if as_norm(self.norm) != 2:
            return super()._stepped(x, gradient, state)
        z = self.inside(x + self.step(gradient, x, state.eps_step, state), state)
        alpha = per_image(torch.from_numpy(np.where(state.steps == 0, 1.0, self._alpha)).to(x), x)
        return self.inside(x + (z - x) * alpha + (x - state.previous) * (1 - alpha), state, slack=1e-12)

    def _keep(self, state: State, fooled: Tensor, f: Tensor) -> None:
        super()._keep(state, fooled, f.masked_fill(fooled, torch.inf))
        state.kept = torch.where(per_image(fooled, state.x), state.x_adv, state.kept)


def _root_of_squares(delta: Tensor) -> Tensor:
    """2-norms in the toolkit's order of operations: where DLR is flat its gradient is rounding, and decides a step."""
    return delta.square().sum(dim=tuple(range(1, delta.ndim)), keepdim=True).sqrt()


_RULES: dict[tuple[type[Attack], str, float], tuple[type[Attack], ...]] = {
    (SteepestAscent, "ART", 1): (OneCoordinateStep,),
    (SteepestAscent, "foolbox", 1): (ProjectThenClip, ProportionalStep),
    (SteepestAscent, "foolbox", 2): (ProjectThenClip, FlooredStep),
    (SteepestAscent, "torchattacks", 2): (ProjectThenClip, DampedStep),
    (AutoProjectedGradientDescent, "torchattacks", float("inf")): (TorchattacksAutoPGD,),
    (AutoProjectedGradientDescent, "torchattacks", 2): (TorchattacksAutoPGD,),
    (CarliniWagnerL2, "foolbox", 2): (FoolboxCarliniWagner,),
    (CarliniWagnerL2, "torchattacks", 2): (TorchattacksCarliniWagner,),
    (DecoupledDirectionNorm, "foolbox", 2): (RoundedFactors, FlooredDirection),
    (FastMinimumNorm, "foolbox", 2): (UnprojectedFastMinimumNorm,),
}


def rules_for(reference: str, spec: Spec) -> tuple[type[Attack], ...]:
    """The rules in which a toolkit differs from the native attack; empty where there are none."""
    found = (_RULES.get((base, reference, spec.norm)) for base in native_class(spec).__mro__)
    return next(filter(None, found), ())


def native_class(spec: Spec, reference: str | None = None) -> type[Attack]:
    """The native attack, with the rules of a toolkit where a reference is named."""
    attack, _ = family_of(spec).native(spec)
    rules = () if reference is None else rules_for(reference, spec)
    return type(attack.__name__, (*rules, attack), {}) if rules else attack


def goes_step_by_step(spec: Spec) -> bool:
    """Whether the native attack is compared with a toolkit's from each iterate to the next, in batches."""
    native = native_class(spec)
    return issubclass(native, SteepestAscent) and not issubclass(native, AutoProjectedGradientDescent)
