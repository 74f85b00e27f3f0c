"""What an evaluation of robustness says and costs beside another one: robust accuracy and time, image by image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from guardians.experiments.bench import summarise
from guardians.experiments.run import Run
from guardians.experiments.store import Store, standing
from guardians.statistics import paired_difference
from guardians.tables import BENCHMARK_COLUMNS, markdown, write_shown

__all__ = ["EVALUATION_COLUMNS", "EVALUATION_SHOWN", "REFERENCE", "as_markdown", "evaluation_table", "evaluation_view"]

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


EVALUATION_SHOWN = (
    *("model", "norm", "contender", "n", "clean_accuracy", "robust_accuracy", "robust_accuracy_low"),
    *("robust_accuracy_high", "on_reference_images", "reference_accuracy", "difference"),
    *("seconds_per_image", "speedup", "backward_per_image"),
)
"""Those that are shown at first."""


def evaluation_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`evaluation.csv`, a row for each model, ball and label, and `evaluation.md`, a table for people."""
    frame = evaluation_table(store, runs)
    return write_shown(frame, out / "evaluation.csv", EVALUATION_SHOWN, as_markdown(frame))


def evaluation_table(store: Store, runs: Sequence[tuple[Run, str]]) -> pd.DataFrame:
    """Rows of `EVALUATION_COLUMNS` of what is complete; times are compared in the rounds that the reference has too."""
    done = {known["key"]: known for known in store.runs([run.key for run, _ in runs])}
    of: dict[tuple[str, float, float | None], dict[str, dict[int, Run]]] = {}
    for run, label in runs:
        assert run.attack is not None
        ball = run.subject.digest, run.attack.norm, run.attack.eps
        if run.key in done:
            of.setdefault(ball, {}).setdefault(label, {})[run.repetition] = run

    def seconds(run: Run) -> float:
        return float(done[run.key]["seconds"]) / len(run.data)

    rows = []
    for (_, norm, eps), contenders in of.items():
        reference = contenders.get(REFERENCE, {})
        for label, rounds in contenders.items():
            run = rounds[min(rounds)]
            outcomes, n = store.outcomes(run.key), len(run.data)
            time = float(np.median([seconds(one) for one in rounds.values()]))
            row = {name: run.known[name] for name in (*_KEPT, "attack", "implementation", "device")}
            row |= {"norm": norm, "eps": eps, "contender": label, **summarise(outcomes)}
            row |= {"seconds": time * n, "seconds_per_image": time, "rounds": len(rounds)}
            row |= {f"{kind}_per_image": done[run.key][kind] / n for kind in ("forward", "backward")}
            paired = [number for number in rounds if number in reference]
            if paired:
                others = store.outcomes(reference[paired[0]].key)
                both = min(n, len(others))
                ours, theirs = (standing(images)[1].to_numpy()[:both] for images in (outcomes, others))
                names = ("difference", "difference_low", "difference_high")
                row |= dict(zip(names, paired_difference(ours, theirs), strict=True))
                row |= {"reference_n": both, "on_reference_images": ours.mean(), "reference_accuracy": theirs.mean()}
                row |= {"speedup": np.median([seconds(reference[i]) / seconds(rounds[i]) for i in paired])}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(EVALUATION_COLUMNS))


def as_markdown(frame: pd.DataFrame) -> str:
    """A row for each model and ball, and for each contender its robust accuracy in percent and its time.

    Robust accuracy is on the images that the reference has, and in brackets on all where there are more; where there
    are fewer, the reference's on these is in brackets. A speed-up is the reference's time for an image over the
    contender's. What has no reference is left out.
    """
    labels = list(dict.fromkeys(frame["contender"]))
    timed = [label for label in labels if label != REFERENCE]
    head = ["model", "norm", *labels, "reference, s / image", *(f"{label}, speed-up" for label in timed)]
    lines = []
    for (model, norm), rows in frame.groupby(["model", "norm"], sort=False):
        of = {row["contender"]: row for row in rows.to_dict("records")}
        if REFERENCE not in of:
            continue
        images = of[REFERENCE]["n"]
        cells = [str(model), f"{norm:g}", *(_accuracy(of[label], images) if label in of else "" for label in labels)]
        cells.append(f"{of[REFERENCE]['seconds_per_image']:.3g}")
        cells += [f"{of[label]['speedup']:.3g} x" if label in of else "" for label in timed]
        lines.append(cells)
    return markdown(head, lines)


def _accuracy(row: Mapping[Hashable, Any], images: int) -> str:
    text = f"{100 * row['on_reference_images']:.1f}"
    if row["n"] > images:
        return f"{text} ({100 * row['robust_accuracy']:.1f} of {row['n']:,})"
    return text if row["n"] == images else f"{text} ({100 * row['reference_accuracy']:.1f}), of {row['n']:,}"
