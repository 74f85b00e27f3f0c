"""Square (Andriushchenko, Croce, Flammarion and Hein, 2020).

"Square attack: a query-efficient black-box adversarial attack via random search".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from art.attacks import evasion
from torch import Tensor
from torch.nn.functional import cross_entropy

from guardians.attacks.norms import CommonNorm, as_norm, ball_bounds, lp_norm, pull_into_ball
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import ArgumentTypeError, check_choice
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Fraction, Number, OptionalCount
from guardians.engine.run import margin
from guardians.engine.state import Answer, Progress, Query, State, on_device

__all__ = ["Square", "SquareAttack"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations out of 10,000 after which p is halved, as in the paper's experiments."""
_TILES = 5
"""Along the shorter side of the start of finite norms."""


def _check_criterion(name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(f"{name}={value!r}: must be None, the model's class decides; `targeted` makes labels targets")


def _check_loss(name: str, value: Any) -> None:
    if callable(value):
        raise ArgumentTypeError(f'{name}={value!r}: must be "margin", "cross_entropy" or None, not a function')
    check_choice(name, value, ("margin", "cross_entropy", None))


class SquareAttack(Attack):
    """Square: random search, in which a square window of the perturbation is changed and kept where the loss rises.

        h_i   = sqrt(p_i h w)                                        the side of the window, p_i halved on a schedule
        inf:    delta_W <- rho eps,  rho in {-1, 1} for each channel                           (algorithm 2)
        2, 1:   delta_W1 <- a (rho eta + delta_W1 / ||delta_W1||_p) / ||...||_p, delta_W2 <- 0  (algorithm 3)
                a^p = ||delta_(W1 u W2)||_p^p + (eps^p - ||delta||_p^p) / channels
        x_new = clip(x + delta), kept where its loss is higher than that of the best        (algorithm 1)

    Windows are uniform over all places in the image, and each image has windows and signs of its own. The start is
    stripes of +-eps along columns (inf), or tiles of +-eta (2 and 1). Norm 1 is the scheme of norm 2 with p = 1, after
    Croce and Hein ("Mind the box", 2021): as a^p spends what is left of the radius and no more, the projection onto
    the ball within `clip_values` is the clipping. No gradient is asked for.

    An image is done when the model is fooled, after `max_iter` windows at the latest; with `early_stop` it is judged
    by the model itself before. What is returned is the best image so far, fooling or not.

    Takes the arguments of `art.attacks.evasion.SquareAttack` in its order.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        adv_criterion: None alone; the model's class decides.
        loss: what is raised: "margin", the largest other logit minus that of the label, which is None too, or
            "cross_entropy"; of targets the negative. Functions, which ART takes, are refused.
        max_iter: windows that are tried; the start is one query more.
        eps: radius of the ball, in the unit of the images.
        p_init: share of the pixels that the first windows have, between 0 and 1.
        nb_restarts: how often the search is started, for images that still stand.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        targeted: reach the labels rather than leave them.
        resc_schedule: stretch the schedule of p, which is made for 10,000 steps, to `max_iter`.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`; also if images are not (N, C, H, W).
    """

    estimator: Estimator
    norm: CommonNorm = np.inf
    adv_criterion: Annotated[None, _check_criterion] = None
    loss: Annotated[str | None, _check_loss] = None
    max_iter: Count = 100
    eps: Number = 0.3
    p_init: Fraction = 0.8
    nb_restarts: Count = 1
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    targeted: Flag = False
    resc_schedule: Flag = True

    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")

    def start(self, state: State) -> None:
        """Stripes, or tiles; `x_adv` is the best image so far, `x_new` the one that is asked about."""
        x, n, p = state.x, len(state), as_norm(self.norm)
        bounds = ball_bounds(x, self._eps(x)) if p == np.inf else (torch.full_like(x, end) for end in (-np.inf, np.inf))
        low, high = (self.victim.clip(bound) for bound in bounds)
        if state.mask is not None:
            low, high = (torch.where(state.mask, bound, x) for bound in (low, high))
        state.low, state.high = low, high
        if p == np.inf:
            channels, _, width = x.shape[1:]
            up = _signs(state.rng.numbers(channels * width)).reshape(n, channels, 1, width) > 0
            state.x_new = torch.where(on_device(up, x), high, low)
        else:
            delta = on_device(_tiles(state, p), x)
            state.x_new = (x + self.eps * delta / lp_norm(delta, p)).to(x.dtype).clamp(low, high)
            state.spent = lp_norm(state.x_new.double() - x.double(), p).flatten() ** p
            state.spent_new = state.spent.clone()
        state.x_adv = state.x_new.clone()
        state.value = x.new_full((n,), -torch.inf)
        windows = 1 if p == np.inf else 2
        state.top, state.left = (np.zeros((n, windows), dtype=np.int64) for _ in range(2))
        state.side = np.ones(n, dtype=np.int64)
        state.steps = np.zeros(n, dtype=np.int64)

    def query(self, state: State) -> Query:
        """The image with the new window."""
        return Query(state.x_new, gradient=False)

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """What is raised: the margin by which the attack succeeds, or the cross-entropy, negated for targets."""
        if self.loss == "cross_entropy":
            loss = cross_entropy(logits, y, reduction="none")
            return -loss if self.targeted else loss
        return margin(logits, y, targeted=self.targeted)

    def update(self, state: State, answer: Answer) -> Progress:
        """Keep the window or take it back, then put the next one; done where the model is fooled, or at `max_iter`."""
        better, is_last = answer.value > state.value, self.keep == "last"
        if is_last:
            better |= answer.fooled
        state.value = torch.where(better, answer.value, state.value)
        self._settle(state, better)
        state.steps = state.steps + 1
        over = state.steps > self.max_iter
        if not over.all():
            self._put_windows(state)
        return Progress(answer.fooled | on_device(over, better) if is_last else over)

    def result(self, state: State) -> Tensor:
        """The best image so far."""
        return self.returned(state.x_adv, state)

    def returned(self, points: Tensor, state: State) -> Tensor:
        """In memory of their own, as windows are put in place, and free of rounding that leaves a ball of finite p."""
        points, p = points.clamp(state.low, state.high), as_norm(self.norm)
        return points if p == np.inf else pull_into_ball(points, state.x, self._eps(state.x), p)

    @property
    def restarts(self) -> int:
        """As many as there are `nb_restarts`."""
        return self.nb_restarts

    def _settle(self, state: State, better: Tensor) -> None:
        """Make `x_adv` and `x_new` the same in the windows in which they differ: the better of both."""
        for which in range(state.top.shape[1]):
            window = _window(state, which)
            kept = torch.where(
                better[window.row][:, None], state.x_new.take(window.index), state.x_adv.take(window.index)
            )
            for images in (state.x_adv, state.x_new):
                images.put_(window.index, kept)
        if as_norm(self.norm) != np.inf:
            state.spent = torch.where(better, state.spent_new, state.spent)

    def _put_windows(self, state: State) -> None:
        p, n, (channels, height, width) = as_norm(self.norm), len(state), state.x.shape[1:]
        state.side = self.sides(state.steps - 1, height, width)
        windows = state.top.shape[1]
        numbers = state.rng.numbers(2 * windows + (p != np.inf) + channels)
        places = numbers[:, : 2 * windows].reshape(n, windows, 2)
        state.top, state.left = (
            (places[..., axis] * (length - state.side + 1)[:, None]).astype(np.int64)
            for axis, length in enumerate((height, width))
        )
        signs = _signs(numbers[:, -channels:])
        if p == np.inf:
            window = _window(state, 0)
            up = on_device(signs > 0, state.x)[window.row]
            state.x_new.put_(window.index, torch.where(up, state.high.take(window.index), state.low.take(window.index)))
        else:
            self._move_mass(state, signs, is_turned=numbers[:, 2 * windows] > 0.5)

    def _move_mass(self, state: State, signs: np.ndarray, is_turned: np.ndarray) -> None:
        """Algorithm 3: what the second window has, and what is left of the radius, goes to the first."""
        x, p = state.x, as_norm(self.norm)
        first, second = _window(state, 0), _window(state, 1)
        row, origin, image = first.row, x.take(first.index).double(), x.take(second.index)
        delta = state.x_adv.take(first.index).double() - origin
        other = state.x_adv.take(second.index).double() - image.double()
        other *= ~_is_inside(second, first)[:, None]

        def power(values: Tensor) -> Tensor:  # ||.||_p^p of each window and channel, (N, channels)
            return torch.segment_reduce(values.abs() ** p, "sum", lengths=first.area, axis=0, unsafe=True)

        own = power(delta)
        moved = own + power(other)
        left_over = (self.eps**p - state.spent).clamp_min(0) / x.shape[1]
        available = (moved + left_over[:, None]) ** (1 / p)
        eta = _eta_at(first, state, is_turned, p)[:, None] * on_device(signs, x)[row]
        shape = eta + _over(delta, (own ** (1 / p))[row])
        shape = _over(shape, (power(shape) ** (1 / p))[row]) * available[row]
        low, high = (bound.take(first.index) for bound in (state.low, state.high))
        x_new = (origin + shape).to(x.dtype).clamp(low, high)
        state.x_new.put_(second.index, image)
        state.x_new.put_(first.index, x_new)
        state.spent_new = state.spent + (power(x_new.double() - origin) - moved).sum(1)

    def sides(self, iterations: np.ndarray, height: int, width: int) -> np.ndarray:
        """Of the windows at iterations (N,) that count from 0; those of finite norms are odd, and 3 or more.

        None is larger than the image.
        """
        at = (iterations / self.max_iter * 10_000).astype(np.int64) if self.resc_schedule else iterations
        p = self.p_init / 2.0 ** np.searchsorted(_HALVINGS, at)
        side, shorter = np.rint(np.sqrt(p * height * width)).astype(np.int64), min(height, width)
        if as_norm(self.norm) == np.inf:
            return side.clip(1, shorter)
        return (side.clip(3) | 1).clip(max=shorter - 1 + shorter % 2)

    def _eps(self, x: Tensor) -> Tensor:
        return torch.full((1,) * x.ndim, self.eps, dtype=torch.float64, device=x.device)

    def _check_call(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be images (N, C, H, W), whose windows are square")


evasion.SquareAttack.register(SquareAttack)
Square = SquareAttack


@dataclass(frozen=True)
class _Window:
    """The T pixels of one window of each sample, one sample after the other, on the device of the images.

    Attributes:
        index: of their channels in all images, (T, C).
        row: of their samples, (T,).
        area: how many belong to each sample, (N,).
        i, j: their places in the image, (T,).
        side, top, left: of the windows, (N,).
    """

    index: Tensor
    row: Tensor
    area: Tensor
    i: Tensor
    j: Tensor
    side: Tensor
    top: Tensor
    left: Tensor


def _window(state: State, which: int) -> _Window:
    """The first or the second of the windows that were put last."""
    x, (channels, height, width) = state.x, state.x.shape[1:]
    side, top, left = (on_device(values, x) for values in (state.side, state.top[:, which], state.left[:, which]))
    area = side**2
    row = torch.repeat_interleave(area, output_size=int((state.side**2).sum()))
    number = torch.arange(len(row), device=x.device) - (area.cumsum(0) - area)[row]
    i = number // side[row]
    j = number - i * side[row] + left[row]
    i = i + top[row]
    index = ((row * channels * height + i) * width + j)[:, None]
    index = index + torch.arange(channels, device=x.device) * height * width
    return _Window(index, row, area, i, j, side, top, left)


def _signs(numbers: np.ndarray) -> np.ndarray:
    return np.where(numbers < 0.5, -1.0, 1.0)


def _over(values: Tensor, norm: Tensor) -> Tensor:
    """`values` of a norm, normalised; zero where it is."""
    return values / norm.masked_fill(norm == 0, 1)


def _rectangle(height: int, width: int, p: float) -> np.ndarray:
    """A bump (height, width) of p-norm 1, which falls from the middle along squares (equation 2)."""
    i, j = np.ogrid[:height, :width]
    ring = np.maximum(abs(i - height // 2), abs(j - width // 2))
    falls = 1 / np.arange(1.0, max(height, width) // 2 + 2) ** 2
    bump = falls[::-1].cumsum()[::-1][ring]
    return bump / np.linalg.norm(bump.ravel(), p) if bump.size else bump


@lru_cache
def _eta(side: int, p: float) -> np.ndarray:
    """(side, side) of p-norm 1: a bump above, one of the other sign below."""
    eta = np.concatenate([_rectangle(side // 2, side, p), -_rectangle(side - side // 2, side, p)])
    return eta / np.linalg.norm(eta.ravel(), p)


@lru_cache(8)
def _etas(largest: int, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Those of all odd sides up to `largest`, flat, one after the other; and where that of each side begins."""
    found = [_eta(side, p).ravel() if side % 2 else np.empty(0) for side in range(largest + 1)]
    return np.concatenate(found), np.cumsum([0, *map(len, found)])


def _within(window: _Window, other: _Window) -> tuple[Tensor, Tensor, Tensor]:
    """The side of the other window at the pixels of one, and where they are in it, (T,) each."""
    row = window.row
    return other.side[row], window.i - other.top[row], window.j - other.left[row]


def _is_inside(window: _Window, other: _Window) -> Tensor:
    """Which pixels of a window are pixels of the other one too, (T,)."""
    side, i, j = _within(window, other)
    return (i >= 0) & (i < side) & (j >= 0) & (j < side)


def _eta_at(window: _Window, state: State, is_turned: np.ndarray, p: float) -> Tensor:
    """eta, or its transpose, at the pixels of a window: (T,)."""
    side, i, j = _within(window, window)
    turned = on_device(is_turned, state.x)[window.row]
    values, begins = (on_device(part, state.x) for part in _etas(min(state.x.shape[2:]), p))
    return values[begins[side] + torch.where(turned, j * side + i, i * side + j)]


def _tiles(state: State, p: float) -> np.ndarray:
    """The start of finite norms (N, C, H, W): as many tiles as fit, each an eta, with signs of its own."""
    n, (channels, height, width) = len(state), state.x.shape[1:]
    side = max(min(height, width) // _TILES, 1)
    down, across = height // side, width // side
    numbers = state.rng.numbers(down * across * (1 + channels)).reshape(n, 1 + channels, down, across, 1, 1)
    eta = _eta(side, p)
    tiles = np.where(numbers[:, :1] > 0.5, eta.T, eta) * _signs(numbers[:, 1:])
    delta = np.zeros((n, channels, height, width))
    top, left = (height - down * side) // 2, (width - across * side) // 2
    covered = tiles.transpose(0, 1, 2, 4, 3, 5).reshape(n, channels, down * side, across * side)
    delta[:, :, top : top + down * side, left : left + across * side] = covered
    return delta


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    return Square, {"norm": spec.norm, "eps": spec.eps, **spec.arguments("p_init", steps="max_iter")}


register(
    Family(
        "Square",
        (np.inf, 2, 1),
        ("steps", "p_init"),
        _native,
        counts_steps=True,
        agreements=tuple(
            Agreement("statistical", Spec("Square", norm, eps, params={"steps": 100}), references, targeted=(False,))
            for norm, eps, references in ((np.inf, 8 / 255, ("ART", "torchattacks")), (2, 1.0, ("torchattacks",)))
        ),
    )
)
