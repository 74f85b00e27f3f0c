"""How near the images are that each implementation of Carlini-Wagner finds, and what they cost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks import CarliniWagnerL2, Spec
from guardians.attacks.norms import lp_norm
from guardians.data import Dataset
from guardians.engine.attack import Attack
from guardians.engine.checks import check_integer
from guardians.engine.victim import predicted_labels, undisturbed
from guardians.experiments.counting import CountingModel
from guardians.experiments.overhead import forward_backward, timed
from guardians.models import digest
from guardians.tables import BENCHMARK_COLUMNS, Table, as_written, file_name, read_csv, write_csv
from guardians.toolkits.base import TensorAttack
from guardians.toolkits.build import build_attack

__all__ = [
    "CONST_COLUMNS",
    "CONTENDERS",
    "MINIMUM_NORM_COLUMNS",
    "RUN_COLUMNS",
    "Contender",
    "correct_images",
    "local_optimality",
    "measure_consts",
    "measure_minimum_norm",
    "perturb",
    "summarise",
]

RUN_COLUMNS = {
    "model": "name of the model",
    "model_digest": BENCHMARK_COLUMNS["model_digest"],
    "data": "where the images came from, and the first digits of a SHA-256 digest of images and labels",
    "n": "images, the first that the model gets right",
    "implementation": "native, native as in the paper (adaptive=False), ART, torchattacks, foolbox, or foolbox DDN",
    "setting": "searches for c x steps of each, or steps",
    "params": "JSON: arguments other than the implementation's defaults",
    "batch_size": "images given to the attack at a time",
    "success_rate": "fraction of the images that fool the model, by its own verdict",
    "l2_median": "median L2 norm of the perturbations that fool it",
    "l2_mean": "mean L2 norm of the perturbations that fool it",
    "forward_per_image": "samples that went forward through the model, or through the copy that searches",
    "backward_per_image": "samples that went backward through it: gradient evaluations",
    "judgement_per_image": "samples that went forward through the model for judgement alone",
    "seconds": "wall-clock time of the attack on all images",
}
_KEY = ("model", "model_digest", "data", "n", "implementation", "setting", "params", "batch_size")

MINIMUM_NORM_COLUMNS = RUN_COLUMNS | {
    "l2_best": "mean over the images of the smallest L2 norm that any run of the study found",
    "l2_ratio": "mean L2 norm over the mean of the smallest ones, of the images that this run fooled",
    "l2_penalised": "mean L2 norm where an image that was not fooled, or further than that, counts as the radius at "
    "which the best images are all inside: the area under robust accuracy against that radius",
    "local_optimality": "(radius - l2_penalised) / (radius - l2_best), AttackBench's (Cina et al. 2025)",
    "speed_up": "time of ART at its defaults over that of this run",
}

CONST_COLUMNS = {
    "model": "name of the model",
    "const": "c, fixed",
    "n": "images, the first that the model gets right",
    "accuracy": "fraction of them that still stand",
    "l2_mean": "mean L2 norm of the perturbations that fool the model",
}


@dataclass(frozen=True)
class Contender:
    """An attack of the study.

    Attributes:
        implementation, setting: its name in the tables, see `RUN_COLUMNS`.
        build: makes the attack for a model, its number of classes, the shape of an image and the batch size.
        params: arguments other than the implementation's defaults.
        batch_size: images given to it at a time; None for the study's.
    """

    implementation: str
    setting: str
    build: Callable[[nn.Module, int, tuple[int, ...], int], TensorAttack]
    params: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.implementation} {self.setting}"


def _toolkit(
    implementation: str, setting: str, batch_size: int | None = None, family: str = "C&W", **params: Any
) -> Contender:
    def build(model: nn.Module, nb_classes: int, shape: tuple[int, ...], batch_size: int) -> TensorAttack:
        spec = Spec(family, 2, params=params)
        return build_attack(
            implementation, spec, model, nb_classes=nb_classes, input_shape=shape, batch_size=batch_size
        )

    name = implementation if family == "C&W" else f"{implementation} {family}"
    return Contender(name, setting, build, params, batch_size)


def _paper(searches: int, steps: int) -> Contender:
    params: dict[str, Any] = {
        "binary_search_steps": searches,
        "max_iter": steps,
        "learning_rate": 0.01,
        "adaptive": False,
    }

    def build(model: nn.Module, nb_classes: int, shape: tuple[int, ...], batch_size: int) -> TensorAttack:
        return CarliniWagnerL2(model, batch_size=batch_size, verbose=False, **params)

    return Contender("native, as in the paper", f"{searches} x {steps}", build, params)


CONTENDERS = (
    _toolkit("foolbox", "9 x 100", steps=100),
    _toolkit("torchattacks", "1 x 50"),
    _toolkit("torchattacks", "1 x 200", steps=200),
    _toolkit("foolbox", "20", family="DDN", steps=20),
    _toolkit("foolbox", "100", family="DDN", steps=100),
    _paper(9, 100),
    _toolkit("native", "9 x 1000", searches=9, steps=1000),
    _toolkit("native", "5 x 100", searches=5, steps=100),
    _toolkit("native", "5 x 10", searches=5),
    _toolkit("native", "2 x 10", searches=2),
    _toolkit("native", "10 x 10"),
    _toolkit("ART", "10 x 10", batch_size=1),
)
"""The attacks of the study. foolbox's default of 10,000 steps is 100 here, and ART's batches are of one image, as its
defaults have it. DDN, a stronger attack than C&W of few steps, sharpens what is called the best."""


def correct_images(model: nn.Module, data: Dataset, n: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The first `n` images (n, C, H, W) that the model gets right, and their labels (n,).

    Raises:
        ValueError: there are not as many.
    """
    images, labels = data.as_floats().to(device), data.labels.to(device)
    correct = predicted_labels(model, images) == labels
    if int(correct.sum()) < n:
        raise ValueError(f"n={n}: the model gets {int(correct.sum())} of the {len(images)} images right")
    return images[correct][:n], labels[correct][:n]


