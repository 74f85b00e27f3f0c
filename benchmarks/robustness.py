"""Robust accuracy of the bundled models and defences, from attacks that know nothing of them to adaptive ones.

    python benchmarks/robustness.py --data PATH

Writes results/defences.csv, and the single seeds to results/defences_runs.csv; columns and attacks in
guardians.experiments.defences. Run again, it goes on from the rows that are there.
"""

from pathlib import Path
from typing import Annotated

import typer

from guardians.data import ENVIRONMENT_VARIABLE, load_data
from guardians.experiments.defences import ATTACKS, BUNDLED, as_markdown, bundled, evaluate
from guardians.models import load_model
from guardians.tables import print_table


def main(
    defence: Annotated[list[str], typer.Option(help="Repeatable.")] = list(BUNDLED),  # noqa: B006
    attack: Annotated[list[str], typer.Option(help="Repeatable.")] = list(ATTACKS),  # noqa: B006
    data: Annotated[Path | None, typer.Option(envvar=ENVIRONMENT_VARIABLE)] = None,
    n: int = 1000,
    pool: Annotated[int, typer.Option(help="Training images that Mixup Inference mixes with.")] = 1000,
    seeds: int = 5,
    batch_size: int = 64,
    device: str = "cpu",
    out: Path = Path("results"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """Attack each defence in each way."""
    clean = load_data(data, "train", pool)
    summary = evaluate(
        [bundled(name, clean, device) for name in dict.fromkeys(defence)],
        load_data(data, n=n),
        out,
        surrogate=load_model("resnet9-16-standard", device=device),
        seeds=seeds,
        attacks=attack,
        batch_size=batch_size,
    )
    if markdown:
        print(as_markdown(summary))
        return
    columns = ["defence", "attack", "n", "seeds", "accuracy", "accuracy_low", "accuracy_high", "seed_sd", "flags"]
    print_table(summary, columns, "Robust accuracy")


if __name__ == "__main__":
    typer.run(main)
