"""How near the images are that attacks of the smallest perturbation find, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from guardians.engine.victim import predicted_labels
from guardians.experiments.run import Run
from guardians.experiments.store import Store
from guardians.figures import plot_accuracy_by_const, plot_frontier, plot_perturbations
from guardians.tables import BENCHMARK_COLUMNS, write_csv, write_shown
from guardians.toolkits.build import build_attack

__all__ = [
    "CONST_COLUMNS",
    "MINIMUM_NORM_COLUMNS",
    "MINIMUM_NORM_SHOWN",
    "consts_view",
    "local_optimality",
    "minimum_norm_table",
    "minimum_norm_view",
    "show_perturbations",
]

MINIMUM_NORM_COLUMNS = {
    "model": "name of the model",
    "model_digest": BENCHMARK_COLUMNS["model_digest"],
    "data": "where the images came from, and the first digits of a SHA-256 digest of images and labels",
    "n": "images, the first that the model gets right",
    "implementation": "native, native as in the paper (adaptive=False), ART, torchattacks or foolbox, and an attack "
    "that is not Carlini-Wagner's",
    "setting": "searches for c x steps of each, or steps",
    "params": "JSON: arguments other than the implementation's defaults",
    "batch_size": "images given to the attack at a time",
    "success_rate": "fraction of the images that fool the model, by its own verdict",
    "l2_median": "median L2 norm of the perturbations that fool it",
    "l2_mean": "mean L2 norm of the perturbations that fool it",
    "forward_per_image": "samples that went forward through the model, or through the copy that searches",
    "backward_per_image": "samples that went backward through it: gradient evaluations",
    "judgement_per_image": "samples that went forward through the model for judgement alone",
    "seconds": "wall-clock time of the attack on all images",
    "l2_best": "mean over the images of the smallest L2 norm that any run of the study found",
    "l2_ratio": "mean L2 norm over the mean of the smallest ones, of the images that this run fooled",
    "l2_penalised": "mean L2 norm where an image that was not fooled, or further than that, counts as the radius at "
    "which the best images are all inside: the area under robust accuracy against that radius",
    "local_optimality": "(radius - l2_penalised) / (radius - l2_best), AttackBench's (Cina et al. 2025)",
    "speed_up": "time of ART at its defaults over that of this run",
}
MINIMUM_NORM_SHOWN = (
    *("model", "implementation", "setting", "success_rate", "l2_median", "l2_mean", "l2_ratio"),
    *("local_optimality", "forward_per_image", "backward_per_image", "seconds", "speed_up"),
)
"""Those that are shown at first."""
CONST_COLUMNS = {
    "model": "name of the model",
    "const": "c, fixed",
    "n": "images, the first that the model gets right",
    "accuracy": "fraction of them that still stand",
    "l2_mean": "mean L2 norm of the perturbations that fool the model",
}
_SHOWN, _SHOWN_CONSTS = 4, (0.1, 100.0)
"""Images of the figure, and what c they are attacked with."""


def minimum_norm_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`carlini_wagner.csv` and `carlini_wagner_frontier.png`."""
    frame = minimum_norm_table(store, runs)
    if len(frame):
        plot_frontier(frame, out / "carlini_wagner_frontier.png")
    return write_shown(frame, out / "carlini_wagner.csv", MINIMUM_NORM_SHOWN)


