"""The parity run: every case, a row of `parity.csv` each."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks.norms import lp_norm
from guardians.attacks.registry import Spec
from guardians.data import Dataset
from guardians.engine.attack import Attack
from guardians.engine.checks import check_integer
from guardians.engine.victim import Victim, predicted_labels
from guardians.experiments.counting import CountingModel
from guardians.experiments.timing import timed
from guardians.models import digest
from guardians.parity.cases import Case, cases
from guardians.parity.comparison import (
    FLOAT64_TOLERANCE,
    Steps,
    Trajectory,
    compare_steps,
    free_run,
    native_attack,
    record,
    replay,
)
from guardians.parity.rules import goes_step_by_step, rules_for
from guardians.parity.single_images import is_dominated, largest_difference, runs_of_one
from guardians.statistics import paired_difference
from guardians.tables import PARITY_COLUMNS, Table
from guardians.toolkits.build import build_attack

__all__ = ["Comparison", "compare", "run_parity", "target_labels"]

STATISTICAL_MARGIN = 0.1
"""Of the success of the same algorithm with other draws, which an interval of 100 images can lie within."""
FLOAT64_IMAGES = 20
"""Images of the float64 runs, whose tolerance leaves no room for chance and whose arithmetic is slow."""
SINGLE_IMAGES = 10
"""Images of the exact cases of attacks that minimise a norm, one at a time."""


@dataclass(frozen=True)
class Comparison:
    """The outcome of one case on one set of images.

    Attributes:
        x: the images attacked.
        native, reference: the last images of the free float32 runs, (N, C, H, W).
        native_success, reference_success: bool (N,), whether each image fools the model.
        same_label: bool (N,), whether the model gives both images the same label.
        verdict: "exact" or "different"; "equivalent", "undecided" or "different"; "dominates" or "weaker"; "own rule"
            where no agreement was asked for.
        steps: the comparison step by step; None where there was none.
        max_abs_diff_float64: of the free float64 runs; None where there were none.
        query_ratio, time_ratio: native over reference, of passes and of seconds.
    """

    x: Tensor
    native: Tensor
    reference: Tensor
    native_success: Tensor
    reference_success: Tensor
    same_label: Tensor
    verdict: str
    steps: Steps | None
    max_abs_diff_float64: float | None
    query_ratio: float
    time_ratio: float


def target_labels(labels: Tensor, nb_classes: int) -> Tensor:
    """The targets of targeted cases: the class after the true one."""
    return (labels + 1) % nb_classes


def compare(
    case: Case,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    nb_classes: int,
    batch_size: int = 100,
    seed: int = 0,
    own_rules: bool = False,
) -> Comparison:
    """Run one case.

    Args:
        case: attack, threat model and toolkit.
        model: logits for images in [0, 1], float32.
        x: images (N, C, H, W).
        labels: true labels (N,).
        nb_classes: number of classes.
        batch_size: images that the toolkit is given at a time.
        seed: of the toolkit's random start, which native takes over from it.
        own_rules: let native follow its own rules also where the toolkit's differ, to measure the effect.
    """
    y = target_labels(labels, nb_classes) if case.spec.targeted else labels
    if case.kind == "dominance":
        return _dominance(case, model, x, y, nb_classes, batch_size)
    if case.kind == "statistical":
        return _statistical(case, model, x, y, nb_classes, batch_size, seed)
    if not goes_step_by_step(case.spec):
        correct = predicted_labels(model, x, batch_size) == labels  # the others are not descended from
        return _exactness(case, model, x[correct][:SINGLE_IMAGES], y[correct][:SINGLE_IMAGES], nb_classes)
    rules_of = None if own_rules else case.reference
    steps = None if own_rules else Steps(0, 0, 0.0)
    runs: list[tuple[Trajectory, Trajectory]] = []
    for x_batch, y_batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        reference = record(case.reference, case.spec, model, x_batch, y_batch, nb_classes, seed)
        native = free_run(case.spec, rules_of, model, x_batch, y_batch, reference.iterates[0])
        if steps is not None:
            attack = native_attack(case.spec, model, len(x_batch), case.reference)
            steps = steps + compare_steps(attack, reference, x_batch, y_batch)
            steps = steps + replay(attack, native, x_batch, y_batch, case.spec.get("steps", 1))
        runs.append((native, reference))
    in_float64 = None if own_rules else _float64_difference(case.reference, case.spec, model, x, y, nb_classes, seed)
    verdict = "own rule"
    if steps is not None:
        agrees = steps.unexplained == 0 and (in_float64 is None or in_float64 <= FLOAT64_TOLERANCE)  # NaN is none
        verdict = "exact" if agrees else "different"
    return _of_runs(case, model, x, y, runs, batch_size, verdict, steps, in_float64)


def _exactness(case: Case, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int) -> Comparison:
    """Query by query, each image alone: in float64 to the last step, and the outcome in float32."""
    in_float64 = largest_difference(
        runs_of_one(case.reference, case.spec, copy.deepcopy(model).double(), x.double(), y, nb_classes),
        x.double(),
        case.spec.norm,
    )
    runs = runs_of_one(case.reference, case.spec, model, x, y, nb_classes)
    verdict = "exact" if in_float64 <= FLOAT64_TOLERANCE else "different"
    return _of_runs(case, model, x, y, runs, len(x), verdict, None, in_float64)


def _dominance(case: Case, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int, batch_size: int) -> Comparison:
    """The native attack at its defaults, and the toolkit's as the case says."""
    native = replace(case.spec, params={})
    # ART's default is one image at a time; its class gradients grow with the classes in a batch.
    reference_batch = 1 if case.reference == "ART" else batch_size
    runs = _side_by_side(case, native, model, x, y, nb_classes, (batch_size, reference_batch), None)
    found = _of_runs(case, model, x, y, [runs], batch_size, "", None, None)
    success = found.native_success, found.reference_success
    dominates = is_dominated(found.native, found.reference, x, *success, case.spec.norm)
    return replace(found, verdict="dominates" if dominates else "weaker")


