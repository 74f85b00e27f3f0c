"""Standard and adversarial training, with mixup or noise: SGD on seeded augmentations, resumable to the step.

Data order, augmentation and all draws are functions of (seed, epoch, step, position in the batch), so a run that was
interrupted and resumed gives the same weights as one that was not, up to the arithmetic of the machine.

Launched by torchrun, the processes train one model (`DistributedDataParallel`). A batch is dealt out in micro-batches,
one to each process, or several of which it accumulates the gradients: the outcome is a function of how many there are,
and of the number of processes only by the order in which sums are rounded. Batch norm normalises a micro-batch by its
own statistics, and its running statistics move by the mean over the micro-batches.
"""

from __future__ import annotations

import csv
import math
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm.auto import tqdm

from guardians.attacks import PGD
from guardians.data import Dataset, class_balanced_subset
from guardians.defences.random_self_ensemble import RandomSelfEnsemble
from guardians.defences.training_loop import (
    BestEpoch,
    Checkpoint,
    Progress,
    State,
    asked_in,
    claimed,
    descend,
    held_out_mask,
    logits_of,
    on_model_as_trained,
    run_epochs,
    share_standing,
    watching,
)
from guardians.engine.checks import check_flag, check_integer
from guardians.engine.process_group import ALONE, TIMEOUT, ProcessGroup, process_group
from guardians.engine.ranks import local_device
from guardians.engine.rng import ForkedGenerators, hashed, row_keys
from guardians.engine.victim import Victim

__all__ = ["ENSEMBLE", "LOG_COLUMNS", "RECIPES", "SCHEDULES", "Recipe", "accuracy", "robust_accuracy", "train"]

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
    micro_batches: int | None = None,
    timeout: float = TIMEOUT,
) -> float:
    """Train `model` in place and return its accuracy on `test_data` (float32, evaluation mode).

    `folder` receives `log.csv`, a row an epoch (`LOG_COLUMNS`; the robust accuracy is that on held-out images under
    PGD-10, nan without them), and `checkpoint.pt`, written after every epoch, every five minutes and on Ctrl-C, which
    waits for the end of the step; where it exists, training goes on from it. Two processes cannot train in one folder
    for themselves: `lock` is the file whose lock the first of them holds, which the operating system frees when it ends
    in whatever way.

    Adversarial training with held-out images stops when its robust accuracy on them has fallen below half of the best
    so far: single-step training can learn, within an epoch, to fool its own attack ("catastrophic overfitting", Wong et
    al. 2020, section 5.3). The log of the program says so, and the model is that of the best epoch.

    In processes that torchrun has launched, or that have started the default group of `torch.distributed`, all call
    this with the same arguments; the first reads and writes `folder`. "cuda" is then the GPU of each process.

    Args:
        model: gives logits for images in [0, 1].
        train_data, test_data: images to train on, and to measure the accuracy after each epoch.
        recipe: what is done.
        folder: see above.
        device: on which it is computed.
        verbose: print a line an epoch, and a progress bar.
        micro_batches: parts of equal size, up to one image, into which a batch is divided. A process with several goes
            through them one after the other, in less memory. None takes as many as there are processes; a run that goes
            on from a checkpoint has as many as before, on fewer processes too.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        ValueError: there are fewer training images than one batch, no test images, fewer training images than are held
            out, the images are too small for `crop_padding`, there are more micro-batches than images of a batch or
            fewer than processes, `folder` cannot be made or is in use by another training, or the checkpoint is of
            another recipe, another number of steps or another model, or cannot be read.
        OSError: the log or the checkpoint cannot be written; the previous checkpoint is whole.
        ConnectionError: another process has died, or has not answered in time.
        KeyboardInterrupt: on Ctrl-C or, in several processes, SIGTERM, after the checkpoint is written.
    """
    held_out = None
    if recipe.holdout and recipe.is_adversarial:
        train_data, held_out = _split(train_data, recipe.holdout, recipe.seed)
    if len(train_data) < recipe.batch_size:
        raise ValueError(f"batch_size={recipe.batch_size}: the training set has only {len(train_data)} images")
    if len(test_data) == 0:
        raise ValueError("test_data has no images")
    if recipe.crop_padding >= (side := min(train_data.images.shape[2:])):
        raise ValueError(f"crop_padding={recipe.crop_padding}: must be below {side}, the side of the images")
    if micro_batches is not None:
        check_integer("micro_batches", micro_batches, low=1)
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout={timeout}: must be above 0 and finite")
    folder, device = Path(folder), torch.device(local_device(str(device)))
    with process_group(device, timeout) as group, group.naming_the_missing():
        if not group.size <= (micro_batches or group.size) <= recipe.batch_size:
            allowed = f"from {group.size}, the number of processes, to batch_size={recipe.batch_size}"
            raise ValueError(f"micro_batches={micro_batches}: must be {allowed}")
        with claimed("folder", folder, folder / "lock") if group.is_first else nullcontext():
            return _train(model, train_data, held_out, test_data, recipe, folder, device, verbose, micro_batches, group)


