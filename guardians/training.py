"""Standard training: one-cycle SGD with label smoothing on seeded augmentations, resumable to the step.

Data order and augmentation of a step are functions of (seed, epoch, step), so a run that was interrupted and resumed
gives the same weights as one that was not (up to the arithmetic of the machine).
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from guardians.data import Dataset

__all__ = ["LOG_COLUMNS", "Recipe", "accuracy", "bfloat16_is_native", "train"]

LOG_COLUMNS = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_accuracy", "seconds")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; a last partial batch is dropped.
        peak_lr: highest learning rate of the one-cycle schedule (Smith and Topin, "Super-Convergence", 2018), reached
            after `warmup` of all steps.
        warmup: fraction of the steps before the peak.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty, on convolution and linear weights only.
        label_smoothing: Szegedy et al. 2016, section 7.
        crop_padding: pixels of reflection padding before the random crop.
        cutout: side of the square that is greyed out in each image (DeVries and Taylor 2017); 0 turns it off.
        seed: of the initial weights, the data order and the augmentation.
    """

    epochs: int = 24
    batch_size: int = 512
    peak_lr: float = 0.4
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_padding: int = 4
    cutout: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "peak_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("warmup", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("weight_decay", "crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return device.type == "cpu" and cpu_check is not None and bool(cpu_check())


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

    `folder` receives `log.csv`, a row an epoch (`LOG_COLUMNS`), and `checkpoint.pt`, written after every epoch and on
    Ctrl-C; where it exists, training goes on from it.

    Raises:
        ValueError: there are fewer training images than one batch, or the checkpoint is of another recipe, of another
            model, or cannot be read.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint is written.
    """
    device = torch.device(device)
    if len(train_data) < recipe.batch_size:
        raise ValueError(f"batch_size={recipe.batch_size}: the training set has only {len(train_data)} images")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint_file, log_file = folder / "checkpoint.pt", folder / "log.csv"

    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps_per_epoch = len(train_data) // recipe.batch_size
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True
    )
    schedule = OneCycleLR(
        optimizer,
        recipe.peak_lr,
        total_steps=recipe.epochs * steps_per_epoch,
        pct_start=recipe.warmup,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    progress = _Progress()
    if checkpoint_file.exists():
        progress = _restore(checkpoint_file, recipe, model, optimizer, schedule)
    elif log_file.exists():
        log_file.unlink()

    def save() -> None:
        state = {
            "recipe": asdict(recipe),
            "progress": asdict(progress),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        partial = checkpoint_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint_file)  # a kill while writing leaves the previous checkpoint whole

    images, labels = train_data.images.to(device), train_data.labels.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16) if bfloat16_is_native(device) else nullcontext()
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
                with autocast:
                    logits = model(x.contiguous(memory_format=torch.channels_last))
                    loss = cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                learning_rate = schedule.get_last_lr()[0]
                schedule.step()
                progress.step += 1
                progress.loss_sum += loss.item() * len(y)
                progress.correct += int((logits.argmax(1) == y).sum())
            seen = steps_per_epoch * recipe.batch_size
            row = {
                "epoch": progress.epoch + 1,
                "learning_rate": learning_rate,
                "train_loss": progress.loss_sum / seen,
                "train_accuracy": progress.correct / seen,
                "test_accuracy": accuracy(model, test_data),
                "seconds": time.perf_counter() - start,
            }
            _append_row(log_file, row)
            if verbose:
                tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
            progress = _Progress(epoch=progress.epoch + 1, seconds=row["seconds"])
            save()
    except KeyboardInterrupt:
        progress.seconds = time.perf_counter() - start
        save()
        raise
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return accuracy(model, test_data)


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, batch_size: int = 500) -> float:
    """Share of the images that the model, in evaluation mode and float32, classifies correctly."""
    device = next(model.parameters()).device
    model.eval()
    correct = 0
    for start in range(0, len(data), batch_size):
        images = data.images[start : start + batch_size].to(device).float() / 255
        labels = data.labels[start : start + batch_size].to(device)
        correct += int((model(images).argmax(1) == labels).sum())
    return correct / len(data)


@dataclass
class _Progress:
    """Where a run stands: `step` steps into `epoch`, with the sums over those steps."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0


def _restore(
    file: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: OneCycleLR
) -> _Progress:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if state["recipe"] != asdict(recipe):
            changed = {k: (v, asdict(recipe).get(k)) for k, v in state["recipe"].items() if asdict(recipe).get(k) != v}
            raise ValueError(f"it was written with another recipe (there, here): {changed}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return _Progress(**state["progress"])
    except Exception as error:  # torch.load raises a different type for each way a file can be broken
        raise ValueError(f"checkpoint {str(file)!r} cannot be resumed: {error}; delete it to start over") from error


def _append_row(file: Path, row: dict[str, float]) -> None:
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, LOG_COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


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
    seed = 0
    for part in key:  # a fixed mixing of the parts, so that (1, 2) and (2, 1) differ
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(seed)


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
