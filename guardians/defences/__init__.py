"""Native defences: modules that return log-probabilities, the attack that is adaptive to one, and trainers."""

from guardians.defences.mixup_inference import MixupInference
from guardians.defences.random_self_ensemble import RandomSelfEnsemble

__all__ = ["MixupInference", "RandomSelfEnsemble"]
