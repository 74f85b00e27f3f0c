"""How time and memory of PGD (inf, 8/255) grow: with the number of images, and with the share of robust ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from guardians.attacks import PGD, Spec
from guardians.data import Dataset, class_balanced_subset
from guardians.engine.checks import check_integer, check_number
from guardians.engine.victim import predicted_labels, undisturbed
from guardians.experiments.counting import peak_memory
from guardians.experiments.timing import timed
from guardians.models import load_model
from guardians.toolkits.build import build_attack

__all__ = [
    "COST_COLUMNS",
    "MEMORY_COLUMNS",
    "measure_cost_of_images",
    "measure_cost_of_robustness",
    "measure_memory",
]

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

COST_COLUMNS = {
    "study": "images: time against their number; robustness: against the share of them that the model withstands",
    "model": "name of the model",
    "implementation": "native or torchattacks",
    "early_stop": "whether images are let go as soon as the model is fooled",
    "precision": "what the search was allowed to compute in",
    "steps": "of PGD",
    "eps": "radius of the inf-norm ball, for images in [0, 1]",
    "n": "number of images",
    "robust_share": "share of them that withstood a first run; empty where they were not chosen by it",
    "rounds": "runs of each; within a round all run once, in random order",
    "seconds": "median over the rounds of the wall-clock time for all images",
    "seconds_per_image": "seconds / n",
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
    _check_counts(steps=steps, batch_size=batch_size)
    _check_sizes("sizes", sizes)
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


def measure_cost_of_images(
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    sizes: Sequence[int] = (100, 200, 500, 1000, 2000, 5000, 10_000),
    *,
    toolkit_limit: int = 1000,
    steps: int = 40,
    batch_size: int = 128,
    rounds: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of native PGD with early stopping, and of torchattacks', against the number of images; `COST_COLUMNS`.

    Args:
        models: by their names.
        images: (N, C, H, W), on the models' device; the first of them are attacked.
        labels: (N,).
        sizes: numbers of images.
        toolkit_limit: the largest size at which torchattacks runs too.
        steps: of PGD.
        batch_size: images in one forward pass.
        rounds: runs of each, after one of a single batch for warm-up.
        seed: of the order within the rounds.

    Raises:
        TypeError, ValueError: an argument is not an integer of at least 1, or there is no size, or one above N.
    """
    _check_counts(steps=steps, batch_size=batch_size, rounds=rounds)
    _check_sizes("sizes", sizes, high=len(images))
    check_integer("toolkit_limit", toolkit_limit, low=0)
    race: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "seed": seed}
    rows = []
    for name, model in models.items():
        native = _natives(model, steps, batch_size)
        toolkit = _Toolkit("torchattacks", model, images, steps, batch_size)
        for n in sizes:
            contenders = [*native, toolkit] if n <= toolkit_limit else native
            times = _race(contenders, images[:n], labels[:n], **race, desc=f"{name}, {n} images")
            rows += _cost_rows("images", name, times, steps, n, float("nan"))
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


