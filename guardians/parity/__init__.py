"""The parity harness: native attacks against ART, torchattacks and foolbox."""

from guardians.parity.cases import REFERENCES, Case, cases
from guardians.parity.harness import Comparison, compare, run_parity

__all__ = ["REFERENCES", "Case", "Comparison", "cases", "compare", "run_parity"]
