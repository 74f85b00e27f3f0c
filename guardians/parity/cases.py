"""The cases: every form of FGSM and PGD that a toolkit has, in the threat models that papers use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from guardians.adapters.implementations import AttackSpec, is_available

__all__ = ["REFERENCES", "Case", "cases"]

REFERENCES = ("ART", "torchattacks", "foolbox")

# norm: (eps, eps_step). In norm 1 a step is shorter than a pixel's range, so that its length shows.
_THREAT_MODELS = {float("inf"): (8 / 255, 2 / 255), 2.0: (0.5, 0.1), 1.0: (6.0, 0.9)}
_ATTACKS = {"FGSM": 1, "PGD-10": 10, "PGD-40": 40}


@dataclass(frozen=True)
class Case:
    """One attack, in one threat model, against one toolkit.

    Attributes:
        spec: the attack and its threat model.
        reference: the toolkit.
        kind: of the agreement asserted, see DESIGN's table: "exact" for all FGSM and PGD cases.
    """

    spec: AttackSpec
    reference: str
    kind: str = "exact"

    @property
    def attack(self) -> str:
        """The attack with its steps, as in "PGD-40"."""
        return self.spec.attack if self.spec.attack == "FGSM" else f"{self.spec.attack}-{self.spec.steps}"

    @property
    def name(self) -> str:
        """For example "PGD-40 L2 targeted random-start vs ART"."""
        goal = "targeted" if self.spec.targeted else "untargeted"
        start = "random-start" if self.spec.random_start else "from-image"
        return f"{self.attack} L{self.spec.norm:g} {goal} {start} vs {self.reference}"


def cases(attacks: Sequence[str] = (), references: Sequence[str] = ()) -> list[Case]:
    """{FGSM, PGD-10, PGD-40} x {inf, 2, 1} x {untargeted, targeted} x {from the image, random start} x toolkits.

    Args:
        attacks: only these, of "FGSM", "PGD-10" and "PGD-40"; empty for all.
        references: only these toolkits; empty for all.

    Raises:
        ValueError: an attack or a reference is unknown.
    """
    for name, values, known in (("attacks", attacks, tuple(_ATTACKS)), ("references", references, REFERENCES)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise ValueError(f"{name}={unknown}: unknown; known are {', '.join(known)}")
    found = []
    for reference, attack, (norm, (eps, eps_step)), targeted, random_start in product(
        references or REFERENCES, attacks or _ATTACKS, _THREAT_MODELS.items(), (False, True), (False, True)
    ):
        spec = AttackSpec(attack.split("-")[0], norm, eps, eps_step, _ATTACKS[attack], targeted, random_start)
        if is_available(reference, spec):
            found.append(Case(spec, reference))
    return found
