"""Robust accuracy and time of `guardians.evaluate` and native AutoAttack beside torchattacks' AutoAttack.

Writes evaluation.csv: for each model, norm and contender the robust accuracy with its interval, on the images that all
contenders have (`--reference-n`) and on all of its own, the time an image, and how many times less that is than
torchattacks takes on the same images of the same run. A model and norm whose rows are there is not measured again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torchattacks
import typer

from guardians.attacks import AutoAttack
from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.engine.victim import predicted_labels
from guardians.evaluation import BUDGETS, evaluate
from guardians.experiments.run import device_name
from guardians.models import load_model
from guardians.models.identity import digest
from guardians.statistics import paired_difference, wilson_interval
from guardians.tables import Table, print_table
from guardians.toolkits import TorchattacksAttack

MODELS = ["resnet9-16-standard", "resnet9-16-fgsm-at", "resnet9-16-pgd-at", "resnet9-16-iat", "resnet9-16-mixup"]
BALLS = {"inf": ("Linf", 8 / 255), "2": ("L2", 0.5)}
KEY = ["model", "model_digest", "norm", "eps", "contender", "n", "reference_n", "seed", "device"]
COLUMNS = [*KEY, "clean_accuracy", "robust_accuracy", "robust_accuracy_low", "robust_accuracy_high"]
COLUMNS += ["on_reference_images", "reference", "difference", "difference_low", "difference_high"]
COLUMNS += ["seconds", "seconds_per_image", "speedup", "backward_per_image", "flags", "threads"]
REFERENCE, STEPS = "torchattacks AutoAttack", 100


class PublishedAutoAttack(torchattacks.AutoAttack):
    """With the iterations of the paper: torchattacks' own takes 10."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        for attack in self._autoattack.attacks:
            attack.steps = STEPS


def main(
    model: Annotated[list[str], typer.Option(help="Repeatable.")] = MODELS,
    norm: Annotated[list[str], typer.Option(help=f"Repeatable: {', '.join(BALLS)}.")] = list(BALLS),  # noqa: B006
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    n: Annotated[int, typer.Option(help="Images for the cascade.")] = 1000,
    reference_n: Annotated[int, typer.Option(help="Of them, for both versions of AutoAttack.")] = 300,
    published: Annotated[
        list[str], typer.Option(help="Models on which torchattacks also takes the iterations of the paper.")
    ] = ["resnet9-16-pgd-at"],  # noqa: B006
    batch_size: Annotated[int, typer.Option(help="Of both versions of AutoAttack.")] = 100,
    seed: int = 0,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure and print one model and norm after the other."""
    table = Table(out / "evaluation.csv", COLUMNS, KEY)
    images = load_data(data, "test", n)
    x, y = images.as_floats().to(device), images.labels.to(device)
    few = slice(0, reference_n)
    for name in model:
        classifier = load_model(name, device=device)
        for ball in norm:
            toolkit_norm, eps = BALLS[ball]
            known = {"model": name, "model_digest": digest(classifier), "norm": ball, "eps": eps, "seed": seed}
            known |= {"reference_n": reference_n, "threads": torch.get_num_threads()}
            known["device"] = device_name(torch.device(device))

            def reference(version: type) -> Any:
                arguments = {"norm": toolkit_norm, "eps": eps, "n_classes": 10, "seed": seed}  # noqa: B023
                attack = TorchattacksAttack(classifier, version, batch_size, **arguments)  # noqa: B023
                return predicted_labels(classifier, attack(x[few], y[few])) == y[few], {}  # noqa: B023

            def native() -> Any:
                attack = AutoAttack(classifier, float(ball), eps, batch_size=batch_size, seed=seed, verbose=False)  # noqa: B023
                attack(x[few], y[few])
                assert attack.ledger is not None
                return attack.ledger.stands, {"backward_per_image": attack.ledger.backward.mean()}

            def cascade(budget: str) -> Any:
                options = {"norm": float(ball), "eps": eps, "budget": budget, "seed": seed}  # noqa: B023
                found: Any = evaluate(classifier, x, y, **options, verbose=False)  # noqa: B023
                more = {"backward_per_image": found.backward.mean(), "flags": "; ".join(found.flags)}
                return found.stage < 0, more

            runs = {REFERENCE: lambda: reference(torchattacks.AutoAttack)}
            if name in published:
                runs[f"{REFERENCE}, {STEPS} steps"] = lambda: reference(PublishedAutoAttack)
            runs["AutoAttack"] = native
            runs |= {budget: lambda budget=budget: cascade(budget) for budget in BUDGETS[:2]}
            stands: dict[str, np.ndarray] = {}
            seconds: dict[str, float] = {}
            correct = (predicted_labels(classifier, x) == y).cpu().numpy()
            rows = [
                {**known, "contender": contender, "n": n if contender in BUDGETS else reference_n} for contender in runs
            ]
            if all(row in table for row in rows):
                continue
            for row, (contender, run) in zip(rows, runs.items(), strict=True):
                sizes = row["n"]
                started = time.perf_counter()
                result, more = run()
                seconds[contender] = (time.perf_counter() - started) / sizes
                stands[contender] = np.asarray(torch.as_tensor(result).cpu())
                low, high = wilson_interval(int(stands[contender].sum()), sizes)
                first, theirs = stands[contender][few], stands[REFERENCE]
                difference, difference_low, difference_high = paired_difference(first, theirs)
                row |= more | {
                    "clean_accuracy": correct[:sizes].mean(),
                    "robust_accuracy": stands[contender].mean(),
                    "robust_accuracy_low": low,
                    "robust_accuracy_high": high,
                    "on_reference_images": first.mean(),
                    "reference": theirs.mean(),
                    "difference": difference,
                    "difference_low": difference_low,
                    "difference_high": difference_high,
                    "seconds": seconds[contender] * sizes,
                    "seconds_per_image": seconds[contender],
                    "speedup": seconds[REFERENCE] / seconds[contender],
                }
                if row not in table:
                    table.append({**dict.fromkeys(COLUMNS, ""), **row})
            shown = ["model", "norm", "contender", "n", "robust_accuracy", "on_reference_images", "reference"]
            frame = table.frame()
            print_table(frame[frame["model"] == name], [*shown, "seconds_per_image", "speedup", "backward_per_image"])


if __name__ == "__main__":
    typer.run(main)
