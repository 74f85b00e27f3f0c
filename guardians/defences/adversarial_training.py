"""Adversarial training with ART's `Trainer` interface (Goodfellow et al. 2015, Madry et al. 2018, Wong et al. 2020)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from guardians.attacks.pgd import ProjectedGradientDescent
from guardians.data import class_balanced_mask
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_flag, check_integer, check_number, checked_images, labels_from
from guardians.engine.rng import hashed
from guardians.engine.search import InPrecision, bfloat16_is_native, folded_view, works_in
from guardians.engine.victim import Victim

__all__ = ["AdversarialTrainer", "has_collapsed", "share_standing", "warn_of_collapse"]

logger = logging.getLogger(__name__)

_WATCHABLE = 5000
"""Images of which a fiftieth tells a collapse from chance."""
_Batch = tuple[Tensor, Tensor, dict[int, Tensor]]
"""Images, labels, and for attacks on another estimator, by their `id`, the adversarial images found before."""


def share_standing(attack: Attack, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Robust accuracy: the share of images that an attack with `early_stop` cannot make the model get wrong."""
    fooled = images = 0
    for finished in attack.stream(batches):
        assert finished.fooled is not None
        fooled, images = fooled + int(finished.fooled.sum()), images + len(finished.index)
    return 1 - fooled / images


def has_collapsed(robust_accuracy: float, best: float) -> bool:
    """Whether robustness is lost: "catastrophic overfitting" ends near 0 within an epoch (Wong et al. 2020, 5.3)."""
    return robust_accuracy < best / 2


def warn_of_collapse(best: float, robust_accuracy: float, epoch: int, best_epoch: int) -> None:
    """Say in the log that training stops."""
    logger.warning(
        "catastrophic overfitting: robust accuracy on held-out images fell from %.1f%% to %.1f%% in epoch %d; "
        "training stops, with the model of epoch %d",
        100 * best,
        100 * robust_accuracy,
        epoch,
        best_epoch,
    )


