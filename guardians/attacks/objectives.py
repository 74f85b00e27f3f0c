"""The seven objective functions of Carlini and Wagner 2017 (section IV.A), for targeted and untargeted attacks.

Each is small where the model gives the class that is wanted and large where it does not. Z are the logits, F the
softmax. A targeted attack wants its target t, and what stands in its way is the largest other class. For an untargeted
one the label y stands in the way, and what is wanted is another class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from guardians.engine.run import margin
from guardians.engine.victim import Victim

__all__ = ["OBJECTIVE_FUNCTIONS", "TAKE_CONFIDENCE", "largest_other", "logit_gap", "margin", "margin_gradient"]

ObjectiveFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def largest_other(logits: Tensor, classes: Tensor) -> Tensor:
    """The class (N,) with the largest of the logits (N, classes), `classes` (N,) set aside; the first where equal."""
    finite = logits.clamp_min(torch.finfo(logits.dtype).min)  # where all others are -inf, it is one of them
    return finite.scatter(1, classes[:, None], -torch.inf).argmax(1)


def margin_gradient(victim: Victim, x: Tensor, y: Tensor) -> Tensor | None:
    """Of the untargeted margin at images (N, ...) with labels (N,); None where logits do not depend on the images."""
    with torch.enable_grad():
        points = x.clone().requires_grad_(True)
        value = margin(victim.logits(points), y, targeted=False).sum()
        if not value.requires_grad:
            return None
        gradient: Tensor | None = torch.autograd.grad(value, points, allow_unused=True)[0]
    return gradient


def _pick(values: Tensor, classes: Tensor) -> Tensor:
    return values.gather(1, classes[:, None])[:, 0]


def _log_probability(logits: Tensor, classes: Tensor) -> Tensor:
    return _pick(log_softmax(logits, 1), classes)


def _probability_gap(logits: Tensor, wanted: Tensor, unwanted: Tensor) -> Tensor:
    probabilities = logits.softmax(1)
    return _pick(probabilities, unwanted) - _pick(probabilities, wanted)


def logit_gap(logits: Tensor, wanted: Tensor, unwanted: Tensor) -> Tensor:
    """Z_unwanted - Z_wanted (N,), for logits (N, classes) and classes (N,)."""
    return _pick(logits, unwanted) - _pick(logits, wanted)


def f1(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """Cross-entropy of the wanted class, minus 1. Printed with the opposite sign, which would lead away from it."""
    return -_log_probability(logits, wanted) - 1


def f2(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """(F_unwanted - F_wanted)+."""
    return _probability_gap(logits, wanted, unwanted).clamp_min(0)


def f3(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """Softplus(F_unwanted - F_wanted) - log 2."""
    return softplus(_probability_gap(logits, wanted, unwanted)) - math.log(2)


def f4(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """(0.5 - F_wanted)+."""
    return (0.5 - _log_probability(logits, wanted).exp()).clamp_min(0)


def f5(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """-log(2 F_wanted). Printed as -log(2 F - 2), the logarithm of a negative number."""
    return -_log_probability(logits, wanted) - math.log(2)


def f6(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """max(Z_unwanted - Z_wanted, -confidence)."""
    return logit_gap(logits, wanted, unwanted).clamp_min(-confidence)


def f7(logits: Tensor, wanted: Tensor, unwanted: Tensor, confidence: float) -> Tensor:
    """Softplus(Z_unwanted - Z_wanted + confidence) - log 2."""
    return softplus(logit_gap(logits, wanted, unwanted) + confidence) - math.log(2)


OBJECTIVE_FUNCTIONS: dict[str, ObjectiveFunction] = {f.__name__: f for f in (f1, f2, f3, f4, f5, f6, f7)}
"""By name; each takes logits (N, classes), wanted and unwanted classes (N,) and the confidence, and returns (N,)."""
TAKE_CONFIDENCE = ("f6", "f7")
"""Those that compare logits, which is what a confidence is measured in."""
