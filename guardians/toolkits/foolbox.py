"""Attacks of foolbox (Rauber et al., "Foolbox Native", 2020) as ART attacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from guardians.attacks.registry import Spec
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import Count, Flag, OptionalNumber
from guardians.engine.victim import Victim
from guardians.toolkits.base import (
    Builder,
    Recipe,
    TensorAttack,
    ToolkitAttack,
    attack_classes,
    installed,
    own_arguments,
)

__all__ = ["BUILDERS", "PACKAGE", "FoolboxAttack", "attacks", "logits", "own", "wrap"]

PACKAGE = "foolbox"


class FoolboxAttack(ToolkitAttack):
    """Any attack of foolbox: `FoolboxAttack(model, foolbox.attacks.LinfPGD(steps=10), eps=8 / 255)`.

    What it returns is the second output of foolbox, the image clipped to the ball of radius `eps`.

    Args:
        estimator: ART `PyTorchClassifier` whose `clip_values` are two numbers, or `nn.Module`.
        attack: an attack of foolbox, made with its own arguments.
        eps: radius of the ball in the attack's norm, in the unit of the images; one number. None lets a minimisation
            attack find the smallest perturbation that it can; attacks of fixed radius need a number.
        batch_size: images that foolbox is given at once.
        targeted: whether the labels are targets (`TargetedMisclassification`).
        verbose: show a progress bar.

    Raises:
        EstimatorError, TypeError, ValueError: see `ToolkitAttack`; a ValueError also if the attack is called with
            targets and takes none.
    """

    estimator: Estimator
    attack: Any
    eps: OptionalNumber = None
    batch_size: Count = 32
    targeted: Flag = False
    verbose: Flag = False

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """The attack's answer for one batch, clipped to the ball."""
        foolbox = installed(PACKAGE)
        bounds = [bound.to(x.dtype).item() for bound in self.victim.clip_values or ()]
        model = foolbox.PyTorchModel(self.logits, bounds=bounds, device=x.device)
        criterion = foolbox.TargetedMisclassification(y) if self.targeted else foolbox.Misclassification(y)
        clipped: Tensor
        try:
            _, clipped, _ = self.attack(model, x, criterion, epsilons=None if self.eps is None else float(self.eps))
        except ValueError as error:
            if self.targeted and "unsupported criterion" in str(error):
                name = type(self.attack).__name__
                raise ValueError(f"targeted=True: foolbox's {name} does not take targets") from error
            raise
        return clipped

    def _check_params(self) -> None:
        super()._check_params()
        base = installed(PACKAGE).attacks.base
        bounds = self.victim.clip_values
        if bounds is None or any(bound.numel() > 1 for bound in bounds):
            raise ValueError("the estimator's clip_values must be two numbers, the bounds that foolbox knows")
        if not isinstance(self.attack, base.Attack):
            raise TypeError(f"attack={self.attack!r}: must be an attack of foolbox, such as foolbox.attacks.LinfPGD()")
        innermost = self.attack.attack if isinstance(self.attack, base.Repeated) else self.attack
        if self.eps is None and isinstance(innermost, base.FixedEpsilonAttack):
            raise ValueError(f"eps=None: {type(innermost).__name__} needs the radius of the ball")


def attacks() -> dict[str, type]:
    """All attacks in `foolbox.attacks` by name."""
    found = installed(PACKAGE).attacks
    return attack_classes(found, found.base.Attack)


def own(name: str, arguments: dict[str, Any], norm: float, eps: float) -> tuple[bool, dict[str, Any]]:
    """Whether an attack is confined to a ball, and its arguments, see `guardians.toolkits.build.own_spec`."""
    found = installed(PACKAGE).attacks
    attack = getattr(found, name)
    return issubclass(attack, found.base.FixedEpsilonAttack), own_arguments(attack, arguments, first=0)


def wrap(recipe: Recipe, spec: Spec, model: nn.Module, batch_size: int, **_: Any) -> TensorAttack:
    """The attack, see `guardians.toolkits.build`."""
    attack = getattr(installed(PACKAGE).attacks, recipe[0])(**recipe[1])
    return FoolboxAttack(model, attack, spec.eps, batch_size=batch_size, targeted=spec.targeted)


def logits(model: nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
    """What the attacks of foolbox are told of a batch."""
    bounded = installed(PACKAGE).PyTorchModel
    return bounded(model, bounds=(0, 1), device=Victim(model).device)


def _fgsm(spec: Spec) -> Recipe | None:
    if spec.targeted:
        return None
    return f"L{spec.norm:g}FastGradientAttack", {"random_start": spec.get("random_start", False)}


def _pgd(spec: Spec) -> Recipe:
    arguments = {"random_start": False, **spec.arguments("steps", "random_start", eps_step="abs_stepsize")}
    return f"L{spec.norm:g}PGD", arguments


def _carlini_wagner(spec: Spec) -> Recipe | None:
    if spec.norm != 2:
        return None
    renamed = {"const": "initial_const", "searches": "binary_search_steps", "learning_rate": "stepsize"}
    return "L2CarliniWagnerAttack", spec.arguments("confidence", "steps", "abort_early", **renamed)


def _ddn(spec: Spec) -> Recipe:
    return "DDNAttack", spec.arguments("steps", "init_epsilon", "gamma")


def _fmn(spec: Spec) -> Recipe:
    arguments = spec.arguments("steps", "gamma", "max_stepsize", "min_stepsize")
    return f"L{spec.norm:g}FMNAttack".replace("Linf", "LInf"), arguments


BUILDERS: dict[str, Builder] = {"FGSM": _fgsm, "PGD": _pgd, "C&W": _carlini_wagner, "DDN": _ddn, "FMN": _fmn}