def measure_cost_of_robustness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    shares: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    *,
    model_name: str,
    n: int = 512,
    steps: int = 40,
    batch_size: int = 128,
    rounds: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of native PGD, and of torchattacks', against the share of images that withstand it; `COST_COLUMNS`.

    A first run of native PGD tells the images that withstand from the others, of which images are then mixed. With
    fewer than `n` of either kind, every mix is as small as the smaller kind.

    Args:
        model: returns logits for images in [0, 1].
        images: (N, C, H, W) to choose from, on the model's device.
        labels: (N,).
        shares: of robust images, in [0, 1].
        model_name: for the table.
        n: images of each mix.
        steps: of PGD.
        batch_size: images in one forward pass.
        rounds: runs of each, after one of a single batch for warm-up.
        seed: of the choice, the order of the images, and the order within the rounds.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed, or no image withstands, or every one does.
    """
    _check_counts(n=n, steps=steps, batch_size=batch_size, rounds=rounds)
    for share in shares:
        check_number("share", share, low=0)
        if share > 1:
            raise ValueError(f"share={share!r}: must be at most 1")
    native = _natives(model, steps, batch_size)[0]
    robust = _is_correct(model, native.run(images, labels), labels, batch_size)
    kinds = robust.nonzero()[0], (~robust).nonzero()[0]
    n = min(n, *map(len, kinds))
    if n == 0:
        raise ValueError(f"images: {robust.sum()} of {len(robust)} withstand; needed are both kinds")
    contenders = [native, _Toolkit("torchattacks", model, images, steps, batch_size)]
    race: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "seed": seed}
    rows = []
    for share in shares:
        generator = np.random.default_rng(seed)
        counts = round(share * n), n - round(share * n)
        chosen = [generator.permutation(kind)[:count] for kind, count in zip(kinds, counts, strict=True)]
        mix = torch.from_numpy(generator.permutation(np.concatenate(chosen))).to(images.device)
        times = _race(contenders, images[mix], labels[mix], **race, desc=f"{model_name}, {share:.0%} robust")
        rows += _cost_rows("robustness", model_name, times, steps, n, counts[0] / n)
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


class _Contender:
    """One implementation with its settings, and what the tables say of it.

    Attributes:
        known: its first columns.
        run: the attack on images (N, C, H, W) and labels (N,).
    """

    def __init__(self, implementation: str, run: Callable[..., Tensor], early_stop: bool, precision: str) -> None:
        self.known = {"implementation": implementation, "early_stop": early_stop, "precision": precision}
        self.run = run


class _Toolkit(_Contender):
    def __init__(self, name: str, model: nn.Module, images: Tensor, steps: int, batch_size: int) -> None:
        with undisturbed(model), torch.no_grad():
            nb_classes = model(images[:1]).shape[1]
        spec = Spec("PGD", np.inf, EPS, params={"steps": steps, "eps_step": EPS_STEP})
        shape = tuple(images.shape[1:])
        attack = build_attack(name, spec, model, nb_classes=nb_classes, input_shape=shape, batch_size=batch_size)
        super().__init__(name, attack, False, "float32")


class _Native(_Contender):
    def __init__(self, model: nn.Module, steps: int, batch_size: int, *, early_stop: bool, precision: str) -> None:
        self.attack = _pgd(model, steps, batch_size, early_stop=early_stop, precision=precision)
        super().__init__("native", self.attack, early_stop, precision)


def _pgd(model: nn.Module, steps: int, batch_size: int, *, early_stop: bool, precision: str) -> PGD:
    return PGD(
        model,
        np.inf,
        EPS,
        EPS_STEP,
        max_iter=steps,
        batch_size=batch_size,
        verbose=False,
        seed=0,
        early_stop=early_stop,
        precision=precision,
    )


def _natives(model: nn.Module, steps: int, batch_size: int) -> list[_Native]:
    return [
        _Native(model, steps, batch_size, early_stop=True, precision=precision) for precision in ("auto", "float32")
    ]


def _race(
    contenders: Sequence[_Contender],
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    rounds: int,
    seed: int,
    desc: str,
) -> pd.DataFrame:
    """Seconds of each contender (columns) in each round (rows), all once per round in random order.

    Before that each runs once on a batch.
    """
    for contender in contenders:
        contender.run(images[:batch_size], labels[:batch_size])
    order, shuffle = list(contenders), random.Random(seed).shuffle
    seconds: dict[_Contender, list[float]] = {contender: [] for contender in contenders}
    with tqdm(total=rounds * len(order), desc=desc, unit="run") as progress:
        for _ in range(rounds):
            shuffle(order)
            for contender in order:
                progress.set_postfix_str(", ".join(map(str, contender.known.values())))
                seconds[contender].append(timed(contender.run, images, labels)[1])
                progress.update()
    return pd.DataFrame(seconds)


def _cost_rows(
    study: str, model_name: str, times: pd.DataFrame, steps: int, n: int, robust_share: float
) -> list[dict[str, Any]]:
    return [
        {
            "study": study,
            "model": model_name,
            **contender.known,
            "steps": steps,
            "eps": EPS,
            "n": n,
            "robust_share": robust_share,
            "rounds": len(times),
            "seconds": seconds,
            "seconds_per_image": seconds / n,
        }
        for contender, seconds in times.median().items()
        if isinstance(contender, _Contender)
    ]


def _is_correct(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> np.ndarray:
    """Whether the model is right about each image: bool (N,)."""
    correct: np.ndarray = (predicted_labels(model, images, batch_size) == labels).cpu().numpy()
    return correct


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
    attack = _pgd(load_model(model, device=device), steps, batch_size, early_stop=True, precision="auto")
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


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        check_integer(name, value, low=1)


def _check_sizes(name: str, sizes: Iterable[int], high: int | None = None) -> None:
    sizes = list(sizes)
    if not sizes:
        raise ValueError(f"{name}=[]: needed is at least one number of images")
    for size in sizes:
        check_integer(name, size, low=1)
        if high is not None and size > high:
            raise ValueError(f"{name}={sizes}: must be at most {high}, the number of images")
