"""Which command wrote a table, and with whose code: `commands.csv` beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guardians.experiments.run import code
from guardians.tables import BENCHMARK_COLUMNS, Table

__all__ = ["COMMANDS", "COMMAND_COLUMNS", "noted"]

COMMANDS = "commands.csv"
COMMAND_COLUMNS = {
    "file": "the table",
    "command": "that wrote rows of it",
    "versions": BENCHMARK_COLUMNS["versions"],
    "commit": BENCHMARK_COLUMNS["commit"],
}


@contextmanager
def noted(folder: str | os.PathLike[str], file: str, command: str) -> Iterator[None]:
    """Note a command in `commands.csv` of a folder where the file in it is another one afterwards.

    A command that finds all rows there, and writes none, is not noted. One that is interrupted is.
    """
    path = Path(folder) / file
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    finally:
        if path.exists() and path.read_bytes() != before:
            made_by = code()
            row = {"file": file, "command": command, **made_by, "versions": json.dumps(made_by["versions"])}
            table = Table(Path(folder) / COMMANDS, COMMAND_COLUMNS, list(COMMAND_COLUMNS))
            if row not in table:
                table.append(row)
