"""Standard and adversarial training, with mixup or noise: SGD on seeded augmentations, resumable to the step.

Data order, augmentation and all draws of a step are functions of (seed, epoch, step), so a run that was interrupted and
resumed gives the same weights as one that was not (up to the arithmetic of the machine, and unless the model draws
random numbers of its own).
"""

from __future__ import annotations

import csv
import math
import operator
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm.auto import tqdm

from guardians.attacks.pgd import ProjectedGradientDescent
from guardians.data import Dataset, class_balanced_mask, class_balanced_subset
from guardians.defences.adversarial_training import has_collapsed, share_standing, warn_of_collapse
from guardians.defences.random_self_ensemble import RandomSelfEnsemble
from guardians.engine.checks import check_flag
from guardians.engine.rng import hashed, row_keys
from guardians.engine.search import InPrecision, bfloat16_is_native, folded_view

__all__ = ["ENSEMBLE", "LOG_COLUMNS", "RECIPES", "SCHEDULES", "Recipe", "accuracy", "robust_accuracy", "train"]

Weights = dict[str, Tensor]

SCHEDULES = ("one-cycle", "swa")
LOG_COLUMNS = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_accuracy", "robust_accuracy", "seconds")
ENSEMBLE = 10
"""Noisy passes whose mean is the answer of a model that is trained with noise."""
_NOT_NEGATIVE = """
    weight_decay crop_padding cutout attack_steps eps holdout mixup_alpha sigma_init sigma_inner
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; a last partial batch is dropped.
        schedule: "one-cycle" (Smith and Topin, "Super-Convergence", 2018), or "swa": a constant learning rate, and in
            the end the average of the weights after each epoch, with batch norm statistics of the training images.
            It wants weights that are trained already (Izmailov et al., "Averaging weights leads to wider optima and
            better generalization", 2018, algorithm 1).
        peak_lr: highest learning rate; of one-cycle, reached after `warmup` of all steps.
        warmup: fraction of the steps before the peak of one-cycle.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty, on convolution and linear weights only.
        label_smoothing: Szegedy et al. 2016, section 7.
        crop_padding: pixels of reflection padding before the random crop; less than the side of the images.
        cutout: side of the square that is greyed out in each image (DeVries and Taylor 2017); 0 turns it off. The
            square has a central pixel, which may lie on the border: an even value gives a side of one pixel less.
        attack_steps: steps of PGD (inf) that perturb training images, in evaluation mode; 0 for none, 1 is "fast"
            training (Wong et al., "Fast is better than free", 2020, algorithm 3), more is that of Madry et al. 2018.
        eps: radius of its ball, in the unit of the images.
        eps_step: its step size.
        random_start: whether it starts at a random point of the ball; one step of `eps` from the image is FGSM.
        ratio: share of the images of a batch that are perturbed, as in ART's `AdversarialTrainer`; rounded up.
        holdout: training images, class-balanced, that are not trained on. After each epoch of adversarial training the
            model is attacked on them (PGD-10), to stop when robustness collapses, see `train`.
        mixup_alpha: parameter of the beta distribution from which mixup's lambda is drawn, one a step; 0 turns it off
            (Zhang et al., "mixup: beyond empirical risk minimization", 2018). With an attack and `ratio` 0.5 this is
            interpolated adversarial training, where perturbed images are mixed among themselves and the others too
            (Lamb et al., "Interpolated adversarial training", 2019, algorithm 1).
        sigma_init, sigma_inner: noise in front of the first convolution and of the others, see `RandomSelfEnsemble`;
            accuracies in the log are of one noisy pass, that in the end is of the ensemble of ten.
        seed: of the data order, the augmentation and all other draws; the command line seeds the initial weights with
            it too.

    Raises:
        TypeError: a value is not a number, or a count not an integer.
        ValueError: a value is out of range.
    """

    epochs: int = 24
    batch_size: int = 512
    schedule: str = "one-cycle"
    peak_lr: float = 0.4
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_padding: int = 4
    cutout: int = 8
    attack_steps: int = 0
    eps: float = 8 / 255
    eps_step: float = 10 / 255
    random_start: bool = True
    ratio: float = 1.0
    holdout: int = 0
    mixup_alpha: float = 0.0
    sigma_init: float = 0.0
    sigma_inner: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        check_flag("random_start", self.random_start)
        for field in fields(self):
            if field.name in ("schedule", "random_start"):
                continue
            value = getattr(self, field.name)
            convert, kind = (operator.index, "an integer") if isinstance(field.default, int) else (float, "a number")
            if isinstance(value, (str, bool)):
                raise TypeError(f"{field.name}={value!r}: must be {kind}")
            try:  # plain numbers, because a checkpoint that holds numpy's cannot be read back
                object.__setattr__(self, field.name, convert(value))
            except TypeError as error:
                raise TypeError(f"{field.name}={value!r}: must be {kind}") from error
        for name in ("epochs", "batch_size", "peak_lr", "eps_step"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0 and finite")
        for name in ("warmup", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and finite")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: must be in [0, 1]")

    @property
    def is_adversarial(self) -> bool:
        """Whether any training image is perturbed."""
        return self.attack_steps > 0 and self.ratio > 0

    @property
    def is_noisy(self) -> bool:
        """Whether the model is trained as a `RandomSelfEnsemble`."""
        return self.sigma_init > 0 or self.sigma_inner > 0


_ADVERSARIAL = {"batch_size": 256, "peak_lr": 0.2, "label_smoothing": 0.0, "cutout": 0, "holdout": 1000}
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    "fgsm-at": {**_ADVERSARIAL, "epochs": 16, "attack_steps": 1},
    "pgd-at": {**_ADVERSARIAL, "epochs": 20, "attack_steps": 3, "eps_step": 4 / 255},
    "rse": {"label_smoothing": 0.0, "cutout": 0, "sigma_init": 0.8, "sigma_inner": 0.2},
    "mixup": {"epochs": 16, "label_smoothing": 0.0, "cutout": 0, "mixup_alpha": 1.0},
    "iat": {**_ADVERSARIAL, "epochs": 12, "attack_steps": 2, "eps_step": 6 / 255, "ratio": 0.5, "mixup_alpha": 1.0},
}
"""What the recipes of the bundled models, `resnet9-16-<name>`, change in `Recipe`."""


