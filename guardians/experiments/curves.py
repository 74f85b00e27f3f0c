"""Figures that follow from the store alone: security curves, and accuracy against steps, gradients, lambda and K."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from guardians.experiments.names import parsed
from guardians.experiments.store import Store, standing
from guardians.figures import plot_lines
from guardians.statistics import wilson_interval

__all__ = ["Drawn", "draw_figures"]

_LEAST = 3
"""Points that make a line."""
_RADII = 100
_COLUMNS = ["of", "panel", "line", "x", "accuracy", "low", "high"]


class Drawn(NamedTuple):
    """A figure in a folder: `figures/{name}.svg` and `.png`.

    Attributes:
        name: of the files.
        title: a line.
        caption: what it shows, and how to read it.
        command: that drew it.
    """

    name: str
    title: str
    caption: str
    command: str = "guardians report"


class _Kind(NamedTuple):
    """A figure, how its points are found, and its horizontal axis."""

    drawn: Drawn
    points: Callable[[Store, list[dict[str, Any]]], Iterator[dict[str, Any]]]
    axis: str
    scale: str = "linear"
    steps: bool = False


def draw_figures(store: Store, out: str | os.PathLike[str]) -> list[Drawn]:
    """Draw what the runs of a store have the points for, a panel for each model and norm.

    Args:
        store: of which complete runs count.
        out: folder of `figures/`, which is created.

    Returns:
        The figures, in the order in which they are shown.
    """
    runs = [run for run in store.runs() if run["spec"] is not None and "source" not in run["options"]]
    drawn = []
    for kind in _KINDS:
        frame = _lines(pd.DataFrame(kind.points(store, runs), columns=_COLUMNS))
        if len(frame):
            for suffix in ("svg", "png"):
                path = Path(out) / "figures" / f"{kind.drawn.name}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                plot_lines(frame, path, axis=kind.axis, scale=kind.scale, steps=kind.steps)
            drawn.append(kind.drawn)
    return drawn


def _lines(points: pd.DataFrame) -> pd.DataFrame:
    """Lines of points that belong together, `of` one run, or of runs on one data set; the longest of several."""
    points = points.drop_duplicates(["of", "panel", "line", "x"])
    length = points.groupby(["of", "panel", "line"])["x"].transform("size")
    longest = length.groupby([points["panel"], points["line"]]).transform("max")
    kept = points[(length == longest) & (length >= _LEAST)]
    first = kept.groupby(["panel", "line"])["of"].transform("first")
    return kept[kept["of"] == first]


def _point(store: Store, run: dict[str, Any], panel: str, line: str, x: float) -> dict[str, Any]:
    stands = standing(store.outcomes(run["key"]))[1]
    low, high = wilson_interval(int(stands.sum()), len(stands))
    of = run["data_digest"], run["seed"]
    return {"of": of, "panel": panel, "line": line, "x": x, "accuracy": stands.mean(), "low": low, "high": high}


def _panel(run: dict[str, Any], *, eps: bool) -> str:
    ball = f"norm {float(run['spec']['norm']):g}"
    defence = "" if run["defence"] == "none" else f", {run['defence'].partition('(')[0]}"
    return f"{run['model']}{defence}, {ball}" + (f", eps {run['spec']['eps']:.3g}" if eps else "")


def _line(run: dict[str, Any], name: str) -> str:
    return name if run["implementation"] == "native" else f"{name}, {run['implementation']}"


def _by_eps(store: Store, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for run in runs:
        if run["spec"]["eps"] is not None:
            yield _point(store, run, _panel(run, eps=False), _line(run, run["attack"]), run["spec"]["eps"])


def _by_steps(store: Store, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for run in runs:
        spec = run["spec"]
        if spec["eps"] is not None and spec["params"].get("steps"):
            yield _point(store, run, _panel(run, eps=True), _line(run, spec["family"]), spec["params"]["steps"])


def _by_gradients(store: Store, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of attacks that count by image, what stands after so many gradients spent on each."""
    for run in runs:
        outcomes = store.outcomes(run["key"])
        if run["spec"]["eps"] is None or outcomes["backward"].isna().any():
            continue
        right, stands = standing(outcomes)
        spent = outcomes["backward"].where(right, 0).where(~stands, np.inf)
        for x in np.unique(np.append(spent[np.isfinite(spent)], [0, outcomes["backward"].max()])):
            left = int((spent > x).sum())
            low, high = wilson_interval(left, len(spent))
            line = {"of": run["key"], "panel": _panel(run, eps=True), "line": _line(run, run["attack"]), "x": x}
            yield line | {"accuracy": left / len(spent), "low": low, "high": high}


