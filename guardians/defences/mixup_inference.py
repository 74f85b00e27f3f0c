"""Mixup Inference (Pang et al., "Mixup inference: better exploiting mixup to defend adversarial attacks", 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guardians.defences.ensemble import RandomEnsemble, log_probabilities
from guardians.engine.checks import check_choice, check_integer, check_number, labels_from
from guardians.engine.rng import hashed
from guardians.engine.victim import Victim, undisturbed

__all__ = ["METHODS", "MixupInference"]

METHODS = ("MI-PL", "MI-OL", "MI-Combined")


class MixupInference(RandomEnsemble):
    """A model asked about mixtures of an image with clean ones (Pang et al. 2020, algorithm 1).

        p(x) = 1/K sum_k softmax(f(x_k)),    x_k = lam * x + (1 - lam) * s_k,    s_k of the pool

    The label of s_k is the one that the model predicts for x (MI-PL, "predicted label"), or is drawn from the others
    with equal chances (MI-OL, "other labels"; section 3.3); s_k is drawn from the pool's images of it. MI-Combined
    (section 4.2) asks MI-PL whether x is adversarial, by its `detection_score`, and answers with MI-OL where that is
    above `threshold`, with f(x) elsewhere. (The authors' code answers with MI-PL there.)

    In training mode it is the model itself: mixup happens in training, see `guardians.training`.

    Args:
        model: returns logits (N, classes) for images (N, ...) in [0, 1]; best trained with mixup. It is not copied.
        pool: clean images (M, ...) in [0, 1] and their labels (M,), which must have each class; they are moved to the
            model's device.
        method: "MI-PL", "MI-OL" or "MI-Combined".
        lam: weight of x, in (0, 1]; with 1 nothing is mixed.
        num_samples: K.
        detection_lam: lambda of MI-PL in MI-Combined, whose `lam` and `num_samples` are those of MI-OL.
        detection_samples: its K.
        threshold: detection score above which MI-Combined takes x for adversarial.
        chunk_size: mixtures that the model is asked about at once. It bounds memory, for gradients too, where all but
            the first chunk are then computed twice; it does not change the result beyond rounding.
        seed: of the draws; None draws one from torch's global generator. Those of an image depend on (seed, its number
            among the images that the module was given), in native attacks on (seed, sample, query) instead.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range; the pool has other labels than the model has classes or lacks one, has
            values outside [0, 1], or images of a shape that the model does not take.
    """

    pool: Tensor
    _counts: Tensor
    _starts: Tensor

    def __init__(
        self,
        model: nn.Module,
        pool: tuple[Tensor, Tensor],
        method: str = "MI-OL",
        lam: float = 0.5,
        num_samples: int = 30,
        *,
        detection_lam: float = 0.5,
        detection_samples: int = 5,
        threshold: float = 0.2,
        chunk_size: int = 512,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, chunk_size=chunk_size, seed=seed)
        check_choice("method", method, METHODS)
        for name, value in (("lam", lam), ("detection_lam", detection_lam)):
            check_number(name, value, low=0, exclusive=True, single=True)
            if value > 1:
                raise ValueError(f"{name}={value}: must be in (0, 1]")
        check_integer("num_samples", num_samples, low=1)
        check_integer("detection_samples", detection_samples, low=1)
        check_number("threshold", threshold, low=-1, single=True)
        if threshold > 1:
            raise ValueError(f"threshold={threshold}: must be in [-1, 1], as detection scores are")
        self.method = method
        self.lam, self.num_samples = float(lam), int(num_samples)
        self.detection_lam, self.detection_samples = float(detection_lam), int(detection_samples)
        self.threshold = float(threshold)
        images, labels, counts = _checked_pool(pool, model)
        order = labels.argsort(stable=True)
        self.register_buffer("pool", images[order], persistent=False)
        self.register_buffer("_counts", counts, persistent=False)
        self.register_buffer("_starts", counts.cumsum(0) - counts, persistent=False)

    @property
    def passes(self) -> int:
        """`num_samples`."""
        return self.num_samples

    @property
    def pool_labels(self) -> Tensor:
        """The labels (M,) of the images in `pool`, which are sorted by them."""
        return torch.arange(len(self._counts), device=self._counts.device).repeat_interleave(self._counts)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, classes) of images (N, ...).

        Raises:
            ValueError: the images have another shape than those of the pool.
        """
        self._check_shape(x)
        if self.training:
            return log_probabilities(self.model, x)
        keys = self.keys(len(x))
        if self.method != "MI-Combined":
            predicted = self.predicted(x)
            return self._mixed(x, predicted, keys, self.method, self.lam, self.num_samples)
        unmixed = self._unmixed(x)
        score, predicted = self._score(x, unmixed, keys)
        others = self._mixed(x, predicted, keys, "MI-OL", self.lam, self.num_samples)
        return torch.where((score > self.threshold)[:, None], others, unmixed)

    def detection_score(self, x: Tensor) -> Tensor:
        """How much confidence in its predicted label an image (N, ...) loses when mixed with others of that label.

        The model's probability of it less that of MI-PL, (N,) in [-1, 1] (Pang et al. 2020, equation 11). Adversarial
        images lose more.

        Raises:
            ValueError: see `forward`.
        """
        self._check_shape(x)
        return self._score(x, self._unmixed(x), self.keys(len(x)))[0]

    def extra_repr(self) -> str:
        """The arguments."""
        return f"method={self.method}, lam={self.lam:g}, num_samples={self.num_samples}, pool={tuple(self.pool.shape)}"

    def _check_shape(self, x: Tensor) -> None:
        if x.shape[1:] != self.pool.shape[1:]:
            raise ValueError(f"x has shape {tuple(x.shape)}: images of the pool have {tuple(self.pool.shape[1:])}")

    def _score(self, x: Tensor, unmixed: Tensor, keys: np.ndarray) -> tuple[Tensor, Tensor]:
        """Detection scores and predicted labels, both (N,)."""
        predicted = unmixed.argmax(1)
        mixed = self._mixed(x, predicted, keys, "MI-PL", self.detection_lam, self.detection_samples)
        confidences = (answer.exp().gather(1, predicted[:, None])[:, 0] for answer in (unmixed, mixed))
        return next(confidences) - next(confidences), predicted

    def _unmixed(self, x: Tensor) -> Tensor:
        """Log-probabilities of the images themselves."""
        return self.mean_over_passes(lambda images, _: self._ask(images), x, np.zeros((len(x), 1)))

    def predicted(self, x: Tensor) -> Tensor:
        """Labels (N,) that the model gives to images (N, ...) as they are."""
        with torch.no_grad():
            return self._unmixed(x).argmax(1)

    def _mixed(
        self, x: Tensor, predicted: Tensor, keys: np.ndarray, method: str, lam: float, num_samples: int
    ) -> Tensor:
        """Log-probabilities of MI-PL or MI-OL."""

        def ask(images: Tensor, rows: Tensor) -> Tensor:
            return self._ask(lam * images + (1 - lam) * self.pool.index_select(0, rows).to(images.dtype))

        return self.mean_over_passes(ask, x, self.partners(predicted, keys, method, num_samples))

    def partners(self, predicted: Tensor, keys: np.ndarray, method: str, num_samples: int) -> Tensor:
        """Rows of `pool` (N, num_samples) with which images are mixed.

        Args:
            predicted: the labels (N,) that the model gives to the images.
            keys: seeds (N,) of the draws, uint64.
            method: "MI-PL", for partners of the predicted label, or "MI-OL", for others.
            num_samples: partners of an image.
        """
        device, classes = self.pool.device, len(self._counts)
        draws = (hashed(keys[:, None], METHODS.index(method), np.arange(num_samples), number) for number in range(2))
        # The remainder of 63 random bits is uniform up to classes / 2**63.
        for_label, for_image = (torch.from_numpy((draw >> np.uint64(1)).astype(np.int64)).to(device) for draw in draws)
        labels = predicted[:, None].expand_as(for_label)
        if method == "MI-OL":
            labels = (labels + 1 + for_label % (classes - 1)) % classes
        return self._starts[labels] + for_image % self._counts[labels]

    def _ask(self, images: Tensor) -> Tensor:
        return log_probabilities(self.fast_model(images), images)


