"""Peak memory of native PGD on few and on many images that are read lazily, each in a process of its own.

    python benchmarks/attack_memory.py --data PATH

Writes results/attack_memory.csv; columns in guardians.experiments.memory.MEMORY_COLUMNS.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.commands import noted
from guardians.experiments.memory import measure_memory
from guardians.tables import print_table, write_csv


def main(
    model: str = "resnet9-16-standard",
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    size: Annotated[list[int], typer.Option(help="Number of images, repeatable.")] = [1000, 50_000],  # noqa: B006
    batch_size: int = 128,
    steps: int = 40,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure, print and write the table."""
    images = load_data(data, split="train")
    frame = measure_memory(model, images, size, steps=steps, batch_size=batch_size, device=device)
    with noted(out, "attack_memory.csv", shlex.join(["python", *sys.argv])):
        write_csv(frame, out / "attack_memory.csv")
    print_table(frame, title="Attack memory")


if __name__ == "__main__":
    typer.run(main)