def _statistical(
    case: Case, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int, batch_size: int, seed: int
) -> Comparison:
    """The same algorithm with other draws: whether the paired interval of the difference is within the margin."""
    runs = _side_by_side(case, case.spec, model, x, y, nb_classes, (batch_size, batch_size), seed)
    found = _of_runs(case, model, x, y, [runs], batch_size, "", None, None)
    _, low, high = paired_difference(found.native_success.cpu().numpy(), found.reference_success.cpu().numpy())
    if max(-low, high) <= STATISTICAL_MARGIN:
        return replace(found, verdict="equivalent")
    return replace(found, verdict="different" if max(low, -high) > STATISTICAL_MARGIN else "undecided")


def _side_by_side(
    case: Case,
    native_spec: Spec,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    nb_classes: int,
    batch_sizes: tuple[int, int],
    seed: int | None,
) -> tuple[Trajectory, Trajectory]:
    """Native's whole run and the toolkit's, each in batches of its own size."""
    setting: dict[str, Any] = {"nb_classes": nb_classes, "input_shape": tuple(x.shape[1:]), "seed": seed}
    native = build_attack("native", native_spec, model, batch_size=batch_sizes[0], **setting)
    assert isinstance(native, Attack)
    native_x_adv, native_seconds = timed(native, x, y)
    report = native.report
    assert report is not None
    native_passes = report.search_forward + report.search_backward + report.judgement_forward
    counting = CountingModel(model)
    reference = build_attack(case.reference, case.spec, counting, batch_size=batch_sizes[1], **setting)
    reference_x_adv, reference_seconds = timed(reference, x, y)
    passes = counting.forward_samples + counting.backward_samples
    return (
        Trajectory([], [], native_x_adv, native_passes, native_seconds),
        Trajectory([], [], reference_x_adv, passes, reference_seconds),
    )


def _of_runs(
    case: Case,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    runs: Sequence[tuple[Trajectory, Trajectory]],
    batch_size: int,
    verdict: str,
    steps: Steps | None,
    in_float64: float | None,
) -> Comparison:
    """The outcome of native's and the reference's runs on batches of `x`."""
    native_x_adv, reference_x_adv = (torch.cat([run.x_adv for run in side]) for side in zip(*runs, strict=True))
    native_passes, reference_passes = (sum(run.passes for run in side) for side in zip(*runs, strict=True))
    native_seconds, reference_seconds = (sum(run.seconds for run in side) for side in zip(*runs, strict=True))
    native_labels, reference_labels = (
        predicted_labels(model, images, batch_size) for images in (native_x_adv, reference_x_adv)
    )
    return Comparison(
        x=x,
        native=native_x_adv,
        reference=reference_x_adv,
        native_success=(native_labels == y) == case.spec.targeted,
        reference_success=(reference_labels == y) == case.spec.targeted,
        same_label=native_labels == reference_labels,
        verdict=verdict,
        steps=steps,
        max_abs_diff_float64=in_float64,
        query_ratio=native_passes / reference_passes,
        time_ratio=native_seconds / reference_seconds,
    )


