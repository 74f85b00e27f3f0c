"""Standard and adversarial training: SGD on seeded augmentations, resumable to the step.

Data order and augmentation of a step are functions of (seed, epoch, step), so a run that was interrupted and resumed
gives the same weights as one that was not (up to the arithmetic of the machine, and unless the model draws random
numbers of its own).
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm.auto import tqdm

from guardians.attacks.pgd import ProjectedGradientDescent
from guardians.attacks.search import bfloat16_is_native
from guardians.data import Dataset, class_balanced_subset

__all__ = ["LOG_COLUMNS", "SCHEDULES", "Recipe", "accuracy", "robust_accuracy", "train"]

SCHEDULES = ("one-cycle", "swa")
LOG_COLUMNS = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_accuracy", "robust_accuracy", "seconds")
_ROBUST_IMAGES = 500
"""Test images on which an epoch of adversarial training is measured."""


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
        attack_steps: steps of PGD (inf, random start) that perturb each training image, in evaluation mode; 0 for
            standard training, 1 is "fast" training (Wong et al., "Fast is better than free", 2020, algorithm 3), more
            is that of Madry et al. 2018.
        eps: radius of its ball, in the unit of the images.
        eps_step: its step size.
        seed: of the data order, the augmentation and the random starts; the command line seeds the initial weights
            with it too.

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
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        for field in fields(self):
            if field.name == "schedule":
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
        for name in ("weight_decay", "crop_padding", "cutout", "attack_steps", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and finite")


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

    `folder` receives `log.csv`, a row an epoch (`LOG_COLUMNS`; the robust accuracy, under PGD-10 on 500 test images, of
    adversarial training only), and `checkpoint.pt`, written after every epoch and on
    Ctrl-C, which waits for the end of the step; where it exists, training goes on from it.

    Raises:
        ValueError: there are fewer training images than one batch, no test images, the images are too small for
            `crop_padding`, `folder` cannot be made, or the checkpoint is of another recipe, another number of steps
            or another model, or cannot be read.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint is written.
    """
    device = torch.device(device)
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
    progress, between_steps = _Progress(), True
    if checkpoint_file.exists():
        progress = _restore(checkpoint_file, recipe, recipe.epochs * steps_per_epoch, stateful)
    _start_log(log_file, progress.epoch)

    def save() -> None:
        state = {"recipe": asdict(recipe), "progress": asdict(progress), "steps": recipe.epochs * steps_per_epoch}
        state |= {name: part.state_dict() for name, part in stateful.items()}
        partial = checkpoint_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint_file)  # a kill while writing leaves the previous checkpoint whole

    images, labels = train_data.images.to(device), train_data.labels.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16) if bfloat16_is_native(device) else nullcontext()
    adversary = _adversary(_Autocast(model, autocast), recipe) if recipe.attack_steps else None
    start = time.perf_counter() - progress.seconds
    try:
        while progress.epoch < recipe.epochs:
            batches = tqdm(
                _batches(images, labels, recipe, progress.epoch, progress.step),
                desc=f"epoch {progress.epoch + 1}/{recipe.epochs}",
                total=steps_per_epoch,
                initial=progress.step,
                disable=not verbose,
                leave=False,
            )
            model.train()
            for x, y in batches:
                with _uninterrupted():
                    between_steps = False
                    if adversary is not None:
                        adversary.seed = _seed(recipe.seed, progress.epoch, progress.step)
                        x = adversary(x, y)
                    with autocast:
                        logits = model(x.contiguous(memory_format=torch.channels_last))
                        loss = cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
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
                "test_accuracy": accuracy(model, test_data),
                "robust_accuracy": robust_accuracy(model, test_data, 10, _ROBUST_IMAGES, recipe.eps)
                if recipe.attack_steps
                else math.nan,
                "seconds": time.perf_counter() - start,
            }
            if verbose:
                tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
            with _uninterrupted():
                if average is not None:
                    average.update_parameters(model)
                _append_row(log_file, row)
                progress = _Progress(epoch=progress.epoch + 1, seconds=row["seconds"])
                save()
    except KeyboardInterrupt:
        if between_steps:  # else a hook raised it inside a step, half of which is in the model
            with _uninterrupted():
                progress.seconds = time.perf_counter() - start
                save()
        raise
    if average is not None:
        model.load_state_dict(average.module.state_dict())
        with autocast:
            update_bn(_float_batches(images, recipe.batch_size), model)
    model.to(memory_format=torch.contiguous_format)
    return accuracy(model, test_data)


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
        model, eps=eps, eps_step=eps / 4 or 1, max_iter=steps, batch_size=128, early_stop=True, verbose=False
    )
    fooled = 0
    for finished in attack.stream((data.images[rows].float() / 255, data.labels[rows]) for rows in chosen.split(500)):
        assert finished.fooled is not None  # early_stop judges
        fooled += int(finished.fooled.sum())
    return 1 - fooled / len(chosen)


class _Autocast(nn.Module):
    """The model in the precision of the training, for its adversary."""

    def __init__(self, model: nn.Module, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast:
            logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits.float()


def _adversary(model: nn.Module, recipe: Recipe) -> ProjectedGradientDescent:
    return ProjectedGradientDescent(
        model,
        eps=recipe.eps,
        eps_step=recipe.eps_step,
        max_iter=recipe.attack_steps,
        num_random_init=1,
        batch_size=recipe.batch_size,
        precision="float32",  # the model comes with its own autocast
        verbose=False,
    )


@dataclass
class _Progress:
    """Where a run stands: `step` steps into `epoch`, with the sums over those steps and the rate of the last."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0


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


def _float_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    for batch in images.split(batch_size):
        yield (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def _restore(file: Path, recipe: Recipe, steps: int, stateful: dict[str, Any]) -> _Progress:
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
        return _Progress(**state["progress"])
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
