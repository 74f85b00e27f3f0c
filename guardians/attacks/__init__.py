"""Native attacks: ART objects that are also plain callables on tensors."""

from guardians.attacks.apgd import APGD, AutoProjectedGradientDescent
from guardians.attacks.carlini_wagner import CarliniL2Method, CarliniLInfMethod, CarliniWagnerL2, CarliniWagnerLinf
from guardians.attacks.ddn import DDN, DecoupledDirectionNorm
from guardians.attacks.fgsm import FGSM, FastGradientMethod
from guardians.attacks.fmn import FMN, FastMinimumNorm
from guardians.attacks.pgd import PGD, ProjectedGradientDescent
from guardians.attacks.registry import Spec
from guardians.engine.attack import Attack

__all__ = [
    "APGD",
    "DDN",
    "FGSM",
    "FMN",
    "PGD",
    "Attack",
    "AutoProjectedGradientDescent",
    "CarliniL2Method",
    "CarliniLInfMethod",
    "CarliniWagnerL2",
    "CarliniWagnerLinf",
    "DecoupledDirectionNorm",
    "FastGradientMethod",
    "FastMinimumNorm",
    "ProjectedGradientDescent",
    "Spec",
]
