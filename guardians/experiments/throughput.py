"""What early stopping and a cheaper search save: the time of an attack in every implementation, paired by rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from guardians.experiments.run import BARE_LOOP, Run
from guardians.experiments.store import Store, standing
from guardians.figures import plot_cost
from guardians.statistics import paired_difference, wilson_interval
from guardians.tables import write_shown
from guardians.toolkits.build import TOOLKITS

__all__ = ["THROUGHPUT_COLUMNS", "THROUGHPUT_SHOWN", "throughput_table", "throughput_view"]

THROUGHPUT_COLUMNS = {
    "model": "name of the model",
    "implementation": "bare loop (forward and backward passes alone), native, ART, torchattacks or foolbox",
    "early_stop": "whether images are let go as soon as the model is fooled",
    "precision": "what the search was allowed to compute in: float32, or auto for the fastest that the device has",
    "search": "the model that the search asked: model for the user's own, or the cheaper copy",
    "steps": "of PGD, and of the bare loop",
    "eps": "radius of the inf-norm ball, for images in [0, 1]",
    "n": "number of images",
    "batch_size": "images in one forward pass",
    "rounds": "runs of each; within a round all run once, in random order",
    "robust_accuracy": "fraction that the model classifies correctly both clean and attacked, by a fresh pass in "
    "float32; empty for the bare loop",
    "robust_accuracy_low": "lower end of its 95% Wilson interval",
    "robust_accuracy_high": "upper end of its 95% Wilson interval",
    "difference": "robust accuracy less that of native with early_stop in float32, on the same images",
    "difference_low": "lower end of its 95% interval for paired outcomes",
    "difference_high": "upper end of its 95% interval for paired outcomes",
    "seconds": "median over the rounds of the wall-clock time for all images",
    "images_per_second": "n / seconds",
    "speedup": "time of the fastest toolkit over this one's in the same round, median",
    "speedup_low": "lowest such ratio of a round",
    "speedup_high": "highest such ratio of a round",
    "bare_loop_ratio": "time over that of the bare loop in the same round, median",
    "forward_per_image": "samples that went forward, per image; for native in the search alone",
    "backward_per_image": "samples that went backward, per image",
    "judgement_per_image": "samples that went forward through the user's model to judge, per image; 0 where the "
    "search asks nothing else",
    "engine_overhead": "time over what the passes made would cost in full batches, priced in the same round; median; "
    "empty for all but native",
}
THROUGHPUT_SHOWN = (
    *("model", "n", "implementation", "early_stop", "precision", "robust_accuracy", "seconds", "speedup"),
    *("bare_loop_ratio", "forward_per_image", "backward_per_image", "judgement_per_image", "engine_overhead"),
)
"""Those that are shown at first."""
_REFERENCE = ("native", True, "float32")
"""What the robust accuracies are held against."""


def throughput_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """A table under the study's first label as its name, and where it has several numbers of images a figure."""
    frame, name = throughput_table(store, [run for run, _ in runs]), runs[0][1] or "attack_throughput"
    if frame["n"].nunique() > 1:
        plot_cost(frame, out / f"{name}.png")
    return write_shown(frame, out / f"{name}.csv", THROUGHPUT_SHOWN)


def throughput_table(store: Store, runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each contender, model and number of images, of the rounds that are complete: `THROUGHPUT_COLUMNS`."""
    found = {known["key"]: known for known in store.runs([run.key for run in runs])}
    rows = []
    for same in dict.fromkeys((run.subject.name, len(run.data)) for run in runs):
        of: dict[tuple[Any, ...], dict[int, Run]] = {}
        for run in runs:
            if (run.subject.name, len(run.data)) == same:
                of.setdefault(_contender(run), {})[run.repetition] = run
        rounds = [
            number for number in next(iter(of.values())) if all(made[number].key in found for made in of.values())
        ]
        if not rounds:
            continue
        seconds = pd.DataFrame(
            {name: [found[made[number].key]["seconds"] for number in rounds] for name, made in of.items()},
        )
        seconds.columns = pd.Index(list(of), tupleize_cols=False)
        whole = {name: {number: made[number] for number in rounds} for name, made in of.items()}
        rows += _rows(store, found, whole, seconds)
    return pd.DataFrame(rows, columns=list(THROUGHPUT_COLUMNS))


def _rows(
    store: Store,
    found: dict[str, dict[str, Any]],
    of: dict[tuple[Any, ...], dict[int, Run]],
    seconds: pd.DataFrame,
) -> list[dict[str, Any]]:
    """Of one model; accuracies and counts are those of the last round."""
    toolkits = [name for name in of if name[0] in TOOLKITS]
    fastest = seconds[toolkits].min(axis=1) if toolkits else pd.Series(np.nan, seconds.index)
    bare = next((seconds[name] for name in of if name[0] == BARE_LOOP), pd.Series(np.nan, seconds.index))
    reference = of.get(_REFERENCE)
    last = max(next(iter(of.values())))
    rows = []
    for name, made in of.items():
        run, known = made[last], found[made[last].key]
        n, spec = known["n"], known["spec"]
        speedup = fastest / seconds[name]
        natives = [found[one.key] for one in made.values() if name[0] == "native"]
        overheads = [one["seconds"] / one["price"] for one in natives if "price" in one]
        row = {"model": run.subject.name, "implementation": name[0], "early_stop": name[1], "precision": name[2]}
        row |= {"search": known["search"], "steps": spec["params"]["steps"], "eps": spec["eps"], "n": n}
        row |= {"batch_size": known["batch_size"], "rounds": len(seconds), "seconds": seconds[name].median()}
        row |= {"images_per_second": n / row["seconds"], "bare_loop_ratio": (seconds[name] / bare).median()}
        row |= {"speedup": speedup.median(), "speedup_low": speedup.min(), "speedup_high": speedup.max()}
        row |= {f"{kind}_per_image": known[kind] / n for kind in ("forward", "backward", "judgement")}
        row |= {"engine_overhead": float(np.median(overheads)) if overheads else np.nan}
        if name[0] != BARE_LOOP:
            robust = _robust(store, run)
            low, high = wilson_interval(int(robust.sum()), n)
            row |= {"robust_accuracy": robust.mean(), "robust_accuracy_low": low, "robust_accuracy_high": high}
            if reference is not None:
                names = ("difference", "difference_low", "difference_high")
                row |= dict(zip(names, paired_difference(robust, _robust(store, reference[last])), strict=True))
        rows.append(row)
    return rows


def _contender(run: Run) -> tuple[Any, ...]:
    """Implementation, early_stop and precision."""
    return run.implementation, run.options.get("early_stop", False), run.options.get("precision", "float32")


def _robust(store: Store, run: Run) -> np.ndarray:
    return standing(store.outcomes(run.key))[1].to_numpy()
