"""How small the perturbations are that Carlini-Wagner finds in each implementation, and what they cost.

    python benchmarks/carlini_wagner.py --data PATH --model NAME --model ADVERSARIALLY-TRAINED-NAME

Writes into results/: carlini_wagner.csv with the runs and outcomes it is made of (columns in
guardians.experiments.minimum_norm), carlini_wagner_frontier.png, carlini_wagner_consts.csv and .png for c fixed, and
carlini_wagner_c.png, the same images attacked with c = 0.1 and c = 100. The same command goes on where it was stopped.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from guardians.data import ENVIRONMENT_VARIABLE, Dataset, load_data
from guardians.engine.victim import undisturbed
from guardians.experiments.minimum_norm import correct_images, measure_consts, measure_minimum_norm, perturb
from guardians.figures import plot_accuracy_by_const, plot_frontier, plot_perturbations
from guardians.models import load_model
from guardians.tables import print_table, write_csv

CONSTS = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
SHOWN = [0.1, 100.0]


def main(
    model: Annotated[list[str], typer.Option(help="Repeatable.")] = ["resnet9-16-standard"],  # noqa: B006
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    n: Annotated[int, typer.Option(help="Images, of those that the model gets right.")] = 200,
    shown: Annotated[int, typer.Option(help="Images in the figure of c = 0.1 and c = 100.")] = 4,
    batch_size: int = 128,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure and print the study, and write tables and figures."""
    subset = load_data(data, n=5 * n)
    models = {name: load_model(name, device=device) for name in model}
    frame = measure_minimum_norm(models, subset, n=n, out=out, batch_size=batch_size, device=device)
    columns = ["model", "implementation", "setting", "success_rate", "l2_median", "l2_mean", "l2_ratio"]
    columns += ["local_optimality", "forward_per_image", "backward_per_image", "seconds", "speed_up"]
    print_table(frame, columns, "Carlini-Wagner, L2")
    plot_frontier(frame, out / "carlini_wagner_frontier.png")
    consts = measure_consts(models, subset, CONSTS, n=n, batch_size=batch_size, device=device)
    write_csv(consts, out / "carlini_wagner_consts.csv")
    print_table(consts, title="c fixed")
    plot_accuracy_by_const(consts, out / "carlini_wagner_consts.png")
    _show(models[model[0]], subset, shown, device, out / "carlini_wagner_c.png")


def _show(model: torch.nn.Module, data: Dataset, n: int, device: str, path: Path) -> None:
    images, labels = correct_images(model, data, n, device)
    adversarial = {f"c = {const:g}": perturb(model, images, labels, const)[0] for const in SHOWN}
    with undisturbed(model), torch.no_grad():
        predictions = {
            name: [data.classes[label] for label in model(x_adv).argmax(1)] for name, x_adv in adversarial.items()
        }
    names = [data.classes[label] for label in labels]
    plot_perturbations(images, adversarial, path, labels=names, predictions=predictions)


if __name__ == "__main__":
    typer.run(main)
