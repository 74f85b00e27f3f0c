"""Targeted PGD on the margin, nearest targets first (Melamed et al., "MALT powers up adversarial attacks", 2024)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guardians.attacks.norms import Norm, annealed, as_norm, dual, free_gradient, lp_norm, random_in_ball
from guardians.attacks.objectives import largest_other, logit_gap
from guardians.attacks.pgd import SteepestAscent
from guardians.attacks.registry import Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Number, OptionalCount, OptionalNumber, Radius, Size
from guardians.engine.state import Answer, Progress, Query, State, on_device, on_host, per_image

__all__ = ["MALT"]

_SHRINKS_TO = 0.02
"""The last step of a search, relative to the first."""
_NEARLY_GONE = 1 / 3
"""How small the margin must be for a random start, relative to what makes a longer search."""


class _Plan(NamedTuple):
    """What each query of an image is for, an entry a query, and one more for the end.

    Attributes:
        kind: one of `_UNTARGETED`, `_RANKING`, `_TARGETED`, `_LONG`, `_RESTART` and `_END`.
        number: which class is ranked, or which target or restart it is.
        share: of the steps of this search that are taken, from 0 to 1; at 1 the point is only looked at.
        first: whether a search begins here.
        gives_up: whether it is seen here if the search leads anywhere.
        next_first: where the next search begins.
    """

    kind: np.ndarray
    number: np.ndarray
    share: np.ndarray
    first: np.ndarray
    gives_up: np.ndarray
    next_first: np.ndarray


_UNTARGETED, _RANKING, _TARGETED, _LONG, _RESTART, _END = range(6)


class MALT(SteepestAscent):
    """Targeted PGD on the logit margin, at one class after the other, in the order of their first-order distances.

    A few untargeted steps first, which is all that most images of an undefended model take. Then the classes with the
    largest logits are ranked by the distance at which the model, were it linear, would take the image for them,

        (z_y - z_t) / ||grad(z_y - z_t)||_q    at the image, with q the dual norm

    (Melamed et al. 2024, section 3; Moosavi-Dezfooli et al., "DeepFool", 2016, equation 8), and the nearest are
    searched from the image, by steps of steepest ascent of z_t - z_y that shrink along half a cosine. Longer searches
    follow of those that came near to the boundary, and some from random points of the ball of the one that came
    nearest. A search that is still far from the boundary after a third of its steps is given up.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, any real p >= 1, inf or "inf".
        eps: radius of the ball, see `ProjectedGradientDescent`.
        max_iter: steps at each target.
        n_targets: how many are searched.
        n_ranked: how many are ranked, those with the largest logits at the image.
        untargeted_steps: before that, of the margin to whichever class is largest.
        num_random_init: random starts.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        long_iter: steps of the longer searches; 0 for none, then random starts take `max_iter`.
        hope: a class is searched longer where the smallest margin to it is at most this share of that at the image, and
            from random points where it is at most a third of this.
        hopeless: a search is given up where its margin is above this share of that at the image; None for none.
        reach: classes at a first-order distance of more than this many `eps` are not searched, but for the nearest;
            None where all are.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    norm: Norm = np.inf
    eps: Radius = 0.3
    max_iter: Count = 20
    n_targets: Count = 3
    n_ranked: Count = 9
    untargeted_steps: Size = 3
    num_random_init: Size = 0
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    long_iter: Size = 0
    hope: Number = 0.1
    hopeless: OptionalNumber = None
    reach: OptionalNumber = None

    keeps: ClassVar[str] = "first"  # the last is the image again, where the next search would begin
    targeted, decay, random_eps, starts_at_random, restarts = False, None, False, False, 1
    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")

    def start(self, state: State) -> None:
        """At the image."""
        super().start(state)
        n = len(state)
        state.order = state.y[:, None].repeat(1, self._n_ranked)
        state.distance = state.x.new_full((n, self._n_ranked), torch.inf)
        state.closest = state.x.new_full((n, self._n_ranked), torch.inf)
        state.column = torch.zeros_like(state.y)
        state.clean_margin = state.x.new_full((n,), torch.inf)

    def query(self, state: State) -> Query:
        """The image where classes are ranked, else the iterate; there is no step after the last."""
        plan = self._plan()
        ranking = on_device(plan.kind[state.steps] == _RANKING, state.x)
        return Query(torch.where(per_image(ranking, state.x), state.x, state.x_adv), plan.share[state.steps] < 1)

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """z_t - z_y, with t the largest other logit where there is no target."""
        untargeted = on_device(self._plan().kind[state.steps] == _UNTARGETED, state.x)
        target = state.order.gather(1, state.column[:, None])[:, 0]
        return -logit_gap(logits, torch.where(untargeted, largest_other(logits, y), target), y)

    def update(self, state: State, answer: Answer) -> Progress:
        """Take note of a class's distance, or take a step; then go on to the next class, target or start."""
        plan, x, steps = self._plan(), state.x, state.steps
        kind, number = plan.kind[steps], plan.number[steps]
        gradient = free_gradient(torch.zeros_like(x) if answer.gradient is None else answer.gradient, state.mask)
        at_image = steps == 0
        if at_image.any():
            self._see_image(state, answer, on_device(at_image, x))
        if (ranked := at_image | (kind == _RANKING)).any():
            slope = lp_norm(gradient, dual(as_norm(self.norm))).flatten()
            state.distance = self._noted(state.distance, state, ranked, -answer.value / slope)
        if (searched := kind >= _TARGETED).any():
            state.closest = self._noted(state.closest, state, searched, -answer.value)

        alpha = annealed(1.0, _SHRINKS_TO, plan.share[steps], x) * state.eps_step
        x_adv = self.inside(state.x_adv + self.step(gradient, state.x_adv, alpha, state), state)
        following = steps + 1
        if self.hopeless is not None and (looked_at := plan.gives_up[steps]).any():
            far = on_host(-answer.value > self.hopeless * state.clean_margin)
            following = np.where(looked_at & far, plan.next_first[steps], following)
        following = np.minimum(following, len(plan.kind) - 1)  # rows that are vacant stay at the end
        state.steps = steps = self._where_hope_is(following, state)
        kind, number, first = plan.kind[steps], plan.number[steps], plan.first[steps]
        if (at_x := first & (kind != _RESTART)).any():
            x_adv = torch.where(per_image(on_device(at_x, x), x), x, x_adv)
        if (at_random := first & (kind == _RESTART)).any():
            x_adv = torch.where(per_image(on_device(at_random, x), x), self._random_start(state), x_adv)
        state.x_adv = torch.where(per_image(on_device(kind == _RANKING, x), x), state.x_adv, x_adv)
        self._aim(state, kind, number, first)
        return Progress(on_device(kind == _END, x))

    def _where_hope_is(self, steps: np.ndarray, state: State) -> np.ndarray:
        """Past classes out of reach, and longer searches and random starts for which the margin gives no hope."""
        plan = self._plan()
        kind, number = plan.kind[steps], plan.number[steps]
        reach = math.inf if self.reach is None else self.reach * state.eps.flatten(1).amax(1)
        for searches, columns, limit in (
            (_TARGETED, state.distance, reach),
            (_LONG, state.closest, self.hope * state.clean_margin),
            (_RESTART, state.closest, _NEARLY_GONE * self.hope * state.clean_margin),
        ):
            if (begun := plan.first[steps] & (kind == searches)).any():
                place = torch.from_numpy(np.where(begun & (searches != _RESTART), number, 0)).to(state.x.device)
                smallest = columns.sort(dim=1).values.gather(1, place[:, None])[:, 0]
                far = on_host(smallest > limit) & ((number > 0) | (searches != _TARGETED))
                steps = np.where(begun & far, np.searchsorted(plan.kind, searches + 1), steps)
                kind, number = plan.kind[steps], plan.number[steps]
        return steps

    def _see_image(self, state: State, answer: Answer, rows: Tensor) -> None:
        others = answer.logits.scatter(1, state.y[:, None], -torch.inf)
        order = others.topk(self._n_ranked, dim=1).indices
        state.order = torch.where(rows[:, None], order, state.order)
        state.clean_margin = torch.where(rows, -answer.value, state.clean_margin)

    def _noted(self, columns: Tensor, state: State, rows: np.ndarray, value: Tensor) -> Tensor:
        """`columns` (N, n_ranked), with the smaller of it and `value` (N,) for the class that is looked at."""
        value = torch.where(on_device(rows, state.x), value.nan_to_num(nan=torch.inf), torch.inf)
        return columns.scatter_reduce(1, state.column[:, None], value[:, None], "amin")

    def _aim(self, state: State, kind: np.ndarray, number: np.ndarray, first: np.ndarray) -> None:
        """At the class that is ranked or searched next."""
        for rows, columns in (
            (kind == _RANKING, None),
            (first & (kind == _TARGETED), state.distance),
            (first & ((kind == _LONG) | (kind == _RESTART)), state.closest),
        ):
            if rows.any():
                column = torch.from_numpy(np.where(rows & (kind != _RESTART), number, 0)).to(state.x.device)
                if columns is not None:
                    column = columns.argsort(dim=1, stable=True).gather(1, column[:, None])[:, 0]
                state.column = torch.where(on_device(rows, state.x), column, state.column)

    def _random_start(self, state: State) -> Tensor:
        start = state.x + random_in_ball(state.x, state.eps, as_norm(self.norm), state.rng)
        return self.inside(start if state.mask is None else torch.where(state.mask, start, state.x), state)

    def _plan(self) -> _Plan:
        lengths = self.untargeted_steps, self.max_iter, self.long_iter
        return _planned(*lengths, self._n_ranked, min(self.n_targets, self._n_ranked), self.num_random_init)

    @property
    def _n_ranked(self) -> int:
        return min(self.n_ranked, (self.victim.nb_classes or self.n_ranked + 1) - 1)

    @property
    def eps_step(self) -> Any:
        """The first step of a search."""
        return self.eps


