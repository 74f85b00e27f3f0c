"""Attacks of the other toolkits under our two interfaces, and ART's attacks as callables on tensors.

torchattacks and foolbox are optional (`pip install guardians[parity]`); each is imported when it is first needed.
"""

from guardians.toolkits.art import ArtAttack
from guardians.toolkits.foolbox import FoolboxAttack
from guardians.toolkits.torchattacks import TorchattacksAttack

__all__ = ["ArtAttack", "FoolboxAttack", "TorchattacksAttack"]
