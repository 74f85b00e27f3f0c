"""Speed of PGD in every implementation on the same images, native with and without early stopping and cheaper search.

    python benchmarks/attack_throughput.py --data PATH --model NAME --model NAME

Writes results/attack_throughput.csv; columns in guardians.experiments.throughput.THROUGHPUT_COLUMNS.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.throughput import measure_throughput
from guardians.models import load_model
from guardians.tables import print_table, write_csv


def main(
    model: Annotated[list[str], typer.Option(help="Repeatable.")] = ["resnet9-16-standard"],  # noqa: B006
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    n: int = 1000,
    batch_size: int = 128,
    steps: int = 40,
    rounds: int = 3,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure and print one model after the other, and write the table after each."""
    images = load_data(data, n=n)
    out.mkdir(parents=True, exist_ok=True)
    frames = []
    for name in dict.fromkeys(model):
        frame = measure_throughput(
            load_model(name, device=device),
            images.as_floats().to(device),
            images.labels.to(device),
            model_name=name,
            steps=steps,
            batch_size=batch_size,
            rounds=rounds,
        )
        print_table(frame, title=f"Attack throughput: {name}")
        frames.append(frame)
        write_csv(pd.concat(frames), out / "attack_throughput.csv")


if __name__ == "__main__":
    typer.run(main)
