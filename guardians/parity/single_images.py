"""Native attacks that minimise a norm against a toolkit's: exactly each image alone, and whether they dominate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from guardians.attacks.norms import lp_norm
from guardians.attacks.registry import Spec
from guardians.parity.comparison import Recorder, Trajectory, native_attack
from guardians.toolkits.build import build_attack

__all__ = ["before_ties", "is_dominated", "largest_difference", "runs_of_one"]


def runs_of_one(
    reference: str, spec: Spec, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int
) -> list[tuple[Trajectory, Trajectory]]:
    """Native's and the toolkit's runs on each image alone, as no toolkit keeps the images of a batch apart.

    Native runs with the rules of the toolkit, and starts where a random start of the toolkit is.
    """
    native_recorder, recorder = Recorder(model), Recorder(model)
    ours = native_attack(spec, native_recorder, 1, reference)
    shape = tuple(x.shape[1:])
    theirs = build_attack(reference, spec, recorder, nb_classes=nb_classes, input_shape=shape, batch_size=1)
    runs = []
    for pair in zip(x.split(1), y.split(1), strict=True):
        run = recorder.trajectory(lambda: theirs(*pair))  # noqa: B023
        start = {"x_adv_init": run.iterates[0]} if spec.get("random_start") else {}
        runs.append((native_recorder.trajectory(lambda: ours(*pair, **start)), run))  # noqa: B023
    return runs


_TIE = 1e-9
"""Of the two largest logits: the queries themselves agree within 1e-10."""


def before_ties(run: Trajectory, model: nn.Module) -> Trajectory:
    """A run up to its first query, that excluded, at which rounding decides the label.

    Where the network is linear, an attack that steps to the boundary between two classes lands on it exactly, and
    whether it has fooled the model there, on which its next step depends, is not the same in two implementations.
    """
    with torch.no_grad():
        first, second = model(torch.cat(run.iterates)).topk(2).values.unbind(1)
    ties = (first - second <= _TIE).nonzero()
    return replace(run, iterates=run.iterates[: max(int(ties[0]), 1)]) if len(ties) else run


def largest_difference(runs: list[tuple[Trajectory, Trajectory]], x: Tensor, norm: float) -> float:
    """Of any pixel of any query, and of the images returned.

    Of two queries at the same distance either may be returned, which of them is a matter of rounding: then it is the
    difference of their distances that counts. A toolkit that stops in between is compared up to there; what it has
    found by then is not native's last word. One that returns a black image where it has found nothing, as foolbox'
    Carlini-Wagner does, has returned none.
    """
    largest = 0.0
    for image, (native, reference) in zip(x.split(1), runs, strict=True):
        steps = len(reference.iterates)
        if len(native.iterates) < steps:
            return float("inf")
        queries = zip(native.iterates, reference.iterates, strict=False)
        differences = [(ours - theirs).abs().max().item() for ours, theirs in queries]
        found_nothing = torch.equal(native.x_adv, image) and not reference.x_adv.any()
        if steps == len(native.iterates) and not found_nothing:
            returned = [(ours - reference.x_adv).abs().max().item() for ours in (native.x_adv, *native.iterates)]
            near = [lp_norm(run.x_adv - image, norm).item() for run in (native, reference)]
            differences.append(min(returned[0], max(min(returned[1:]), abs(near[0] - near[1]))))
        largest = max(largest, *differences)
    return largest


def is_dominated(
    native: Tensor, reference: Tensor, x: Tensor, native_success: Tensor, reference_success: Tensor, norm: float
) -> bool:
    """Whether native fools as many images, and those that the reference fools with no larger a mean norm."""
    if native_success.sum() < reference_success.sum():
        return False
    both = native_success & reference_success
    ours, theirs = (lp_norm(images - x, norm).flatten()[both].double().mean() for images in (native, reference))
    return not bool(ours > theirs)
