"""The figures that a report of 2023 on CIFAR-10 published, and what becomes of its claims here.

The report names neither an architecture nor eps, the number of images or the length of training. So its figures are
held against those of a model like its own, and its claims, which are comparisons, also against those of other models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from guardians.experiments.minimum_norm import show_perturbations
from guardians.experiments.names import parsed
from guardians.experiments.run import Run
from guardians.experiments.store import Store, standing
from guardians.figures import plot_lines
from guardians.statistics import paired_difference, wilson_interval
from guardians.tables import BENCHMARK_COLUMNS, markdown, write_shown

logger = logging.getLogger(__name__)

__all__ = [
    "CLAIMS",
    "PUBLISHED_COLUMNS",
    "PUBLISHED_SHOWN",
    "Claim",
    "as_markdown",
    "judged",
    "published_table",
    "published_view",
]

CLOSE = 0.03
"""Accuracy within which a figure counts as the same: the report's models, images and eps are unknown."""
LAMBDA, PICTURES, SEARCH = "lambda", "pictures", "search for eps"
"""Labels of runs that no claim is about."""


class Claim(NamedTuple):
    """One figure of the report.

    Attributes:
        role: of what is attacked, see `_role`.
        attack: the label of its runs.
        published: the accuracy.
        beside: role and attack of what the report compares it with, in the same study; None for its first figure.
        published_beside: the accuracy of that.
        reading: how the report's words were taken, where they can be taken otherwise.
    """

    role: str
    attack: str
    published: float
    beside: tuple[str, str] | None = None
    published_beside: float = float("nan")
    reading: str = ""


_SWAPPED = "the report's columns with and without the defence are taken as swapped in the rows of attacks"
CLAIMS = (
    Claim("standard", "clean", 0.55),
    Claim("standard", "FGSM", 0.10, ("standard", "clean"), 0.55),
    Claim("standard", "PGD-10", 0.092, ("standard", "FGSM"), 0.10),
    Claim("standard", "PGD-40", 0.063, ("standard", "PGD-10"), 0.092),
    Claim("standard", "C&W", 0.32, ("standard", "clean"), 0.55, "no ball bounds the perturbation"),
    Claim("fgsm-at", "FGSM", 0.2285, ("standard", "FGSM"), 0.10),
    Claim("pgd-at", "PGD-40", 0.2402, ("standard", "PGD-40"), 0.063),
    Claim("rse", "clean", 0.52, ("standard", "clean"), 0.55),
    Claim("rse", "FGSM", 0.16, ("standard", "FGSM"), 0.10, _SWAPPED),
    Claim("rse", "PGD-40", 0.098, ("standard", "PGD-40"), 0.068, _SWAPPED),
    Claim("mi", "clean", 0.43, ("standard", "clean"), 0.55, "the report's text says it the other way round"),
    Claim("mi", "FGSM", 0.095, ("standard", "FGSM"), 0.10),
    Claim("mi", "PGD-40", 0.073, ("standard", "PGD-40"), 0.063),
)
_STRONGER = ("PGD-40", "EOT-PGD", "adaptive", "evaluate")
"""Labels of attacks that a claim is held against besides its own."""

PUBLISHED_COLUMNS = {
    "model": BENCHMARK_COLUMNS["model"],
    "defence": BENCHMARK_COLUMNS["defence"],
    "attack": "the label that the study gives it; lambda is about accuracy as lambda falls",
    "eps": BENCHMARK_COLUMNS["eps"],
    "n": "number of images",
    "published": "accuracy in the report",
    "accuracy": "here",
    "accuracy_low": "lower end of its 95% Wilson interval",
    "accuracy_high": "upper end of it",
    "beside": "what the report compares it with",
    "published_beside": "the accuracy of that in the report",
    "accuracy_beside": "here",
    "difference": "accuracy - accuracy_beside, paired by image",
    "difference_low": "lower end of its 95% interval",
    "difference_high": "upper end of it",
    "verdict": "reproduced, same direction, contradicted or undecided, see `guardians.experiments.published.judged`",
    "why": "the figures that the verdict follows from",
    "stronger": "the attack of the study in the same ball that leaves least of this model and defence",
    "stronger_accuracy": "what it leaves",
    "stronger_beside": "what the strongest leaves of the undefended model; if it is as much, the defence adds nothing",
}


PUBLISHED_SHOWN = (
    *("model", "defence", "attack", "published", "accuracy", "accuracy_low", "accuracy_high", "verdict"),
    *("stronger", "stronger_accuracy", "stronger_beside"),
)
"""Those that are shown at first."""


