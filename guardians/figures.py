"""Figures of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

__all__ = [
    "plot_accuracy_by_const",
    "plot_cost",
    "plot_frontier",
    "plot_lines",
    "plot_perturbations",
]

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#000000", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442")
"""Colours of Okabe and Ito, told apart by the colour-blind; the palest last."""
_STYLES = {
    ("native", "auto"): ("#0072B2", "-"),
    ("native", "float32"): ("#D55E00", "-"),
    ("torchattacks", "float32"): ("#000000", "--"),
}
"""Colour, of `_PALETTE`, and line of an implementation and its precision."""
_COLOURS = {
    "native": "#0072B2",
    "native, as in the paper": "#56B4E9",
    "ART": "#E69F00",
    "torchattacks": "#000000",
    "foolbox": "#009E73",
    "foolbox DDN": "#CC79A7",
}
"""Of the implementations of `plot_frontier`; others take what is left of `_PALETTE`."""
_DASHES = ("-", "--", ":")
_MARKERS = "osD^v*"
"""Of the models; in `plot_frontier`, of the implementations."""
_BEST = "best of all attacks for each image"
_HOLLOW = "hollow: does not fool all images"


def plot_cost(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Time against the number of images, as a PNG file.

    Args:
        frame: a table with the columns `guardians.experiments.throughput.THROUGHPUT_COLUMNS`.
        path: of the PNG file; the same table gives the same bytes.

    Raises:
        ValueError: the table is empty, or holds several threat models or numbers of steps.
    """
    settings = frame[["steps", "eps"]].drop_duplicates()
    if len(settings) != 1:
        raise ValueError(f"frame holds {len(settings)} combinations of steps and eps: must be one")
    steps, eps = int(settings["steps"].iloc[0]), float(settings["eps"].iloc[0])
    markers = _markers(frame["model"])
    figure = _new_figure(7, 5)
    axes = figure.subplots()
    for key, line in frame.groupby(["model", "implementation", "precision"], sort=False):
        model, implementation, precision = map(str, key)
        colour, dashes = _STYLES.get((implementation, precision), ("0.5", ":"))
        name = f"{implementation}, {precision}" if implementation == "native" else implementation
        line = line.sort_values("n")
        axes.plot(
            line["n"],
            line["seconds"],
            color=colour,
            linestyle=dashes,
            marker=markers[model],
            markerfacecolor="white",
            markersize=5,
            label=f"{name}: {model}",
        )
    axes.set(xscale="log", yscale="log", xlabel="number of images", ylabel="time (s)")
    axes.set_title(rf"Cost of PGD-{steps} ($\ell_\infty$, $\varepsilon$ = {255 * eps:g}/255)", fontsize="medium")
    _tidy(axes)
    axes.legend(fontsize="small", frameon=False)
    _save(figure, path)


