"""Time of PGD in every implementation over that of a bare loop of forward and backward passes, in one run.

    python benchmarks/attack_overhead.py --data PATH

Writes results/attack_overhead.csv; columns in guardians.experiments.overhead.OVERHEAD_COLUMNS.
"""

from pathlib import Path
from typing import Annotated

import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.overhead import measure_overhead
from guardians.models import load_model
from guardians.tables import print_table, write_csv


def main(
    model: str = "resnet9-16-standard",
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    batch_size: int = 128,
    steps: int = 40,
    rounds: int = 15,
    device: str = "cpu",
    out: Path = Path("results"),
) -> None:
    """Measure, print and write the table."""
    images = load_data(data, n=batch_size)
    frame = measure_overhead(
        load_model(model, device=device),
        images.as_floats().to(device),
        images.labels.to(device),
        steps=steps,
        rounds=rounds,
    )
    frame.insert(0, "model", model)
    write_csv(frame, out / "attack_overhead.csv")
    print_table(frame, title="Attack overhead")


if __name__ == "__main__":
    typer.run(main)
