"""How fast the defences are: training against ART's trainers, inference against plain forward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import art.attacks.evasion as art_attacks
import art.defences.trainer as art_trainers
import pandas as pd
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.attacks import FGSM, PGD
from guardians.defences import AdversarialTrainer, MixupInference, RandomSelfEnsemble
from guardians.engine.checks import check_integer
from guardians.engine.victim import undisturbed
from guardians.experiments.timing import paired_times

__all__ = ["SPEED_COLUMNS", "measure_inference", "measure_training"]

SPEED_COLUMNS = {
    "work": "what is done",
    "implementation": "whose code does it",
    "precision": "of native training: float32, the default, or auto, the fastest that the device has; else float32",
    "options": "speed options of native training that were on, of bfloat16, channels_last, folded batch norm; "
    "else none",
    "n": "images, one pass over them",
    "batch_size": "images in a step",
    "rounds": "runs of each; within a round all run once, in random order",
    "seconds": "median over the rounds",
    "images_per_second": "n over that",
    "ratio": "of training, images/s over those of ART; of inference, seconds over those of the plain passes; in the "
    "same round, median",
    "ratio_low": "lower quartile of that ratio",
    "ratio_high": "upper quartile of that ratio",
}
_EPS = 8 / 255


def measure_training(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 128, rounds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """An epoch of adversarial training with native trainer and attack against ART's, columns `SPEED_COLUMNS`.

    FGSM with half of each batch attacked, PGD of 7 steps of 2/255 on all images, and ART's `AdversarialTrainerMadryPGD`
    with the same PGD; inf, 8/255, and SGD. Each run trains a copy of the model.

    Args:
        model: returns logits for images in [0, 1].
        images: (N, C, H, W).
        labels: (N,).
        batch_size: images in a step, and in a batch of the attacks.
        rounds: runs of each, after one for warm-up.
        seed: of the order within the rounds.

    Raises:
        TypeError, ValueError: `batch_size` or `rounds` is not an integer of at least 1.
    """
    check_integer("batch_size", batch_size, low=1)
    check_integer("rounds", rounds, low=1)
    x, y = images.cpu().numpy(), labels.cpu().numpy()
    with undisturbed(model), torch.no_grad():
        nb_classes = model(images[:1]).shape[1]
    pgd = {"eps": _EPS, "eps_step": 2 / 255, "max_iter": 7, "batch_size": batch_size, "verbose": False}
    fgsm = {"eps": _EPS, "batch_size": batch_size}

    def classifier() -> PyTorchClassifier:
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        device_type = "gpu" if images.is_cuda else "cpu"
        loss = nn.CrossEntropyLoss()
        return PyTorchClassifier(
            trained, loss, x.shape[1:], nb_classes, optimizer, clip_values=(0, 1), device_type=device_type
        )

    were_on: dict[tuple[str, str, str], list[str]] = {}

    def native(work: str, attack: Any, options: dict[str, Any], ratio: float, precision: str) -> Callable[[], None]:
        def run() -> None:
            trained = classifier()
            trainer = AdversarialTrainer(
                trained, attack(trained, **options), ratio, precision=precision, holdout=0, verbose=False
            )
            trainer.fit(x, y, batch_size=batch_size, nb_epochs=1)
            were_on[work, "native", precision] = trainer.speed_options

        return run

    def art(attack: Any, options: dict[str, Any], ratio: float) -> Callable[[], None]:
        def run() -> None:
            trained = classifier()
            trainer = art_trainers.AdversarialTrainer(trained, attack(trained, **options), ratio)
            trainer.fit(x, y, batch_size=batch_size, nb_epochs=1)

        return run

    def madry() -> None:
        trained = classifier()
        trainer = art_trainers.AdversarialTrainerMadryPGD(
            trained, nb_epochs=1, batch_size=batch_size, eps=_EPS, eps_step=2 / 255, max_iter=7, num_random_init=0
        )
        trainer.trainer.attacks[0].set_params(batch_size=batch_size)
        trainer.fit(x, y)

    runs: dict[tuple[str, str, str], Callable[[], None]] = {
        ("FGSM, ratio 0.5", "ART", "float32"): art(art_attacks.FastGradientMethod, fgsm, 0.5),
        ("PGD-7, ratio 1", "ART", "float32"): art(art_attacks.ProjectedGradientDescent, pgd, 1.0),
        ("PGD-7, ratio 1", "ART AdversarialTrainerMadryPGD", "float32"): madry,
    }
    for precision in ("float32", "auto"):
        for work, attack, options, ratio in (("FGSM, ratio 0.5", FGSM, fgsm, 0.5), ("PGD-7, ratio 1", PGD, pgd, 1.0)):
            runs[work, "native", precision] = native(work, attack, options, ratio, precision)
    names = {", ".join(key): key for key in runs}
    times = paired_times({name: runs[key] for name, key in names.items()}, rounds, seed, "training")
    rows = []
    for name, (work, implementation, precision) in names.items():
        speedup = times[", ".join((work, "ART", "float32"))] / times[name]
        known = {"work": work, "implementation": implementation, "precision": precision}
        known["options"] = " + ".join(were_on.get((work, implementation, precision), [])) or "none"
        rows.append(known | _columns(times[name], speedup, len(images), batch_size))
    return pd.DataFrame(rows, columns=list(SPEED_COLUMNS))


def measure_inference(
    model: nn.Module,
    images: Tensor,
    pool: tuple[Tensor, Tensor],
    *,
    passes: int = 10,
    batch_size: int = 128,
    rounds: int = 7,
    seed: int = 0,
) -> pd.DataFrame:
    """Random Self-Ensemble and Mixup Inference against as many plain forward passes, columns `SPEED_COLUMNS`.

    The plain passes are the model called on each batch, `passes` times, without gradients. Mixup Inference makes one
    more, to predict the label of an image first.

    Args:
        model: returns logits for images in [0, 1].
        images: (N, C, H, W), on the model's device.
        pool: images and labels of Mixup Inference.
        passes: n of Random Self-Ensemble, K of Mixup Inference.
        batch_size: images in a batch.
        rounds: runs of each, after one for warm-up.
        seed: of the order within the rounds.

    Raises:
        TypeError, ValueError: `passes`, `batch_size` or `rounds` is not an integer of at least 1.
    """
    check_integer("passes", passes, low=1)
    check_integer("batch_size", batch_size, low=1)
    check_integer("rounds", rounds, low=1)
    batches = images.split(batch_size)

    def asking(module: nn.Module, times: int = 1) -> Callable[[], None]:
        def run() -> None:
            with undisturbed(module), torch.no_grad():
                for batch in batches:
                    for _ in range(times):
                        module(batch)

        return run

    plain = f"plain x {passes}"
    runs = {plain: asking(model, passes), "Random Self-Ensemble": asking(RandomSelfEnsemble(model, n=passes, seed=0))}
    for method in ("MI-PL", "MI-OL"):
        runs[method] = asking(MixupInference(model, pool, method, num_samples=passes, seed=0))
    times = paired_times(runs, rounds, seed, "inference")
    rows = []
    for name in runs:
        known = {"work": f"inference: {name}", "implementation": "native", "precision": "float32", "options": "none"}
        rows.append(known | _columns(times[name], times[name] / times[plain], len(images), batch_size))
    return pd.DataFrame(rows, columns=list(SPEED_COLUMNS))


def _columns(seconds: pd.Series, ratio: pd.Series, n: int, batch_size: int) -> dict[str, float]:
    return {
        "n": n,
        "batch_size": batch_size,
        "rounds": len(seconds),
        "seconds": float(seconds.median()),
        "images_per_second": n / float(seconds.median()),
        "ratio": float(ratio.median()),
        "ratio_low": float(ratio.quantile(0.25)),
        "ratio_high": float(ratio.quantile(0.75)),
    }
