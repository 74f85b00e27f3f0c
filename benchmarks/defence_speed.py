"""Speed of the defences: adversarial training against ART's trainers, inference against plain forward passes.

    python benchmarks/defence_speed.py --data PATH

Writes results/defence_speed.csv; columns in guardians.experiments.defence_speed.SPEED_COLUMNS. How robust they are:
benchmarks/defences.yaml.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.commands import noted
from guardians.experiments.defence_speed import measure_inference, measure_training
from guardians.models import load_model
from guardians.tables import print_table, write_csv


def main(
    model: str = "resnet9-16-standard",
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    n: Annotated[int, typer.Option(help="Images, to train on and to classify.")] = 1024,
    batch_size: int = 128,
    passes: Annotated[int, typer.Option(help="Of a randomised defence.")] = 10,
    rounds: int = 5,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure, print and write the table."""
    classifier = load_model(model, device=device)
    images = load_data(data, "train", n)
    x, y = images.as_floats().to(device), images.labels.to(device)
    frame = pd.concat(
        [
            measure_inference(classifier, x, (x, y), passes=passes, batch_size=batch_size, rounds=rounds),
            measure_training(classifier, x, y, batch_size=batch_size, rounds=rounds),
        ]
    )
    frame.insert(0, "model", model)
    with noted(out, "defence_speed.csv", shlex.join(["python", *sys.argv])):
        write_csv(frame, out / "defence_speed.csv")
    print_table(frame, title="Speed of the defences")


if __name__ == "__main__":
    typer.run(main)
