"""What `guardians.training` and `AdversarialTrainer` share: the loop over epochs, its checkpoint, the best epoch, and
the model as it is asked in training, by the step and by the attack."""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from guardians.attacks import PGD
from guardians.data import class_balanced_mask
from guardians.engine.attack import Attack
from guardians.engine.process_group import ALONE, ProcessGroup
from guardians.engine.search import InPrecision, bfloat16_is_native, folded_view, works_in
from guardians.engine.victim import Victim

__all__ = [
    "BestEpoch",
    "Checkpoint",
    "Progress",
    "State",
    "asked_in",
    "claimed",
    "descend",
    "held_out_mask",
    "logits_of",
    "on_model_as_trained",
    "run_epochs",
    "share_standing",
    "uninterrupted",
    "watching",
]

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

SAVED_EVERY = 300.0
"""Seconds after which a checkpoint is written in the middle of an epoch, too."""


class State:
    """Plain values and tensors of a run, as a checkpoint holds them."""

    def state_dict(self) -> dict[str, Any]:
        """All of them, not copied."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Those of another.

        Raises:
            KeyError: one is missing.
        """
        for name in vars(self):
            setattr(self, name, state[name])


@dataclass
class Progress(State):
    """Where a run stands: `step` steps into `epoch`, both counted from 0, after `seconds` of training."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


@dataclass
class BestEpoch(State):
    """Keeps the weights of the epoch after which the model was most robust, and says when robustness is lost.

    Attributes:
        accuracies: robust accuracy on held-out images after each epoch.
        weights: of the model after the best epoch, the last one of equals.
    """

    accuracies: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def collapsed(self) -> bool:
        """Whether robustness is lost: "catastrophic overfitting" takes it to near 0 (Wong et al. 2020, section 5.3)."""
        return bool(self.accuracies) and self.accuracies[-1] < max(self.accuracies) / 2

    def judge(self, model: nn.Module, robust_accuracy: float) -> None:
        """Take the robust accuracy after an epoch; where it has collapsed, the model gets the best weights back."""
        self.accuracies.append(robust_accuracy)
        best = max(self.accuracies)
        if self.collapsed:
            logger.warning(
                "catastrophic overfitting: robust accuracy on held-out images fell from %.1f%% to %.1f%% in epoch %d; "
                "training stops, with the model of epoch %d",
                100 * best,
                100 * robust_accuracy,
                len(self.accuracies),
                max(epoch for epoch, accuracy in enumerate(self.accuracies, 1) if accuracy == best),
            )
            model.load_state_dict(self.weights)
        elif robust_accuracy == best:
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Checkpoint:
    """A file from which an interrupted run goes on.

    Args:
        file: where it is.
        run: what the run is, in plain values: a file of another run is refused.
        parts: all that changes in the run, objects with `state_dict` and `load_state_dict`.
        group: of which the first process reads and writes.
    """

    def __init__(self, file: Path, run: dict[str, Any], parts: dict[str, Any], group: ProcessGroup = ALONE) -> None:
        self.file, self.run, self.parts, self.group = file, run, parts, group

    def restore(self) -> bool:
        """Bring the parts to where the file says they were, if there is one; whether there was.

        Raises:
            ValueError: it cannot be read, or is of another run or another model.
        """
        state = self.group.from_first(self._read)
        if state is None:
            return False
        with self._refused():
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        return True

    def _read(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        with self._refused():
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            here, there = self.run, state["run"]
            if here != there:
                changed = {key: (there.get(key), here.get(key)) for key in here | there}
                changed = {key: values for key, values in changed.items() if values[0] != values[1]}
                raise ValueError(f"it was written with other settings or data (there, here): {changed}")
        return state

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch.load raises a different type for each way a file can be broken
            raise ValueError(
                f"checkpoint {str(self.file)!r} cannot be resumed: {type(error).__name__}: {error}; "
                "delete it to start over"
            ) from error

    def save(self) -> None:
        """Write the parts as they are; a kill or a failure while writing leaves the previous file whole.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        if not self.group.is_first:
            return
        state = {"run": self.run} | {name: part.state_dict() for name, part in self.parts.items()}
        partial = Path(f"{self.file}.partial")
        try:
            with partial.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())  # else a power failure may leave the new name with nothing in it
            partial.replace(self.file)
        except (OSError, RuntimeError) as error:  # torch's writer has the second for some failures
            partial.unlink(missing_ok=True)
            raise OSError(
                f"checkpoint {str(self.file)!r} cannot be written: {error}; the previous one, if any, is whole"
            ) from error