@lru_cache
def _planned(untargeted_steps: int, steps: int, long: int, n_ranked: int, n_targets: int, n_random: int) -> _Plan:
    """Ranking and searches in their order."""

    def search(kind: int, number: int, steps: int) -> list[tuple[int, int, float, bool, bool]]:
        third = math.ceil(steps / 3) if kind >= _TARGETED and steps > 1 else -1
        return [(kind, number, step / steps, step == 0, step == third) for step in range(steps + 1)]

    at_image = [(_UNTARGETED, 0, 0.0, True, False)]  # which ranks the class with the largest logit
    entries = search(_UNTARGETED, 0, untargeted_steps) if untargeted_steps else at_image
    entries += [(_RANKING, number, 0.0, False, False) for number in range(1, n_ranked)]
    for target in range(n_targets):
        entries += search(_TARGETED, target, steps)
    for target in range(n_targets if long else 0):
        entries += search(_LONG, target, long)
    for start in range(n_random):
        entries += search(_RESTART, start, long or steps)
    columns = zip(*entries, (_END, 0, 1.0, True, False), strict=True)
    kind, number, share, first, gives_up = (np.array(column) for column in columns)
    begins = first.nonzero()[0]
    following = begins[np.searchsorted(begins, np.arange(len(kind)), side="right").clip(max=len(begins) - 1)]
    return _Plan(kind, number, share, first, gives_up, following)


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    arguments = spec.arguments("n_targets", "untargeted_steps", steps="max_iter")
    return MALT, {"norm": spec.norm, "eps": spec.eps, **arguments}


register(Family("MALT", (np.inf, 2, 1), ("steps", "n_targets", "untargeted_steps"), _native, counts_steps=True))
