"""The cases: every form of a native attack that a toolkit has, in the threat models that the attack's file names, and
the other native pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from guardians.attacks.registry import Spec, canonical, compared, families, family_of
from guardians.parity.defences import DEFENCE_CASES, PAPER, DefenceCase
from guardians.toolkits.build import TOOLKITS, is_available

__all__ = ["REFERENCES", "Case", "cases", "pieces"]

REFERENCES = (*TOOLKITS, PAPER)


@dataclass(frozen=True)
class Case:
    """One attack, in one threat model, against one toolkit.

    Attributes:
        spec: the attack and its threat model.
        reference: the toolkit.
        kind: of the agreement asserted, see DESIGN's table: "exact", "statistical" or "dominance".
    """

    spec: Spec
    reference: str
    kind: str = "exact"

    @property
    def attack(self) -> str:
        """Its name in tables."""
        return self.spec.name

    @property
    def name(self) -> str:
        """For example "PGD-40 L2 targeted random-start vs ART" and "C&W L2 untargeted dominance vs ART"."""
        goal = "targeted" if self.spec.targeted else "untargeted"
        how = "random-start" if self.spec.get("random_start") else "from-image"
        if self.kind != "exact" or family_of(self.spec).minimises_norm:
            how = self.kind
        return f"{self.attack} L{self.spec.norm:g} {goal} {how} vs {self.reference}"


def pieces() -> list[str]:
    """The names of what there are cases of: attacks of families that say so, then defences and what belongs to them."""
    return list(dict.fromkeys([*compared(), *(case.attack for case in DEFENCE_CASES)]))


def cases(attacks: Sequence[str] = (), references: Sequence[str] = ()) -> list[Case | DefenceCase]:
    """What registered families say of themselves, of each toolkit that has the attack; then `DEFENCE_CASES`.

    Args:
        attacks: only these, such as "FGSM", "PGD-40", "C&W" and "RSE", in upper or lower case; empty for all.
        references: only these, in upper or lower case, see `REFERENCES`; empty for all.

    Raises:
        ValueError: an attack or a reference is unknown.
    """
    stated = [agreement for family in families() for agreement in family.agreements]
    wanted: set[str] = set()
    for argument, names, known in (("attacks", attacks, pieces()), ("references", references, REFERENCES)):
        chosen = {canonical(name, known) for name in names or known}
        unknown = sorted(chosen - set(known))
        if unknown:
            raise ValueError(f"{argument}={unknown}: unknown; known are {', '.join(known)}")
        wanted |= chosen
    found = [
        Case(replace(agreement.spec, targeted=targeted), reference, agreement.kind)
        for reference, agreement in product(TOOLKITS, stated)
        for targeted in agreement.targeted
        if reference in (agreement.references or TOOLKITS) and {reference, agreement.spec.name} <= wanted
    ]
    return [
        *(case for case in found if is_available(case.reference, case.spec)),
        *(case for case in DEFENCE_CASES if {case.reference, case.attack} <= wanted),
    ]
