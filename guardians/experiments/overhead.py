"""What an attack costs beyond the model's own passes: paired ratios against a bare loop, in one run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from guardians.attacks import Spec
from guardians.engine.checks import check_integer
from guardians.engine.victim import undisturbed
from guardians.toolkits.build import IMPLEMENTATIONS, build_attack

__all__ = ["OVERHEAD_COLUMNS", "bare_loop", "forward_backward", "measure_overhead", "paired_times", "timed"]

OVERHEAD_COLUMNS = {
    "implementation": "bare loop, native, ART, torchattacks or foolbox",
    "steps": "forward and backward passes of the bare loop, and steps of PGD",
    "batch_size": "images, all in one batch",
    "rounds": "runs of each; within a round all run once, in random order",
    "seconds": "median over the rounds",
    "ratio": "time over that of the bare loop in the same round, median",
    "ratio_low": "lower quartile of that ratio",
    "ratio_high": "upper quartile of that ratio",
    "native_ratio": "native time over this implementation's in the same round, median",
}


def measure_overhead(
    model: nn.Module, images: Tensor, labels: Tensor, *, steps: int = 40, rounds: int = 15, seed: int = 0
) -> pd.DataFrame:
    """PGD (inf, 8/255) in every implementation against forward and backward passes alone, columns `OVERHEAD_COLUMNS`.

    The bare loop computes logits, the sum of the cross-entropy and its gradient with respect to the images, `steps`
    times, with frozen parameters as the attacks have them.

    Args:
        model: returns logits for images in [0, 1].
        images: (N, C, H, W), attacked as one batch, on the model's device.
        labels: (N,).
        steps: of PGD.
        rounds: runs of each implementation, after one for warm-up.
        seed: of the order within the rounds.

    Raises:
        TypeError, ValueError: `steps` or `rounds` is not an integer of at least 1.
    """
    check_integer("steps", steps, low=1)
    check_integer("rounds", rounds, low=1)
    spec = Spec("PGD", np.inf, 8 / 255, params={"steps": steps, "eps_step": 2 / 255})
    with torch.no_grad():
        nb_classes = model(images[:1]).shape[1]
    runs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bare loop": lambda x, y: bare_loop(model, x, y, steps)}
    for implementation in IMPLEMENTATIONS:
        shape = tuple(images.shape[1:])
        runs[implementation] = build_attack(
            implementation, spec, model, nb_classes=nb_classes, input_shape=shape, batch_size=len(images)
        )
    times = paired_times({name: partial(run, images, labels) for name, run in runs.items()}, rounds, seed, "overhead")
    ratios = times.div(times["bare loop"], axis=0)
    return pd.DataFrame(
        [
            {
                "implementation": name,
                "steps": steps,
                "batch_size": len(images),
                "rounds": rounds,
                "seconds": times[name].median(),
                "ratio": ratios[name].median(),
                "ratio_low": ratios[name].quantile(0.25),
                "ratio_high": ratios[name].quantile(0.75),
                "native_ratio": (times["native"] / times[name]).median(),
            }
            for name in runs
        ],
        columns=list(OVERHEAD_COLUMNS),
    )


def forward_backward(logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the sum of the cross-entropy with respect to the images."""
    with torch.enable_grad():
        inputs = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(logits_of(inputs), y, reduction="sum"), inputs)
    return gradient


def bare_loop(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch_size: int | None = None) -> Tensor:
    """`steps` forward and backward passes of each batch (all images by default); the gradient of the last."""
    gradient = torch.empty(0)
    with undisturbed(model):
        for images, labels in zip(x.split(batch_size or len(x)), y.split(batch_size or len(x)), strict=True):
            for _ in range(steps):
                gradient = forward_backward(model, images, labels)
    return gradient


def paired_times(runs: Mapping[str, Callable[[], Any]], rounds: int, seed: int, desc: str) -> pd.DataFrame:
    """Seconds of each run (columns) in each round (rows), all once per round in random order, after one for warm-up."""
    for run in runs.values():
        run()
    order, shuffle = list(runs), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=desc, unit="round"):
        shuffle(order)
        for name in order:
            seconds[name].append(timed(runs[name])[1])
    return pd.DataFrame(seconds)


def timed(run: Callable[..., Any], *arguments: Tensor) -> tuple[Any, float]:
    """What `run` returns, and the seconds until it is done, on the GPU too."""
    start = time.perf_counter()
    result = run(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
