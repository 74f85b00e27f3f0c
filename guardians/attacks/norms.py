"""The geometry of p-norm balls, 1 <= p <= inf, over batches: the first dimension is the sample."""

from __future__ import annotations

from numbers import Real
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from guardians.engine.checks import check_choice
from guardians.engine.rng import SampleRng
from guardians.engine.state import per_image

__all__ = [
    "CommonNorm",
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
    "pull_into_ball",
    "random_in_ball",
    "random_on_sphere",
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
CommonNorm = Annotated[float | str, lambda name, value: check_choice(name, as_norm(value), (1.0, 2.0, np.inf))]
"""1, 2, inf or "inf"."""


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


def nearest_in_ball_and_box(delta: Tensor, x: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """The Euclidean projection of `delta` onto the d with ||d||_1 <= eps (N, 1, ..., 1) and low <= x + d <= high.

    It is sign(delta) min(max(|delta| - threshold, 0), room), with the room that a pixel has up to its bound. The
    1-norm falls with the threshold along a line between the values at which a pixel leaves its bound or reaches
    zero, which are sorted (Croce and Hein, "Mind the box: l1-APGD", 2021, section 2).
    """
    size, radius = delta.flatten(1).abs(), eps.flatten(1)
    room = torch.where(delta > 0, high - x, x - low).flatten(1)
    knots, order = torch.cat([size, (size - room).clamp_min(0)], 1).sort(dim=1, descending=True, stable=True)
    moving = torch.where(order < size.shape[1], 1, -1).cumsum(1)  # pixels between zero and their bound, below a knot
    norms = torch.nn.functional.pad((moving[:, :-1] * (knots[:, :-1] - knots[:, 1:])).cumsum(1), (1, 0))
    last = (norms <= radius).sum(1, keepdim=True) - 1
    rest = (radius - norms.gather(1, last)) / moving.gather(1, last).clamp_min(1)
    threshold = (knots.gather(1, last) - rest).clamp_min(0)
    shrunk = torch.minimum((size - threshold).clamp_min(0), room)
    return (delta.flatten(1).sign() * shrunk).view_as(delta)


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


def random_on_sphere(like: Tensor, eps: Tensor, p: float, rng: SampleRng) -> Tensor:
    """Draws of p-norm `eps`, in the shape, dtype and device of `like`: p of 2 uniform on the sphere.

    For inf they are uniform in the cube, for finite p they have density proportional to exp(-||t||_p^p), and are scaled
    to the radius.
    """
    shape = tuple(like.shape[1:])
    if p == float("inf"):
        direction = 2 * rng.uniform(shape) - 1
    else:
        direction = torch.where(rng.uniform(shape) < 0.5, -1.0, 1.0) * rng.gamma(1 / p, shape) ** (1 / p)
    norm = lp_norm(direction, p).clamp_min(torch.finfo(direction.dtype).tiny)
    return ((direction / norm).to(like.device) * eps).to(like.dtype)


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
