"""Attacks by name: one registration makes a native attack known to toolkits, harness, benchmark and command line.

The file of an attack ends with `register(Family(...))`. How a toolkit builds the same attack is said in the toolkit's
file, see `guardians.toolkits.build`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from guardians.attacks.norms import as_norm
from guardians.engine.checks import check_choice
from guardians.engine.interfaces import ClassifierAttack

__all__ = ["Agreement", "Family", "Spec", "canonical", "families", "family_of", "named", "register", "usages"]

MAX_STEPS = 1_000_000


@dataclass(frozen=True)
class Spec:
    """An attack in one threat model, whoever implements it.

    Attributes:
        family: the name of a registered `Family`, or "toolkit:Class" for an attack that a toolkit has under that name.
        norm: order p of the norm.
        eps: radius of the ball, in the unit of the images; None for attacks that look for the smallest perturbation.
        targeted: whether the labels are targets.
        params: under the names that all implementations share (`Family.parameters`); given as a mapping or as pairs,
            kept as pairs in alphabetical order. What is None or missing is left to the implementation's default.
    """

    family: str
    norm: float
    eps: float | None = None
    targeted: bool = False
    params: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        params = {name: value for name, value in dict(self.params).items() if value is not None}
        object.__setattr__(self, "params", tuple(sorted(params.items())))
        object.__setattr__(self, "norm", as_norm(self.norm))
        object.__setattr__(self, "eps", None if self.eps is None else float(self.eps))

    def get(self, name: str, default: Any = None) -> Any:
        """One of the `params`."""
        return dict(self.params).get(name, default)

    def having(self, **params: Any) -> Spec:
        """The same with other `params`; None removes one."""
        return replace(self, params=dict(self.params) | params)

    def arguments(self, *names: str, **renamed: str) -> dict[str, Any]:
        """Keyword arguments of an implementation: those of the `params` that are given, `renamed` under its names."""
        wanted = {**dict(zip(names, names, strict=True)), **renamed}
        return {wanted[name]: value for name, value in dict(self.params).items() if name in wanted}

    @property
    def toolkit(self) -> str | None:
        """Whose attack it is, under the name of its class; None for one of a registered family."""
        toolkit, colon, _ = self.family.partition(":")
        return toolkit if colon else None

    @property
    def name(self) -> str:
        """As tables have it: "FGSM", "C&W", and with the steps "PGD-40"."""
        if self.toolkit is not None:
            return self.family
        return f"{self.family}-{self.get('steps')}" if _family(self.family).counts_steps else self.family

    @property
    def json(self) -> str:
        """Canonical: equal specs have the same text."""
        values = {"family": self.family, "norm": f"{self.norm:g}", "eps": self.eps, "targeted": self.targeted}
        return json.dumps(values | {"params": dict(self.params)}, sort_keys=True)


@dataclass(frozen=True)
class Agreement:
    """What the parity harness asserts of an attack.

    Attributes:
        kind: "exact", "statistical" or "dominance", see DESIGN's table.
        spec: the attack as the toolkit runs it.
        references: the toolkits that it is asserted of; empty for all.
        targeted: whether it is asserted of the attack without targets (False), with them (True), or of both.
    """

    kind: str
    spec: Spec
    references: tuple[str, ...] = ()
    targeted: tuple[bool, ...] = (False, True)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("exact", "statistical", "dominance"))


@dataclass(frozen=True)
class Family:
    """A native attack under the name by which it is found, in any case.

    Attributes:
        name: as papers have it.
        norms: that it has.
        parameters: names of the `params` of its specs. Those that several attacks have are called steps, eps_step,
            random_start, confidence, searches, const, learning_rate and abort_early.
        native: makes of a spec the class and its arguments, but for `targeted` and what all attacks share.
        counts_steps: whether its name in tables and on the command line ends with the steps, as "PGD-40".
        minimises_norm: whether it looks for the smallest perturbation, rather than for any in a ball.
        agreements: the parity cases.
        made_for: the defences that it is made for; empty for any model.
    """

    name: str
    norms: tuple[float, ...]
    parameters: tuple[str, ...]
    native: Callable[[Spec], tuple[type[ClassifierAttack], dict[str, Any]]]
    counts_steps: bool = False
    minimises_norm: bool = False
    agreements: tuple[Agreement, ...] = ()
    made_for: tuple[str, ...] = ()


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make an attack known; one of the same name is replaced."""
    _FAMILIES[family.name] = family


def families() -> list[Family]:
    """All that are registered, by name."""
    return [_FAMILIES[name] for name in sorted(_FAMILIES)]


def usages() -> list[str]:
    """How they are named on the command line, as "FGSM" and "PGD-<steps>"."""
    return [f"{family.name}-<steps>" if family.counts_steps else family.name for family in families()]


def compared() -> list[str]:
    """The names of the attacks that the parity harness has cases of."""
    return list(dict.fromkeys(agreement.spec.name for family in families() for agreement in family.agreements))


def family_of(spec: Spec) -> Family:
    """The family of a spec.

    Raises:
        ValueError: none has this name, or it does not have this norm, `eps` or one of the `params`.
    """
    family = _family(spec.family)
    if spec.norm not in family.norms:
        known = ", ".join(f"{norm:g}" for norm in family.norms)
        raise ValueError(f"norm={spec.norm:g}: must be one of {known} for {family.name}")
    if (spec.eps is None) != family.minimises_norm:
        raise ValueError(f"eps={spec.eps}: must be {'None' if family.minimises_norm else 'a number'} for {family.name}")
    for name, value in dict(spec.params).items():
        if name not in family.parameters:
            raise ValueError(f"{name}={value!r}: {family.name} has only {', '.join(family.parameters)}")
    return family


def named(name: str, norm: float, eps: float, **params: Any) -> Spec | None:
    """The attack that a user calls "FGSM", "PGD-40" or "pgd-40"; None where there is none.

    Args:
        name: the family, and the steps where it counts them.
        norm: of the threat model.
        eps: radius of the ball; without effect on an attack that has none.
        params: of an attack that counts its steps, those that it has.

    Raises:
        ValueError: more than a million steps.
    """
    stem, steps = re.fullmatch(r"(.*?)(?:-([1-9][0-9]*))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    family = _FAMILIES.get(canonical(stem, _FAMILIES))
    if family is None or family.counts_steps != (steps is not None):
        return None
    # The length comes first: Python refuses to read integers of thousands of digits.
    if steps and (len(steps) > len(str(MAX_STEPS)) or int(steps) > MAX_STEPS):
        raise ValueError(f"attack {name!r}: must have at most {MAX_STEPS:,} steps")
    given = {"steps": int(steps), **params} if steps else {}
    given = {key: value for key, value in given.items() if key in family.parameters}
    return Spec(family.name, norm, None if family.minimises_norm else eps, params=given)


def canonical(name: Any, known: Iterable[str]) -> Any:
    """The one of `known` that is `name` but for upper and lower case; `name` itself where there is none."""
    return next((other for other in known if other.casefold() == str(name).casefold()), name)


def _family(name: str) -> Family:
    check_choice("family", name, sorted(_FAMILIES))
    return _FAMILIES[name]
