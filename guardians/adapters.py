"""The former place of the adapters, which are in `guardians.toolkits`."""

import warnings

from guardians.toolkits import ArtAttack, FoolboxAttack, TorchattacksAttack

__all__ = ["ArtAttack", "FoolboxAttack", "TorchattacksAttack"]

warnings.warn("guardians.adapters is now guardians.toolkits: import from there", DeprecationWarning, stacklevel=2)
