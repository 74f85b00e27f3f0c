"""ART classifiers, one for each defence; the plain one is ART's own `PyTorchClassifier`."""

from guardians.estimators.mixup_inference import MixupInferenceClassifier
from guardians.estimators.random_self_ensemble import RandomSelfEnsembleClassifier

__all__ = ["MixupInferenceClassifier", "RandomSelfEnsembleClassifier"]