def consts_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`carlini_wagner_consts.csv` and `.png`, and `carlini_wagner_c.png`, images attacked with little and much c."""
    rows = []
    for run, _ in runs:
        if run.key not in store:
            continue
        outcomes, fooled = _fooled(store, run)
        figures = {"accuracy": 1 - fooled.mean(), "l2_mean": outcomes["l2"][fooled].mean()}
        rows.append(run.known | {"const": _const(run)} | figures)
    frame = pd.DataFrame(rows, columns=list(CONST_COLUMNS))
    write_csv(frame, out / "carlini_wagner_consts.csv")
    if len(frame):
        plot_accuracy_by_const(frame, out / "carlini_wagner_consts.png")
    shown = [run for run, _ in runs if run.subject is runs[0][0].subject and _const(run) in _SHOWN_CONSTS]
    if shown:
        show_perturbations(shown, out / "carlini_wagner_c.png")
    return frame


def _fooled(store: Store, run: Run) -> tuple[pd.DataFrame, pd.Series]:
    """The outcomes of its images, and which of them fool the model."""
    outcomes = store.outcomes(run.key)
    return outcomes, outcomes["adversarial_prediction"] != outcomes["label"]


def _const(run: Run) -> float:
    assert run.attack is not None
    return float(run.attack.get("const", np.nan))


def show_perturbations(runs: Sequence[Run], path: Path) -> None:
    """The first images of runs on one subject, which are made again for it."""
    data, subject = runs[0].data, runs[0].subject
    x, y = data.as_floats()[:_SHOWN].to(runs[0].device), data.labels[:_SHOWN].to(runs[0].device)
    adversarial, predictions = {}, {}
    for run in runs:
        assert run.attack is not None
        setting: dict[str, Any] = {
            "nb_classes": len(data.classes),
            "input_shape": tuple(x.shape[1:]),
            "batch_size": len(x),
        }
        attack = build_attack(run.implementation, run.attack, subject.base, seed=run.seed, **setting, **run.options)
        title = f"c = {_const(run):g}"
        adversarial[title] = attack(x, y)
        predictions[title] = [data.classes[label] for label in predicted_labels(subject.base, adversarial[title])]
    plot_perturbations(x, adversarial, path, labels=[data.classes[label] for label in y], predictions=predictions)


def minimum_norm_table(store: Store, runs: Sequence[tuple[Run, str]]) -> pd.DataFrame:
    """Runs that are complete, with what each is worth beside the others on the same model: `MINIMUM_NORM_COLUMNS`."""
    done = {known["key"]: known for known in store.runs([run.key for run, _ in runs])}
    rows, distances = [], []
    for run, label in runs:
        if run.key not in done:
            continue
        known, outcomes, fooled = done[run.key], *_fooled(store, run)
        n = len(outcomes)
        distances.append(np.where(fooled, outcomes["l2"], np.inf))
        rows.append(
            run.known
            | {
                "implementation": _implementation(run),
                "setting": label,
                "params": json.dumps(run.known["spec"]["params"], sort_keys=True),
                "success_rate": fooled.mean(),
                "l2_median": outcomes["l2"][fooled].median(),
                "l2_mean": outcomes["l2"][fooled].mean(),
                "seconds": known["seconds"],
                **{f"{kind}_per_image": known[kind] / n for kind in ("forward", "backward", "judgement")},
            }
        )
    frame = pd.DataFrame(rows, columns=list(MINIMUM_NORM_COLUMNS))
    parts = [
        _beside_others(same, np.stack([distances[i] for i in same.index]))
        for _, same in frame.groupby("model", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)[list(MINIMUM_NORM_COLUMNS)] if parts else frame


def _implementation(run: Run) -> str:
    spec = run.attack
    assert spec is not None
    if spec.get("adaptive") is False:
        return f"{run.implementation}, as in the paper"
    return run.implementation if spec.family == "C&W" else f"{run.implementation} {spec.family}"


def _beside_others(rows: pd.DataFrame, distances: np.ndarray) -> pd.DataFrame:
    """The rows of one model, and the distances of its images (rows, N), infinite where they do not fool it."""
    best = distances.min(axis=0)
    radius = best[np.isfinite(best)].max(initial=0.0)
    fooled = np.isfinite(distances)
    ratio = [own[f].mean() / best[f].mean() if f.any() else np.nan for own, f in zip(distances, fooled, strict=True)]
    is_art = (rows["implementation"] == "ART") & (rows["params"] == "{}")
    art = rows.loc[is_art, "seconds"].iloc[0] if is_art.any() else np.nan
    return rows.assign(
        l2_best=np.minimum(best, radius).mean(),
        l2_ratio=ratio,
        l2_penalised=np.minimum(distances, radius).mean(axis=1),
        local_optimality=[local_optimality(own, best) for own in distances],
        speed_up=art / rows["seconds"],
    )


def local_optimality(distances: np.ndarray, best: np.ndarray) -> float:
    """How much of the area that the best attack leaves under robust accuracy against the radius this one leaves too.

    1 for an attack that is the best on every image, 0 for one that fools no image before the best has fooled all
    (Cina et al., "AttackBench", 2025, section 3). For images that the model gets right. NaN where the best leaves no
    area: nothing is fooled, or all images at the same radius.

    Args:
        distances: norms of an attack's perturbations (N,), infinite where the model was not fooled.
        best: the smallest norms (N,) that any attack found.
    """
    radius = best[np.isfinite(best)].max(initial=0.0)
    reached = radius - np.minimum(best, radius).mean()
    return float((radius - np.minimum(distances, radius).mean()) / reached) if reached > 0 else float("nan")
