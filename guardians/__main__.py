"""`python -m guardians` is the `guardians` command."""

from guardians.cli import run

run()
