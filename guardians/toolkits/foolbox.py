"""Attacks of foolbox (Rauber et al., "Foolbox Native", 2020) as ART attacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import Count, Flag, OptionalNumber
from guardians.toolkits.base import ToolkitAttack

try:
    import foolbox
    from foolbox.attacks.base import Attack, FixedEpsilonAttack, Repeated
except ImportError as error:
    raise ImportError("foolbox is not installed: pip install guardians[parity]") from error

__all__ = ["FoolboxAttack"]


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
        bounds = self.victim.clip_values
        if bounds is None or any(bound.numel() > 1 for bound in bounds):
            raise ValueError("the estimator's clip_values must be two numbers, the bounds that foolbox knows")
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack={self.attack!r}: must be an attack of foolbox, such as foolbox.attacks.LinfPGD()")
        if self.eps is None and isinstance(_innermost(self.attack), FixedEpsilonAttack):
            raise ValueError(f"eps=None: {type(_innermost(self.attack)).__name__} needs the radius of the ball")


def _innermost(attack: Any) -> Any:
    return attack.attack if isinstance(attack, Repeated) else attack
