"""Square (Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack", 2020)."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from art.attacks import evasion
from torch import Tensor
from torch.nn.functional import cross_entropy

from guardians.attacks.norms import as_norm, ball_bounds, lp_norm, nearest_in_ball_and_box, pull_into_ball, rows_of
from guardians.attacks.objectives import margin
from guardians.attacks.registry import Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Fraction, OptionalCount, Radius
from guardians.engine.state import Answer, Progress, Query, State, on_device, per_image

__all__ = ["Square", "SquareAttack"]

_HALVED_AT = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
"""Of 10,000 queries: where the share of pixels that a window has is halved (section 3.3)."""


def _check_norm(name: str, value: Any) -> None:
    check_choice(name, as_norm(value), (1.0, 2.0, np.inf))


def _check_loss(name: str, value: Any) -> None:
    check_choice(name, value, (None, "margin", "cross_entropy"))


def _check_criterion(name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(f"{name}={value!r}: must be None; fooled is what changes the label, or reaches the target")


class SquareAttack(Attack):
    """Square: random search that changes one square window at a time, and asks for no gradient.

    For norm inf it begins with vertical stripes at the bounds of the ball, and puts a window of each channel to one of
    the bounds (Andriushchenko et al. 2020, algorithm 2). For norm 2 it begins with tiles of the shape eta, and adds to a
    window that shape and what another window gives up (algorithm 3); for norm 1 the same in that norm, projected onto
    the intersection of ball and box (Croce and Hein, "Mind the box", 2021, section 4). What raises the loss is kept.
    The windows shrink, at points that are fixed shares of `max_iter`. Each image has windows of its own.

    Takes the arguments of `art.attacks.evasion.SquareAttack` with their meaning and order.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`; it need not be differentiable.
        norm: 1, 2, inf or "inf".
        adv_criterion: None.
        loss: "margin" (None), the difference of the logits that decide, or "cross_entropy".
        max_iter: queries after the first.
        eps: radius of the ball, see `ProjectedGradientDescent`.
        p_init: the share of the pixels that the first windows have.
        nb_restarts: how often the search is started, for images that still stand.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        targeted: reach the labels rather than leave them.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`; also for images that are not (N, C, H, W).
    """

    estimator: Estimator
    norm: Annotated[float | str, _check_norm] = np.inf
    adv_criterion: Annotated[None, _check_criterion] = None
    loss: Annotated[str | None, _check_loss] = None
    max_iter: Count = 100
    eps: Radius = 0.3
    p_init: Fraction = 0.8
    nb_restarts: Count = 1
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    targeted: Flag = False

    _options = ("mask", "first_index")

    def start(self, state: State) -> None:
        """The first perturbation, which is taken as it is."""
        x, p, n = state.x, as_norm(self.norm), len(state)
        state.eps = rows_of(self.eps, state)
        bounds = ball_bounds(x, state.eps) if p == np.inf else (torch.full_like(x, b) for b in (-np.inf, np.inf))
        state.low, state.high = (self.victim.clip(bound) for bound in bounds)
        state.x_best = x.clone()
        state.loss_best = x.new_full((n,), -torch.inf)
        state.steps = np.zeros(n, dtype=np.int64)
        state.x_adv = self._allowed(self._stripes(state) if p == np.inf else self._tiles(state), state)

    def query(self, state: State) -> Query:
        """What is tried, without a gradient."""
        return Query(state.x_adv, gradient=False)

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """What is to rise."""
        if self.loss == "cross_entropy":
            return cross_entropy(logits, y, reduction="none") * (-1 if self.targeted else 1)
        return margin(logits, y, targeted=self.targeted)

    def update(self, state: State, answer: Answer) -> Progress:
        """Keep what raised the loss or fooled the model, and try another window."""
        better = (answer.value > state.loss_best) | answer.fooled | on_device(state.steps == 0, state.x)
        state.x_best = torch.where(per_image(better, state.x), state.x_adv, state.x_best)
        state.loss_best = torch.where(better, answer.value, state.loss_best)
        change = self._window if as_norm(self.norm) == np.inf else self._windows
        state.x_adv = self._allowed(change(state), state)
        state.steps = state.steps + 1
        return Progress(state.steps > self.max_iter)

    def result(self, state: State) -> Tensor:
        """The best."""
        return self.returned(state.x_best, state)

    def returned(self, points: Tensor, state: State) -> Tensor:
        """Free of the rounding with which a perturbation leaves a ball of finite p."""
        p = as_norm(self.norm)
        return points if p == np.inf else pull_into_ball(points.clamp(state.low, state.high), state.x, state.eps, p)

    @property
    def restarts(self) -> int:
        """As they are asked for."""
        return int(self.nb_restarts)

    def _allowed(self, x_adv: Tensor, state: State) -> Tensor:
        return x_adv if state.mask is None else torch.where(state.mask, x_adv, state.x)

    def _sizes(self, state: State) -> np.ndarray:
        """Sides (N,) of the next windows; for finite p odd, and at least 3."""
        _, height, width = state.x.shape[1:]
        halvings = (state.steps / self.max_iter * 10_000).astype(np.int64)[:, None] > _HALVED_AT
        sides = np.sqrt(self.p_init / 2.0 ** halvings.sum(1) * height * width).round().astype(np.int64)
        largest = min(height, width)
        if as_norm(self.norm) == np.inf:
            return sides.clip(1, largest)
        sides = sides.clip(3)
        return np.minimum(sides + (sides % 2 == 0), largest)

    def _window(self, state: State) -> Tensor:
        """The best perturbation with a window of each channel at one of the bounds."""
        channels = state.x.shape[1]
        draws, sides = state.rng.few(2 + channels), self._sizes(state)
        inside, _, _ = _place(draws[:, 0], draws[:, 1], sides, state.x)
        return torch.where(inside, _ends(draws[:, 2:], state), state.x_best)

    def _stripes(self, state: State) -> Tensor:
        """Columns at one of the bounds."""
        _, channels, _, width = state.x.shape
        draws = state.rng.few(channels * width).view(len(state), channels, 1, width)
        return torch.where(draws.to(state.x.device) < 0.5, state.low, state.high)

    def _tiles(self, state: State) -> Tensor:
        """The image plus five by five tiles of the shape eta, of either sign."""
        n, channels, height, width = state.x.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        draws = state.rng.few(down * across * (channels + 1)).view(n, down, across, channels + 1)
        upright, lying = (shape.to(state.x) for shape in _etas(side, as_norm(self.norm)))
        lies = (draws[..., 0] > 0.5).to(state.x.device)[..., None, None]
        tiles = torch.where(lies, lying[side - 1, :side, :side], upright[side - 1, :side, :side])
        signs = _signs(draws[..., 1:], state.x)  # (N, down, across, C)
        pattern = torch.einsum("nijhw,nijc->ncihjw", tiles, signs).reshape(n, channels, down * side, across * side)
        delta = torch.zeros_like(state.x)
        top = left = max((min(height, width) - 5 * side) // 2, 0)
        fitting = delta[:, :, top : top + down * side, left : left + across * side]
        fitting.copy_(pattern[:, :, : fitting.shape[2], : fitting.shape[3]])
        return self._scaled(delta, state)

    def _windows(self, state: State) -> Tensor:
        """The best perturbation, with the mass of one window moved to another, in the shape eta."""
        x, p, channels = state.x, as_norm(self.norm), state.x.shape[1]
        draws, sides = state.rng.few(5 + channels), self._sizes(state)
        inside, row, column = _place(draws[:, 0], draws[:, 1], sides, x)
        other, _, _ = _place(draws[:, 2], draws[:, 3], sides, x)
        delta = state.x_best - x
        mass = (lp_norm(delta * (inside | other), p), lp_norm(delta, p))
        upright, lying = (shape.to(x)[torch.from_numpy(sides - 1).to(x.device)] for shape in _etas(int(sides.max()), p))
        shape = torch.where(per_image(draws[:, 4] > 0.5, upright).to(x.device), lying, upright)
        last = shape.shape[-1] - 1
        rows = row.clamp(0, last)[:, :, None].expand(-1, -1, last + 1)
        columns = column.clamp(0, last)[:, None, :].expand(-1, x.shape[2], -1)
        shape = shape.gather(1, rows).gather(2, columns)[:, None]
        kept = delta * inside
        change = shape * _signs(draws[:, 5:], x)[:, :, None, None] * inside
        change = change + kept / (_channel_norm(kept, p) + 1e-12)
        change = change / (_channel_norm(change, p) + 1e-12)
        eps = state.eps.to(x.dtype)
        windows, whole = mass
        if p == 2:
            change = change * ((eps**2 - whole**2).clamp_min(0) / channels + windows**2).sqrt()
        else:
            change = change * ((eps - whole).clamp_min(0) / channels + windows)
        return self._scaled(torch.where(inside, change, delta.masked_fill(other, 0)), state)

    def _scaled(self, delta: Tensor, state: State) -> Tensor:
        """The image plus a perturbation of norm eps along `delta`, or the nearest that is within the box."""
        x, p, eps = state.x, as_norm(self.norm), state.eps.to(delta.dtype)
        if p == 2:
            return (x + delta / (lp_norm(delta, p) + 1e-12) * eps).clamp(state.low, state.high)
        return x + nearest_in_ball_and_box(delta, state.low - x, state.high - x, eps)


def _place(down: Tensor, across: Tensor, sides: np.ndarray, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows by their position (N,) in [0, 1): bool (N, 1, H, W), and each row (N, H) and column (N, W) as it has it."""
    side = torch.from_numpy(sides)
    first = [(draw * (size - side + 1)).long() for draw, size in zip((down, across), x.shape[2:], strict=True)]
    inside = [
        (torch.arange(size)[None] - start[:, None]).to(x.device) for start, size in zip(first, x.shape[2:], strict=True)
    ]
    side = side[:, None].to(x.device)
    row, column = ((place >= 0) & (place < side) for place in inside)
    return (row[:, :, None] & column[:, None, :])[:, None], inside[0], inside[1]


