"""A store of made-up runs."""

import numpy as np
import pandas as pd
import torch
from models_for_tests import small_net

from guardians.data import Dataset
from guardians.experiments.run import Run
from guardians.experiments.store import OUTCOME_COLUMNS, Store
from guardians.experiments.subject import Subject


def made_up(folder, rows):
    """A store, and runs with their labels.

    Rows have the subject, the label, the spec, which images stand, and what else a run has: seed, repetition, and the
    L2 norm of all perturbations and the seconds as "l2" and "seconds". What stands not is wrong when it is clean
    already where there is no spec.
    """
    store, runs, subjects = Store(folder), [], {}
    for name, label, spec, stands, *more in rows:
        more = dict(*more)
        stands, l2, seconds = np.asarray(stands), more.pop("l2", 0.1), more.pop("seconds", 1.0)
        n = len(stands)
        data = Dataset(
            torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ("a", "b"), "none"
        )
        subject = subjects.setdefault(name, Subject(name, small_net(len(subjects))))
        run = Run(subject, data, spec, more.pop("implementation", "native"), **more)
        outcomes = pd.DataFrame({"image": range(n), "label": 0, "clean_prediction": 0, "l2": l2})
        outcomes["adversarial_prediction"] = (~stands).astype(int)
        if spec is None:
            outcomes["clean_prediction"] = outcomes["adversarial_prediction"]
        figures = {"search": "model", "flags": [], "forward": 2 * n, "backward": n, "judgement": 0}
        figures |= {"seconds": seconds, "peak_memory_mb": 1.0, "versions": {}, "commit": ""}
        store.write(run.key, run.known, figures, outcomes.reindex(columns=list(OUTCOME_COLUMNS)))
        runs.append((run, label))
    return store, runs
