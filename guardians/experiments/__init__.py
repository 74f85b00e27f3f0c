"""Experiments: what was run on what, one store of all outcomes, and the tables and figures that are views of it."""

from guardians.experiments.bench import ATTACKS, run_benchmark, summarise
from guardians.experiments.store import Store
from guardians.experiments.subject import Subject, defended

__all__ = ["ATTACKS", "Store", "Subject", "defended", "run_benchmark", "summarise"]
