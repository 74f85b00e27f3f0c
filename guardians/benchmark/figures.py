"""Figures of the benchmarks."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["plot_cost"]

_STYLES = {
    ("native", "auto"): ("#0072B2", "-"),
    ("native", "float32"): ("#D55E00", "-"),
    ("torchattacks", "float32"): ("#000000", "--"),
}
"""Colour and line of an implementation and its precision; colours of Okabe and Ito, told apart by the colour-blind."""
_MARKERS = "osD^v*"
"""Of the models."""


def plot_cost(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Time against the number of images, and time per image against the share of robust ones, as a PNG file.

    Args:
        frame: a table with the columns `guardians.benchmark.throughput.COST_COLUMNS`.
        path: of the PNG file; the same table gives the same bytes.

    Raises:
        ValueError: the table is empty, or holds several threat models or numbers of steps.
    """
    settings = frame[["steps", "eps"]].drop_duplicates()
    if len(settings) != 1:
        raise ValueError(f"frame holds {len(settings)} combinations of steps and eps: must be one")
    steps, eps = int(settings["steps"].iloc[0]), float(settings["eps"].iloc[0])
    markers = {model: _MARKERS[i % len(_MARKERS)] for i, model in enumerate(frame["model"].unique())}

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(rf"Cost of PGD-{steps} ($\ell_\infty$, $\varepsilon$ = {255 * eps:g}/255)")

    by_number = frame[frame["study"] == "images"]
    _draw(left, by_number, x="n", y="seconds", markers=markers)
    left.set(xscale="log", yscale="log", xlabel="number of images", ylabel="time (s)")
    left.set_title("Time by number of images", fontsize="medium")

    by_share = frame[frame["study"] == "robustness"]
    by_share = by_share.assign(percent=100 * by_share["robust_share"], ms=1000 * by_share["seconds_per_image"])
    _draw(right, by_share, x="percent", y="ms", markers=markers)
    right.set(xlabel="share of images that withstand (%)", ylabel="time per image (ms)")
    right.set_ylim(bottom=0)
    names = ", ".join(by_share["model"].unique())
    right.set_title(f"Time per image by share of robust images ({names})", fontsize="medium")

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _draw(axes: Axes, frame: pd.DataFrame, *, x: str, y: str, markers: dict[str, str]) -> None:
    """A line for each model and implementation."""
    for key, line in frame.groupby(["model", "implementation", "precision"], sort=False):
        model, implementation, precision = map(str, key)
        colour, dashes = _STYLES[implementation, precision]
        line = line.sort_values(x)
        label = (
            f"{implementation}, {precision}: {model}" if implementation == "native" else f"{implementation}: {model}"
        )
        axes.plot(
            line[x],
            line[y],
            color=colour,
            linestyle=dashes,
            marker=markers[model],
            markerfacecolor="white",
            markersize=5,
            label=label,
        )
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize="small", frameon=False)