def _by_distance(store: Store, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of searches for the smallest perturbation, what stands at each radius."""
    for run in runs:
        if run["spec"]["eps"] is not None:
            continue
        outcomes = store.outcomes(run["key"])
        size = outcomes[f"l{float(run['spec']['norm']):g}"].where(~standing(outcomes)[1], np.inf)
        params = ", ".join(f"{key}={value}" for key, value in run["spec"]["params"].items() if key != "steps")
        name = run["attack"] + (f" ({params})" if params else "")
        for x in np.linspace(0, size[np.isfinite(size)].max(), _RADII):
            left = int((size > x).sum())
            low, high = wilson_interval(left, len(size))
            line = {"of": run["key"], "panel": _panel(run, eps=False), "line": _line(run, name), "x": x}
            yield line | {"accuracy": left / len(size), "low": low, "high": high}


def _by_argument(argument: str) -> Callable[[Store, list[dict[str, Any]]], Iterator[dict[str, Any]]]:
    """Runs on Mixup Inference with several values of an argument, the others being equal."""

    def points(store: Store, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for run in runs:
            kind, arguments = parsed(run["defence"])
            if kind.startswith("mi") and argument in arguments and run["spec"]["eps"] is not None:
                same = {key: value for key, value in arguments.items() if key not in (argument, "search_passes")}
                others = ", ".join(f"{key}={value}" for key, value in same.items())
                panel = f"{run['model']}, {kind}, {others}, eps {run['spec']['eps']:.3g}"
                yield _point(store, run, panel, _line(run, run["attack"]), arguments[argument])

    return points


_KINDS = (
    _Kind(
        Drawn(
            "security_curves",
            "Security curves",
            "Robust accuracy against the radius of the ball, with 95 % intervals. The lowest line is what is known of "
            "the model; a line that does not fall to 0 with a large radius tells of masked gradients.",
        ),
        _by_eps,
        "radius eps",
    ),
    _Kind(
        Drawn(
            "accuracy_by_distance",
            "The smallest perturbations",
            "Share of the images that stand at each radius, by the smallest perturbations that each attack found: the "
            "distribution of their norms, from above.",
        ),
        _by_distance,
        "radius",
        steps=True,
    ),
    _Kind(
        Drawn(
            "accuracy_by_steps",
            "Accuracy against iterations",
            "Robust accuracy against the number of steps, with 95 % intervals. Where a line still falls at its end, "
            "more steps would tell more.",
        ),
        _by_steps,
        "iterations",
        "log",
    ),
    _Kind(
        Drawn(
            "accuracy_by_gradients",
            "Accuracy against gradients",
            "Robust accuracy after so many gradients have been spent on each image. What falls fast is cheap; where "
            "all lines are flat, more would change nothing.",
        ),
        _by_gradients,
        "gradients spent on an image",
        "symlog",
        steps=True,
    ),
    _Kind(
        Drawn(
            "accuracy_by_lambda",
            "Mixup Inference against lambda",
            "Robust accuracy against the weight of the image in the mixture, with 95 % intervals; at 1 nothing is "
            "mixed.",
        ),
        _by_argument("lam"),
        "lambda, the weight of the image",
    ),
    _Kind(
        Drawn(
            "accuracy_by_samples",
            "Mixup Inference against K",
            "Robust accuracy against the number of mixtures whose mean is the answer, with 95 % intervals.",
        ),
        _by_argument("num_samples"),
        "K, mixtures for one answer",
        "log",
    ),
)