def run_parity(
    model: nn.Module,
    data: Dataset,
    *,
    model_name: str,
    out: str | os.PathLike[str],
    attacks: Sequence[str] = (),
    references: Sequence[str] = (),
    own_rules: bool = False,
    batch_size: int = 100,
    seed: int = 0,
    verbose: bool = True,
) -> pd.DataFrame:
    """Run the cases and write `parity.csv`, or `deviations.csv` with `own_rules`; see `guardians.tables`.

    A run that was stopped goes on with the first case that has no row yet.

    Args:
        model: logits for images in [0, 1], which go to its device; it comes back as it was.
        data: images and labels.
        model_name: for the table.
        out: folder of the table.
        attacks, references: only these; empty for all, see `guardians.parity.cases`.
        own_rules: only the cases in which a toolkit's rule differs from the native one, and native with its own.
        batch_size: images that a toolkit is given at a time.
        seed: of the toolkits' random starts, which native takes over from them.
        verbose: show a progress bar.

    Returns:
        The rows of this run.

    Raises:
        ValueError: an attack or a reference is unknown, or the table cannot be written.
    """
    check_integer("batch_size", batch_size, low=1)
    check_integer("seed", seed, low=0)
    todo = cases(attacks, references)
    if own_rules:
        steps = [case for case in todo if isinstance(case, Case) and goes_step_by_step(case.spec)]
        todo = [case for case in steps if rules_for(case.reference, case.spec)]
    key = ("case", "model", "model_digest", "data", "n", "batch_size", "seed")
    table = Table(Path(out) / ("deviations.csv" if own_rules else "parity.csv"), PARITY_COLUMNS, key)
    device = Victim(model).device or torch.device("cpu")
    x, labels = data.as_floats().to(device), data.labels.to(device)
    run = {"model": model_name, "model_digest": digest(model), "data": data.identity, "n": len(data)}
    run |= {"batch_size": batch_size, "seed": seed}
    rows = []
    for case in tqdm(todo, desc="parity", unit="case", disable=not verbose):
        identity = {"case": case.name, **run}
        if identity not in table:
            kind = "deviation" if own_rules else case.kind
            names = {"attack": case.attack, "reference": case.reference, "kind": kind}
            if isinstance(case, Case):
                options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "own_rules": own_rules}
                row = _row(case, compare(case, model, x, labels, nb_classes=len(data.classes), **options))
            else:
                row = case.row(model, x, labels, len(data.classes), seed)
            table.append(dict.fromkeys(PARITY_COLUMNS) | identity | names | row)
        rows.append(identity)
    return table.select(rows)


def _row(case: Case, found: Comparison) -> dict[str, Any]:
    """The columns of `PARITY_COLUMNS` that a comparison fills."""
    difference, low, high = paired_difference(found.native_success.cpu().numpy(), found.reference_success.cpu().numpy())
    norm, counted = case.spec.norm if case.kind == "dominance" else 2, torch.ones_like(found.native_success)
    if case.kind != "exact":
        counted = found.native_success & found.reference_success
    native_l2, reference_l2 = (
        lp_norm(images - found.x, norm)[counted].mean().item() for images in (found.native, found.reference)
    )
    steps = found.steps
    return {
        "max_abs_diff": (found.native - found.reference).abs().max().item(),
        "pixel_mismatch": None if steps is None else steps.mismatches,
        "unexplained": None if steps is None else steps.unexplained,
        "max_abs_diff_float64": found.max_abs_diff_float64,
        "label_agreement": found.same_label.double().mean().item(),
        "native_success": found.native_success.double().mean().item(),
        "reference_success": found.reference_success.double().mean().item(),
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "l2_ratio": native_l2 / reference_l2 if reference_l2 else 1.0,
        "query_ratio": found.query_ratio,
        "time_ratio": found.time_ratio,
        "verdict": found.verdict,
        "note": _note(case, found),
    }


def _note(case: Case, found: Comparison) -> str:
    if case.kind == "dominance":
        return f"native at its defaults; l2_ratio is of the L{case.spec.norm:g} norms where both fool the model"
    if case.kind == "statistical":
        return f"margin {STATISTICAL_MARGIN:g}; l2_ratio is where both fool the model"
    rules = ", ".join(rule.__name__ for rule in rules_for(case.reference, case.spec))
    parts = [f"{'without' if found.verdict == 'own rule' else 'with'} the toolkit's {rules}"] if rules else []
    if not goes_step_by_step(case.spec):
        parts.append(f"{len(found.x)} images, each alone")
    return "; ".join(parts)


def _float64_difference(
    reference: str, spec: Spec, model: nn.Module, x: Tensor, y: Tensor, nb_classes: int, seed: int
) -> float | None:
    """Largest pixel difference of two free float64 runs; None for ART, which casts images to float32."""
    if reference == "ART":
        return None
    x, y = x[:FLOAT64_IMAGES].double(), y[:FLOAT64_IMAGES]
    model = copy.deepcopy(model).double()
    theirs = record(reference, spec, model, x, y, nb_classes, seed)
    native = free_run(spec, reference, model, x, y, theirs.iterates[0])
    return (native.x_adv - theirs.x_adv).abs().max().item()