def _train(
    model: nn.Module,
    train_data: Dataset,
    held_out: Dataset | None,
    test_data: Dataset,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    verbose: bool,
    micro_batches: int | None,
    group: ProcessGroup,
) -> float:
    verbose = verbose and group.is_first
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = model
    if recipe.is_noisy:
        network = RandomSelfEnsemble(
            model, recipe.sigma_init, recipe.sigma_inner, n=1, seed=recipe.seed, share_parameters=True
        )
    steps = len(train_data) // recipe.batch_size
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay),
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    schedule = _schedule(optimizer, recipe, recipe.epochs * steps)
    progress, sums, best, division = Progress(), _Sums(), BestEpoch(), _Division()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    parts |= {"progress": progress, "sums": sums, "best": best, "division": division}
    average = AveragedModel(model) if recipe.schedule == "swa" else None
    if average is not None:
        parts["average"] = average
    run = asdict(recipe) | {"steps": recipe.epochs * steps}
    checkpoint = Checkpoint(folder / "checkpoint.pt", run, parts, group)
    checkpoint.restore()
    division.micro_batches = micro_batches or max(division.micro_batches, group.size)
    log_file = folder / "log.csv"
    if group.is_first:
        _start_log(log_file, progress.epoch)

    images, labels = train_data.images.to(device), train_data.labels.to(device)
    asked = asked_in("auto", Victim(network), device)
    adversary = None
    if recipe.is_adversarial:
        adversary = on_model_as_trained(_adversary(network, recipe), asked, images[:8].float() / 255)
    trained: nn.Module = asked
    without_communication: Callable[[], AbstractContextManager[None]] = nullcontext
    if group.size > 1:
        trained = parallel = DistributedDataParallel(asked)
        parallel.broadcast_buffers = False  # `_Statistics` brings them together, better than those of the first process
        without_communication = parallel.no_sync
    own = division.rows_of(group, recipe.batch_size)
    own_there = [rows.to(device) for rows in own]
    statistics = _Statistics(model, division.micro_batches, group)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        network.train()
        yield from tqdm(
            _batches(images, labels, recipe, progress.epoch, progress.step, torch.cat(own)),
            desc=f"epoch {progress.epoch + 1}/{recipe.epochs}",
            total=steps,
            initial=progress.step,
            disable=not verbose,
            leave=False,
        )

    def step(batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        seed = _seed(recipe.seed, progress.epoch, progress.step)
        pieces = list(x.split([len(rows) for rows in own]))
        perturbed = 0
        if adversary is not None:
            perturbed = math.ceil(recipe.ratio * len(y))  # the order is random: the first ones will do
            adversary.seed = seed
            pieces = [
                _attacked(adversary, piece, y[there], rows, perturbed)
                for piece, rows, there in zip(pieces, own, own_there, strict=True)
            ]
        weight, partners = _mixup(len(y), perturbed, recipe.mixup_alpha, seed)
        if weight < 1:
            whole = x.new_zeros(len(y), *x.shape[1:])
            whole[torch.cat(own_there)] = torch.cat(pieces)
            group.add_up(whole)  # a partner may be in another process, and adversarial
            mixed = [whole[partners[rows]] for rows in own]
            pieces = [weight * piece + (1 - weight) * other for piece, other in zip(pieces, mixed, strict=True)]

        def losses() -> Iterator[Tensor]:
            for number, (piece, rows, there) in enumerate(zip(pieces, own, own_there, strict=True)):
                statistics.start_micro_batch()
                keys = hashed(seed, rows.numpy())
                with nullcontext() if number == len(own) - 1 else without_communication():
                    with row_keys(keys), ForkedGenerators(int(keys[0]), device):
                        logits = logits_of(trained, piece)
                    loss = weight * cross_entropy(logits, y[there], label_smoothing=recipe.label_smoothing)
                    if weight < 1:
                        other = cross_entropy(logits, y[partners[rows]], label_smoothing=recipe.label_smoothing)
                        loss = loss + (1 - weight) * other
                    yield loss * (len(rows) * group.size / len(y))  # of which DDP takes the mean over the processes
                statistics.add(len(rows), len(y), loss.detach(), (logits.argmax(1) == y[there]).sum())

        sums.learning_rate = float(schedule.get_last_lr()[0])
        statistics.start_step()
        descend(losses(), optimizer, schedule)
        loss, correct = statistics.end_step()
        sums.loss, sums.correct = sums.loss + loss, sums.correct + correct

    def measure() -> dict[str, float]:
        robust = math.nan
        if held_out is not None:
            robust = robust_accuracy(network, held_out, 10, eps=recipe.eps, group=group)
        return {"test_accuracy": accuracy(network, test_data, group=group), "robust_accuracy": robust}

    def record(measured: dict[str, float]) -> None:
        seen = steps * recipe.batch_size
        row = {"epoch": progress.epoch + 1, "learning_rate": sums.learning_rate, "train_loss": float(sums.loss) / seen}
        row |= {"train_accuracy": int(sums.correct) / seen, **measured, "seconds": progress.seconds}
        if verbose:
            tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if average is not None:
            average.update_parameters(model)
        if group.is_first:
            _append_row(log_file, row)
        sums.load_state_dict(vars(_Sums()))

    run_epochs(model, recipe.epochs, progress, best, batches, step, measure, record, checkpoint, group)
    if average is not None and not best.collapsed:
        model.load_state_dict(average.module.state_dict())
        with ForkedGenerators(recipe.seed, device):
            update_bn((batch.float() / 255 for batch in images.split(recipe.batch_size)), asked)
    if isinstance(network, RandomSelfEnsemble):
        network.n = ENSEMBLE
    result = accuracy(network, test_data, group=group)
    model.to(memory_format=torch.contiguous_format)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, batch_size: int = 500, *, group: ProcessGroup = ALONE) -> float:
    """Share of the images that the model, in evaluation mode and float32, classifies correctly.

    The model stays in evaluation mode. The processes of a group take turns batch by batch, and all get the result.

    Raises:
        ValueError: there are no images.
    """
    if len(data) == 0:
        raise ValueError("data has no images")
    device = next((parameter.device for parameter in model.parameters()), data.images.device)
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(group.rank * batch_size, len(data), group.size * batch_size):
        images = data.images[start : start + batch_size].to(device).float() / 255
        labels = data.labels[start : start + batch_size].to(device)
        with row_keys(hashed(0, np.arange(start, start + len(labels)))):
            correct += (model(images).argmax(1) == labels).sum()
    return int(group.add_up(correct)) / len(data)


