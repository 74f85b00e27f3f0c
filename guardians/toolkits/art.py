"""Attacks of ART (Nicolae et al., "Adversarial Robustness Toolbox", 2018) as callables on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from art.attacks import EvasionAttack, evasion
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import one_hot

from guardians.attacks.registry import Spec
from guardians.engine.checks import labels_from
from guardians.engine.victim import Victim, undisturbed
from guardians.toolkits.base import Builder, Recipe, TensorAttack, attack_classes, own_arguments

__all__ = ["BUILDERS", "PACKAGE", "ArtAttack", "attacks", "logits", "own", "wrap"]

PACKAGE = "art"


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

    def __call__(self, images: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Adversarial images on the device and in the dtype of `images`; ART computes on its estimator's device.

        Args:
            images: (N, ...), in the range of the estimator's `clip_values`.
            labels: indices (N,) or one-hot rows (N, classes), the targets of a targeted attack; None leaves it to the
                attack, most take the model's predictions.
            mask: broadcastable to `images`, bool or floating point; where it is zero an attack that takes masks does
                not perturb. ART's other attacks ignore it.

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
        options = {} if mask is None else {"mask": mask.cpu().numpy()}
        with protection, torch.inference_mode(False), torch.enable_grad():
            return torch.as_tensor(self.art_attack.generate(x=x, y=y, **options)).to(images)


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


def attacks() -> dict[str, type]:
    """All evasion attacks in `art.attacks.evasion` by name; some are for other frameworks or data."""
    return attack_classes(evasion, EvasionAttack)


def own(name: str, arguments: dict[str, Any], norm: float, eps: float) -> tuple[bool, dict[str, Any]]:
    """Whether an attack is confined to a ball, and its arguments, see `guardians.toolkits.build.own_spec`."""
    found = own_arguments(getattr(evasion, name), arguments, eps=eps, norm=norm)
    return "eps" in found, found


def wrap(
    recipe: Recipe, spec: Spec, model: nn.Module, batch_size: int, nb_classes: int, input_shape: tuple[int, ...]
) -> TensorAttack:
    """The attack, see `guardians.toolkits.build`."""
    attack, arguments = getattr(evasion, recipe[0]), recipe[1]
    if "verbose" in attack.attack_params:
        arguments = arguments | {"verbose": False}
    if spec.targeted and "targeted" not in attack.attack_params:
        raise ValueError(f"targeted=True: art's {recipe[0]} does not take targets")
    if "targeted" in attack.attack_params:
        arguments = arguments | {"targeted": spec.targeted}
    if "batch_size" in attack.attack_params:
        arguments = {"batch_size": batch_size} | arguments
    with _protected(model):  # some constructors ask the model, and leave it in evaluation mode
        return ArtAttack(attack(_classifier(model, nb_classes, input_shape), **arguments))


def logits(model: nn.Module, nb_classes: int, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """What ART's attacks are told of a batch."""
    classifier = _classifier(model, nb_classes, input_shape)
    return lambda x: torch.from_numpy(classifier.predict(x.cpu().numpy(), batch_size=len(x))).to(x)


def _classifier(model: nn.Module, nb_classes: int, input_shape: tuple[int, ...]) -> PyTorchClassifier:
    device = Victim(model).device or torch.device("cpu")
    # ART moves the model to the current CUDA device.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            input_shape,
            nb_classes,
            clip_values=(0, 1),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )


def _in_ball(name: str, spec: Spec) -> Recipe:
    start = {"num_random_init": int(spec.get("random_start", False))}
    return name, {"norm": spec.norm, "eps": spec.eps, **start, **spec.arguments("eps_step", steps="max_iter")}


def _carlini_wagner(spec: Spec) -> Recipe:
    renamed = {"steps": "max_iter", "const": "initial_const", "searches": "binary_search_steps"}
    arguments = spec.arguments("confidence", "learning_rate", **renamed)
    return "CarliniL2Method" if spec.norm == 2 else "CarliniLInfMethod", arguments


def _square(spec: Spec) -> Recipe | None:
    if spec.norm == 1 or spec.targeted:  # it takes norm 1, and returns the images
        return None
    return "SquareAttack", {"norm": spec.norm, "eps": spec.eps, **spec.arguments("p_init", steps="max_iter")}


def _apgd(spec: Spec) -> Recipe | None:
    loss = spec.get("loss", "cross_entropy")
    if not spec.get("random_start") or spec.get("n_targets", 0) or spec.get("rho", 0.75) != 0.75 or loss == "margin":
        return None
    first = {"eps_step": (1 if spec.norm == 1 else 2) * (spec.eps or 0)}
    arguments = {"norm": spec.norm, "eps": spec.eps, "nb_random_init": 1, "loss_type": loss}
    return "AutoProjectedGradientDescent", {**arguments, **first, **spec.arguments(steps="max_iter")}


BUILDERS: dict[str, Builder] = {
    "FGSM": partial(_in_ball, "FastGradientMethod"),
    "PGD": partial(_in_ball, "ProjectedGradientDescent"),
    "C&W": _carlini_wagner,
    "Square": _square,
    "APGD": _apgd,
}
