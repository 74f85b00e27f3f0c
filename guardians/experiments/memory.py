"""The memory of PGD (inf, 8/255) on images that are read lazily, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from guardians.attacks import PGD
from guardians.data import Dataset, class_balanced_subset
from guardians.engine.checks import check_integer
from guardians.experiments.counting import peak_memory
from guardians.experiments.timing import timed
from guardians.models import load_model

__all__ = ["MEMORY_COLUMNS", "measure_memory"]

EPS, EPS_STEP = 8 / 255, 2 / 255
_CHUNK = 1000
"""Images written at once."""

MEMORY_COLUMNS = {
    "model": "name of the model",
    "n": "number of images, read lazily",
    "steps": "of PGD, native with early_stop and precision auto",
    "batch_size": "images in one forward pass, and in one batch read",
    "peak_memory_mb": "peak memory in MB (10^6 bytes) of a process of its own: resident, or on a GPU allocated there",
    "peak_anonymous_mb": "largest resident memory in MB, files that are mapped left out, whenever results came; empty "
    "where the system does not tell",
    "seconds": "wall-clock time, reading included, without a warm-up",
    "images_per_second": "n / seconds",
    "robust_accuracy": "fraction that the model classifies correctly both clean and attacked",
}


def measure_memory(
    model: str,
    data: Dataset,
    sizes: Sequence[int] = (1000, 50_000),
    *,
    steps: int = 40,
    batch_size: int = 128,
    device: str = "cpu",
) -> pd.DataFrame:
    """Peak memory of native PGD on images that are read from a memory-mapped file, `MEMORY_COLUMNS`.

    Each number of images is attacked in a fresh process.

    Args:
        model: name of the model, see `load_model`.
        data: images, in the order of a class-balanced draw, and from the first again where they are too few.
        sizes: numbers of images.
        steps: of PGD.
        batch_size: images in one forward pass, and in one batch read.
        device: where the model goes.

    Raises:
        TypeError, ValueError: a size, `steps` or `batch_size` is not an integer of at least 1, or there is no size.
    """
    check_integer("steps", steps, low=1)
    check_integer("batch_size", batch_size, low=1)
    if not sizes:
        raise ValueError("sizes=[]: needed is at least one number of images")
    for size in sizes:
        check_integer("sizes", size, low=1)
    rows = []
    with TemporaryDirectory() as folder:
        _write_images(Path(folder), data, max(sizes))
        for n in tqdm(sizes, desc="memory", unit="run"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                task = process.submit(
                    _attack_files, model, folder, n, steps, batch_size, device, torch.get_num_threads()
                )
                rows.append({"model": model, "n": int(n), "steps": steps, "batch_size": batch_size, **task.result()})
    return pd.DataFrame(rows, columns=list(MEMORY_COLUMNS))


class _MappedImages(TorchDataset[tuple[Tensor, Tensor]]):
    """The first `n` images and labels of a folder that `_write_images` has written.

    The file is mapped for one read at a time: pages that were read no longer count as memory of the process.
    """

    def __init__(self, folder: str | Path, n: int) -> None:
        self._folder, self._n = Path(folder), n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Several at once, which is how a `DataLoader` asks."""
        images, labels = (
            torch.from_numpy(np.load(self._folder / f"{name}.npy", mmap_mode="r")[indices])
            for name in ("images", "labels")
        )
        return list(zip(images.float() / 255, labels, strict=True))


def _write_images(folder: Path, data: Dataset, n: int) -> None:
    """The images and labels as .npy files, written piece by piece."""
    order = np.resize(class_balanced_subset(data.labels.numpy(), len(data)), n)
    for name, values in (("images", data.images), ("labels", data.labels)):
        array = values.numpy()
        file = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=array.dtype, shape=(n, *array.shape[1:])
        )
        for first in range(0, n, _CHUNK):
            file[first : first + _CHUNK] = array[order[first : first + _CHUNK]]
        file.flush()


def _attack_files(
    model: str, folder: str, n: int, steps: int, batch_size: int, device: str, threads: int
) -> dict[str, float]:
    """Attack the first `n` images of a folder; what a process of its own has to say of it."""
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "early_stop": True, "verbose": False}
    attack = PGD(load_model(model, device=device), np.inf, EPS, EPS_STEP, max_iter=steps, **options)
    batches = DataLoader(_MappedImages(folder, n), batch_size=batch_size)
    robust, anonymous = 0, _anonymous_mb()

    def run() -> Tensor:
        nonlocal robust, anonymous
        for finished in attack.stream(batches):
            assert finished.fooled is not None
            robust += int((~finished.fooled).sum())
            anonymous = max(anonymous, _anonymous_mb())
        return torch.empty(0, device=device)

    with peak_memory(device) as peak:
        _, seconds = timed(run)
    return {
        "peak_memory_mb": peak.mb,
        "peak_anonymous_mb": anonymous,
        "seconds": seconds,
        "images_per_second": n / seconds,
        "robust_accuracy": robust / n,
    }


def _anonymous_mb() -> float:
    """Resident memory of this process without mapped files, in MB; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