def train(
    model: nn.Module,
    train_data: Dataset,
    test_data: Dataset,
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    verbose: bool = True,
) -> float:
    """Train `model` in place and return its accuracy on `test_data` (float32, evaluation mode).

    `folder` receives `log.csv`, a row an epoch (`LOG_COLUMNS`; the robust accuracy is that on held-out images under
    PGD-10, nan without them), and `checkpoint.pt`, written after every epoch and on Ctrl-C, which waits for the end
    of the step; where it exists, training goes on from it.

    Adversarial training with held-out images stops when its robust accuracy on them has fallen below half of the best
    so far: single-step training can learn, within an epoch, to fool its own attack ("catastrophic overfitting", Wong et
    al. 2020, section 5.3). The log of the program says so, and the model is that of the best epoch.

    Raises:
        ValueError: there are fewer training images than one batch, no test images, fewer training images than are held
            out, the images are too small for `crop_padding`, `folder` cannot be made, or the checkpoint is of another
            recipe, another number of steps or another model, or cannot be read.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint is written.
    """
    device = torch.device(device)
    held_out = None
    if recipe.holdout and recipe.is_adversarial:
        train_data, held_out = _split(train_data, recipe.holdout, recipe.seed)
    if len(train_data) < recipe.batch_size:
        raise ValueError(f"batch_size={recipe.batch_size}: the training set has only {len(train_data)} images")
    if len(test_data) == 0:
        raise ValueError("test_data has no images")
    if recipe.crop_padding >= (side := min(train_data.images.shape[2:])):
        raise ValueError(f"crop_padding={recipe.crop_padding}: must be below {side}, the side of the images")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder={str(folder)!r}: cannot be made: {error}") from error
    checkpoint_file, log_file = folder / "checkpoint.pt", folder / "log.csv"

    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = model
    if recipe.is_noisy:
        network = RandomSelfEnsemble(
            model, recipe.sigma_init, recipe.sigma_inner, n=1, seed=recipe.seed, share_parameters=True
        )
    steps_per_epoch = len(train_data) // recipe.batch_size
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay),
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    schedule = _schedule(optimizer, recipe, recipe.epochs * steps_per_epoch)
    average = AveragedModel(model) if recipe.schedule == "swa" else None
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        stateful["average"] = average
    progress, best_weights, between_steps = _Progress(), _weights_of(model), True
    if checkpoint_file.exists():
        progress, best_weights = _restore(checkpoint_file, recipe, recipe.epochs * steps_per_epoch, stateful)
    _start_log(log_file, progress.epoch)

    def save() -> None:
        state = {"recipe": asdict(recipe), "progress": asdict(progress), "steps": recipe.epochs * steps_per_epoch}
        state |= {"best_weights": best_weights if held_out is not None else {}}
        state |= {name: part.state_dict() for name, part in stateful.items()}
        partial = checkpoint_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint_file)  # a kill while writing leaves the previous checkpoint whole

    images, labels = train_data.images.to(device), train_data.labels.to(device)
    dtype = torch.bfloat16 if bfloat16_is_native(device) else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    adversary = None
    if recipe.is_adversarial:
        view = folded_view(network, images[:8].float() / 255)
        adversary = _adversary(InPrecision(view, dtype, channels_last=True), recipe)
    start = time.perf_counter() - progress.seconds
    try:
        while progress.epoch < recipe.epochs and not progress.collapsed:
            batches = tqdm(
                _batches(images, labels, recipe, progress.epoch, progress.step),
                desc=f"epoch {progress.epoch + 1}/{recipe.epochs}",
                total=steps_per_epoch,
                initial=progress.step,
                disable=not verbose,
                leave=False,
            )
            network.train()
            for x, y in batches:
                with _uninterrupted():
                    between_steps = False
                    seed = _seed(recipe.seed, progress.epoch, progress.step)
                    perturbed = 0
                    if adversary is not None:
                        perturbed = math.ceil(recipe.ratio * len(y))  # the order is random: the first ones will do
                        adversary.seed = seed
                        x = torch.cat([adversary(x[:perturbed], y[:perturbed]), x[perturbed:]])
                    weight, partners = _mixup(len(y), perturbed, recipe.mixup_alpha, seed)
                    if weight < 1:
                        x = weight * x + (1 - weight) * x[partners]
                    with autocast, row_keys(hashed(seed, np.arange(len(y)))):
                        logits = network(x.contiguous(memory_format=torch.channels_last)).float()
                    loss = weight * cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
                    if weight < 1:
                        other = cross_entropy(logits, y[partners], label_smoothing=recipe.label_smoothing)
                        loss = loss + (1 - weight) * other
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    progress.learning_rate = float(schedule.get_last_lr()[0])
                    schedule.step()
                    progress.step += 1
                    progress.loss_sum += loss.item() * len(y)
                    progress.correct += int((logits.argmax(1) == y).sum())
                    between_steps = True
            seen = steps_per_epoch * recipe.batch_size
            row = {
                "epoch": progress.epoch + 1,
                "learning_rate": progress.learning_rate,
                "train_loss": progress.loss_sum / seen,
                "train_accuracy": progress.correct / seen,
                "test_accuracy": accuracy(network, test_data),
                "robust_accuracy": math.nan
                if held_out is None
                else robust_accuracy(network, held_out, 10, eps=recipe.eps),
                "seconds": time.perf_counter() - start,
            }
            if verbose:
                tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
            with _uninterrupted():
                if average is not None:
                    average.update_parameters(model)
                _append_row(log_file, row)
                progress = progress.after_epoch(row["robust_accuracy"], row["seconds"])
                if progress.collapsed:
                    warn_of_collapse(
                        progress.best_accuracy, row["robust_accuracy"], progress.epoch, progress.best_epoch
                    )
                    model.load_state_dict(best_weights)
                elif progress.best_epoch == progress.epoch:
                    best_weights = _weights_of(model)
                save()
    except KeyboardInterrupt:
        if between_steps:  # else a hook raised it inside a step, half of which is in the model
            with _uninterrupted():
                progress.seconds = time.perf_counter() - start
                save()
        raise
    if average is not None and not progress.collapsed:
        model.load_state_dict(average.module.state_dict())
        with autocast:
            update_bn(_float_batches(images, recipe.batch_size), network)
    if isinstance(network, RandomSelfEnsemble):
        network.n = ENSEMBLE
    result = accuracy(network, test_data)
    model.to(memory_format=torch.contiguous_format)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, batch_size: int = 500) -> float:
    """Share of the images that the model, in evaluation mode and float32, classifies correctly.

    The model stays in evaluation mode.

    Raises:
        ValueError: there are no images.
    """
    if len(data) == 0:
        raise ValueError("data has no images")
    device = next((parameter.device for parameter in model.parameters()), data.images.device)
    model.eval()
    correct = 0
    for start in range(0, len(data), batch_size):
        images = data.images[start : start + batch_size].to(device).float() / 255
        labels = data.labels[start : start + batch_size].to(device)
        with row_keys(hashed(0, np.arange(start, start + len(labels)))):
            correct += int((model(images).argmax(1) == labels).sum())
    return correct / len(data)


