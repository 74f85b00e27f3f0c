"""Attacks of torchattacks (Kim, "Torchattacks: a PyTorch repository for adversarial attacks", 2020) as ART attacks."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from torch import Tensor, nn

from guardians.attacks.registry import Spec
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag
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

__all__ = ["BUILDERS", "PACKAGE", "TorchattacksAttack", "attacks", "logits", "own", "wrap"]

PACKAGE = "torchattacks"


class TorchattacksAttack(ToolkitAttack):
    """Any attack class of torchattacks, with that class's own arguments: `TorchattacksAttack(model, torchattacks.PGD)`.

    Args:
        estimator: ART `PyTorchClassifier` with `clip_values=(0, 1)`, all that torchattacks knows, or `nn.Module`.
        attack: a class of torchattacks whose first argument is the model.
        batch_size: images that torchattacks is given at once.
        targeted: whether the labels are targets.
        verbose: show a progress bar.
        arguments: of the class, under its names; `set_params` takes them too.

    Raises:
        EstimatorError, TypeError, ValueError: see `ToolkitAttack`; also if the class knows no such argument, or no
            targets although `targeted`.
    """

    estimator: Estimator
    attack: type
    batch_size: Count = 32
    targeted: Flag = False
    verbose: Flag = False
    _: KW_ONLY
    arguments: Any = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        own = {name: options.pop(name) for name in list(options) if name in self.parameters()}
        super().__init__(*arguments, **own, arguments=options)

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """The attack's answer for one batch."""
        attack = self._build()
        attack.set_device(x.device)
        adversarial: Tensor = attack(x, y)
        return adversarial

    def set_params(self, **kwargs: Any) -> None:
        """Change arguments of the adapter or, under any other name, of the attack."""
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in self.attack_params}
        arguments = {**own.pop("arguments", self.arguments), **kwargs}
        super().set_params(**own, arguments=arguments)

    def _build(self) -> Any:
        with redirect_stdout(io.StringIO()):  # it prints where the model has no parameters
            attack = self.attack(self.logits, **self.arguments)
        if self.targeted:
            if "targeted" not in attack.supported_mode:
                raise ValueError(f"targeted=True: torchattacks.{self.attack.__name__} does not take targets")
            attack.set_mode_targeted_by_label(quiet=True)
        return attack

    def _check_params(self) -> None:
        super()._check_params()
        _check_bounds(self.victim)
        if not (isinstance(self.attack, type) and issubclass(self.attack, installed(PACKAGE).attack.Attack)):
            raise TypeError(f"attack={self.attack!r}: must be a class of torchattacks, such as torchattacks.PGD")
        known = list(inspect.signature(self.attack).parameters.values())
        names = [parameter.name for parameter in known]
        if names[0] != "model":
            raise TypeError(f"attack={self.attack!r}: its first argument must be the model, not {names[0]!r}")
        unknown = sorted(set(self.arguments) - set(names[1:]))
        if unknown and known[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"{unknown[0]}={self.arguments[unknown[0]]!r}: {self.attack.__name__} takes {names[1:]}")
        self._build()


def _check_bounds(victim: Victim) -> None:
    bounds = victim.clip_values
    if bounds is None or (bounds[0] != 0).any() or (bounds[1] != 1).any():
        got = None if bounds is None else tuple(bound.tolist() for bound in bounds)
        raise ValueError(f"the estimator's clip_values are {got}: must be (0, 1), the range of torchattacks")


def attacks() -> dict[str, type]:
    """All attacks of torchattacks that are made of a model, by name."""
    package = installed(PACKAGE)
    found = attack_classes(package, package.attack.Attack)
    return {name: kind for name, kind in found.items() if next(iter(inspect.signature(kind).parameters)) == "model"}


def own(name: str, arguments: dict[str, Any], norm: float, eps: float) -> tuple[bool, dict[str, Any]]:
    """Whether an attack is confined to a ball, and its arguments, see `guardians.toolkits.build.own_spec`."""
    found = own_arguments(getattr(installed(PACKAGE), name), arguments, eps=eps, norm=f"L{norm:g}")
    return "eps" in found, found


