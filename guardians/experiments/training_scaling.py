"""How much faster several processes train, launched as torchrun launches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import set_forkserver_preload
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from guardians.data import Dataset
from guardians.engine.checks import check_choice, check_integer
from guardians.engine.ranks import local_device
from guardians.models import build_model
from guardians.training import RECIPES, Recipe, train

__all__ = ["SCALING_COLUMNS", "measure_scaling"]

SCALING_COLUMNS = {
    "recipe": "name of the recipe, with its batch size and its attack",
    "architecture": "resnet9 and its width",
    "processes": "that train one model, launched by torch's elastic agent",
    "threads": "of each on a CPU",
    "batch_size": "images in a step of all processes together",
    "steps": "of the epoch that is timed; one before it is not",
    "seconds": "of that epoch, the least of the repeats, which take turns with those of the other numbers of processes",
    "images_per_second": "of all processes together",
    "speedup": "of images_per_second over that of the first number of processes, of the same recipe",
    "device": "on which it was measured",
}
"""Of training_scaling.csv, a row for each recipe and number of processes."""


def measure_scaling(
    data: Dataset,
    recipes: Sequence[str],
    processes: Sequence[int],
    *,
    width: int = 16,
    batch_size: int | None = None,
    steps: int = 50,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> pd.DataFrame:
    """Train a resnet9 for two epochs of `steps` steps with each number of processes, and time the second.

    Args:
        data: at least as many images as an epoch takes.
        recipes: names of recipes.
        processes: numbers of processes.
        width: base width of the model.
        batch_size: of all processes together; None takes the recipe's.
        steps: of an epoch.
        repeats: of each measurement.
        threads: of each process.
        device: "cpu" or "cuda", of which each process has its own.

    Returns:
        A row for each recipe and number of processes, see `SCALING_COLUMNS`.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed.
    """
    for argument, value in [("steps", steps), ("repeats", repeats), ("threads", threads)]:
        check_integer(argument, value, low=1)
    for count in processes:
        check_integer("processes", count, low=1)
    chosen = {}
    for name in recipes:
        check_choice("recipes", name, RECIPES)
        recipe = replace(Recipe(**RECIPES[name]), epochs=2, holdout=0)
        chosen[name] = recipe = replace(recipe, batch_size=batch_size or recipe.batch_size)
        if (needed := steps * recipe.batch_size) > len(data):
            raise ValueError(f"steps={steps}: an epoch of {name} takes {needed} images, the data has {len(data)}")
    rows = []
    for name, recipe in chosen.items():
        part = data[: steps * recipe.batch_size]
        seconds: dict[int, float] = {}
        for _ in range(repeats):
            for count in processes:
                found = _launch(count, part, recipe, width, threads, device)
                seconds[count] = min(found, seconds.get(count, found))
        for count in processes:
            rate = len(part) / seconds[count]
            row: dict[str, Any] = {"recipe": name, "architecture": f"resnet9-{width}", "processes": count}
            row |= {"threads": threads, "batch_size": recipe.batch_size, "steps": steps, "seconds": seconds[count]}
            row |= {"images_per_second": rate, "speedup": seconds[processes[0]] / seconds[count]}
            rows.append(row | {"device": device})
    return pd.DataFrame(rows, columns=list(SCALING_COLUMNS))


def _launch(count: int, data: Dataset, recipe: Recipe, width: int, threads: int, device: str) -> float:
    set_forkserver_preload([__name__])  # the processes are forked from one that has imported all
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        start_method="forkserver",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="training_scaling",
        max_restarts=0,
    )
    found: dict[int, float] = elastic_launch(config, _seconds)(data, recipe, width, threads, device)
    return found[0]


def _seconds(data: Dataset, recipe: Recipe, width: int, threads: int, device: str) -> float:
    """Of the second epoch, with the evaluation of a single image."""
    torch.set_num_threads(threads)
    model = build_model("resnet9", width=width, num_classes=len(data.classes))
    with TemporaryDirectory() as folder:
        train(model, data, data[:1], recipe, folder, device=local_device(device), verbose=False)
        log = pd.read_csv(Path(folder) / "log.csv") if (Path(folder) / "log.csv").exists() else None
    return 0.0 if log is None else float(log["seconds"].iloc[1] - log["seconds"].iloc[0])
