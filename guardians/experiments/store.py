"""The store: what was run, what it cost, and what became of each image, in an SQLite database."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from guardians.tables import write_csv

__all__ = ["OUTCOME_COLUMNS", "Store", "standing"]

OUTCOME_COLUMNS = {
    "image": "position in the data",
    "label": "true label",
    "clean_prediction": "label that the model gives the image as it is",
    "adversarial_prediction": "label that it gives the image that the attack returned",
    "l1": "norm of the perturbation",
    "l2": "likewise",
    "linf": "likewise",
    "forward": "how often the search evaluated the model for this image; empty where it does not count by image",
    "backward": "likewise its gradient",
    "stage": "of a sequence of attacks the one that felled it",
}
_VERSION = 1
_SCHEMA = f"""
    CREATE TABLE IF NOT EXISTS runs (
        key TEXT PRIMARY KEY, known TEXT NOT NULL, figures TEXT NOT NULL, is_complete INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS outcomes (
        key TEXT NOT NULL REFERENCES runs (key), {", ".join(OUTCOME_COLUMNS)}, PRIMARY KEY (key, image)
    ) WITHOUT ROWID;
    PRAGMA user_version = {_VERSION};
"""
_NAMES = ("runs.csv", "outcomes.csv.xz")


def standing(outcomes: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Of outcomes, bool (N,) each: which images are right as they are, and which attacked too."""
    right = outcomes[["clean_prediction", "adversarial_prediction"]].eq(outcomes["label"], axis=0)
    return right["clean_prediction"], right.all(axis=1)


class Store:
    """Runs, each under the key that tells it from all others, and the outcomes of its images.

    A run is written with all its images in one transaction: a kill leaves it whole or not there. Any number of
    processes may read and write one store; who wants to do a run claims it first.

    A folder without a database in which tables of `export` lie is filled from them.

    Args:
        folder: of the database `store.sqlite`, created where it does not exist.

    Raises:
        ValueError: it cannot be written, or is of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "store.sqlite"
        # SQLite waits for others once a database is open, but not while they change its journal mode.
        self._lock = FileLock(self.folder / ".store.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._open()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"store {str(self.path)!r} cannot be written: {error}") from error

    def _open(self) -> None:
        is_new = not self.path.exists()
        # Isolation None: transactions begin where `_transaction` says.
        self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        with self._transaction():
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ValueError(f"store {str(self.path)!r} is of version {version}: must be {_VERSION}")
            if version == 0:
                for statement in _SCHEMA.split(";")[:-1]:
                    self._database.execute(statement)
        if is_new and all((self.folder / name).exists() for name in _NAMES):
            self.read(self.folder)

    def __contains__(self, key: object) -> bool:
        """Whether the run is there, and complete."""
        return self._database.execute("SELECT 1 FROM runs WHERE key = ? AND is_complete", (key,)).fetchone() is not None

    def write(
        self,
        key: str,
        known: Mapping[str, Any],
        figures: Mapping[str, Any],
        outcomes: pd.DataFrame,
        *,
        is_complete: bool = True,
    ) -> None:
        """A run; one that is complete stays as it is, one that is not is replaced.

        Args:
            key: of the run.
            known: what is run; of JSON's types.
            figures: what it cost, likewise.
            outcomes: a row for each image that is finished, columns `OUTCOME_COLUMNS`.
            is_complete: whether those are all.
        """
        texts = (json.dumps(dict(known)), json.dumps(dict(figures)))
        rows = outcomes[list(OUTCOME_COLUMNS)].astype(object).where(outcomes.notna(), None).itertuples(index=False)
        marks = ", ".join("?" * (1 + len(OUTCOME_COLUMNS)))
        with self._transaction():
            if key in self:
                return
            self._database.execute("DELETE FROM outcomes WHERE key = ?", (key,))
            self._database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", (key, *texts, is_complete))
            self._database.executemany(f"INSERT INTO outcomes VALUES ({marks})", ((key, *row) for row in rows))

    def forget(self, keys: Iterable[str]) -> None:
        """Take runs out, with their outcomes."""
        given = [(key,) for key in keys]
        with self._transaction():
            for table in ("outcomes", "runs"):
                self._database.executemany(f"DELETE FROM {table} WHERE key = ?", given)

    def runs(self, keys: Sequence[str] | None = None, *, unfinished: bool = False) -> list[dict[str, Any]]:
        """What is known of runs, and their figures: with these keys in their order, or all in that of their writing.

        Args:
            keys: of those wanted; unknown ones are left out.
            unfinished: whether those count that are not complete.
        """
        query = "SELECT key, known, figures, is_complete FROM runs"
        if keys is None:
            rows = self._database.execute(f"{query} ORDER BY rowid").fetchall()
        else:
            found = (self._database.execute(f"{query} WHERE key = ?", (key,)).fetchone() for key in dict.fromkeys(keys))
            rows = list(filter(None, found))
        return [
            {"key": key, **json.loads(known), **json.loads(figures), "is_complete": bool(is_complete)}
            for key, known, figures, is_complete in rows
            if is_complete or unfinished
        ]

    def outcomes(self, key: str) -> pd.DataFrame:
        """Of the images of a run, in their order; none of one that is not there."""
        columns = list(OUTCOME_COLUMNS)
        query = f"SELECT {', '.join(columns)} FROM outcomes WHERE key = ? ORDER BY image"
        found = pd.DataFrame(self._database.execute(query, (key,)).fetchall(), columns=columns)
        return found.assign(
            stage=found["stage"].fillna(""), **{name: pd.to_numeric(found[name]) for name in columns[:-1]}
        )

    @contextmanager
    def claim(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether this process may do the run: no other is at it. A process that dies gives it back.

        Args:
            key: of the run.
            wait: until another process, if one is at it, is done.
        """
        folder = self.folder / ".claims"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write complete runs and their outcomes as `runs.csv` and `outcomes.csv.xz`, which `read` takes in again."""
        with self._lock:  # so that both tables are of the same runs
            complete = "SELECT key, known, figures FROM runs WHERE is_complete ORDER BY rowid"
            runs = pd.DataFrame(self._database.execute(complete).fetchall(), columns=["key", "known", "figures"])
            outcomes = pd.concat([self.outcomes(key).assign(key=key) for key in ["", *runs["key"]]])
            write_csv(runs, Path(folder) / _NAMES[0])
            temporary = Path(folder) / f".{_NAMES[1]}.{os.getpid()}"
            outcomes.to_csv(temporary, index=False, compression="xz", lineterminator="\n")
            temporary.replace(Path(folder) / _NAMES[1])

    def read(self, folder: str | os.PathLike[str]) -> None:
        """Take in what `export` has written; runs that are here stay."""
        runs = pd.read_csv(Path(folder) / _NAMES[0], dtype=str)
        outcomes = pd.read_csv(
            Path(folder) / _NAMES[1], compression="xz", dtype={"key": str, "stage": str}, float_precision="round_trip"
        )
        of = dict(tuple(outcomes.groupby("key")))
        for key, known, figures in runs[["key", "known", "figures"]].to_numpy(dtype=str).tolist():
            self.write(key, json.loads(known), json.loads(figures), of.get(key, outcomes[:0]))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
