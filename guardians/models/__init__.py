"""Architectures and bundled weights: `load_model("resnet9-16-standard")`."""

from guardians.models.architectures import CIFAR10_MEAN, CIFAR10_STD, Normalize, lenet, resnet9, resnet18, wide_resnet
from guardians.models.identity import digest
from guardians.models.registry import (
    ARCHITECTURES,
    build_model,
    bundled_models,
    load_model,
    load_weights,
    model_card,
    save_model,
)

__all__ = [
    "ARCHITECTURES",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "Normalize",
    "build_model",
    "bundled_models",
    "digest",
    "lenet",
    "load_model",
    "load_weights",
    "model_card",
    "resnet9",
    "resnet18",
    "save_model",
    "wide_resnet",
]
