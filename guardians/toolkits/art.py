"""Attacks of ART as callables on tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from art.attacks import EvasionAttack
from torch import Tensor, nn
from torch.nn.functional import one_hot

from guardians.engine.checks import labels_from
from guardians.engine.victim import undisturbed

__all__ = ["ArtAttack"]


class ArtAttack:
    """Any evasion attack of ART as torchattacks users expect one: `ArtAttack(art_attack)(images, labels)`.

    Args:
        art_attack: the attack with its estimator. A PyTorch model comes back as it was, `.grad` included.

    Raises:
        TypeError: it is not an `art.attacks.EvasionAttack`.
    """

    def __init__(self, art_attack: EvasionAttack) -> None:
        if not isinstance(art_attack, EvasionAttack):
            got = art_attack.__name__ if isinstance(art_attack, type) else type(art_attack).__name__
            raise TypeError(f"art_attack={got}: must be an instance of an art.attacks.EvasionAttack")
        self.art_attack = art_attack

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images on the device and in the dtype of `images`; ART computes on its estimator's device.

        Args:
            images: (N, ...), in the range of the estimator's `clip_values`.
            labels: indices (N,) or one-hot rows (N, classes), the targets of a targeted attack; None leaves it to the
                attack, most take the model's predictions.

        Raises:
            TypeError: the images are not a floating-point tensor.
            ValueError: the labels do not fit the images or the classes.
        """
        if not (isinstance(images, Tensor) and images.is_floating_point()):
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images of type {got}: must be a floating-point tensor; arrays go to ART's generate()")
        y = None
        if labels is not None:
            nb_classes = getattr(self.art_attack.estimator, "nb_classes", None)
            indices = labels_from(labels, len(images), nb_classes)
            y = (indices if nb_classes is None else one_hot(indices, nb_classes)).cpu().numpy()
        estimator, dtype = self.art_attack.estimator, images.dtype
        module = estimator if isinstance(estimator, nn.Module) else getattr(estimator, "_model", None)
        protection: AbstractContextManager[None] = nullcontext()
        if isinstance(module, nn.Module):
            protection = _protected(module)
            dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), dtype)
        x = images.detach().to("cpu", dtype, copy=True).numpy()
        with protection, torch.inference_mode(False), torch.enable_grad():
            return torch.as_tensor(self.art_attack.generate(x=x, y=y)).to(images)


@contextmanager
def _protected(module: nn.Module) -> Iterator[None]:
    """`undisturbed`, and `.grad` put aside: ART calls `zero_grad`."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with undisturbed(module):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
