"""The geometry of p-norm balls, 1 <= p <= inf, over batches: the first dimension is the sample."""

from __future__ import annotations

from numbers import Real
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from guardians.engine.rng import SampleRng
from guardians.engine.state import State, per_image

__all__ = [
    "Norm",
    "annealed",
    "as_norm",
    "ball_bounds",
    "dual",
    "farthest",
    "free_gradient",
    "lp_norm",
    "nearest_in_ball",
    "nearest_in_ball_and_box",
    "project",
    "project_onto_hyperplane",
    "pull_into_ball",
    "random_in_ball",
    "rows_of",
    "steepest_ascent",
    "steepest_ascent_in_box",
    "widest",
]


def as_norm(norm: Any) -> float:
    """The order p of a norm given as ART takes it: 1, 2, another real p >= 1, `inf` or "inf".

    Raises:
        ValueError: anything else.
    """
    p = float("inf") if norm == "inf" else norm
    if isinstance(p, bool) or not isinstance(p, Real) or not float(p) >= 1:
        raise ValueError(f'norm={norm!r}: allowed are 1, 2, any real p >= 1, inf and "inf"')
    return float(p)


Norm = Annotated[float | str, lambda name, value: as_norm(value)]
"""1, 2, any real p >= 1, inf or "inf"."""


def lp_norm(x: Tensor, p: float) -> Tensor:
    """p-norm of each sample, with dimensions of size 1 kept: (N, ...) -> (N, 1, ...)."""
    return torch.linalg.vector_norm(x, p, dim=tuple(range(1, x.ndim)), keepdim=True)


def dual(p: float) -> float:
    """The order q of the dual norm, 1/p + 1/q = 1."""
    return np.inf if p == 1 else 1.0 if p == np.inf else p / (p - 1)


def steepest_ascent(gradient: Tensor, p: float) -> Tensor:
    """The d that maximises <gradient, d> over ||d||_p <= 1; zero where the gradient is zero.

    Sign for inf, the normalised gradient for 2, the largest coordinate alone for 1 (the first where several are
    equal). Madry et al. 2018, section 2.1, for inf and 2; Boyd and Vandenberghe, "Convex Optimization", section 9.4.
    """
    if p == float("inf"):
        return gradient.sign()
    if p == 1:
        flat = gradient.flatten(1)
        position = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, position, flat.gather(1, position).sign()).view_as(gradient)
    # Divided by its largest entry first, so that squares of small gradients do not underflow.
    largest = lp_norm(gradient, float("inf"))
    scaled = gradient / largest.masked_fill(largest == 0, 1)
    q = dual(p)
    dual_norm = lp_norm(scaled, q)
    unit = scaled / dual_norm.masked_fill(dual_norm == 0, 1)
    return unit if p == 2 else unit.sign() * unit.abs() ** (q - 1)


def steepest_ascent_in_box(gradient: Tensor, x: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """The d that maximises <gradient, d> over ||d||_1 <= radius and low <= x + d <= high.

    Coordinates are used up to their bound in the order of their gradients until the radius (N, 1, ..., 1) is spent.
    Without the box a step would go to the largest coordinate alone, also where a bound has already stopped it, and
    images get stuck far inside the ball (Croce and Hein, "Mind the box: l1-APGD", 2021, section 2).
    """
    ascent, budget = gradient.flatten(1), radius.flatten(1)
    room = torch.where(ascent > 0, (high - x).flatten(1), (x - low).flatten(1))
    room = torch.minimum(room.masked_fill(ascent == 0, 0), budget)
    order = ascent.abs().argsort(dim=1, descending=True, stable=True)
    room = room.gather(1, order)
    spent_before = room.cumsum(1) - room
    length = torch.zeros_like(room).scatter_(1, order, torch.minimum((budget - spent_before).clamp_min(0), room))
    return (ascent.sign() * length).view_as(gradient)


def project(delta: Tensor, eps: Tensor, p: float) -> Tensor:
    """`delta` brought into the p-norm ball of radius `eps` (broadcastable to `delta`).

    Clamped for inf and scaled towards zero for finite p, which for p other than 2 is not the nearest point of the
    ball; it is what ART and foolbox do.
    """
    if p == float("inf"):
        return torch.clamp(delta, -eps, eps)
    norm = lp_norm(delta, p)
    return delta * (eps / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)


def nearest_in_ball(delta: Tensor, eps: Tensor, p: float) -> Tensor:
    """The Euclidean projection of `delta` onto the p-norm ball of radius `eps` (N, 1, ..., 1), for p = 1, 2 and inf.

    For 1 by sorting (Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the l1-ball", 2008, figure
    1); else it is `project`.
    """
    if p != 1:
        return project(delta, eps, p)
    size, radius = delta.flatten(1).abs(), eps.flatten(1)
    ordered = size.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - radius
    count = torch.arange(1, size.shape[1] + 1, device=size.device, dtype=size.dtype)
    last = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, last - 1) / last).clamp_min(0)
    shrunk = delta.flatten(1).sign() * (size - threshold).clamp_min(0)
    return torch.where(size.sum(1, keepdim=True) <= radius, delta.flatten(1), shrunk).view_as(delta)