def _signs(draws: Tensor, x: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(x)


def _ends(draws: Tensor, state: State) -> Tensor:
    """For each channel the lower or the upper bounds."""
    return torch.where((draws < 0.5)[:, :, None, None].to(state.x.device), state.low, state.high)


def _channel_norm(delta: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(delta, p, dim=(2, 3), keepdim=True)


@lru_cache
def _etas(largest: int, p: float) -> tuple[Tensor, Tensor]:
    """The shapes eta of all sides up to `largest` (sides, largest, largest), and lying on their side.

    Two halves of opposite sign, each of rectangles around its middle whose weights fall with their size
    (Andriushchenko et al. 2020, equation 2).
    """
    shapes = torch.zeros(largest, largest, largest, dtype=torch.float64)
    for side in range(1, largest + 1):
        upper = side // 2
        shape = torch.cat([_rectangles(upper, side, p), -_rectangles(side - upper, side, p)])
        shapes[side - 1, :side, :side] = shape / torch.linalg.vector_norm(shape, p)
    return shapes, shapes.mT.contiguous()


def _rectangles(height: int, width: int, p: float) -> Tensor:
    shape = torch.zeros(height, width, dtype=torch.float64)
    if height == 0:
        return shape
    for number in range(max(height, width) // 2 + 1):
        top, left = height // 2 - number, width // 2 - number
        rows, columns = slice(max(top, 0), top + 2 * number + 1), slice(max(left, 0), left + 2 * number + 1)
        shape[rows, columns] += 1 / (number + 1) ** (2 if p == 2 else 4)
    return shape / torch.linalg.vector_norm(shape, p)


evasion.SquareAttack.register(SquareAttack)
Square = SquareAttack


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    return Square, {"norm": spec.norm, "eps": spec.eps, **spec.arguments("p_init", steps="max_iter")}


register(Family("Square", (np.inf, 2, 1), ("steps", "p_init"), _native, counts_steps=True))