def judged(
    published: float,
    accuracy: float,
    interval: tuple[float, float],
    published_difference: float = float("nan"),
    difference: tuple[float, float, float] = (float("nan"),) * 3,
) -> tuple[str, str]:
    """A verdict, and why.

    - contradicted: the difference to what the report compares with has the other sign, and a 95% interval without 0;
    - reproduced: else, if the figure lies in the 95% interval of ours, or within 3 points of it;
    - same direction: else, if the difference has the report's sign, and its interval is without 0;
    - undecided: else.

    Args:
        published: accuracy in the report; NaN where it gives no number.
        accuracy: ours.
        interval: of 95%.
        published_difference: to what it is compared with in the report, of which the sign counts; NaN where to nothing.
        difference: ours, and its interval.
    """
    found, low, high = difference
    is_clear = low > 0 or high < 0
    is_close = abs(accuracy - published) <= CLOSE or interval[0] <= published <= interval[1]
    figure = f"{accuracy:.1%}" + ("" if np.isnan(published) else f", in the report {published:.1%}")
    change = f"; {100 * found:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]" if np.isfinite(found) else ""
    if np.isfinite(published_difference) and np.isfinite(published):
        change += f", in the report {100 * published_difference:+.1f}"
    if is_clear and found * published_difference < 0:
        return "contradicted", figure + change
    if is_close:
        return "reproduced", figure + change
    if is_clear and found * published_difference > 0:
        return "same direction", figure + change
    return "undecided", figure + change


def published_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`robust_neural_networks.csv`, a row for each claim and kind of model, and the report's two figures."""
    frame = published_table(store, runs)
    pictured = [run for run, label in runs if label == PICTURES]
    if pictured:
        show_perturbations(pictured, out / "robust_neural_networks_c.png")
    by_lambda = _by_lambda(store, runs)
    if len(by_lambda):
        plot_lines(by_lambda, out / "robust_neural_networks_lambda.png", axis="lambda, the weight of the image")
    return write_shown(frame, out / "robust_neural_networks.csv", PUBLISHED_SHOWN, as_markdown(frame))


def as_markdown(frame: pd.DataFrame) -> str:
    """The table for people: accuracies in percent, with their intervals."""
    names = ("model", "defence", "attack", "report", "here", "verdict", "strongest attack leaves", "of the plain model")
    rows = []
    for row in frame.to_dict("records"):
        interval = f"{100 * row['accuracy']:.1f} [{100 * row['accuracy_low']:.1f}, {100 * row['accuracy_high']:.1f}]"
        published = "" if np.isnan(row["published"]) else f"{100 * row['published']:.4g}"
        stronger = ["", ""]
        if isinstance(row["stronger"], str) and row["stronger"]:
            stronger = [
                f"{100 * row['stronger_accuracy']:.1f} ({row['stronger']})",
                f"{100 * row['stronger_beside']:.1f}",
            ]
        shown = [row["model"], row["defence"].partition("(")[0], row["attack"], published, interval, row["verdict"]]
        rows.append([*shown, *stronger])
    return markdown(names, rows)


def published_table(store: Store, runs: Sequence[tuple[Run, str]]) -> pd.DataFrame:
    """Rows of `PUBLISHED_COLUMNS` for the runs that are complete."""
    _warn_of_eps(store, runs)
    found: dict[str, dict[tuple[str, str], tuple[Run, np.ndarray]]] = {}
    for run, label in runs:
        if label not in (LAMBDA, PICTURES, SEARCH) and run.key in store:
            stands = standing(store.outcomes(run.key))[1].to_numpy()
            found.setdefault(_family(run), {})[_role(run), label] = run, stands
    rows = [
        _row(claim, of_family)
        for of_family in found.values()
        for claim in CLAIMS
        if (claim.role, claim.attack) in of_family
    ]
    return pd.DataFrame([*rows, *_lambda_rows(store, runs)], columns=list(PUBLISHED_COLUMNS))


def _row(claim: Claim, found: Mapping[tuple[str, str], tuple[Run, np.ndarray]]) -> dict[str, Any]:
    run, stands = found[claim.role, claim.attack]
    row = _figures(run, claim.attack, stands) | {"published": claim.published}
    published_difference = claim.published - claim.published_beside
    difference = (float("nan"),) * 3
    if claim.beside is not None and claim.beside in found:
        beside, others = found[claim.beside]
        both = min(len(stands), len(others))
        difference = paired_difference(stands[:both], others[:both])
        row |= {"beside": f"{claim.beside[1]} on {beside.subject.name}", "accuracy_beside": others[:both].mean()}
        row |= {"published_beside": claim.published_beside}
        row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
    interval = row["accuracy_low"], row["accuracy_high"]
    row["verdict"], why = judged(claim.published, row["accuracy"], interval, published_difference, difference)
    row["why"] = "; ".join(filter(None, [why, claim.reading]))
    if claim.attack not in ("clean", "C&W"):
        strongest = {role: _strongest(role, found) for role in (claim.role, "standard")}
        row["stronger"], row["stronger_accuracy"] = strongest[claim.role]
        row["stronger_beside"] = strongest["standard"][1]
    return row


