"""Guardians: adversarial attacks for PyTorch, native, drop-in for ART, and cross-checked against the toolkits."""

__version__ = "0.1.0"
