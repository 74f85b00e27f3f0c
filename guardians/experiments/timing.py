"""The time of a piece of work, paired with that of others, and of the model's passes alone."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from guardians.engine.attack import Attack
from guardians.engine.report import Report
from guardians.engine.run import PROBE, Run
from guardians.engine.victim import undisturbed

__all__ = ["bare_loop", "forward_backward", "paired_times", "price", "timed"]

_PASSES = 5
"""Whose median is the price of one."""


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


def price(attack: Attack, x: Tensor, y: Tensor, counts: tuple[float, float, float]) -> float:
    """Seconds that passes of a native attack cost in batches as full as `x`, by the medians of some.

    Args:
        attack: which has run.
        x: images (N, ...).
        y: labels (N,).
        counts: samples that it sent forward and backward in the search, and forward to judge.
    """
    forward, backward, judgement = counts

    def an_image(run: Callable[[], Tensor]) -> float:
        return statistics.median(timed(run)[1] for _ in range(_PASSES)) / len(x)

    with undisturbed(attack.victim.module), torch.no_grad():
        chosen = Run(attack, x[:PROBE], 0, Report())
        search, judge = chosen.searches[0].logits, chosen.judge_logits
        step = an_image(lambda: forward_backward(search, x, y))
        ahead = an_image(lambda: search(x)) if forward > backward else 0.0
        judging = an_image(lambda: judge(x)) if judgement else 0.0
    return backward * step + (forward - backward) * ahead + judgement * judging


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
