"""The cases: every form of FGSM, PGD and Carlini-Wagner that a toolkit has, in the threat models that papers use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from guardians.toolkits.implementations import AttackSpec, CarliniWagnerSpec, is_available
from guardians.toolkits.names import canonical

__all__ = ["REFERENCES", "Case", "cases"]

REFERENCES = ("ART", "torchattacks", "foolbox")

# norm: (eps, eps_step). In norm 1 a step is shorter than a pixel's range, so that its length shows.
_THREAT_MODELS = {float("inf"): (8 / 255, 2 / 255), 2.0: (0.5, 0.1), 1.0: (6.0, 0.9)}
_ATTACKS = {"FGSM": 1, "PGD-10": 10, "PGD-40": 40}
_CARLINI_WAGNER = CarliniWagnerSpec.attack

_EXACT = {
    "foolbox": CarliniWagnerSpec(steps=25, searches=4, const=0.01, learning_rate=0.01, abort_early=False),
    "torchattacks": CarliniWagnerSpec(steps=50, searches=1, const=1.0, learning_rate=0.01),
}
"""Where a toolkit is right: each image alone, and no abort. torchattacks' has no switch; its checks end most runs."""
_DEFAULTS = {
    "ART": CarliniWagnerSpec(),
    "torchattacks": CarliniWagnerSpec(),
    "foolbox": CarliniWagnerSpec(steps=100),  # 10,000 take it ten seconds an image
}


@dataclass(frozen=True)
class Case:
    """One attack, in one threat model, against one toolkit.

    Attributes:
        spec: the attack and its threat model.
        reference: the toolkit.
        kind: of the agreement asserted, see DESIGN's table: "exact" for all FGSM and PGD cases, "exact" or "dominance"
            for Carlini-Wagner.
    """

    spec: AttackSpec | CarliniWagnerSpec
    reference: str
    kind: str = "exact"

    @property
    def attack(self) -> str:
        """The attack with its steps, as in "PGD-40"; "C&W"."""
        if isinstance(self.spec, CarliniWagnerSpec) or self.spec.attack == "FGSM":
            return self.spec.attack
        return f"{self.spec.attack}-{self.spec.steps}"

    @property
    def name(self) -> str:
        """For example "PGD-40 L2 targeted random-start vs ART" and "C&W L2 untargeted dominance vs ART"."""
        goal = "targeted" if self.spec.targeted else "untargeted"
        if isinstance(self.spec, CarliniWagnerSpec):
            return f"{self.attack} L{self.spec.norm:g} {goal} {self.kind} vs {self.reference}"
        start = "random-start" if self.spec.random_start else "from-image"
        return f"{self.attack} L{self.spec.norm:g} {goal} {start} vs {self.reference}"


def cases(attacks: Sequence[str] = (), references: Sequence[str] = ()) -> list[Case]:
    """{FGSM, PGD-10, PGD-40} x {inf, 2, 1} x {untargeted, targeted} x {from the image, random start}, and C&W.

    Carlini-Wagner, targeted or not, is compared exactly with foolbox and torchattacks, and for dominance with all three
    at their defaults, but for foolbox' 10,000 steps, which are 100.

    Args:
        attacks: only these, of "FGSM", "PGD-10", "PGD-40" and "C&W", in upper or lower case; empty for all.
        references: only these toolkits, in upper or lower case; empty for all.

    Raises:
        ValueError: an attack or a reference is unknown.
    """
    known_attacks = (*_ATTACKS, _CARLINI_WAGNER)
    attacks = list(dict.fromkeys(canonical(name, known_attacks) for name in attacks))
    references = list(dict.fromkeys(canonical(name, REFERENCES) for name in references))
    for name, values, known in (("attacks", attacks, known_attacks), ("references", references, REFERENCES)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise ValueError(f"{name}={unknown}: unknown; known are {', '.join(known)}")
    found: list[Case] = []
    attacks, references = attacks or known_attacks, references or REFERENCES
    for reference, attack, (norm, (eps, eps_step)), targeted, random_start in product(
        references, (name for name in attacks if name in _ATTACKS), _THREAT_MODELS.items(), (False, True), (False, True)
    ):
        spec = AttackSpec(attack.split("-")[0], norm, eps, eps_step, _ATTACKS[attack], targeted, random_start)
        if is_available(reference, spec):
            found.append(Case(spec, reference))
    if _CARLINI_WAGNER in attacks:
        found += _carlini_wagner_cases(references)
    return found


def _carlini_wagner_cases(references: Sequence[str]) -> list[Case]:
    found = []
    for reference, targeted in product(references, (False, True)):
        if reference in _EXACT:
            found.append(Case(replace(_EXACT[reference], targeted=targeted), reference))
        found.append(Case(replace(_DEFAULTS[reference], targeted=targeted), reference, "dominance"))
    if "ART" in references:
        found.append(Case(CarliniWagnerSpec(norm=float("inf")), "ART", "dominance"))
    return found