def robust_accuracy(model: nn.Module, data: Dataset, steps: int, n: int | None = None, eps: float = 8 / 255) -> float:
    """Share of images that the model classifies correctly as they are and under PGD (inf, step eps / 4).

    Args:
        model: is judged in evaluation mode and float32.
        data: the images.
        steps: of PGD, from the image.
        n: images of a class-balanced subset; None, or more than there are, takes all.
        eps: radius of the ball.

    Raises:
        ValueError: there are no images.
    """
    if len(data) == 0:
        raise ValueError("data has no images")
    chosen = torch.arange(len(data))
    if n is not None and n < len(data):
        chosen = torch.from_numpy(class_balanced_subset(data.labels.tolist(), n))
    attack = ProjectedGradientDescent(
        model, eps=eps, eps_step=eps / 4 or 1, max_iter=steps, batch_size=128, seed=0, early_stop=True, verbose=False
    )
    batches = ((data.images[rows].float() / 255, data.labels[rows]) for rows in chosen.split(500))
    return share_standing(attack, batches)


def _adversary(model: nn.Module, recipe: Recipe) -> ProjectedGradientDescent:
    return ProjectedGradientDescent(
        model,
        eps=recipe.eps,
        eps_step=recipe.eps_step,
        max_iter=recipe.attack_steps,
        num_random_init=int(recipe.random_start),
        batch_size=recipe.batch_size,
        precision="float32",  # the model comes in its own
        verbose=False,
    )


