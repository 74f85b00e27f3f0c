"""Memory and speed of decoding JPEG files, and of PGD (inf, 8/255) on them, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks import PGD
from guardians.data import Dataset, class_balanced_subset, open_data
from guardians.engine.checks import check_integer
from guardians.experiments.counting import peak_memory, resident_peak
from guardians.experiments.timing import timed
from guardians.models import load_model

__all__ = ["MEMORY_COLUMNS", "measure_memory"]

EPS, EPS_STEP = 8 / 255, 2 / 255
_DISTINCT = 1000
"""Files with images of their own; the others are hard links to them, so reading is from memory that caches the disk."""

MEMORY_COLUMNS = {
    "work": "decode: the files alone; attack in memory: of images that are decoded before; attack: of files",
    "model": "name of the model, in front of which images are averaged to the size that it is for; empty for decode",
    "n": "number of images",
    "side": "of an image, in pixels",
    "workers": "processes that decode; 0 for an attack in memory",
    "steps": "of PGD, native with early_stop and precision auto; 0 for decode",
    "batch_size": "images in one shard and in one forward pass",
    "peak_memory_mb": "peak memory in MB (10^6 bytes) of the process that asks for images: resident, or on a GPU "
    "allocated there",
    "worker_peak_mb": "largest resident memory in MB of a process that decodes, what it shares with the one that asks "
    "included; empty where the system does not tell",
    "seconds": "wall-clock time, without a warm-up; of an attack in memory without decoding",
    "images_per_second": "n / seconds",
    "robust_accuracy": "fraction that the model classifies correctly both clean and attacked",
}


def measure_memory(
    model: str,
    data: Dataset,
    sizes: Sequence[int] = (1000, 50_000),
    *,
    workers: Sequence[int] = (1, 2),
    side: int = 224,
    steps: int = 40,
    batch_size: int = 32,
    device: str = "cpu",
) -> pd.DataFrame:
    """Peak memory and speed of `open_data` and of native PGD on an `ImageFolder` of JPEG files, `MEMORY_COLUMNS`.

    Decoding is measured for each number of images and of workers, the attack for each number of images with the first
    number of workers, and on the smallest number of images in memory.

    Args:
        model: name of the model, see `load_model`.
        data: images, of which 1,000 or as many as there are, in a class-balanced draw, are enlarged to files.
        sizes: numbers of images; beyond the 1,000 they are the same again, under other names.
        workers: numbers of processes that decode, each at least 1.
        side: to which images are enlarged, in pixels.
        steps: of PGD.
        batch_size: images in one shard and in one forward pass.
        device: where the model goes.

    Raises:
        TypeError, ValueError: a size, a number of workers, `side`, `steps` or `batch_size` is not an integer of at
            least 1, or there is no size or no number of workers.
    """
    for name, values in (("sizes", sizes), ("workers", workers)):
        if not values:
            raise ValueError(f"{name}=[]: needed is at least one number")
        for value in values:
            check_integer(name, value, low=1)
    for name, value in (("side", side), ("steps", steps), ("batch_size", batch_size)):
        check_integer(name, value, low=1)
    tasks: list[tuple[str, int, int]] = [("decode", n, count) for n in sizes for count in workers]
    tasks += [("attack in memory", min(sizes), 0), *(("attack", n, workers[0]) for n in sizes)]
    rows = []
    with TemporaryDirectory() as folder:
        _write_images(Path(folder), data, max(sizes), side)
        for work, n, count in tqdm(tasks, desc="memory", unit="run"):
            settings: dict[str, Any] = {"n": int(n), "workers": int(count), "batch_size": batch_size}
            shown = {"work": work, "model": "", "side": side, "steps": 0, **settings}
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_starts_as_usual) as process:
                if work == "decode":
                    task = process.submit(_decode, folder, **settings)
                else:
                    shown |= {"model": model, "steps": steps}
                    settings |= {"steps": steps, "size": data.image_shape[1:], "device": device}
                    task = process.submit(_attack, folder, model, **settings, threads=torch.get_num_threads())
                rows.append({**shown, **task.result()})
    return pd.DataFrame(rows, columns=list(MEMORY_COLUMNS))


def _starts_as_usual() -> None:
    """What is spawned would spawn the processes that decode, too, which takes seconds each."""
    set_start_method(None, force=True)


def _write_images(folder: Path, data: Dataset, n: int, side: int) -> None:
    """An `ImageFolder` tree of `n` JPEG files of `side` x `side` pixels, its class folders named by their labels."""
    chosen = class_balanced_subset(data.labels.numpy(), min(n, len(data), _DISTINCT))
    for i in range(n):
        same = i % len(chosen)
        place = folder / "test" / str(int(data.labels[chosen[same]]))
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{i}.jpg"
        if i != same:
            os.link(place / f"{same}.jpg", file)
            continue
        pixels = data.images[chosen[same]].permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        picture.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)


def _decode(folder: str, n: int, workers: int, batch_size: int) -> dict[str, float]:
    """Decode `n` images of a folder; what a process of its own has to say of it."""
    data = open_data(folder, n=n)
    with peak_memory() as peak:
        _, seconds = timed(lambda: sum(len(shard) for shard in data.shards(batch_size, workers=workers)))
    return _costs(n, workers, peak.mb, seconds)


def _attack(
    folder: str,
    model: str,
    n: int,
    workers: int,
    batch_size: int,
    steps: int,
    size: tuple[int, ...],
    device: str,
    threads: int,
) -> dict[str, float]:
    """Attack `n` images of a folder, without workers in memory; what a process of its own has to say of it."""
    torch.set_num_threads(threads)
    averaged = nn.Sequential(nn.AdaptiveAvgPool2d(size), load_model(model, device=device)).eval()
    options: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "early_stop": True, "verbose": False}
    attack = PGD(averaged, np.inf, EPS, EPS_STEP, max_iter=steps, **options)
    files = open_data(folder, n=n)
    data = files if workers else files[:]
    labels, robust = torch.tensor([int(name) for name in files.classes]), 0

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for shard in data.shards(batch_size, workers=workers):
            yield shard.as_floats(), labels[shard.labels]

    def run() -> None:
        nonlocal robust
        for finished in attack.stream(batches()):
            assert finished.fooled is not None
            robust += int((~finished.fooled).sum())

    with peak_memory(device) as peak:
        _, seconds = timed(run)
    return {**_costs(n, workers, peak.mb, seconds), "robust_accuracy": robust / n}


def _costs(n: int, workers: int, peak: float, seconds: float) -> dict[str, float]:
    of_worker = resident_peak(of_children=True) if workers else float("nan")
    return {"peak_memory_mb": peak, "worker_peak_mb": of_worker, "seconds": seconds, "images_per_second": n / seconds}