class AdversarialTrainer(Trainer):
    """Training on adversarial images of the model as it is at each step, mixed with clean ones.

    A drop-in for `art.defences.trainer.AdversarialTrainer`, with its batches, its draws of `np.random` and its
    optimizer, in a loop that stays on the device. With FGSM it is that of Goodfellow et al. 2015; with FGSM from a
    random start "fast" training (Wong et al. 2020, algorithm 3); with PGD and `ratio` 1 that of Madry et al. 2018.

    Args:
        classifier: an ART `PyTorchClassifier` with an optimizer. Its loss and preprocessing are honoured.
        attacks: an attack, or a list of attacks that take turns batch by batch; untargeted. Those on another estimator
            are run once, before training (Tramer et al. 2018). Native ones are the fastest.
        ratio: share of the images of each batch that are replaced by adversarial ones, rounded up; 0 is plain training.
        precision: of the training and of native attacks. "float32" computes as ART does; "bfloat16" under autocast and
            in channels_last, with batch norm folded into the convolutions for attacks; "auto" likewise, in bfloat16
            where the device computes in it and the model can be asked so, else in float32.
        holdout: images that are not trained on. After each epoch native PGD-10 with the first attack's norm and eps
            attacks them; when robust accuracy falls below half of its best, the log says so, training stops, and the
            model is that of the best epoch. 0 turns it off. None takes a fiftieth of 5,000 images or more, at most
            1,000, where all attacks are native and take a single step, for which alone that is known to happen.
        seed: of the order, of the choice of images and of native attacks that have none of their own; None draws from
            `np.random` and torch's global generator.
        verbose: show a progress bar.

    Attributes:
        robust_accuracies: that on the held-out images after each epoch of the last `fit`.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed.
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attacks: EvasionAttack | list[EvasionAttack],
        ratio: float = 0.5,
        *,
        precision: str = "auto",
        holdout: int | None = None,
        seed: int | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise TypeError(f"classifier of type {type(classifier).__name__}: must be an ART PyTorchClassifier")
        if classifier.optimizer is None:
            raise ValueError("classifier has no optimizer: training needs one")
        super().__init__(classifier=classifier)
        self.attacks = list(attacks) if isinstance(attacks, (list, tuple)) else [attacks]
        for attack in self.attacks or [None]:
            if not isinstance(attack, EvasionAttack):
                raise TypeError(f"attacks={attacks!r}: must be an art.attacks.EvasionAttack or a list of them")
            if getattr(attack, "targeted", False):
                raise ValueError(f"attacks: {type(attack).__name__} is targeted; must be untargeted")
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

    def fit(self, x: np.ndarray, y: np.ndarray, batch_size: int = 128, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Train the classifier.

        Args:
            x: images (N, ...), float32 within the classifier's `clip_values`.
            y: labels (N,), or one-hot rows (N, classes).
            batch_size: images in a step; the last batch of an epoch may be smaller.
            nb_epochs: passes over the images.
            **kwargs: only `scheduler`, which takes a step after each batch, as in ART.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed, or labels do not fit images or classes.
        """
        scheduler = _only_scheduler(kwargs)
        check_integer("batch_size", batch_size, low=1)
        check_integer("nb_epochs", nb_epochs, low=1)
        images = torch.as_tensor(np.asarray(x))
        if not images.is_floating_point() or not len(images):
            got = f"dtype {images.dtype} and shape {tuple(images.shape)}"
            raise ValueError(f"x has {got}: must be floating-point images, at least one")
        images, labels = images.float(), labels_from(y, len(images), self._classifier.nb_classes)
        images = checked_images("x", images, Victim(self._classifier))
        images, labels, held_out = self._split(images, labels)
        transferred = {
            id(attack): torch.from_numpy(attack.generate(images.numpy(), y=labels.numpy()))
            for attack in self.attacks
            if not self._is_white_box(attack)
        }
        draw, order = self._draw(), np.arange(len(images))

        def epoch() -> Iterator[_Batch]:
            draw.shuffle(order)
            for rows in torch.from_numpy(order.copy()).split(batch_size):
                yield images[rows], labels[rows], {key: found[rows] for key, found in transferred.items()}

        watch = None if held_out is None else self._watch(*held_out, batch_size)
        self._run(epoch, math.ceil(len(images) / batch_size), nb_epochs, batch_size, draw, scheduler, watch)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Train the classifier on the batches of an ART `DataGenerator`, of which none are held out.

        Args:
            generator: knows its size, which says how many batches are an epoch.
            nb_epochs: epochs.
            **kwargs: only `scheduler`, as in `fit`.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed, the generator has no size, or an attack is on
                another estimator, which only `fit` can run before training.
        """
        scheduler = _only_scheduler(kwargs)
        check_integer("nb_epochs", nb_epochs, low=1)
        if generator.size is None:
            raise ValueError("generator.size=None: the generator must know how many images it has")
        if not all(map(self._is_white_box, self.attacks)):
            raise ValueError("attacks: one is on another estimator than the classifier; with a generator none may be")
        steps = math.ceil(generator.size / generator.batch_size)

        draw = self._draw()

        def epoch() -> Iterator[_Batch]:
            draw.shuffle(np.arange(generator.size))  # of no use, but ART's trainer draws it
            for _ in range(steps):
                x, y = generator.get_batch()
                yield torch.as_tensor(x).float(), labels_from(y, len(x), self._classifier.nb_classes), {}

        self._run(epoch, steps, nb_epochs, generator.batch_size, draw, scheduler, None)

    def predict(self, x: np.ndarray, **kwargs: Any) -> np.ndarray:
        """The classifier's predictions (N, classes); arguments as of its `predict`."""
        predictions: np.ndarray = self._classifier.predict(x, **kwargs)
        return predictions

    def _run(
        self,
        epoch: Callable[[], Iterator[_Batch]],
        steps: int,
        nb_epochs: int,
        batch_size: int,
        draw: Any,
        scheduler: Any,
        watch: Callable[[], float] | None,
    ) -> None:
        """Train on the batches of each epoch, and stop where robustness collapses."""
        model, device = self._classifier.model, self._classifier.device
        self._choose_precision()
        attacks = [self._prepared(attack, batch_size) for attack in self.attacks]
        self.robust_accuracies = []
        best, best_epoch, step = 0.0, 0, 0
        best_weights: dict[str, Tensor] = {}
        with tqdm(total=nb_epochs * steps, desc="adversarial training", disable=not self.verbose) as progress:
            for number in range(1, nb_epochs + 1):
                for x, y, transferred in epoch():
                    attack = attacks[step % len(attacks)]
                    x, y = x.to(device, copy=True), y.to(device)
                    rows = torch.from_numpy(self._chosen(len(x), draw)).to(device)
                    if len(rows):
                        x[rows] = self._perturbed(attack, x[rows], y[rows], rows, transferred, step)
                    self._learn(x, y, scheduler)
                    step += 1
                    progress.update()
                if watch is None:
                    continue
                self.robust_accuracies.append(watch())
                progress.set_postfix_str(f"robust accuracy {self.robust_accuracies[-1]:.1%}")
                if has_collapsed(self.robust_accuracies[-1], best):
                    warn_of_collapse(best, self.robust_accuracies[-1], number, best_epoch)
                    model.load_state_dict(best_weights)
                    return
                if self.robust_accuracies[-1] >= best:
                    best, best_epoch = self.robust_accuracies[-1], number
                    best_weights = copy.deepcopy(model.state_dict())

    def _choose_precision(self) -> None:
        """The dtype and the memory format in which the model is trained and attacked."""
        works, device = partial(works_in, Victim(self._classifier), self._probe), self._classifier.device
        self._dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        if self.precision == "auto" and bfloat16_is_native(device) and works(torch.bfloat16, channels_last=False):
            self._dtype = torch.bfloat16
        gains = self.precision != "float32" and (self._dtype == torch.bfloat16 or device.type == "cpu")
        self._channels_last = gains and works(self._dtype, channels_last=True)

    def _learn(self, x: Tensor, y: Tensor, scheduler: Any) -> None:
        """A step of the optimizer."""
        classifier, model = self._classifier, self._classifier.model
        target = one_hot(y, classifier.nb_classes).float()
        if classifier.preprocessing_operations:
            processed = classifier._apply_preprocessing(x.cpu().numpy(), target.cpu().numpy(), fit=True)
            x, target = (torch.from_numpy(part).to(x.device) for part in processed)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        model.train()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            logits = model(x)
        loss = classifier.loss(logits.float(), classifier.reduce_labels(target))
        classifier.optimizer.zero_grad()
        loss.backward()
        classifier.optimizer.step()
        if scheduler is not None:
            scheduler.step()

    def _perturbed(
        self, attack: EvasionAttack, x: Tensor, y: Tensor, rows: Tensor, transferred: dict[int, Tensor], step: int
    ) -> Tensor:
        """Adversarial images of some rows of a batch."""
        if id(attack) in transferred:
            return transferred[id(attack)][rows.cpu()].to(x.device)
        if not isinstance(attack, Attack):
            return torch.from_numpy(attack.generate(x.cpu().numpy(), y=y.cpu().numpy())).to(x.device)
        seed = self.seed if attack.seed is None else attack.seed
        step_attack = copy.copy(attack)
        if seed is not None:
            step_attack.seed = int(hashed(seed, step))
        return step_attack(x, y)

    def _chosen(self, n: int, draw: Any) -> np.ndarray:
        """Rows of a batch of `n` that are replaced; `draw` is used as ART's trainer uses it."""
        if self.ratio < 1:
            chosen: np.ndarray = draw.choice(n, size=math.ceil(self.ratio * n), replace=False)
            return chosen
        rows = np.arange(n)
        draw.shuffle(rows)
        return rows

    def _prepared(self, attack: EvasionAttack, batch_size: int) -> EvasionAttack:
        """A native attack in batches and precision of the training."""
        if not isinstance(attack, Attack) or not self._is_white_box(attack):
            return attack
        attack = copy.copy(attack)
        attack.verbose, attack.batch_size = False, batch_size
        if attack.precision == "auto" and self.precision != "float32":
            # Weights change with every step, which a copy would not follow.
            attack.precision, attack.victim = "float32", copy.copy(attack.victim)
            view = folded_view(attack.victim.module, self._probe)
            attack.victim.module = InPrecision(view, self._dtype, channels_last=self._channels_last)
        return attack

    @property
    def _probe(self) -> Tensor:
        """Images on which memory formats and a folded view are tried."""
        images = torch.rand(8, *self._classifier.input_shape, generator=torch.Generator().manual_seed(0))
        return Victim(self._classifier).clip(images.to(self._classifier.device))

    def _is_white_box(self, attack: EvasionAttack) -> bool:
        """Whether it attacks the classifier that is trained."""
        return attack.estimator is self._classifier or attack.estimator is self._classifier.model

    def _draw(self) -> Any:
        return np.random if self.seed is None else np.random.RandomState(self.seed)

    def _split(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Images and labels to train on, and those that are held out."""
        held = self.holdout
        if held is None:
            single_step = all(isinstance(a, ProjectedGradientDescent) and a.max_iter == 1 for a in self.attacks)
            held = min(1000, len(images) // 50) if single_step and len(images) >= _WATCHABLE else 0
        if held == 0 or self.ratio == 0:
            return images, labels, None
        if held >= len(images):
            raise ValueError(f"holdout={held}: there are only {len(images)} images")
        if not isinstance(self.attacks[0], ProjectedGradientDescent):
            raise ValueError(f"holdout={held}: the first attack must be native FGSM or PGD, whose ball is then watched")
        taken = class_balanced_mask(labels, held, self.seed or 0)
        return images[~taken], labels[~taken], (images[taken], labels[taken])

    def _watch(self, images: Tensor, labels: Tensor, batch_size: int) -> Callable[[], float]:
        """Measures robust accuracy on held-out images."""
        trained_on = self.attacks[0]
        attack = ProjectedGradientDescent(
            self._classifier,
            trained_on.norm,
            trained_on.eps,
            np.asarray(trained_on.eps) / 4 if np.any(trained_on.eps) else 1.0,
            max_iter=10,
            batch_size=batch_size,
            seed=0,
            early_stop=True,
            verbose=False,
        )
        device = self._classifier.device
        return lambda: share_standing(attack, [(images.to(device), labels.to(device))])


def _only_scheduler(options: dict[str, Any]) -> Any:
    """The one argument of ART's `fit` that applies."""
    unknown = sorted(set(options) - {"scheduler"})
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; known is scheduler")
    return options.get("scheduler")