def measure_minimum_norm(
    models: Mapping[str, nn.Module],
    data: Dataset,
    *,
    n: int,
    out: str | os.PathLike[str],
    contenders: Sequence[Contender] = CONTENDERS,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    verbose: bool = True,
) -> pd.DataFrame:
    """Run all contenders on all models, and write `out/carlini_wagner.csv`, columns `MINIMUM_NORM_COLUMNS`.

    Each run is kept in `out/carlini_wagner_runs.csv`, with its images' outcomes in `out/carlini_wagner_outcomes`, as
    soon as it is finished; the same call goes on where one was stopped.

    Args:
        models: by name; each returns logits for images in [0, 1].
        data: from which the first `n` images that a model gets right are taken.
        n: images.
        out: folder of the tables.
        contenders: attacks.
        batch_size: images given to an attack at a time, unless it says otherwise.
        device: of models and images.
        verbose: show progress.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed; before any work.
    """
    check_integer("n", n, low=1)
    check_integer("batch_size", batch_size, low=1)
    out = Path(out)
    table = Table(out / "carlini_wagner_runs.csv", RUN_COLUMNS, _KEY)
    digests = {name: digest(model) for name, model in models.items()}
    samples = {name: correct_images(model, data, n, device) for name, model in models.items()}
    jobs = [(name, contender) for name in models for contender in contenders]
    wanted = []
    with tqdm(jobs, desc="minimum norm", unit="run", disable=not verbose) as progress:
        for name, contender in progress:
            progress.set_postfix_str(f"{contender.name} on {name}")
            size = contender.batch_size or batch_size
            known = {"model": name, "model_digest": digests[name], "data": data.identity, "n": n}
            known |= {"implementation": contender.implementation, "setting": contender.setting}
            known |= {"params": json.dumps(contender.params), "batch_size": size}
            wanted.append(known)
            if known not in table:
                row, outcome = _run(contender, models[name], *samples[name], size)
                table.append(known | row, (_outcome_path(out, known), outcome))
    runs = pd.concat([table.select([known]) for known in wanted], ignore_index=True)  # in this order, not the table's
    frame = summarise(runs, [read_csv(_outcome_path(out, known)) for known in wanted])
    write_csv(frame, out / "carlini_wagner.csv")
    return frame