def robust_accuracy(
    model: nn.Module,
    data: Dataset,
    steps: int,
    n: int | None = None,
    eps: float = 8 / 255,
    *,
    group: ProcessGroup = ALONE,
) -> float:
    """Share of images that the model classifies correctly as they are and under PGD (inf, step eps / 4).

    Args:
        model: is judged in evaluation mode and float32.
        data: the images.
        steps: of PGD, from the image.
        n: images of a class-balanced subset; None, or more than there are, takes all.
        eps: radius of the ball.
        group: processes that take turns, 500 images at a time, and all get the result.

    Raises:
        ValueError: there are no images.
    """
    if len(data) == 0:
        raise ValueError("data has no images")
    chosen = torch.arange(len(data))
    if n is not None and n < len(data):
        chosen = torch.from_numpy(class_balanced_subset(data.labels.tolist(), n))
    attack, standing = watching(model, np.inf, eps, 128, steps), 0
    for first in range(group.rank * 500, len(chosen), group.size * 500):
        rows = chosen[first : first + 500]
        batch = data.images[rows].float() / 255, data.labels[rows]
        standing += round(len(rows) * share_standing(attack, [batch], first))
    device = next((parameter.device for parameter in model.parameters()), data.images.device)
    return int(group.add_up(torch.tensor(standing, device=device))) / len(chosen)


def _adversary(model: nn.Module, recipe: Recipe) -> PGD:
    return PGD(
        model,
        eps=recipe.eps,
        eps_step=recipe.eps_step,
        max_iter=recipe.attack_steps,
        num_random_init=int(recipe.random_start),
        batch_size=recipe.batch_size,
    )


