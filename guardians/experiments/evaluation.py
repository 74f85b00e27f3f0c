"""What an evaluation of robustness says and costs beside another one: robust accuracy and time, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from guardians.experiments.run import Run
from guardians.experiments.store import Store
from guardians.statistics import paired_difference, wilson_interval
from guardians.tables import BENCHMARK_COLUMNS, write_csv

__all__ = ["EVALUATION_COLUMNS", "REFERENCE", "evaluation_table", "evaluation_view"]

REFERENCE = "reference"
"""The label of what the others are held against."""
_KEPT = ("model", "model_digest", "data")
EVALUATION_COLUMNS = {
    **{name: BENCHMARK_COLUMNS[name] for name in _KEPT},
    "norm": "of the ball",
    "eps": "its radius",
    "contender": f"the label that the study gives it; {REFERENCE} is what the others are held against",
    "attack": BENCHMARK_COLUMNS["attack"],
    "implementation": BENCHMARK_COLUMNS["implementation"],
    "n": "number of images",
    **{name: BENCHMARK_COLUMNS[name] for name in ("clean_accuracy", "robust_accuracy")},
    "robust_accuracy_low": BENCHMARK_COLUMNS["robust_accuracy_low"],
    "robust_accuracy_high": BENCHMARK_COLUMNS["robust_accuracy_high"],
    "reference_n": "images that this one and the reference have",
    "on_reference_images": "robust accuracy on them",
    "reference_accuracy": "the reference's on them",
    "difference": "the first less the second",
    "difference_low": "lower end of its 95% interval for paired outcomes",
    "difference_high": "upper end of it",
    "seconds": "median over the rounds of the wall-clock time for all images",
    "seconds_per_image": "seconds / n",
    "speedup": "the reference's time for an image over this one's in the same round, median",
    "forward_per_image": BENCHMARK_COLUMNS["forward_per_image"],
    "backward_per_image": BENCHMARK_COLUMNS["backward_per_image"],
    "rounds": "runs of each; within a round all run once, in random order",
    "device": BENCHMARK_COLUMNS["device"],
}


def evaluation_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`evaluation.csv`, a row for each model, ball and label."""
    frame = evaluation_table(store, runs)
    write_csv(frame, out / "evaluation.csv")
    shown = ["model", "norm", "contender", "n", "robust_accuracy", "on_reference_images", "reference_accuracy"]
    return frame[[*shown, "seconds_per_image", "speedup", "backward_per_image"]]


def evaluation_table(store: Store, runs: Sequence[tuple[Run, str]]) -> pd.DataFrame:
    """Rows of `EVALUATION_COLUMNS` of the rounds in which both a contender and its reference are complete."""
    seconds = {known["key"]: known["seconds"] for known in store.runs([run.key for run, _ in runs])}
    known = {known["key"]: known for known in store.runs(list(seconds))}
    of: dict[tuple[str, float, float | None], dict[str, dict[int, Run]]] = {}
    for run, label in runs:
        assert run.attack is not None
        ball = run.subject.digest, run.attack.norm, run.attack.eps
        if run.key in seconds:
            of.setdefault(ball, {}).setdefault(label, {})[run.repetition] = run
    rows = []
    for (_, norm, eps), contenders in of.items():
        reference = contenders.get(REFERENCE, {})
        for label, rounds in contenders.items():
            run, n = rounds[min(rounds)], len(rounds[min(rounds)].data)
            clean, stands = _stands(store, run)
            low, high = wilson_interval(int(stands.sum()), n)
            time = np.array([seconds[run.key] for run in rounds.values()])
            row = {name: run.known[name] for name in (*_KEPT, "attack", "implementation")}
            row |= {"norm": norm, "eps": eps, "contender": label, "n": n}
            row |= {"clean_accuracy": clean.mean(), "robust_accuracy": stands.mean()}
            row |= {"robust_accuracy_low": low, "robust_accuracy_high": high}
            row |= {"seconds": np.median(time), "seconds_per_image": np.median(time) / n, "rounds": len(time)}
            row |= {f"{kind}_per_image": known[run.key][kind] / n for kind in ("forward", "backward")}
            row |= {"device": run.known["device"]}
            paired = [number for number in rounds if number in reference]
            if paired:
                others = reference[paired[0]]
                theirs = _stands(store, others)[1]
                both = min(n, len(theirs))
                names = ("difference", "difference_low", "difference_high")
                row |= dict(zip(names, paired_difference(stands[:both], theirs[:both]), strict=True))
                row |= {"reference_n": both, "on_reference_images": stands[:both].mean()}
                row |= {"reference_accuracy": theirs[:both].mean()}
                ratios = [seconds[reference[i].key] / len(theirs) * n / seconds[rounds[i].key] for i in paired]
                row |= {"speedup": np.median(ratios)}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(EVALUATION_COLUMNS))


def _stands(store: Store, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Which images are right as they are, and which attacked too."""
    outcomes = store.outcomes(run.key)
    right = outcomes[["clean_prediction", "adversarial_prediction"]].eq(outcomes["label"], axis=0)
    return right["clean_prediction"].to_numpy(), right.all(axis=1).to_numpy()
