"""How much sooner an evaluation ends that several processes share: `torchrun -m guardians evaluate`, a thread each.

    python benchmarks/process_scaling.py --data PATH

Writes results/process_scaling.csv; columns in `COLUMNS`. Times are those of the evaluation, without the start of the
processes, and in each round all numbers of processes follow one another in random order.
"""

import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from guardians.data import ENVIRONMENT_VARIABLE
from guardians.experiments.commands import noted
from guardians.tables import print_table, read_csv, write_csv

COLUMNS = {
    "model": "that is evaluated, norm inf, 8/255",
    "budget": "of the evaluation",
    "n": "images",
    "processes": "of one thread each",
    "rounds": "of which the medians are given",
    "seconds": "wall-clock time of the evaluation",
    "speedup": "the time of one process over this one's, in the same round",
    "efficiency": "speedup / processes",
    "same": "whether the table by image is one process', byte for byte",
}


def seconds_of(processes: int, model: str, n: int, data: Path, out: Path) -> float:
    """Evaluate into a folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "guardians", "evaluate", "--model", model, "--images", str(n), "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, env=environment)
    return float(read_csv(next(out.rglob("evaluation.csv")))["seconds"].iloc[0])


def main(
    data: Annotated[Path, typer.Option(envvar=ENVIRONMENT_VARIABLE, help="Folder of the images.")],
    model: list[str] = ["resnet9-16-pgd-at", "resnet9-16-standard"],  # noqa: B006
    processes: list[int] = [1, 2],  # noqa: B006
    n: Annotated[int, typer.Option("--images")] = 1000,
    rounds: int = 3,
    out: Path = Path("results"),
) -> None:
    """Measure, print and write the table."""
    rows = []
    for name in model:
        times: dict[int, list[float]] = {number: [] for number in processes}
        tables: dict[int, set[bytes]] = {number: set() for number in processes}
        for _ in range(rounds):
            for number in random.sample(processes, len(processes)):
                with tempfile.TemporaryDirectory() as folder:
                    times[number].append(seconds_of(number, name, n, data, Path(folder)))
                    tables[number].add(next(Path(folder).rglob("evaluation_images.csv")).read_bytes())
        for number in processes:
            speedup = float(np.median(np.array(times[processes[0]]) / times[number]))
            rows.append(
                {"model": name, "budget": "standard", "n": n, "processes": number, "rounds": rounds}
                | {"seconds": float(np.median(times[number])), "speedup": speedup, "efficiency": speedup / number}
                | {"same": tables[number] == tables[processes[0]] and len(tables[number]) == 1}
            )
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    with noted(out, "process_scaling.csv", shlex.join(["python", *sys.argv])):
        write_csv(frame, out / "process_scaling.csv")
    print_table(frame, title="Scaling")


if __name__ == "__main__":
    typer.run(main)
