"""The same attack in every implementation, built from its spec.

The file of a toolkit has for each family that it can build a function in `BUILDERS`, which makes of a spec the name of
the toolkit's class and its arguments, or None where the toolkit does not have that form; `wrap` makes the attack of
them. That and the registration of the native attack (`guardians.attacks.registry`) is all that a new attack needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guardians.attacks.registry import Spec, family_of
from guardians.engine.checks import check_choice
from guardians.toolkits import art, foolbox, torchattacks
from guardians.toolkits.base import TensorAttack

__all__ = [
    "IMPLEMENTATIONS",
    "TOOLKITS",
    "build_attack",
    "build_prediction",
    "global_seed",
    "is_available",
    "is_installed",
    "own_spec",
]

TOOLKITS: dict[str, ModuleType] = {"ART": art, "torchattacks": torchattacks, "foolbox": foolbox}
IMPLEMENTATIONS = ("native", *TOOLKITS)


def is_installed(implementation: str) -> bool:
    """Whether an implementation can run here."""
    return implementation == "native" or find_spec(TOOLKITS[implementation].PACKAGE) is not None


def is_available(implementation: str, spec: Spec) -> bool:
    """Whether the toolkit has this attack in this norm and mode, installed or not.

    Raises:
        ValueError: the implementation is unknown, or the spec is of no registered attack, see `family_of`.
    """
    return _recipe(implementation, spec) is not None


def own_spec(toolkit: str, name: str, arguments: dict[str, Any], norm: float, eps: float) -> Spec:
    """The spec of an attack that a toolkit has, under the name of its class and with that class's arguments.

    Args:
        toolkit: of `TOOLKITS`.
        name: of the class, see the toolkit's `attacks()`.
        arguments: of the class.
        norm: of the threat model; an argument where the class takes one and it is not given.
        eps: radius of the ball; likewise. The spec has None where the attack is not confined to a ball.

    Raises:
        ValueError: the toolkit has no such attack, or the attack no such argument.
        ImportError: the toolkit is not installed.
    """
    check_choice("toolkit", toolkit, tuple(TOOLKITS))
    if name not in (known := TOOLKITS[toolkit].attacks()):
        raise ValueError(f"attack {toolkit}:{name} is unknown; {toolkit} has {', '.join(known)}")
    has_radius, params = TOOLKITS[toolkit].own(name, arguments, norm, eps)
    return Spec(f"{toolkit}:{name}", norm, params.get("eps", eps) if has_radius else None, params=params)


def build_attack(
    implementation: str,
    spec: Spec,
    model: nn.Module,
    *,
    nb_classes: int,
    input_shape: tuple[int, ...],
    batch_size: int,
    seed: int | None = None,
    early_stop: bool = False,
    precision: str = "auto",
    eot_samples: int = 1,
) -> TensorAttack:
    """The attack as a callable on images (N, C, H, W) in [0, 1] and labels or targets (N,).

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        spec: the attack.
        model: returns logits; it comes back from every call as it was.
        nb_classes: number of classes.
        input_shape: of one image.
        batch_size: images in one forward pass.
        seed: of random starts: every call draws the same, and the global generators are left as they were. None
            draws anew at every call, from the global generators of torch and (ART) numpy.
        early_stop, precision, eot_samples: of a native attack, see `guardians.engine.attack.Attack`; attacks that
            minimise a norm have no early_stop. The toolkits stop at no image early and compute in the model's own
            float32.

    Returns:
        For "native" the attack itself, with its `stream` and its `report`.

    Raises:
        TypeError, ValueError: an unknown name, see `is_available`, an attack that the toolkit does not have, or
            `early_stop` or `precision` is outside what is allowed, of a toolkit False, and "auto" or "float32".
        ImportError: the toolkit is not installed.
    """
    found = _recipe(implementation, spec)
    if found is None:
        raise ValueError(f"implementation={implementation!r} does not have {spec}")
    if implementation == "native":
        if family_of(spec).minimises_norm and early_stop is not False:
            raise ValueError(f"early_stop={early_stop!r}: must be False for {spec.family}, which looks for the nearest")
        options = {"targeted": spec.targeted, "early_stop": early_stop, "precision": precision}
        options |= {"eot_samples": eot_samples, "batch_size": batch_size, "seed": seed, "verbose": False}
        taken = found[0].parameters()  # sequences of attacks have no targets, and stop early anyhow
        if spec.targeted and "targeted" not in taken:
            raise ValueError(f"targeted=True: {spec.family} has no targets")
        return found[0](model, **found[1], **{name: value for name, value in options.items() if name in taken})
    if early_stop is not False:
        raise ValueError(f"early_stop={early_stop!r}: must be False for {implementation}; only native attacks have it")
    if precision not in ("auto", "float32"):
        raise ValueError(
            f"precision={precision!r}: must be auto or float32 for {implementation}; only native attacks have others"
        )
    setting = {"batch_size": batch_size, "nb_classes": nb_classes, "input_shape": input_shape}
    attack: TensorAttack = TOOLKITS[implementation].wrap(found, spec, model, **setting)
    if seed is None:
        return attack

    def seeded(images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        with global_seed(seed, images.device):
            return attack(images, labels, **options)

    return seeded


def build_prediction(
    implementation: str, model: nn.Module, *, nb_classes: int, input_shape: tuple[int, ...], batch_size: int
) -> Callable[[Tensor], Tensor]:
    """Logits (N, classes) of images (N, C, H, W), as the attacks of an implementation get them.

    Raises:
        ValueError: the implementation is unknown.
        ImportError: the toolkit is not installed.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    logits: Callable[[Tensor], Tensor] = model
    if implementation != "native":
        logits = TOOLKITS[implementation].logits(model, nb_classes=nb_classes, input_shape=input_shape)

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([logits(batch) for batch in x.split(batch_size)])

    return predict


def _recipe(implementation: str, spec: Spec) -> tuple[Any, dict[str, Any]] | None:
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if spec.toolkit is not None:
        name = spec.family.partition(":")[2]
        return (name, dict(spec.params)) if spec.toolkit == implementation else None
    family = family_of(spec)
    if implementation == "native":
        return family.native(spec)
    builder = TOOLKITS[implementation].BUILDERS.get(spec.family)
    return None if builder is None else builder(spec)


@contextmanager
def global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of torch and numpy seeded inside, as they were outside."""
    state = np.random.get_state()  # noqa: NPY002 - what ART draws from
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