def plot_curve(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Robust accuracy against the gradients spent on an image, as a PNG or SVG file.

    Args:
        frame: a table with the columns gradients and robust_accuracy, see `guardians.evaluation.Evaluation.curve`.
        path: of the file, an SVG file where it ends in .svg; the same table gives the same bytes.
    """
    figure = _new_figure(6, 4)
    axes = figure.subplots()
    axes.step(frame["gradients"], 100 * frame["robust_accuracy"], where="post", color=_PALETTE[0])
    axes.set(xscale="symlog", xlabel="gradients spent on an image", ylabel="robust accuracy (%)")
    axes.set_ylim(bottom=0)
    _tidy(axes)
    _save(figure, path)


def plot_frontier(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    r"""Mean \(\ell_2\) norm against gradient evaluations per image, a panel for each model, as a PNG file.

    A line joins the settings of an implementation, and a dotted one marks the mean of the smallest norm that any attack
    reaches on each image. Markers are hollow where the setting does not fool all images.

    Args:
        frame: a table with a row for each model, implementation and setting, and the columns `model`,
            `implementation`, `setting` (a short label), `backward_per_image` (gradient evaluations), `l2_penalised`
            (mean \(\ell_2\) norm, in pixel values of 0 to 1, where images that are not fooled count with the radius at
            which the best attack fools all), `success_rate` (share of images fooled, 0 to 1) and `l2_best` (of the
            dotted line, one value for each model).
        path: of the PNG file; the same table gives the same bytes.

    Raises:
        ValueError: the table is empty, `backward_per_image` is not positive everywhere, or a model has several
            values of `l2_best`.
    """
    _save(_frontier_figure(frame), path)


def _frontier_figure(frame: pd.DataFrame) -> Figure:
    """What `plot_frontier` saves."""
    _check_log(frame, "backward_per_image")
    models = list(frame["model"].unique())
    colours, markers = _colours(frame["implementation"]), _markers(frame["implementation"])
    figure = _new_figure(max(5 * len(models), 6), 5)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _draw_frontier(axes, frame[frame["model"] == model], colours, markers)
        axes.set_title(str(model), fontsize="medium")
    panels[0].set_ylabel(r"mean $\ell_2$ norm")
    handles = [Line2D([], [], color=colours[name], marker=markers[name], ms=5, label=name) for name in colours]
    handles.append(Line2D([], [], color="0.4", linestyle=":", label=_BEST))
    if (frame["success_rate"] < 1).any():
        handles.append(Line2D([], [], color="0.4", ls="none", marker="o", mfc="white", ms=5, label=_HOLLOW))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def _draw_frontier(axes: Axes, frame: pd.DataFrame, colours: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """The panel of a model: a line for each implementation, hollow markers over it, and the best norm."""
    best = frame["l2_best"].unique()
    if len(best) != 1:
        raise ValueError(f"l2_best has {len(best)} values for the model {frame['model'].iloc[0]!r}: must be one")
    for name, line in frame.groupby("implementation", sort=False):
        line = line.sort_values("backward_per_image", kind="stable")
        colour, marker = colours[str(name)], markers[str(name)]
        axes.plot(line["backward_per_image"], line["l2_penalised"], color=colour, marker=marker, ms=5, label=name)
        _draw_hollow(axes, line[line["success_rate"] < 1], colour, marker)
        for setting, x, y in zip(line["setting"], line["backward_per_image"], line["l2_penalised"], strict=True):
            _annotate(axes, str(setting), (x, y), colour)
    axes.axhline(best[0], color="0.4", linestyle=":", label=_BEST)
    axes.set(xscale="log", xlabel="gradient evaluations per image")
    axes.set_ylim(bottom=_bottom([*frame["l2_penalised"], *best]))
    _tidy(axes)


def _draw_hollow(axes: Axes, points: pd.DataFrame, colour: str, marker: str) -> None:
    """White markers with a coloured edge over those of a line that is drawn."""
    if len(points):
        x, y = points["backward_per_image"], points["l2_penalised"]
        axes.plot(x, y, color=colour, linestyle="none", marker=marker, markerfacecolor="white", ms=5, zorder=3)


def _annotate(axes: Axes, text: str, point: tuple[float, float], colour: str) -> None:
    """A small label to the upper right of a point."""
    axes.annotate(text, point, xytext=(3, 3), textcoords="offset points", fontsize="x-small", color=colour)


def _bottom(values: Sequence[float]) -> float:
    """Lower end of an axis a little below the smallest of the finite values, and at least 0."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return 0.0
    low, high = min(finite), max(finite)
    return max(0.0, low - 0.1 * ((high - low) or low))


def plot_perturbations(
    images: Tensor,
    adversarial: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
    magnify: float = 10.0,
) -> None:
    r"""Clean image, adversarial image and magnified perturbation side by side, as a PNG file.

    A row for each image, and three columns for each key of `adversarial`. The perturbation \(\delta\) is shown as
    \(1/2 + m \delta\), clipped to [0, 1], with its \(\ell_2\) norm below.

    Args:
        images: clean images, (N, C, H, W) in [0, 1]; C is 3, or 1 for grey-scale images.
        adversarial: adversarial images of the same shape by the title of their columns, for example "c = 0.1".
        path: of the PNG file; the same input gives the same bytes.
        labels: N names of the classes of the clean images.
        predictions: N names of the classes predicted for the adversarial images, for each key of `adversarial`.
        magnify: factor \(m\).

    Raises:
        ValueError: there are no images or no adversarial ones, `images` is not (N, C, H, W) with 1 or 3 channels,
            adversarial images have another shape, or labels or predictions are not as many as the images.
    """
    _save(_perturbations_figure(images, adversarial, labels=labels, predictions=predictions, magnify=magnify), path)


def _perturbations_figure(
    images: Tensor,
    adversarial: Mapping[str, Tensor],
    *,
    labels: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
    magnify: float,
) -> Figure:
    """What `plot_perturbations` saves."""
    _check_perturbations(images, adversarial, labels, predictions)
    figure = _new_figure(1.5 * 3 * len(adversarial), 1.7 * len(images) + 0.4)
    panels = figure.subplots(len(images), 3 * len(adversarial), squeeze=False)
    clean = images.detach().float().cpu()
    for i, (key, attacked) in enumerate(adversarial.items()):
        columns = panels[:, 3 * i : 3 * i + 3]
        attacked = attacked.detach().float().cpu()
        delta = attacked - clean
        for j, (left, middle, right) in enumerate(columns):
            _show(left, clean[j], labels[j])
            _show(middle, attacked[j], predictions[key][j])
            _show(right, 0.5 + magnify * delta[j], f"L2 {float(delta[j].norm()):.2f}")
        titles = ("clean", "adversarial", f"perturbation x {magnify:g}")
        for axes, title in zip(columns[0], titles, strict=True):
            axes.set_title(f"{key}\n{title}", fontsize="small")
    return figure


def _check_perturbations(
    images: Tensor,
    adversarial: Mapping[str, Tensor],
    labels: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
) -> None:
    """Raise a ValueError where the arguments of `plot_perturbations` do not fit together."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images has the shape {tuple(images.shape)}: must be (N, 1 or 3, H, W) with N at least 1")
    if not adversarial:
        raise ValueError("adversarial is empty: must hold at least one batch of images")
    if len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    for key, attacked in adversarial.items():
        if attacked.shape != images.shape:
            shapes = f"{tuple(attacked.shape)}: must be that of images, {tuple(images.shape)}"
            raise ValueError(f"adversarial[{key!r}] has the shape {shapes}")
        if len(predictions.get(key, ())) != len(images):
            raise ValueError(f"{len(predictions.get(key, ()))} predictions for {key!r}, for {len(images)} images")


def _show(axes: Axes, image: Tensor, caption: str) -> None:
    """An image, (C, H, W), clipped to [0, 1], with a caption below and no ticks."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize="small")


def plot_accuracy_by_const(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    r"""Robust accuracy and mean \(\ell_2\) norm of the perturbations against the constant c, as a PNG file.

    Args:
        frame: a table with a row for each model and constant, and the columns `model`, `const` (c, positive),
            `accuracy` (share of images that still stand, 0 to 1) and `l2_mean` (mean \(\ell_2\) norm of the
            perturbations of images that are fooled, in pixel values of 0 to 1; NaN, not drawn, where none is).
        path: of the PNG file; the same table gives the same bytes.

    Raises:
        ValueError: the table is empty, or `const` is not positive everywhere.
    """
    _save(_accuracy_figure(frame), path)


def _accuracy_figure(frame: pd.DataFrame) -> Figure:
    """What `plot_accuracy_by_const` saves."""
    _check_log(frame, "const")
    frame = frame.assign(percent=100 * frame["accuracy"]).sort_values("const", kind="stable")
    models = list(dict.fromkeys(frame["model"]))
    markers = _markers(frame["model"])
    figure = _new_figure(10, 4.5)
    left, right = figure.subplots(1, 2, sharex=True)
    panels = ((left, "percent", "robust accuracy (%)"), (right, "l2_mean", r"mean $\ell_2$ norm where fooled"))
    for axes, column, title in panels:
        for model, colour in zip(models, cycle(_PALETTE), strict=False):
            x, y = (frame.loc[frame["model"] == model, name] for name in ("const", column))
            axes.plot(x, y, color=colour, marker=markers[model], ms=5, label=model, clip_on=False)
        axes.set(xscale="log", xlabel="c", ylabel=title)
        axes.set_ylim(bottom=0)
        _tidy(axes)
    left.legend(fontsize="small", frameon=False)
    return figure


def plot_lines(
    frame: pd.DataFrame, path: str | os.PathLike[str], *, axis: str, scale: str = "linear", steps: bool = False
) -> None:
    """Accuracy with its interval against something, a panel for each group of lines.

    Args:
        frame: columns `panel`, `line`, `x`, `accuracy`, `low` and `high` (0 to 1).
        path: of the file; the same table gives the same bytes.
        axis: what x is.
        scale: of x, as matplotlib's.
        steps: whether accuracy stays the same until the next x.

    Raises:
        ValueError: the table is empty.
    """
    if frame.empty:
        raise ValueError("frame is empty: must have at least one row")
    panels = list(dict.fromkeys(frame["panel"]))
    names = list(dict.fromkeys(frame["line"]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _new_figure(4 * columns, 3.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for number, name in enumerate(names):
            line = frame[(frame["panel"] == panel) & (frame["line"] == name)].sort_values("x")
            if line.empty:
                continue
            style = {"color": _PALETTE[number % len(_PALETTE)], "ls": _DASHES[number // len(_PALETTE) % len(_DASHES)]}
            percent = 100 * line[["accuracy", "low", "high"]]
            where = {"drawstyle": "steps-post"} if steps else {"marker": _MARKERS[number % len(_MARKERS)], "ms": 4}
            axes.plot(line["x"], percent["accuracy"], label=name, **style, **where)
            step = "post" if steps else None
            axes.fill_between(
                line["x"], percent["low"], percent["high"], color=style["color"], alpha=0.12, lw=0, step=step
            )
        axes.set(xscale=scale, xlabel=axis, ylabel="robust accuracy (%)")
        if scale == "log":
            ticks = sorted(frame.loc[frame["panel"] == panel, "x"].unique())
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_title(panel, fontsize="small")
        _tidy(axes)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small", frameon=False
    )
    _save(figure, path)


def _check_log(frame: pd.DataFrame, column: str) -> None:
    """Raise a ValueError where a table has no rows, or values that a logarithmic axis does not show."""
    if frame.empty:
        raise ValueError("frame is empty: must have at least one row")
    if not (np.isfinite(frame[column]) & (frame[column] > 0)).all():
        raise ValueError(f"{column} must be positive and finite everywhere, for the logarithmic axis")


def _markers(names: pd.Series) -> dict[str, str]:
    """A marker for each distinct name, in order of appearance."""
    return dict(zip(names.unique(), cycle(_MARKERS), strict=False))


def _colours(implementations: pd.Series) -> dict[str, str]:
    """A colour for each distinct implementation, in order of appearance: its own, or one that none here has."""
    names = list(implementations.unique())
    taken = {_COLOURS[name] for name in names if name in _COLOURS}
    spare = cycle([colour for colour in _PALETTE if colour not in taken])
    return {name: _COLOURS[name] if name in _COLOURS else next(spare) for name in names}


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that Agg draws."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    """A faint grid, and no lines at the top and right."""
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG file of 150 dots per inch, or where the name ends so an SVG file; creates its folder.

    Neither holds the version of Matplotlib or the time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        with rc_context({"svg.hashsalt": "guardians"}):
            figure.savefig(path, format="svg", metadata={"Creator": None, "Date": None})
    else:
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
