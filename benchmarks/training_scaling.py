"""Training in one process and in several, in turns: images a second and how they grow.

    python benchmarks/training_scaling.py --data PATH

Writes results/training_scaling.csv; columns in guardians.experiments.training_scaling.SCALING_COLUMNS.
"""

from pathlib import Path
from typing import Annotated

import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.training_scaling import measure_scaling
from guardians.tables import print_table, write_csv


def main(
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    recipe: Annotated[list[str], typer.Option(help="Repeatable.")] = ["standard", "pgd-at"],  # noqa: B006
    processes: Annotated[list[int], typer.Option(help="Number of processes, repeatable.")] = [1, 2],  # noqa: B006
    width: int = 16,
    batch_size: Annotated[int | None, typer.Option(show_default="the recipe's")] = None,
    steps: int = 50,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure, print and write the table."""
    images = load_data(data, split="train")
    options = {"width": width, "batch_size": batch_size, "steps": steps, "repeats": repeats, "threads": threads}
    frame = measure_scaling(images, recipe, processes, **options, device=device)
    write_csv(frame, out / "training_scaling.csv")
    print_table(frame, title="Training in several processes")


if __name__ == "__main__":
    typer.run(main)
