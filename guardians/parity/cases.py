"""The cases: every form of a native attack that a toolkit has, in the threat models that the attack's file names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from guardians.attacks.registry import Spec, canonical, compared, families, family_of
from guardians.toolkits.build import TOOLKITS, is_available

__all__ = ["REFERENCES", "Case", "cases"]

REFERENCES = tuple(TOOLKITS)


@dataclass(frozen=True)
class Case:
    """One attack, in one threat model, against one toolkit.

    Attributes:
        spec: the attack and its threat model.
        reference: the toolkit.
        kind: of the agreement asserted, see DESIGN's table: "exact" or "dominance".
    """

    spec: Spec
    reference: str
    kind: str = "exact"

    @property
    def name(self) -> str:
        """For example "PGD-40 L2 targeted random-start vs ART" and "C&W L2 untargeted dominance vs ART"."""
        goal = "targeted" if self.spec.targeted else "untargeted"
        how = "random-start" if self.spec.get("random_start") else "from-image"
        if self.kind != "exact" or family_of(self.spec).minimises_norm:
            how = self.kind
        return f"{self.spec.name} L{self.spec.norm:g} {goal} {how} vs {self.reference}"


def cases(attacks: Sequence[str] = (), references: Sequence[str] = ()) -> list[Case]:
    """What the families that are registered say of themselves, of each toolkit that has the attack.

    Args:
        attacks: only these, such as "FGSM", "PGD-40" and "C&W", in upper or lower case; empty for all.
        references: only these toolkits, in upper or lower case; empty for all.

    Raises:
        ValueError: an attack or a reference is unknown.
    """
    stated = [agreement for family in families() for agreement in family.agreements]
    wanted: set[str] = set()
    for argument, names, known in (("attacks", attacks, compared()), ("references", references, REFERENCES)):
        chosen = {canonical(name, known) for name in names or known}
        unknown = sorted(chosen - set(known))
        if unknown:
            raise ValueError(f"{argument}={unknown}: unknown; known are {', '.join(known)}")
        wanted |= chosen
    found = [
        Case(replace(agreement.spec, targeted=targeted), reference, agreement.kind)
        for reference, agreement in product(REFERENCES, stated)
        for targeted in agreement.targeted
        if reference in (agreement.references or REFERENCES) and {reference, agreement.spec.name} <= wanted
    ]
    return [case for case in found if is_available(case.reference, case.spec)]
