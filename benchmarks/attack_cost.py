"""Time of PGD against the number of images, and against the share of them that the model withstands.

    python benchmarks/attack_cost.py --data PATH --model NAME --model ADVERSARIALLY-TRAINED-NAME

Writes results/attack_cost.csv and results/attack_cost.png; columns in
guardians.experiments.attack_cost.COST_COLUMNS. The images of the last model are the ones mixed by share.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.attack_cost import measure_cost_of_images, measure_cost_of_robustness
from guardians.figures import plot_cost
from guardians.models import load_model
from guardians.tables import print_table, write_csv

SIZES = [100, 200, 500, 1000, 2000, 5000, 10_000]


def main(
    model: Annotated[list[str], typer.Option(help="Repeatable; shares are mixed for the last.")] = [  # noqa: B006
        "resnet9-16-standard"
    ],
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    size: Annotated[list[int], typer.Option(help="Number of images, repeatable.")] = SIZES,
    toolkit_limit: Annotated[int, typer.Option(help="Largest size at which torchattacks runs.")] = 1000,
    mix: Annotated[int, typer.Option(help="Images of each mix of robust and other images.")] = 512,
    pool: Annotated[int, typer.Option(help="Images from which they are chosen.")] = 2000,
    batch_size: int = 128,
    steps: int = 40,
    rounds: int = 3,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure and print both studies, and write table and figure."""
    subset = load_data(data, n=max(*size, pool))
    images, labels = subset.as_floats().to(device), subset.labels.to(device)
    models = {name: load_model(name, device=device) for name in model}
    last = list(models)[-1]
    common = {"steps": steps, "batch_size": batch_size, "rounds": rounds}
    by_number = measure_cost_of_images(models, images, labels, size, toolkit_limit=toolkit_limit, **common)
    print_table(by_number, title="Attack cost by number of images")
    by_share = measure_cost_of_robustness(models[last], images[:pool], labels[:pool], model_name=last, n=mix, **common)
    print_table(by_share, title="Attack cost by share of robust images")
    frame = pd.concat([by_number, by_share])
    out.mkdir(parents=True, exist_ok=True)
    write_csv(frame, out / "attack_cost.csv")
    plot_cost(frame, out / "attack_cost.png")


if __name__ == "__main__":
    typer.run(main)
