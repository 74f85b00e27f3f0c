"""The shortest way onto a hyperplane within a box, over batches: the first dimension is the sample.

Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guardians.attacks.norms import lp_norm

__all__ = ["to_hyperplane"]


def to_hyperplane(w: Tensor, gap: Tensor, low: Tensor, high: Tensor, p: float) -> Tensor:
    """The d of smallest p-norm with <w, d> = gap and low <= d <= high, for p = 1, 2 and inf.

    Where the box does not reach the hyperplane it is the corner nearest to it, of the pixels in which w is not zero.
    Each pixel goes towards the hyperplane, as far as |d_i| = min(t, room) for inf, min(t |w_i|, room) for 2, with the
    one t that gets there, found by sorting; for 1 pixels use their room in the order of |w_i|.

    Args:
        w: normals (N, ...); the result does not depend on their scale.
        gap: (N,), what <w, d> is to be: b - <w, x> for the hyperplane <w, z> = b seen from x.
        low, high: bounds of d (N, ...), low <= 0 <= high, infinite where there are none.
        p: 1, 2 or inf.
    """
    largest = lp_norm(w, torch.inf)
    scale = largest.masked_fill(largest == 0, 1)
    need = (gap.abs() / scale.flatten())[:, None]
    direction = (w * gap.sign().view_as(scale)).sign()
    weight = (w / scale).abs().flatten(1)
    room = torch.where(direction > 0, high, -low).flatten(1).clamp_min(0).masked_fill(direction.flatten(1) == 0, 0)
    if p == 1:
        order = weight.argsort(dim=1, descending=True, stable=True)
        weight, room = weight.gather(1, order), room.gather(1, order)
        ahead = _sums_before(weight * room)
        steps = torch.minimum((need - ahead).clamp_min(0) / weight.masked_fill(weight == 0, 1), room)
        length = torch.zeros_like(steps).scatter_(1, order, steps)
    elif p == 2:
        until = room / weight.masked_fill(weight == 0, 1)
        length = torch.minimum(_level(weight**2, until, need) * weight, room)
    else:
        length = torch.minimum(_level(weight, room, need), room)
    return direction * length.view_as(w)


def _level(weight: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """The t (N, 1) with sum of weight * min(t, room) = need; the largest room where there is none."""
    room, order = room.sort(dim=1)
    weight = weight.gather(1, order)
    ahead, rest = _sums_before(weight * room), weight.flip(1).cumsum(1).flip(1)
    full = (ahead + room * rest < need).sum(1, keepdim=True)  # pixels that use up their room
    k = full.clamp_max(room.shape[1] - 1)
    level = (need - ahead.gather(1, k)) / rest.gather(1, k).clamp_min(torch.finfo(rest.dtype).tiny)
    return torch.where(full > k, room[:, -1:], level)


def _sums_before(values: Tensor) -> Tensor:
    """Of the entries to the left of each."""
    return torch.cat([torch.zeros_like(values[:, :1]), values.cumsum(1)[:, :-1]], 1)
