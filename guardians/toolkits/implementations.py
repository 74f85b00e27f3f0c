"""The same attack in every toolkit, for the parity harness and the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.attacks import FGSM, PGD, CarliniWagnerL2, CarliniWagnerLinf
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice
from guardians.engine.victim import Victim

__all__ = ["IMPLEMENTATIONS", "AttackSpec", "CarliniWagnerSpec", "build_attack", "build_prediction", "is_available"]

TensorAttack = Callable[[Tensor, Tensor], Tensor]

IMPLEMENTATIONS = ("native", "ART", "torchattacks", "foolbox")
ATTACKS = ("FGSM", "PGD")
NORMS = (np.inf, 2, 1)


@dataclass(frozen=True)
class AttackSpec:
    """FGSM or PGD in one threat model.

    Attributes:
        attack: "FGSM" or "PGD".
        norm: inf, 2 or 1.
        eps: radius of the ball, in the unit of the images.
        eps_step: step size; ignored by FGSM, whose step is as large as the ball.
        steps: number of steps; ignored by FGSM.
        targeted: whether the labels are targets.
        random_start: start at one random point of the ball rather than at the image.
    """

    attack: str
    norm: float
    eps: float
    eps_step: float
    steps: int = 1
    targeted: bool = False
    random_start: bool = False


@dataclass(frozen=True)
class CarliniWagnerSpec:
    """Carlini-Wagner; what is None is left to the implementation's default.

    Attributes:
        norm: 2 or inf.
        targeted: whether the labels are targets.
        confidence: margin in logits.
        steps: of a descent.
        searches: values of c; 1 for torchattacks, which knows no more.
        const: the first c.
        learning_rate: of Adam, or of ART's line search.
        abort_early: end descents that make no progress.
    """

    norm: float = 2
    targeted: bool = False
    confidence: float = 0.0
    steps: int | None = None
    searches: int | None = None
    const: float | None = None
    learning_rate: float | None = None
    abort_early: bool | None = None

    attack: ClassVar[str] = "C&W"

    def arguments(self, **names: str) -> dict[str, Any]:
        """Keyword arguments under the names that an implementation gives them, without those that are None."""
        values = {argument: getattr(self, field) for field, argument in names.items()}
        return {argument: value for argument, value in values.items() if value is not None}

    def art_arguments(self) -> dict[str, Any]:
        """Under ART's names, which are native's too; without `abort_early`, which ART does not have."""
        return self.arguments(
            confidence="confidence",
            targeted="targeted",
            learning_rate="learning_rate",
            steps="max_iter",
            const="initial_const",
            searches="binary_search_steps",
        )


def is_available(implementation: str, spec: AttackSpec | CarliniWagnerSpec) -> bool:
    """Whether the toolkit has this attack in this norm and mode, installed or not.

    Raises:
        ValueError: the implementation, the attack or the norm is none of the known ones.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if isinstance(spec, CarliniWagnerSpec):
        check_choice("norm", spec.norm, (2, np.inf))
        if implementation == "torchattacks":
            return spec.norm == 2 and spec.searches in (None, 1)
        return spec.norm == 2 or implementation in ("native", "ART")
    check_choice("attack", spec.attack, ATTACKS)
    check_choice("norm", spec.norm, NORMS)
    if implementation == "torchattacks":
        return spec.norm == np.inf or (spec.norm == 2 and spec.attack == "PGD")
    if implementation == "foolbox":
        return not (spec.targeted and spec.attack == "FGSM")
    return True