@contextmanager
def claimed(argument: str, path: Path, lock: Path) -> Iterator[None]:
    """Nobody else trains on `path` inside. The operating system holds the lock, and frees it when the process dies.

    Args:
        argument: what the user calls `path`.
        path: what is claimed.
        lock: the file that stands for it, whose folder is made; it may be left behind.

    Raises:
        ValueError: somebody else has it, or it cannot be made.
    """
    claim = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        claim.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{argument}={str(path)!r}: is in use by another training") from None
    except OSError as error:
        raise ValueError(f"{argument}={str(path)!r}: cannot be made: {error}") from error
    try:
        yield
    finally:
        claim.release()


def run_epochs(
    model: nn.Module,
    epochs: int,
    progress: Progress,
    best: BestEpoch,
    batches: Callable[[], Iterable[Batch]],
    step: Callable[[Batch], None],
    measure: Callable[[], dict[str, float]],
    record: Callable[[dict[str, float]], None],
    checkpoint: Checkpoint | None,
    group: ProcessGroup = ALONE,
) -> None:
    """Train from where `progress` stands to the last epoch, or until robustness collapses.

    With a checkpoint, which is written after every epoch, every five minutes and on Ctrl-C, Ctrl-C waits for the end of
    the step; of several processes, for that of the step after which all know of it.

    Args:
        model: is trained.
        epochs: in all.
        progress: is kept up to date.
        best: judges the "robust_accuracy" after each epoch, where it is not NaN.
        batches: those of `progress.epoch` from `progress.step` on.
        step: trains on a batch.
        measure: what is known of the model after an epoch, the same in all processes. It leaves no trace, as it may be
            interrupted and repeated.
        record: is given that, before the next epoch begins.
        checkpoint: has `progress`, `best` and all else that changes; None for a run that cannot be resumed.
        group: the processes that train the model.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the checkpoint is written.
    """
    whole = nullcontext if checkpoint is None else uninterrupted
    start, between_steps = time.perf_counter() - progress.seconds, True
    saved = time.monotonic()

    def take(batch: Batch) -> None:
        nonlocal between_steps, saved
        between_steps = False
        step(batch)
        progress.step += 1
        between_steps = True
        if checkpoint is not None and time.monotonic() - saved > SAVED_EVERY:
            progress.seconds = time.perf_counter() - start
            checkpoint.save()
            saved = time.monotonic()

    try:
        while progress.epoch < epochs and not best.collapsed:
            if group.size == 1:
                for batch in batches():
                    with whole():
                        take(batch)
            else:  # a signal comes to each at another time, and nobody is to wait for one who has stopped
                with uninterrupted() as received:
                    for batch in batches():
                        take(batch)
                        if group.any(bool(received)):
                            raise KeyboardInterrupt
            measured = measure()
            progress.seconds = time.perf_counter() - start
            with whole():
                record(measured)
                progress.epoch, progress.step = progress.epoch + 1, 0
                if not math.isnan(measured["robust_accuracy"]):
                    best.judge(model, measured["robust_accuracy"])
                if checkpoint is not None:
                    checkpoint.save()
    except KeyboardInterrupt:
        if checkpoint is not None and between_steps:  # else a hook raised it in a step, half of which is in the model
            with uninterrupted():
                progress.seconds = time.perf_counter() - start
                checkpoint.save()
        raise


@contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Hold Ctrl-C and SIGTERM back until the end of the block, so that no checkpoint has half a step or misses its row.

    It yields the signals that have come so far; they are raised in the end, unless an error ends the block.
    """
    received: list[int] = []
    held: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # in another no handler can be set
        held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in held.items() if handler is not None}  # Python's to handle
    for number in held:
        signal.signal(number, lambda received_number, _: received.append(received_number))
    try:
        yield received
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(received):
        signal.raise_signal(number)


def asked_in(precision: str, victim: Victim, device: torch.device, images: Tensor | None = None) -> InPrecision:
    """The model, not a copy, as it is asked in training: in a precision and the memory format that is fastest in it.

    Args:
        precision: "float32" asks the model as it is, "bfloat16" under autocast, "auto" in bfloat16 where the device
            multiplies in it. In bfloat16 and, with "auto", on a CPU, in channels_last.
        victim: has the model.
        device: where it is.
        images: (N, ...), on which the model must work so; None takes its word for it.
    """

    def works(dtype: torch.dtype, channels_last: bool) -> bool:
        return images is None or works_in(victim, images, dtype, channels_last=channels_last)

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if precision == "auto" and bfloat16_is_native(device) and works(torch.bfloat16, False):
        dtype = torch.bfloat16
    gains = precision != "float32" and (dtype == torch.bfloat16 or device.type == "cpu")
    return InPrecision(victim.module, dtype, is_folded=False, channels_last=gains and works(dtype, True))


def logits_of(asked: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, classes) in training, whatever autocast the caller is in."""
    with torch.autocast(x.device.type, enabled=False):
        logits: Tensor = asked(x)
    return logits


def on_model_as_trained(attack: Attack, asked: InPrecision, images: Tensor) -> Attack:
    """A silent copy of a native attack that asks the model as training does, with batch norm folded into convolutions.

    Args:
        attack: on the model of `asked`.
        asked: see `asked_in`. It follows when the model is trained, as a copy would not.
        images: (N, ...), on which folding is tried.
    """
    attack = copy.copy(attack)
    attack.verbose, attack.precision, attack.victim = False, "float32", copy.copy(attack.victim)
    view = folded_view(asked.module, images)
    is_folded = view is not asked.module
    attack.victim.module = InPrecision(view, asked.dtype, is_folded=is_folded, channels_last=asked.channels_last)
    return attack


def descend(losses: Iterable[Tensor], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """A step of the optimizer down the sum of losses, and of the schedule of its learning rate where there is one.

    A loss is differentiated before the next is asked for.
    """
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
    optimizer.step()
    if schedule is not None:
        schedule.step()


def held_out_mask(labels: Tensor, n: int, seed: int) -> Tensor:
    """Which of the images with these labels (N,) are held out: bool (N,), true for `n`, class-balanced.

    Raises:
        ValueError: there are no more than `n`.
    """
    if n >= len(labels):
        raise ValueError(f"holdout={n}: there are only {len(labels)} images")
    return class_balanced_mask(labels, n, seed)


def watching(estimator: Any, norm: Any, eps: Any, batch_size: int, steps: int = 10) -> PGD:
    """The attack by which robustness is watched: PGD from the image, of `steps` steps of eps / 4."""
    eps_step = np.asarray(eps) / 4 if np.any(np.asarray(eps)) else 1.0
    return PGD(
        estimator, norm, eps, eps_step, max_iter=steps, batch_size=batch_size, seed=0, early_stop=True, verbose=False
    )


def share_standing(attack: Attack, batches: Iterable[tuple[Tensor, Tensor]], first_index: int = 0) -> float:
    """Robust accuracy: the share of images that an attack with `early_stop` cannot make the model get wrong."""
    fooled = images = 0
    for finished in attack.stream(batches, first_index=first_index):
        assert finished.fooled is not None
        fooled, images = fooled + int(finished.fooled.sum()), images + len(finished.index)
    return 1 - fooled / images
