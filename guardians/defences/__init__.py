"""Native defences: modules that return log-probabilities, the attack adaptive to one, and adversarial training."""

from guardians.defences.adversarial_training import AdversarialTrainer
from guardians.defences.mixup_inference import MixupInference
from guardians.defences.mixup_inference_attack import AveragedMixturePGD
from guardians.defences.random_self_ensemble import RandomSelfEnsemble

__all__ = ["AdversarialTrainer", "AveragedMixturePGD", "MixupInference", "RandomSelfEnsemble"]