def build_attack(
    implementation: str,
    spec: AttackSpec | CarliniWagnerSpec,
    model: nn.Module,
    *,
    nb_classes: int,
    input_shape: tuple[int, ...],
    batch_size: int,
    seed: int | None = None,
    early_stop: bool = False,
    precision: str = "auto",
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
        early_stop, precision: of a native attack, see `guardians.engine.attack.Attack`; Carlini-Wagner has no
            early_stop. The toolkits stop at no image early and compute in the model's own float32.

    Returns:
        For "native" the attack itself, with its `stream` and its `report`.

    Raises:
        TypeError, ValueError: an unknown name, see `is_available`, an attack that the toolkit does not have, or
            `early_stop` or `precision` is outside what is allowed, of a toolkit False, and "auto" or "float32".
        ImportError: the toolkit is not installed.
    """
    if not is_available(implementation, spec):
        raise ValueError(f"implementation={implementation!r} does not have {spec}")
    if implementation == "native":
        return _native(spec, model, batch_size, seed, early_stop, precision)
    if early_stop is not False:
        raise ValueError(f"early_stop={early_stop!r}: must be False for {implementation}; only native attacks have it")
    if precision not in ("auto", "float32"):
        raise ValueError(
            f"precision={precision!r}: must be auto or float32 for {implementation}; only native attacks have others"
        )
    if implementation == "ART":
        attack = _art(spec, model, nb_classes, input_shape, batch_size)
    else:
        attack = (_torchattacks if implementation == "torchattacks" else _foolbox)(spec, model, batch_size)
    if seed is None:
        return attack

    def seeded(images: Tensor, labels: Tensor) -> Tensor:
        with _global_seed(seed, images.device):
            return attack(images, labels)

    return seeded


def build_prediction(
    implementation: str, model: nn.Module, *, nb_classes: int, input_shape: tuple[int, ...], batch_size: int
) -> Callable[[Tensor], Tensor]:
    """Logits (N, classes) of images (N, C, H, W), as the attacks of an implementation get them.

    Raises:
        ValueError: the implementation is unknown.
        ImportError: the toolkit is not installed.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    logits: Callable[[Tensor], Tensor] = model
    if implementation == "ART":
        classifier = _art_classifier(model, nb_classes, input_shape)
        return lambda x: torch.from_numpy(classifier.predict(x.cpu().numpy(), batch_size=batch_size)).to(x)
    if implementation == "torchattacks":
        from guardians.toolkits.torchattacks import torchattacks

        logits = torchattacks.attack.Attack("clean", model).get_logits
    elif implementation == "foolbox":
        from guardians.toolkits.foolbox import foolbox

        logits = foolbox.PyTorchModel(model, bounds=(0, 1), device=Victim(model).device)

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([logits(batch) for batch in x.split(batch_size)])

    return predict


def _native(
    spec: AttackSpec | CarliniWagnerSpec,
    model: nn.Module,
    batch_size: int,
    seed: int | None,
    early_stop: bool,
    precision: str,
) -> Attack:
    if isinstance(spec, CarliniWagnerSpec):
        if early_stop is not False:
            raise ValueError(f"early_stop={early_stop!r}: must be False for {spec.attack}, which looks for the nearest")
        options: dict[str, Any] = {"batch_size": batch_size, "verbose": False, "seed": seed, "precision": precision}
        options |= spec.art_arguments()
        if spec.norm == np.inf:
            return CarliniWagnerLinf(model, **options)
        return CarliniWagnerL2(model, **options, **spec.arguments(abort_early="abort_early"))
    attack = FGSM(model) if spec.attack == "FGSM" else PGD(model, max_iter=spec.steps, eps_step=spec.eps_step)
    attack.set_params(
        norm=spec.norm,
        eps=spec.eps,
        targeted=spec.targeted,
        num_random_init=int(spec.random_start),
        batch_size=batch_size,
        seed=seed,
        early_stop=early_stop,
        precision=precision,
        verbose=False,
    )
    return attack


def _art_classifier(model: nn.Module, nb_classes: int, input_shape: tuple[int, ...]) -> PyTorchClassifier:
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


def _art(
    spec: AttackSpec | CarliniWagnerSpec,
    model: nn.Module,
    nb_classes: int,
    input_shape: tuple[int, ...],
    batch_size: int,
) -> TensorAttack:
    from art.attacks.evasion import CarliniL2Method, CarliniLInfMethod, FastGradientMethod, ProjectedGradientDescent

    from guardians.toolkits.art import ArtAttack

    classifier = _art_classifier(model, nb_classes, input_shape)
    if isinstance(spec, CarliniWagnerSpec):
        attack = CarliniL2Method if spec.norm == 2 else CarliniLInfMethod
        return ArtAttack(attack(classifier, batch_size=batch_size, verbose=False, **spec.art_arguments()))
    options = {"targeted": spec.targeted, "num_random_init": int(spec.random_start), "batch_size": batch_size}
    if spec.attack == "FGSM":
        return ArtAttack(FastGradientMethod(classifier, spec.norm, spec.eps, **options))
    return ArtAttack(
        ProjectedGradientDescent(
            classifier, spec.norm, spec.eps, spec.eps_step, max_iter=spec.steps, verbose=False, **options
        )
    )


def _torchattacks(spec: AttackSpec | CarliniWagnerSpec, model: nn.Module, batch_size: int) -> TensorAttack:
    from guardians.toolkits.torchattacks import TorchattacksAttack, torchattacks

    arguments: dict[str, Any]
    if isinstance(spec, CarliniWagnerSpec):
        arguments = spec.arguments(confidence="kappa", const="c", steps="steps", learning_rate="lr")
        return TorchattacksAttack(model, torchattacks.CW, batch_size=batch_size, targeted=spec.targeted, **arguments)
    if spec.attack == "FGSM" and spec.random_start:
        attack, arguments = torchattacks.FFGSM, {"alpha": spec.eps}
    elif spec.attack == "FGSM":
        attack, arguments = torchattacks.FGSM, {}
    else:
        attack = torchattacks.PGD if spec.norm == np.inf else torchattacks.PGDL2
        arguments = {"alpha": spec.eps_step, "steps": spec.steps, "random_start": spec.random_start}
    return TorchattacksAttack(model, attack, batch_size=batch_size, targeted=spec.targeted, eps=spec.eps, **arguments)


def _foolbox(spec: AttackSpec | CarliniWagnerSpec, model: nn.Module, batch_size: int) -> TensorAttack:
    from guardians.toolkits.foolbox import FoolboxAttack, foolbox

    if isinstance(spec, CarliniWagnerSpec):
        arguments = spec.arguments(
            confidence="confidence",
            const="initial_const",
            steps="steps",
            searches="binary_search_steps",
            learning_rate="stepsize",
            abort_early="abort_early",
        )
        attack = foolbox.attacks.L2CarliniWagnerAttack(**arguments)
        return FoolboxAttack(model, attack, batch_size=batch_size, targeted=spec.targeted)
    if spec.attack == "FGSM":
        classes = {
            np.inf: foolbox.attacks.LinfFastGradientAttack,
            2: foolbox.attacks.L2FastGradientAttack,
            1: foolbox.attacks.L1FastGradientAttack,
        }
        attack = classes[spec.norm](random_start=spec.random_start)
    else:
        classes = {np.inf: foolbox.attacks.LinfPGD, 2: foolbox.attacks.L2PGD, 1: foolbox.attacks.L1PGD}
        attack = classes[spec.norm](abs_stepsize=spec.eps_step, steps=spec.steps, random_start=spec.random_start)
    return FoolboxAttack(model, attack, spec.eps, batch_size=batch_size, targeted=spec.targeted)


@contextmanager
def _global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of torch and numpy seeded inside, as they were outside."""
    state = np.random.get_state()  # noqa: NPY002 - what ART draws from
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