def _strongest(role: str, found: Mapping[tuple[str, str], tuple[Run, np.ndarray]]) -> tuple[str, float]:
    left = {label: found[role, label][1].mean() for label in _STRONGER if (role, label) in found}
    label = min(left, key=lambda name: left[name]) if left else ""
    return label, left.get(label, float("nan"))


def _figures(run: Run, label: str, stands: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(stands.sum()), len(stands))
    eps = 0.0 if run.attack is None else np.inf if run.attack.eps is None else run.attack.eps
    row = {"model": run.subject.name, "defence": run.subject.defence, "attack": label, "eps": eps, "n": len(stands)}
    return row | {"accuracy": stands.mean(), "accuracy_low": low, "accuracy_high": high}


def _lambda_rows(store: Store, runs: Sequence[tuple[Run, str]]) -> list[dict[str, Any]]:
    """For each model whether accuracy falls with lambda from each value to the next smaller: no number is published."""
    rows = []
    for _, of_model in _groups(store, runs).items():
        for attack, by_lambda in of_model.items():
            lams = sorted(by_lambda)
            (_, first), (run, last) = by_lambda[lams[-1]], by_lambda[lams[0]]
            difference = paired_difference(last, first)
            steps = [paired_difference(by_lambda[low][1], by_lambda[high][1]) for low, high in pairwise(lams)]
            falls = difference[2] < 0 and not any(low > 0 for _, low, _ in steps)
            rises = difference[1] > 0 and not any(high < 0 for _, _, high in steps)
            row = _figures(run, f"{LAMBDA}, {attack}", last)
            row |= {"beside": f"lambda {lams[-1]:g}, here {lams[0]:g}", "accuracy_beside": first.mean()}
            row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
            row["verdict"] = "same direction" if falls else "contradicted" if rises else "undecided"
            row["why"] = ", ".join(f"{lam:g}: {by_lambda[lam][1].mean():.1%}" for lam in lams)
            rows.append(row)
    return rows


def _groups(store: Store, runs: Sequence[tuple[Run, str]]) -> dict[str, dict[str, dict[float, tuple[Run, np.ndarray]]]]:
    """By model, attack and lambda, which images stand."""
    groups: dict[str, dict[str, dict[float, tuple[Run, np.ndarray]]]] = {}
    for run, label in runs:
        if label == LAMBDA and run.key in store:
            attack = "clean" if run.attack is None else run.attack.name
            stands = standing(store.outcomes(run.key))[1].to_numpy()
            groups.setdefault(run.subject.name, {}).setdefault(attack, {})[_lambda_of(run)] = run, stands
    return groups


def _by_lambda(store: Store, runs: Sequence[tuple[Run, str]]) -> pd.DataFrame:
    """Accuracy with its interval against lambda, as `plot_lines` takes it: a panel a model, a line an attack."""
    rows = [
        {"panel": model, "line": attack, "x": lam, **_figures(run, attack, stands)}
        for model, of_model in _groups(store, runs).items()
        for attack, by_lambda in of_model.items()
        for lam, (run, stands) in by_lambda.items()
    ]
    return pd.DataFrame(rows).rename(columns={"accuracy_low": "low", "accuracy_high": "high"})


def _warn_of_eps(store: Store, runs: Sequence[tuple[Run, str]]) -> None:
    """Say in the log if FGSM leaves nearest to what the report says at another eps of the search, as on few images."""
    published = next(claim.published for claim in CLAIMS if claim.attack == "FGSM")
    searched = {
        run.attack.eps: standing(store.outcomes(run.key))[1].mean()
        for run, label in runs
        if label == SEARCH and run.attack is not None and run.key in store
    }
    used = {run.attack.eps for run, label in runs if label == "FGSM" and run.attack is not None}
    if searched and len(searched) == sum(label == SEARCH for _, label in runs):
        nearest = min(searched, key=lambda eps: abs(searched[eps] - published))
        if used != {nearest}:
            logger.warning(
                "eps %s of the study is not that of its search: on %d images FGSM leaves nearest to %.0f %% at %.4f",
                used,
                len(next(run.data for run, label in runs if label == SEARCH)),
                100 * published,
                nearest,
            )


def _family(run: Run) -> str:
    """Models of one architecture are compared with each other."""
    return run.subject.name.partition("-")[0]


def _role(run: Run) -> str:
    """Of what is attacked: the recipe of the model, as "standard" and "fgsm-at", or the defence, "rse" or "mi"."""
    kind, recipe = run.subject.kind, run.subject.name.removeprefix(_family(run)).lstrip("-0123456789")
    return recipe if kind == "none" else kind.partition("-")[0]


def _lambda_of(run: Run) -> float:
    return float(parsed(run.subject.defence)[1]["lam"])