def _checked_pool(pool: Any, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the number of images of each class."""
    try:
        images, labels = pool
    except (TypeError, ValueError):
        raise TypeError(f"pool of type {type(pool).__name__}: must be a pair of images and labels") from None
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"pool has images of type {got}: must be a floating-point tensor (M, ...)")
    if images.ndim < 2 or not len(images):
        raise ValueError(f"pool has images of shape {tuple(images.shape)}: must be at least one (M, ...)")
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"pool has values from {low:g} to {high:g}: must be in [0, 1]")
    images = images.to(Victim(model).device or images.device)
    try:
        with undisturbed(model), torch.no_grad():
            classes = model(images[:1]).shape[1]
    except Exception as error:  # the model is the user's, and may fail in any way
        shape = tuple(images.shape[1:])
        raise ValueError(
            f"pool has {images.dtype} images of shape {shape}, on which the model fails: {error}"
        ) from error
    if classes < 2:
        raise ValueError(f"the model has {classes} class: needed are two or more")
    try:
        labels = labels_from(labels, len(images), classes).to(images.device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"pool has labels that do not fit: {error}") from error
    counts = labels.bincount(minlength=classes)
    if not counts.all():
        missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()))
        raise ValueError(f"pool has no image of class {missing}: needed is at least one of each")
    return images, labels, counts