def wrap(recipe: Recipe, spec: Spec, model: nn.Module, batch_size: int, nb_classes: int, **_: Any) -> TensorAttack:
    """The attack, see `guardians.toolkits.build`."""
    (name, given), package = recipe, installed(PACKAGE)
    attack = name(package) if callable(name) else getattr(package, name)
    arguments = own_arguments(attack, given, n_classes=nb_classes)  # else it takes them to be ten
    return TorchattacksAttack(model, attack, batch_size=batch_size, targeted=spec.targeted, **arguments)


def logits(model: nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
    """What the attacks of torchattacks are told of a batch."""
    return installed(PACKAGE).attack.Attack("clean", model).get_logits


def _fgsm(spec: Spec) -> Recipe | None:
    if spec.norm != np.inf:
        return None
    if spec.get("random_start"):
        return "FFGSM", {"eps": spec.eps, "alpha": spec.eps}
    return "FGSM", {"eps": spec.eps}


def _pgd(spec: Spec) -> Recipe | None:
    if spec.norm == 1:
        return None
    arguments = {"random_start": False, **spec.arguments("steps", "random_start", eps_step="alpha")}
    return "PGD" if spec.norm == np.inf else "PGDL2", {"eps": spec.eps, **arguments}


def _carlini_wagner(spec: Spec) -> Recipe | None:
    if spec.norm != 2 or spec.get("searches", 1) != 1:
        return None
    return "CW", spec.arguments("steps", confidence="kappa", const="c", learning_rate="lr")


_ANY_DISTANCE = 1e9


def _fab(spec: Spec) -> Recipe | None:
    if spec.norm == 1 or spec.targeted:  # it fails in norm 1, and takes labels for targets that it does not reach
        return None
    arguments = spec.arguments("steps", "alpha_max", "eta", "beta")
    if targets := spec.get("n_targets"):
        arguments |= {"multi_targeted": True, "n_classes": targets + 1}
    # What is farther than eps is given up.
    return "FAB", {"norm": f"L{spec.norm:g}", "eps": _ANY_DISTANCE, **arguments}


def _square(spec: Spec) -> Recipe | None:
    if spec.norm == 1:
        return None
    arguments = {"norm": f"L{spec.norm:g}", "eps": spec.eps, **spec.arguments("p_init", steps="n_queries")}
    return "Square", arguments


def _apgd(spec: Spec) -> Recipe | None:
    targets, loss = spec.get("n_targets", 0), spec.get("loss", "cross_entropy")
    losses = {"cross_entropy": "ce", "difference_logits_ratio": "dlr"}
    if spec.norm == 1 or spec.targeted or not spec.get("random_start") or loss not in losses:
        return None
    arguments = {"norm": f"L{spec.norm:g}", "eps": spec.eps, **spec.arguments("steps", "rho")}
    if not targets:
        return "APGD", {**arguments, "loss": losses[loss]}
    return ("APGDT", {**arguments, "n_classes": targets + 1}) if losses[loss] == "dlr" else None


def _auto_attack(spec: Spec) -> Recipe | None:
    if spec.norm == 1:
        return None
    arguments = {"steps": 100, "seed": 0, **spec.arguments("version", "steps", "n_queries")}
    return _auto_attack_of, {"norm": f"L{spec.norm:g}", "eps": spec.eps, **arguments}


def _auto_attack_of(package: Any) -> type:
    """torchattacks' AutoAttack with iterations and queries of its parts, of which it takes 10 and 5,000 by itself."""

    class AutoAttack(package.AutoAttack):
        def __init__(
            self,
            model: nn.Module,
            norm: str,
            eps: float,
            n_classes: int,
            steps: int,
            n_queries: int = 5000,
            version: str = "standard",
            seed: int | None = None,
        ) -> None:
            super().__init__(model, norm=norm, eps=eps, version=version, n_classes=n_classes, seed=seed)
            for part in self._autoattack.attacks:
                name, value = ("n_queries", n_queries) if hasattr(part, "n_queries") else ("steps", steps)
                setattr(part, name, value)

    return AutoAttack


BUILDERS: dict[str, Builder] = {
    "FGSM": _fgsm,
    "PGD": _pgd,
    "C&W": _carlini_wagner,
    "APGD": _apgd,
    "AutoAttack": _auto_attack,
    "FAB": _fab,
    "Square": _square,
}