@dataclass
class _Progress:
    """Where a run stands: `step` steps into `epoch`, with the sums over those steps and the rate of the last.

    The best epoch is the one after which robust accuracy on held-out images was highest, counted from 1; 0 for none.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    best_epoch: int = 0
    best_accuracy: float = 0.0
    collapsed: bool = False

    def after_epoch(self, robust_accuracy: float, seconds: float) -> _Progress:
        """At the start of the next epoch; `robust_accuracy` is NaN where none was measured."""
        epoch, best_epoch, best_accuracy = self.epoch + 1, self.best_epoch, self.best_accuracy
        if robust_accuracy >= best_accuracy:
            best_epoch, best_accuracy = epoch, robust_accuracy
        return _Progress(
            epoch=epoch,
            seconds=seconds,
            best_epoch=best_epoch,
            best_accuracy=best_accuracy,
            collapsed=has_collapsed(robust_accuracy, best_accuracy),
        )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, so that no checkpoint has half a step or misses its log row."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is None or threading.current_thread() is not threading.main_thread():
        yield  # not Python's to handle, or handled in another thread
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        signal.raise_signal(signal.SIGINT)


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> LRScheduler:
    if recipe.schedule == "swa":
        return LambdaLR(optimizer, lambda step: 1.0)
    warmup = recipe.warmup
    if warmup * total_steps == 1:  # OneCycleLR divides by the length of its first phase, which is one step shorter
        warmup *= 1 - 1e-9
    return OneCycleLR(
        optimizer,
        recipe.peak_lr,
        total_steps=total_steps,
        pct_start=warmup,
        anneal_strategy="linear",
        cycle_momentum=False,
    )


def _mixup(n: int, perturbed: int, alpha: float, seed: int) -> tuple[float, Tensor]:
    """Weight of the images of a batch, and the partner (n,) of each: of the first `perturbed` among themselves."""
    if alpha == 0:
        return 1.0, torch.arange(n)
    generator = torch.Generator().manual_seed(seed)
    partners = torch.cat(
        [torch.randperm(perturbed, generator=generator), torch.randperm(n - perturbed, generator=generator) + perturbed]
    )
    return float(np.random.default_rng(seed).beta(alpha, alpha)), partners


def _split(data: Dataset, n: int, seed: int) -> tuple[Dataset, Dataset]:
    """The data without `n` images, class-balanced, and those."""
    if n >= len(data):
        raise ValueError(f"holdout={n}: the training set has only {len(data)} images")
    taken = class_balanced_mask(data.labels, n, seed)
    rest, held_out = (replace(data, images=data.images[rows], labels=data.labels[rows]) for rows in (~taken, taken))
    return rest, held_out


def _weights_of(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _float_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    for batch in images.split(batch_size):
        yield (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def _restore(file: Path, recipe: Recipe, steps: int, stateful: dict[str, Any]) -> tuple[_Progress, Weights]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if state["recipe"] != asdict(recipe):
            there, here = state["recipe"], asdict(recipe)
            changed = {key: (there.get(key), here.get(key)) for key in here | there if there.get(key) != here.get(key)}
            raise ValueError(f"it was written with another recipe (there, here): {changed}")
        if state["steps"] != steps:
            raise ValueError(f"it is of a run of {state['steps']} steps, this is one of {steps}: other data")
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        return _Progress(**state["progress"]), state["best_weights"]
    except Exception as error:  # torch.load raises a different type for each way a file can be broken
        raise ValueError(
            f"checkpoint {str(file)!r} cannot be resumed: {type(error).__name__}: {error}; delete it to start over"
        ) from error


def _start_log(file: Path, epochs: int) -> None:
    """A header and those rows of an earlier run that the checkpoint holds, the first `epochs` ones.

    A run killed between a row and its checkpoint leaves a row that will be written again.
    """
    rows = []
    if file.exists():
        done = {str(epoch + 1) for epoch in range(epochs)}
        with file.open(newline="") as stream:
            rows = [line for line in stream if line.endswith("\n") and line.partition(",")[0] in done]
    partial = file.with_suffix(".partial.csv")
    with partial.open("w", newline="") as stream:
        csv.writer(stream).writerow(LOG_COLUMNS)
        stream.writelines(rows)
    partial.replace(file)


def _append_row(file: Path, row: dict[str, float]) -> None:
    with file.open("a", newline="") as stream:
        csv.DictWriter(stream, LOG_COLUMNS).writerow(row)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers decay; biases and batch norm do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _batches(
    images: Tensor, labels: Tensor, recipe: Recipe, epoch: int, first_step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented float batches of one epoch from `first_step` on."""
    order = torch.randperm(len(images), generator=_generator(recipe.seed, epoch)).to(images.device)
    for step in range(first_step, len(images) // recipe.batch_size):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        yield _augment(images[chosen], recipe, _generator(recipe.seed, epoch, step)), labels[chosen]


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    seed = 0
    for part in key:  # a fixed mixing of the parts, so that (1, 2) and (2, 1) differ
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def _augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Random reflection-padded crop, horizontal flip and cutout of uint8 images; float32 in [0, 1]."""
    n, _, height, width = images.shape
    device, padding = images.device, recipe.crop_padding
    x = images.float() / 255

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator).to(device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=device)
    columns = draw(2 * padding + 1) + torch.arange(width, device=device)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    x = pad(x, (padding,) * 4, mode="reflect")
    x = x[torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if recipe.cutout:
        in_rows = (torch.arange(height, device=device) - draw(height)).abs() * 2 < recipe.cutout
        in_columns = (torch.arange(width, device=device) - draw(width)).abs() * 2 < recipe.cutout
        x = x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.5)
    return x