def _attacked(attack: PGD, x: Tensor, y: Tensor, positions: Tensor, perturbed: int) -> Tensor:
    """Images (N, ...), of which those at `positions` (N,) in the batch below `perturbed` are made adversarial."""
    n = int((positions < perturbed).sum())
    if n == 0:
        return x
    return torch.cat([attack._run({"x": x[:n], "y": y[:n]}, x.device, positions[:n].numpy()), x[n:]])


@dataclass
class _Sums(State):
    """Over the steps of an epoch so far, with the learning rate of the last."""

    loss: float | Tensor = 0.0
    correct: float | Tensor = 0.0
    learning_rate: float = 0.0


@dataclass
class _Division(State):
    """Into how many micro-batches a batch is divided."""

    micro_batches: int = 1

    def rows_of(self, group: ProcessGroup, n: int) -> list[Tensor]:
        """The positions in a batch of `n` images of each micro-batch of this process.

        They are spread over the batch, of which the first images are perturbed where not all are.
        """
        return [
            torch.arange(number, n, self.micro_batches) for number in range(group.rank, self.micro_batches, group.size)
        ]


class _Statistics:
    """What a step adds up over the micro-batches of all processes: loss, correct answers, running statistics.

    The running statistics of batch norm, and all other floating-point buffers of the model, move from where they were
    before the step by the mean over the micro-batches.
    """

    def __init__(self, model: nn.Module, micro_batches: int, group: ProcessGroup) -> None:
        self._group, self._found = group, torch.empty(0)
        self._all = list(model.buffers()) if micro_batches > 1 else []
        self._averaged = [buffer for buffer in self._all if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    def start_step(self) -> None:
        """Where the buffers are now, each micro-batch begins."""
        self._before, self._found = [buffer.clone() for buffer in self._all], torch.empty(0)

    def start_micro_batch(self) -> None:
        """Before its forward pass."""
        for buffer, before in zip(self._all, self._before, strict=True):
            buffer.copy_(before)

    def add(self, n: int, total: int, loss: Tensor, correct: Tensor) -> None:
        """After the backward pass of `n` images of a batch of `total`: their mean loss and how many are correct."""
        averaged = (buffer.double() * (n / total) for buffer in self._averaged)
        found = torch.cat([part.flatten() for part in (loss.double() * n, correct.double(), *averaged)])
        self._found = self._found + found if len(self._found) else found

    def end_step(self) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and the number of correct answers, of the whole batch."""
        self._group.add_up(self._found)
        loss, correct, *means = self._found.split([1, 1, *(buffer.numel() for buffer in self._averaged)])
        for buffer, mean in zip(self._averaged, means, strict=True):
            buffer.copy_(mean.view_as(buffer))
        return loss[0], correct[0]


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
    taken = held_out_mask(data.labels, n, seed)
    rest, held_out = (replace(data, images=data.images[rows], labels=data.labels[rows]) for rows in (~taken, taken))
    return rest, held_out


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
    try:
        with file.open("a", newline="") as stream:
            csv.DictWriter(stream, LOG_COLUMNS).writerow(row)
    except OSError as error:
        raise OSError(f"log {str(file)!r} cannot be written: {error}; the checkpoint is whole") from error


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers decay; biases and batch norm do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _batches(
    images: Tensor, labels: Tensor, recipe: Recipe, epoch: int, first_step: int, own: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the batches of one epoch from `first_step` on, augmented images at the positions `own`, and all labels."""
    order = torch.randperm(len(images), generator=_generator(recipe.seed, epoch)).to(images.device)
    for step in range(first_step, len(images) // recipe.batch_size):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        yield _augment(images[chosen], recipe, _generator(recipe.seed, epoch, step), own), labels[chosen]


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    seed = 0
    for part in key:  # a fixed mixing of the parts, so that (1, 2) and (2, 1) differ
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def _augment(images: Tensor, recipe: Recipe, generator: torch.Generator, own: Tensor | None = None) -> Tensor:
    """Random reflection-padded crop, horizontal flip and cutout of uint8 images; float32 in [0, 1].

    Of a batch, of which only the images at the positions `own` are wanted; None for all.
    """
    total, _, height, width = images.shape
    device, padding = images.device, recipe.crop_padding
    own = torch.arange(total) if own is None else own
    x = images[own.to(device)].float() / 255
    n = len(x)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (total, 1), generator=generator)[own].to(device)

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
