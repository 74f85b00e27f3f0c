"""Peak memory and speed of decoding few and many JPEG files of 224 x 224, and of native PGD on them.

    python benchmarks/attack_memory.py --data PATH

The files are enlarged images of the data: 1,000, and hard links to them. Writes results/attack_memory.csv; columns in
guardians.experiments.memory.MEMORY_COLUMNS.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.commands import noted
from guardians.experiments.memory import measure_memory
from guardians.tables import print_table, write_csv


def main(
    model: str = "resnet9-16-standard",
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    size: Annotated[list[int], typer.Option(help="Number of images, repeatable.")] = [1000, 50_000],  # noqa: B006
    workers: Annotated[list[int], typer.Option(help="Processes that decode, repeatable.")] = [1, 2],  # noqa: B006
    side: Annotated[int, typer.Option(help="Of an image, in pixels.")] = 224,
    batch_size: int = 32,
    steps: int = 40,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure, print and write the table."""
    settings: dict[str, Any] = {"workers": workers, "side": side, "steps": steps, "batch_size": batch_size}
    frame = measure_memory(model, load_data(data), size, **settings, device=device)
    with noted(out, "attack_memory.csv", shlex.join(["python", *sys.argv])):
        write_csv(frame, out / "attack_memory.csv")
    print_table(frame, title="Attack memory")


if __name__ == "__main__":
    typer.run(main)
