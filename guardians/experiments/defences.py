"""Robust accuracy of models and defences under attacks that know more and more of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from guardians.experiments.run import Run
from guardians.experiments.store import Store, standing
from guardians.statistics import wilson_interval
from guardians.tables import BENCHMARK_COLUMNS, markdown, write_shown

__all__ = ["DEFENCE_COLUMNS", "DEFENCE_SHOWN", "as_markdown", "defences_table", "defences_view"]

_KEPT = ("model", "defence", "model_digest", "data", "device")
_COUNTS = ("forward", "backward", "judgement")
DEFENCE_COLUMNS = {
    **{name: BENCHMARK_COLUMNS[name] for name in _KEPT},
    "attack": "the label that the study gives it",
    "norm": "of the ball in which images count as fooled",
    "eps": "its radius; of attacks that look for the smallest perturbation that of the others in the norm",
    "n": "number of images",
    "seeds": "of the draws of defence and attack; 1 where nothing is random",
    "accuracy": "mean over the seeds of robust accuracy, by fresh draws of the defence; of clean, of accuracy",
    "accuracy_low": "lower end of its 95% Wilson interval over the images",
    "accuracy_high": "upper end of it",
    "seed_sd": "standard deviation of the accuracy over the seeds",
    "seed_min": "lowest accuracy of a seed",
    "seed_max": "highest accuracy of a seed",
    "l2_median": "median L2 norm of the perturbations that fool the defence, over all seeds",
    **{f"{kind}_per_image": f"mean over the seeds: {BENCHMARK_COLUMNS[f'{kind}_per_image']}" for kind in _COUNTS},
    "flags": "flattering: another attack in the same ball leaves an interval that lies below this one's; and those of "
    "the runs",
}


DEFENCE_SHOWN = (
    *("model", "defence", "attack", "norm", "n", "seeds", "accuracy", "accuracy_low", "accuracy_high"),
    *("seed_sd", "backward_per_image", "flags"),
)
"""Those that are shown at first."""


def defences_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`defences.csv`, a row for each subject and label, and `defences.md`, a table for people."""
    frame = defences_table(store, runs)
    return write_shown(frame, out / "defences.csv", DEFENCE_SHOWN, as_markdown(frame))


def defences_table(store: Store, runs: Sequence[tuple[Run, str]]) -> pd.DataFrame:
    """Rows of `DEFENCE_COLUMNS` of the runs that are complete; the seeds of a subject and label are one row."""
    radii = {run.attack.norm: run.attack.eps for run, _ in runs if run.attack and run.attack.eps is not None}
    done = {known["key"]: known for known in store.runs([run.key for run, _ in runs])}
    seeds: dict[tuple[str, str], list[Run]] = {}
    for run, label in runs:
        if run.key in done:
            seeds.setdefault((run.subject.digest, label), []).append(run)
    rows = []
    for (_, label), of_seeds in seeds.items():
        first, n = of_seeds[0], len(of_seeds[0].data)
        norm = np.nan if first.attack is None else first.attack.norm
        eps = radii.get(norm, np.nan)
        found = [_standing(store.outcomes(run.key), run, eps) for run in of_seeds]
        accuracy = np.array([stands.mean() for stands, _ in found])
        costs = [done[run.key] for run in of_seeds]
        low, high = wilson_interval(round(float(accuracy.mean()) * n), n)
        rows.append(
            {name: first.known[name] for name in _KEPT}
            | {"attack": label, "norm": norm, "eps": eps, "n": n, "seeds": len(found)}
            | {"accuracy": accuracy.mean(), "accuracy_low": low, "accuracy_high": high}
            | {"seed_sd": accuracy.std(ddof=1) if len(found) > 1 else np.nan}
            | {"seed_min": accuracy.min(), "seed_max": accuracy.max()}
            | {"l2_median": pd.concat([sizes for _, sizes in found]).median()}
            | {f"{kind}_per_image": np.mean([cost[kind] for cost in costs]) / n for kind in _COUNTS}
            | {"flags": ";".join(sorted({flag for cost in costs for flag in cost["flags"]}))}
        )
    frame = pd.DataFrame(rows, columns=list(DEFENCE_COLUMNS))
    lowest = frame.groupby(["model_digest", "norm", "eps"])["accuracy_high"].transform("min")
    flattering = frame["accuracy_low"] > lowest  # never of clean, whose ball is NaN
    frame.loc[flattering, "flags"] = [";".join(filter(None, ["flattering", old])) for old in frame["flags"][flattering]]
    return frame


def as_markdown(frame: pd.DataFrame) -> str:
    """A row for each subject and a column for each attack: accuracy in percent ± its deviation over the seeds.

    A star is the flag "flattering".
    """
    labels = list(dict.fromkeys(frame["attack"]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in frame.to_dict("records"):
        spread = "" if np.isnan(row["seed_sd"]) else f" ± {100 * row['seed_sd']:.1f}"
        text = f"{100 * row['accuracy']:.1f}{spread}{'*' if 'flattering' in row['flags'] else ''}"
        cells.setdefault((row["model"], row["defence"]), {})[row["attack"]] = text
    return markdown(
        ["model", "defence", *labels],
        (
            [model, defence.partition("(")[0], *(known.get(label, "") for label in labels)]
            for (model, defence), known in cells.items()
        ),
    )


def _standing(outcomes: pd.DataFrame, run: Run, eps: float) -> tuple[pd.Series, pd.Series]:
    """Which images are right, clean and attacked within the ball, and the L2 norms of those that fool."""
    fooled = outcomes["adversarial_prediction"] != outcomes["label"]
    if run.attack is not None and run.attack.eps is None:
        fooled &= ~(outcomes[f"l{run.attack.norm:g}"] > eps)
    return standing(outcomes)[0] & ~fooled, outcomes["l2"][fooled]