def nearest_in_ball_and_box(delta: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """The Euclidean projection of `delta` onto the 1-norm ball of radius `eps` (N, 1, ..., 1) and low <= 0 <= high.

    Each coordinate is shrunk by the same amount and then cut off by its bound. The norm that is left falls piecewise
    linearly as that amount grows: from where a coordinate comes below its bound to where it is zero. The breakpoints,
    sorted, hold the amount at which it is `eps` (Croce and Hein, "Mind the box", 2021, proposition 2.1).
    """
    flat, radius = delta.flatten(1), eps.flatten(1)
    size, room = flat.abs(), torch.where(flat > 0, high.flatten(1), -low.flatten(1)).clamp_min(0)
    ends, order = torch.cat([(size - room).clamp_min(0), size], 1).sort(dim=1)
    slope = torch.where(order < size.shape[1], -1.0, 1.0).to(flat.dtype).cumsum(1)  # behind each breakpoint
    fall = torch.cat([torch.zeros_like(radius), slope[:, :-1] * ends.diff(dim=1)], 1).cumsum(1)
    left = torch.minimum(size, room).sum(1, keepdim=True) + fall  # of the norm, at each breakpoint
    last = ((left >= radius).sum(1, keepdim=True) - 1).clamp_min(0)  # before the radius is reached
    excess, steepness = left.gather(1, last) - radius, -slope.gather(1, last)
    shrink = ends.gather(1, last) + excess.clamp_min(0) / steepness.clamp_min(1)
    shrink = shrink.masked_fill(left[:, :1] <= radius, 0)
    return (flat.sign() * torch.minimum((size - shrink).clamp_min(0), room)).view_as(delta)


def project_onto_hyperplane(x: Tensor, w: Tensor, c: Tensor, low: Tensor, high: Tensor, p: float) -> Tensor:
    """The d of least p-norm with <w, d> = c and low <= x + d <= high, for p = 1, 2 and inf; as near as the box allows.

    All coordinates go towards the hyperplane, with the speed that is best in the norm (1 for inf, |w_i| for 2), until
    they meet their bound; for 1 one after the other in the order of |w_i|. So the way that is left falls piecewise
    linearly, and the breakpoints, sorted, hold where it is used up (Croce and Hein 2020b, section 2.2 and appendix A).

    Args:
        x: points (N, ...).
        w: normals of the hyperplanes (N, ...).
        c: what <w, d> is to be, (N,).
        low, high: bounds (N, ...), infinite where there are none.
        p: order of the norm.
    """
    weight, way = w.flatten(1), c[:, None].abs()
    towards = weight.sign() * c[:, None].sign()
    weight, room = weight.abs(), torch.where(towards > 0, (high - x).flatten(1), (x - low).flatten(1)).clamp_min(0)
    room = room.masked_fill(weight == 0, 0)
    if p == 1:
        order = weight.argsort(dim=1, descending=True, stable=True)
        weight_in_order, room_in_order = weight.gather(1, order), room.gather(1, order)
        gone = _sum_before((weight_in_order * room_in_order).nan_to_num(nan=0.0))
        needed = ((way - gone).clamp_min(0) / weight_in_order).nan_to_num(nan=0.0)
        length = torch.zeros_like(room).scatter_(1, order, torch.minimum(needed, room_in_order))
    else:
        speed = weight if p == 2 else torch.ones_like(weight)
        ends, order = (room / speed).nan_to_num(nan=0.0, posinf=torch.inf).sort(dim=1)
        gone = _sum_before((weight * room).nan_to_num(nan=0.0, posinf=torch.inf).gather(1, order))
        pace = (weight * speed).gather(1, order).flip(1).cumsum(1).flip(1)  # of those that still move
        arrived = gone + ends * pace >= way
        arrives, last = arrived.any(1, keepdim=True), arrived.to(weight.dtype).argmax(1, keepdim=True)
        time = ((way - gone.gather(1, last)) / pace.gather(1, last)).nan_to_num(nan=0.0)
        length = torch.where(arrives, torch.minimum(time * speed, room), room)
    return (towards * length).view_as(x)


def _sum_before(values: Tensor) -> Tensor:
    """Of the entries before each, along dimension 1."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1].cumsum(1)], 1)


def farthest(x: Tensor, clip_values: tuple[Tensor, Tensor] | None, p: float) -> Tensor:
    """The largest p-norm (N,) of a perturbation that stays within `clip_values`; infinite where there are none."""
    if clip_values is None:
        return x.new_full((len(x),), torch.inf)
    low, high = (bound.to(x) for bound in clip_values)
    return lp_norm(torch.maximum(x - low, high - x), p).flatten()


def widest(x: Tensor, clip_values: tuple[Tensor, Tensor] | None) -> Tensor:
    """The largest range of a pixel, a number; 1 where there are no bounds."""
    if clip_values is None:
        return x.new_ones(())
    low, high = clip_values
    return (high - low).max().to(x)


def free_gradient(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """A gradient without NaN, and zero where the mask fixes a pixel."""
    gradient = gradient.nan_to_num(nan=0.0)
    return gradient if mask is None else gradient.masked_fill(~mask, 0)


def annealed(first: float, last: float, share: np.ndarray, x: Tensor) -> Tensor:
    """From `first` to `last` along half a cosine, of which each image of `x` has gone a share (N,): (N, 1, ..., 1).

    Loshchilov and Hutter, "SGDR", 2017, equation 5.
    """
    return per_image(torch.from_numpy(last + (first - last) * (1 + np.cos(np.pi * share)) / 2).to(x), x)


def rows_of(radius: float | np.ndarray | Tensor, state: State) -> Tensor:
    """The rows of `radius`, which broadcasts to the images of the call, that belong to these: (N, ...) in float64."""
    rows = torch.as_tensor(radius, dtype=torch.float64)
    rows = rows.reshape((1,) * (state.x.ndim - rows.ndim) + rows.shape)
    rows = rows[state.index] if len(rows) > 1 else rows.repeat(len(state), *(1,) * (rows.ndim - 1))
    return rows.to(state.x.device)


def random_in_ball(like: Tensor, eps: Tensor, p: float, rng: SampleRng) -> Tensor:
    """Uniform draws from the p-norm balls of radius `eps`, in the shape, dtype and device of `like`.

    For finite p: coordinates with density proportional to exp(-|t|^p), divided by the p-norm of themselves extended by
    an exponential variable (Barthe, Guedon, Mendelson and Naor, "A probabilistic approach to the geometry of the
    l_p^n-ball", 2005, theorem 1).
    """
    shape = tuple(like.shape[1:])
    if p == float("inf"):
        unit = 2 * rng.uniform(shape) - 1
    else:
        magnitude_p = rng.gamma(1 / p, shape)  # |t|^p
        extension = rng.gamma(1.0, (1,) * len(shape))
        total = magnitude_p.sum(dim=tuple(range(1, like.ndim)), keepdim=True) + extension
        unit = torch.where(rng.uniform(shape) < 0.5, -1.0, 1.0) * (magnitude_p / total) ** (1 / p)
    return (unit.to(like.device) * eps).to(like.dtype)


def ball_bounds(x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest images of the inf-norm ball about `x`, in the dtype of `x`; inside in exact arithmetic.

    A bound that rounding has put outside gives way to its neighbour on the side of `x`. `eps` is float64.
    """
    centre = x.double()
    low, high = (centre - eps).to(x.dtype), (centre + eps).to(x.dtype)
    low = torch.where(low.double() - centre < -eps, low.nextafter(x), low)
    high = torch.where(high.double() - centre > eps, high.nextafter(x), high)
    return low, high


def pull_into_ball(x_adv: Tensor, x: Tensor, eps: Tensor, p: float) -> Tensor:
    """`x_adv`, moved towards `x` by as little as puts it inside the ball in exact arithmetic, rounding included.

    For finite p, images that rounding has left outside by some last bits are scaled in float64, and each pixel is
    rounded towards `x`, so that they stay inside any box that holds both; the others come back bit for bit. `eps` is
    float64.
    """
    if p == float("inf"):
        return x_adv.clamp(*ball_bounds(x, eps))
    delta = x_adv.double() - x.double()
    excess = lp_norm(delta, p) > eps
    inside = x + project(delta, eps * (1 - 1e-12), p)  # the margin covers float64's own rounding of a norm
    rounded = inside.to(x.dtype)
    # The rounding may have gone outwards: then the neighbour on the side of x is the one inside.
    outwards = (rounded.double() - x).abs() > (inside - x).abs()
    rounded = torch.where(outwards, rounded.nextafter(x), rounded)
    return torch.where(excess, rounded, x_adv)