def summarise(runs: pd.DataFrame, outcomes: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The runs with what each is worth beside the others on the same model: columns `MINIMUM_NORM_COLUMNS`.

    Args:
        runs: columns `RUN_COLUMNS`.
        outcomes: of each run, in the same order, the columns fooled and l2 of its images.
    """
    distances = np.stack([np.where(outcome["fooled"] == 1, outcome["l2"], np.inf) for outcome in outcomes])
    parts = []
    for _, rows in runs.reset_index(drop=True).groupby("model", sort=False):
        own = distances[rows.index]
        best = own.min(axis=0)
        radius = best[np.isfinite(best)].max(initial=0.0)
        penalised = np.minimum(own, radius).mean(axis=1)
        fooled = np.isfinite(own)
        ratio = [d[f].mean() / best[f].mean() if f.any() else np.nan for d, f in zip(own, fooled, strict=True)]
        is_art = (rows["implementation"] == "ART") & (rows["params"] == "{}")
        art = rows.loc[is_art, "seconds"].iloc[0] if is_art.any() else np.nan
        parts.append(
            rows.assign(
                l2_best=np.minimum(best, radius).mean(),
                l2_ratio=ratio,
                l2_penalised=penalised,
                local_optimality=[local_optimality(d, best) for d in own],
                speed_up=art / rows["seconds"],
            )
        )
    return pd.concat(parts, ignore_index=True)[list(MINIMUM_NORM_COLUMNS)]


def local_optimality(distances: np.ndarray, best: np.ndarray) -> float:
    """How much of the area that the best attack leaves under robust accuracy against the radius this one leaves too.

    1 for an attack that is the best on every image, 0 for one that fools no image before the best has fooled all
    (Cina et al., "AttackBench", 2025, section 3). For images that the model gets right. NaN where the best leaves no
    area: nothing is fooled, or all images at the same radius.

    Args:
        distances: norms of an attack's perturbations (N,), infinite where the model was not fooled.
        best: the smallest norms (N,) that any attack found.
    """
    radius = best[np.isfinite(best)].max(initial=0.0)
    reached = radius - np.minimum(best, radius).mean()
    return float((radius - np.minimum(distances, radius).mean()) / reached) if reached > 0 else float("nan")


def measure_consts(
    models: Mapping[str, nn.Module],
    data: Dataset,
    consts: Sequence[float],
    *,
    n: int,
    steps: int = 100,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """What becomes of accuracy and perturbations with c fixed, see `perturb`: columns `CONST_COLUMNS`."""
    rows = []
    for name, model in models.items():
        images, labels = correct_images(model, data, n, device)
        for const in tqdm(consts, desc=f"consts, {name}", unit="const"):
            x_adv, fooled = perturb(model, images, labels, const, steps=steps, batch_size=batch_size)
            l2 = lp_norm(x_adv - images, 2).flatten()[fooled]
            accuracy = 1 - fooled.double().mean().item()
            rows.append({"model": name, "const": const, "n": n, "accuracy": accuracy, "l2_mean": l2.mean().item()})
    return pd.DataFrame(rows, columns=list(CONST_COLUMNS))


def perturb(
    model: nn.Module, images: Tensor, labels: Tensor, const: float, *, steps: int = 100, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The paper's C&W with c fixed: images (N, C, H, W), and whether they fool the model, bool (N,)."""
    attack = CarliniWagnerL2(
        model,
        learning_rate=0.01,
        binary_search_steps=1,
        max_iter=steps,
        initial_const=const,
        batch_size=batch_size,
        verbose=False,
        adaptive=False,
        abort_early=False,
    )
    x_adv = attack(images, labels)
    assert attack.report is not None
    assert attack.report.fooled is not None
    return x_adv, torch.from_numpy(attack.report.fooled).to(images.device)


def _run(
    contender: Contender, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The columns of a run that are not its key, and the outcomes of its images."""
    counting = CountingModel(model)
    is_native = contender.implementation.startswith("native")
    with undisturbed(model), torch.no_grad():
        nb_classes = model(images[:1]).shape[1]
        forward_backward(model, images[:batch_size], labels[:batch_size])  # kernels are prepared
    attack = contender.build(model if is_native else counting, nb_classes, tuple(images.shape[1:]), batch_size)
    counting.reset()
    x_adv, seconds = timed(attack, images, labels)
    counts = (counting.forward_samples, counting.backward_samples, 0)
    if isinstance(attack, Attack):
        report = attack.report
        assert report is not None
        counts = (report.search_forward, report.search_backward, report.judgement_forward)
    fooled = predicted_labels(model, x_adv) != labels
    l2 = lp_norm(x_adv - images, 2).flatten()
    outcome = {"label": labels.tolist(), "fooled": fooled.int().tolist(), "l2": l2.tolist()}
    n = len(images)
    row = {
        "success_rate": fooled.double().mean().item(),
        "l2_median": l2[fooled].median().item(),
        "l2_mean": l2[fooled].mean().item(),
        **dict(
            zip(
                ("forward_per_image", "backward_per_image", "judgement_per_image"),
                (count / n for count in counts),
                strict=True,
            )
        ),
        "seconds": seconds,
    }
    return row, pd.DataFrame({"index": range(n), **outcome})


def _outcome_path(out: Path, known: Mapping[str, Any]) -> Path:
    """Of a run: its file has a digest of the whole key in its name."""
    hashed = hashlib.sha256(json.dumps([as_written(known[name]) for name in _KEY]).encode()).hexdigest()[:8]
    name = file_name(known["model"], known["implementation"], known["setting"], hashed)
    return out / "carlini_wagner_outcomes" / f"{name}.csv"
