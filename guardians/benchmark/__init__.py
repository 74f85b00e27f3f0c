"""Benchmarks of attacks: the runner, what it counts, and its statistics."""

from guardians.benchmark.runner import ATTACKS, outcome_path, run_benchmark, summarise

__all__ = ["ATTACKS", "outcome_path", "run_benchmark", "summarise"]
