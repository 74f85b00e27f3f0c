"""Adversarial training with ART's `Trainer` interface (Goodfellow et al. 2015, Madry et al. 2018, Wong et al. 2020)."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor
from tqdm.auto import tqdm

from guardians.defences.training_loop import (
    BestEpoch,
    Checkpoint,
    Progress,
    asked_in,
    claimed,
    descend,
    held_out_mask,
    logits_of,
    on_model_as_trained,
    run_epochs,
    share_standing,
    uninterrupted,
    watching,
)
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_flag, check_integer, check_number, checked_images, labels_from
from guardians.engine.rng import hashed
from guardians.engine.search import InPrecision
from guardians.engine.victim import Victim

__all__ = ["AdversarialTrainer"]

logger = logging.getLogger(__name__)

_WATCHABLE = 5000
"""Images of which a fiftieth tells a collapse from chance."""
_Images = tuple[Tensor, Tensor]
"""Images (N, ...) and their labels (N,), or rows of one-hot labels or probabilities (N, classes), on the CPU."""


class AdversarialTrainer(Trainer):
    """Training on adversarial images of the model as it is at each step, mixed with clean ones.

    A drop-in for `art.defences.trainer.AdversarialTrainer`, with its batches, its draws of `np.random` and its
    optimizer, in a loop that stays on the device: the same call gives the same weights up to rounding, unless model or
    attack draw from torch's global generator. With FGSM it is that of Goodfellow et al. 2015; with FGSM from a random
    start "fast" training (Wong et al. 2020, algorithm 3); with PGD and `ratio` 1 that of Madry et al. 2018. What ART
    does not have is keyword-only and off unless asked for.

    Args:
        classifier: an ART `PyTorchClassifier`. Its optimizer, which `fit` needs, loss and preprocessing are honoured.
        attacks: an attack, or a list of attacks that take turns batch by batch; untargeted. Those on another estimator
            are run once, before training (Tramer et al. 2018). Native ones are the fastest.
        ratio: share of the images of each batch that are replaced by adversarial ones, rounded up; 0, which ART does
            not allow, is plain training.
        precision: of the training and of native attacks whose own is "auto". "float32" asks the model as it is, as ART
            does; "bfloat16" under autocast and in channels_last, with batch norm folded into the convolutions for
            attacks; "auto" likewise, in bfloat16 where the device computes in it and the model can be asked so, else in
            float32.
        holdout: images that are not trained on. After each epoch native PGD-10 with the first attack's norm and eps
            attacks them; when robust accuracy falls below half of its best, the log says so, training stops, and the
            model is that of the best epoch. 0 turns it off. None takes a fiftieth of 5,000 images or more, at most
            1,000, where all attacks are native and take a single step, for which alone that is known to happen.
        seed: of the order, of the choice of images and of native attacks that have none of their own; None draws from
            `np.random` and torch's global generator.
        verbose: show a progress bar.

    Attributes:
        robust_accuracies: that on the held-out images after each epoch of the last `fit`.
        speed_options: what the last `fit` computed with, of "bfloat16", "channels_last" and "folded batch norm".

    Raises:
        TypeError, ValueError: an argument is outside what is allowed.
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attacks: EvasionAttack | list[EvasionAttack],
        ratio: float = 0.5,
        *,
        precision: str = "float32",
        holdout: int | None = 0,
        seed: int | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise TypeError(f"classifier of type {type(classifier).__name__}: must be an ART PyTorchClassifier")
        super().__init__(classifier=classifier)
        self.attacks = list(attacks) if isinstance(attacks, (list, tuple)) else [attacks]
        if not self.attacks or not all(isinstance(attack, EvasionAttack) for attack in self.attacks):
            raise ValueError(f"attacks={attacks!r}: must be an art.attacks.EvasionAttack or a list of them")
        check_number("ratio", ratio, low=0, single=True)
        if ratio > 1:
            raise ValueError(f"ratio={ratio}: must be in [0, 1]")
        check_choice("precision", precision, ("auto", "float32", "bfloat16"))
        if holdout is not None:
            check_integer("holdout", holdout, low=0)
        if seed is not None:
            check_integer("seed", seed, low=0)
            if seed >= 2**32:
                raise ValueError(f"seed={seed}: must be below 2**32")
        check_flag("verbose", verbose)
        self.ratio, self.precision, self.holdout, self.seed, self.verbose = ratio, precision, holdout, seed, verbose
        self.robust_accuracies: list[float] = []
        self.speed_options: list[str] = []

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray,
        batch_size: int = 128,
        nb_epochs: int = 20,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the classifier.

        Args:
            x: images (N, ...), floating point, within the classifier's `clip_values`; computed on in the model's dtype.
            y: labels (N,), or rows (N, classes), one-hot or of probabilities, which are trained on as the classifier's
                `fit` does: by cross-entropy as they are, by a loss of labels as the largest.
            batch_size: images in a step; the last batch of an epoch may be smaller.
            nb_epochs: passes over the images.
            checkpoint: a file, written after each epoch, every five minutes and on Ctrl-C, which then waits for the end
                of the step. Where it exists, training goes on from it: an interrupted fit, called again with the same
                arguments, gives the weights of one that was not. The global generators come back with it. Beside it
                lies a file whose lock keeps other trainings off.
            **kwargs: those of the classifier's `fit`, with what they do there to a single batch. `scheduler` takes a
                step after each batch; `training_mode=False` trains the model in evaluation mode. All others are without
                effect: `drop_last` and `validation_data` silently, of the rest the log says so.

        Raises:
            TypeError: an argument is of another type, or `verbose`, which ART's trainer sets itself.
            ValueError: an argument is outside what is allowed, labels do not fit images or classes, the classifier has
                no optimizer, or the checkpoint is in use, cannot be read or is of another run.
            NotImplementedError: an attack is targeted.
            KeyboardInterrupt: on Ctrl-C, after the checkpoint is written.
        """
        scheduler, training_mode = self._checked(nb_epochs, kwargs)
        check_integer("batch_size", batch_size, low=1)
        images = torch.as_tensor(np.asarray(x))
        if not images.is_floating_point() or not len(images):
            got = f"dtype {images.dtype} and shape {tuple(images.shape)}"
            raise ValueError(f"x has {got}: must be floating-point images, at least one")
        images, labels = images.to(self._dtype), self._labels(y, len(images))
        images = checked_images("x", images, Victim(self._classifier))
        (images, labels), held_out = self._split(images, labels)

        file = None if checkpoint is None else Path(checkpoint)
        with nullcontext() if file is None else claimed("checkpoint", file, Path(f"{file}.lock")):
            self._run(
                len(images),
                batch_size,
                nb_epochs,
                take=lambda rows: (images[rows], labels[rows]),
                transferable=lambda: [(images, labels)],
                scheduler=scheduler,
                training_mode=training_mode,
                held_out=held_out,
                file=file,
            )

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Train the classifier on the batches of an ART `DataGenerator`, of which none are held out.

        Attacks on another estimator are run on a pass over the generator each, before training. Their images keep
        their labels, where ART's trainer gives them those of other images.

        Args:
            generator: knows its size, which says how many batches are an epoch.
            nb_epochs: epochs.
            **kwargs: as of `fit`.

        Raises:
            TypeError: as `fit`, or `batch_size` or `checkpoint`: a generator has its own, and cannot be rewound.
            ValueError: as `fit`, or the generator has no size, or has fewer images than it says.
            NotImplementedError: an attack is targeted.
        """
        for name in {"batch_size", "checkpoint"} & set(kwargs):
            raise TypeError(f"{name}={kwargs[name]!r}: not an argument of fit_generator")
        scheduler, training_mode = self._checked(nb_epochs, kwargs)
        if generator.size is None:
            raise ValueError("generator.size=None: the generator must know how many images it has")

        def take(rows: Tensor) -> _Images:
            x, y = generator.get_batch()
            return torch.as_tensor(x).to(self._dtype), self._labels(y, len(x))

        self._run(
            generator.size,
            generator.batch_size,
            nb_epochs,
            take=take,
            transferable=lambda: map(take, torch.arange(generator.size).split(generator.batch_size)),
            scheduler=scheduler,
            training_mode=training_mode,
        )

    def predict(self, x: np.ndarray, **kwargs: Any) -> np.ndarray:
        """The classifier's predictions (N, classes); arguments as of its `predict`."""
        predictions: np.ndarray = self._classifier.predict(x, **kwargs)
        return predictions

    def _checked(self, nb_epochs: int, options: dict[str, Any]) -> tuple[Any, bool]:
        """The scheduler and the mode of training, of the arguments of a `classifier.fit`."""
        check_integer("nb_epochs", nb_epochs, low=0)
        if self._classifier.optimizer is None:
            raise ValueError("classifier.optimizer=None: training needs one; give it to PyTorchClassifier")
        for attack in self.attacks:
            if "targeted" in attack.attack_params and attack.targeted:
                raise NotImplementedError(f"attacks: {type(attack).__name__} is targeted; must be untargeted")
        if "verbose" in options:
            raise TypeError(f"verbose={options['verbose']!r}: an argument of the trainer, not of fit")
        training_mode = options.get("training_mode", True)
        check_flag("training_mode", training_mode)
        without_effect = sorted(set(options) - {"scheduler", "training_mode", "drop_last", "validation_data"})
        if without_effect:
            logger.warning("arguments without effect, as in PyTorchClassifier.fit: %s", ", ".join(without_effect))
        return options.get("scheduler"), training_mode

    def _run(
        self,
        n: int,
        batch_size: int,
        nb_epochs: int,
        *,
        take: Callable[[Tensor], _Images],
        transferable: Callable[[], Iterable[_Images]],
        scheduler: Any,
        training_mode: bool,
        held_out: _Images | None = None,
        file: Path | None = None,
    ) -> None:
        """Train on the batches that `take` gives for rows of the `n` images.

        Attacks on another estimator are run on those of `transferable`, the same images in their order.
        """
        classifier, model, device = self._classifier, self._classifier.model, self._classifier.device
        progress, best, draws = Progress(), BestEpoch(), _Draws(n, self.seed, device)
        checkpoint, resumed = None, False
        if file is not None:
            parts = {"model": model, "optimizer": classifier.optimizer, "progress": progress, "best": best}
            parts |= {"draws": draws} | ({} if scheduler is None else {"scheduler": scheduler})
            settings = {name: getattr(self, name) for name in ("ratio", "precision", "holdout", "seed")}
            settings |= {"images": n, "batch_size": batch_size, "nb_epochs": nb_epochs, "training_mode": training_mode}
            settings |= {"attacks": list(map(_described, self.attacks)), "scheduler": type(scheduler).__name__}
            checkpoint = Checkpoint(file, {name: _plain(value) for name, value in settings.items()}, parts)
            resumed = checkpoint.restore()
        self.robust_accuracies = best.accuracies

        victim = Victim(classifier)
        probe = torch.rand(8, *classifier.input_shape, generator=torch.Generator().manual_seed(0))
        probe = victim.clip(probe.to(device, self._dtype))
        asked = asked_in(self.precision, victim, device, probe)
        attacks = [self._prepared(attack, asked, probe, batch_size) for attack in self.attacks]
        self.speed_options = _speed_options(asked, attacks)
        with draws.as_at_the_start() if resumed else nullcontext():
            transferred = {
                turn: self._transferred(attack, transferable())
                for turn, attack in enumerate(attacks)
                if not self._is_white_box(attack)
            }
        for images, _ in transferred.values():
            if len(images) < n:
                raise ValueError(f"generator.size={n}: it gave only {len(images)} images in as many batches")

        steps = math.ceil(n / batch_size)
        bar = tqdm(total=nb_epochs * steps, desc="adversarial training", disable=not self.verbose)
        bar.update(progress.epoch * steps + progress.step)

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            order = draws.order_of(progress.epoch)
            for rows in order.split(batch_size)[progress.step :]:
                yield rows, *take(rows)

        def step(batch: tuple[Tensor, Tensor, Tensor]) -> None:
            rows, x, y = batch
            number = progress.epoch * steps + progress.step
            turn = number % len(attacks)
            x, y = x.to(device, copy=True), y.clone()
            found = transferred.get(turn)
            chosen = torch.from_numpy(self._chosen(min(len(x), len(rows)) if found else len(x), draws.generator))
            if found is not None:
                x_adv, labels = (part[rows[chosen]] for part in found)
                x[chosen.to(device)], y[chosen] = x_adv.to(x), labels
            elif len(chosen):
                x[chosen.to(device)] = self._perturbed(
                    attacks[turn], getattr(self.attacks[turn], "seed", None), x[chosen.to(device)], y[chosen], number
                )
            model.train(training_mode)
            descend([self._loss(asked, x, y)], classifier.optimizer, scheduler)
            bar.update()

        def measure() -> dict[str, float]:
            return {"robust_accuracy": math.nan if held_out is None else self._robust_accuracy(*held_out, batch_size)}

        def record(measured: dict[str, float]) -> None:
            if held_out is not None:
                bar.set_postfix_str(f"robust accuracy {measured['robust_accuracy']:.1%}")

        with bar:
            run_epochs(model, nb_epochs, progress, best, batches, step, measure, record, checkpoint)

    def _loss(self, asked: InPrecision, x: Tensor, y: Tensor) -> Tensor:
        """As the classifier's `fit` computes it, of images on the device, and labels."""
        classifier = self._classifier
        target: Any = np.eye(classifier.nb_classes, dtype=np.float32)[y.numpy()] if y.ndim == 1 else y.numpy()
        if classifier.preprocessing_operations:
            array, target = classifier._apply_preprocessing(x.cpu().numpy(), target, fit=True)
            x = torch.from_numpy(array).to(x.device)
        target = torch.from_numpy(classifier.reduce_labels(target))
        logits = logits_of(asked, x)
        loss: Tensor = classifier.loss(logits, target.to(logits if target.is_floating_point() else logits.device))
        return loss

    def _perturbed(self, attack: EvasionAttack, own_seed: int | None, x: Tensor, y: Tensor, number: int) -> Tensor:
        """Adversarial images of the batch of this number, on the device of `x`; `own_seed` is that of the attack."""
        if not isinstance(attack, Attack):
            return torch.from_numpy(attack.generate(x.cpu().numpy(), y=y.numpy())).to(x)
        seed = self.seed if own_seed is None else own_seed
        attack.seed = None if seed is None else int(hashed(seed, number))
        return attack(x, y.to(x.device))

    def _transferred(self, attack: EvasionAttack, batches: Iterable[_Images]) -> _Images:
        """Adversarial images of an attack on another estimator, and the labels that are theirs."""
        found = [(torch.from_numpy(attack.generate(x.numpy(), y=y.numpy())), y) for x, y in batches]
        images, labels = zip(*found, strict=True)
        return torch.cat(images), torch.cat(labels)

    def _chosen(self, n: int, draw: Any) -> np.ndarray:
        """Rows of a batch of `n` that are replaced; `draw` is used as ART's trainer uses it."""
        if self.ratio < 1:
            chosen: np.ndarray = draw.choice(n, size=math.ceil(self.ratio * n), replace=False)
            return chosen
        rows = np.arange(n)
        draw.shuffle(rows)
        return rows

    def _prepared(self, attack: EvasionAttack, asked: InPrecision, images: Tensor, batch_size: int) -> EvasionAttack:
        """An attack that is silent; a native one is copied, and as the training is in batches and precision."""
        if not isinstance(attack, Attack):
            if "verbose" in attack.attack_params:
                attack.set_params(verbose=False)  # as ART's trainer does
            return attack
        prepared = copy.copy(attack)
        prepared.verbose = False
        if self._is_white_box(attack):
            if attack.precision == "auto":
                prepared.precision = "float32"
                if self.precision != "float32":
                    prepared = on_model_as_trained(attack, asked, images)
            prepared.batch_size = batch_size
        elif attack.seed is None:
            prepared.seed = self.seed
        return prepared

    @property
    def _dtype(self) -> torch.dtype:
        """Of the model, in which images are given to it."""
        return Victim(self._classifier).dtype or torch.float32

    def _is_white_box(self, attack: EvasionAttack) -> bool:
        """Whether it attacks the classifier that is trained."""
        return attack.estimator is self._classifier or attack.estimator is self._classifier.model

    def _labels(self, y: Any, n: int) -> Tensor:
        """Labels (n,), or where rows are given these in float32: (n, classes)."""
        labels, given = labels_from(y, n, self._classifier.nb_classes), torch.as_tensor(y)
        return (given.float() if given.ndim == 2 and given.shape[1] > 1 else labels).cpu()

    def _split(self, images: Tensor, labels: Tensor) -> tuple[_Images, _Images | None]:
        """Images and labels to train on, and those that are held out."""
        held = self.holdout
        if held is None:
            single_step = all(isinstance(a, Attack) and getattr(a, "max_iter", None) == 1 for a in self.attacks)
            held = min(1000, len(images) // 50) if single_step and len(images) >= _WATCHABLE else 0
        if held == 0 or self.ratio == 0:
            return (images, labels), None
        if not (isinstance(self.attacks[0], Attack) and hasattr(self.attacks[0], "eps")):
            raise ValueError(f"holdout={held}: the first attack must be native FGSM or PGD, whose ball is then watched")
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        taken = held_out_mask(classes, held, self.seed or 0)
        return (images[~taken], labels[~taken]), (images[taken], classes[taken])

    def _robust_accuracy(self, images: Tensor, labels: Tensor, batch_size: int) -> float:
        attack, device = self.attacks[0], self._classifier.device
        watch = watching(self._classifier, attack.norm, attack.eps, batch_size)
        return share_standing(watch, [(images.to(device), labels.to(device))])


class _Draws:
    """The order of the images and the generators that a fit draws from, as a checkpoint holds them."""

    def __init__(self, n: int, seed: int | None, device: torch.device) -> None:
        self.generator: Any = np.random if seed is None else np.random.RandomState(seed)
        self._order, self._epoch, self._device = np.arange(n), -1, device
        self._start = self._generators()

    def order_of(self, epoch: int) -> Tensor:
        """The rows in the order of an epoch, which is drawn once, as ART's trainer draws it."""
        if self._epoch != epoch:
            with uninterrupted():
                self.generator.shuffle(self._order)
                self._epoch = epoch
        return torch.from_numpy(self._order.copy())

    @contextmanager
    def as_at_the_start(self) -> Iterator[None]:
        """The generators as they were when the fit that a checkpoint continues began."""
        now = self._generators()
        self._set_generators(self._start)
        yield
        self._set_generators(now)

    def state_dict(self) -> dict[str, Any]:
        """The order, the epoch that it is of, and the generators at the start and now."""
        order = torch.from_numpy(self._order.copy())
        return {"order": order, "epoch": self._epoch, "start": self._start, "now": self._generators()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What another was when it gave this; the global generators are set too."""
        self._order, self._epoch, self._start = state["order"].numpy(), state["epoch"], state["start"]
        self._set_generators(state["now"])

    def _generators(self) -> dict[str, Any]:
        """The trainer's own, and the global ones, from which attacks and models may draw."""
        states: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        for name, generator in (("numpy", np.random), ("own", self.generator)):
            kind, keys, *rest = generator.get_state()
            states[name] = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
        return states

    def _set_generators(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self._device)
        for name, generator in (("numpy", np.random), ("own", self.generator)):
            kind, keys, *rest = states[name]
            generator.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _plain(value: Any) -> Any:
    """A number of Python's for one of numpy's, which a checkpoint does not give back."""
    return value.item() if isinstance(value, np.generic) else value


def _described(attack: EvasionAttack) -> str:
    """Its name and arguments, without what tells one process from another."""
    names = [name for name in attack.attack_params if name not in ("verbose", "summary_writer")]
    arguments = ", ".join(f"{name}={getattr(attack, name, None)!r}" for name in names)
    return f"{type(attack).__name__}({re.sub(' at 0x[0-9a-fA-F]+', '', arguments)})"


def _speed_options(asked: InPrecision, attacks: list[EvasionAttack]) -> list[str]:
    """What is used of that which `precision` allows."""
    modules = [attack.victim.module for attack in attacks if isinstance(attack, Attack)]
    used = {
        "bfloat16": asked.dtype == torch.bfloat16,
        "channels_last": asked.channels_last,
        "folded batch norm": any(isinstance(module, InPrecision) and module.is_folded for module in modules),
    }
    return [option for option, is_used in used.items() if is_used]
