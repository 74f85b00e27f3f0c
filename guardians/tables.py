"""The CSV tables: their columns, a table that a killed run can resume, and how a table is printed."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

__all__ = [
    "BENCHMARK_COLUMNS",
    "BENCHMARK_FLAGS",
    "CONFORMANCE_COLUMNS",
    "PARITY_COLUMNS",
    "RATES",
    "Table",
    "as_written",
    "columns_as_markdown",
    "file_name",
    "markdown",
    "print_table",
    "printed",
    "read_csv",
    "write_csv",
    "write_shown",
]

BENCHMARK_FLAGS = {
    "nan": "a pixel of an adversarial image is not a number",
    "outside_ball": "a perturbation is larger than the radius, by more than rounding",
    "outside_clip": "a pixel of an adversarial image is outside [0, 1]",
    "weaker_than_fgsm": "FGSM of the same implementation and settings leaves fewer images",
    "zero_gradient": "the gradient of the loss is zero in every pixel of more than 1 % of the images: gradient "
    "masking, so the number may flatter the model",
    "interrupted": "its figures are of the n images that were finished, the cost includes what the others have taken "
    "so far, and as images that are fooled finish first, its robust accuracy says nothing of the others",
}
"""Reasons to distrust a row."""

BENCHMARK_COLUMNS = {
    "model": "name of the model",
    "model_digest": "first digits of a SHA-256 digest of its weights and structure, see `guardians.models.digest`",
    "data": "where the images came from, and the first digits of a SHA-256 digest of images and labels",
    "defence": "name of the defence, or none",
    "attack": "clean, or the attack, with its steps where it counts them, as PGD-40",
    "implementation": "whose code ran: native, ART, torchattacks or foolbox",
    "norm": "order p of the norm of the threat model",
    "eps": "radius of the norm ball, for images in [0, 1]; 0 for clean, inf for attacks that minimise the norm",
    "steps": "gradient steps; 0 for clean, and where they are the default of the implementation",
    "params": "JSON: the other arguments (batch_size, those of the spec, such as eps_step and random_start, and of "
    "native attacks early_stop)",
    "eot": "model evaluations averaged for one gradient; 1 is no EOT",
    "n": "number of images",
    "clean_accuracy": "fraction of the images that are classified correctly",
    "robust_accuracy": "fraction classified correctly both clean and attacked",
    "robust_accuracy_low": "lower end of its 95% Wilson interval",
    "robust_accuracy_high": "upper end of its 95% Wilson interval",
    "success_rate": "fraction of the images correct when clean that the attack made wrong; empty where none is correct",
    "l2_median": "median over all images of the L2 norm of the perturbation",
    "l2_mean": "mean over all images of the L2 norm of the perturbation",
    "linf_max": "largest absolute change of any pixel of any image",
    "forward_per_image": "samples that went forward through the model, or through the copy of it that `search` names, "
    "per image",
    "backward_per_image": "samples that went backward through it, per image",
    "judgement_per_image": "samples that went forward through the model for judgement alone, per image",
    "seconds": "wall-clock time of the attack on all images, after a warm-up batch; of several processes, of all of "
    "them together",
    "images_per_second": "n / seconds",
    "peak_memory_mb": "peak memory during the attack in MB (10^6 bytes): allocated on the GPU, or resident in the "
    "process on a CPU",
    "flags": f"reasons to distrust the row, joined by semicolons: {', '.join(BENCHMARK_FLAGS)}; empty for none. An "
    f"interrupted row is never on disk: {BENCHMARK_FLAGS['interrupted']}",
    "seed": "seed of the attack",
    "device": "cpu, or cuda and the name of the GPU",
    "precision": "of native attacks what was asked for: auto, float32, bfloat16 or float16; else float32, in which the "
    "model computed",
    "search": "the model that the search asked: model, or a cheaper copy of it, as in folded, channels_last, bfloat16",
    "versions": "JSON: versions of guardians, python and the toolkits; null where not installed",
    "commit": "git commit of the guardians that ran, with -dirty where tracked files of the package differ from it; "
    "empty for an installed package",
}

PARITY_COLUMNS = {
    "case": "the attack, its threat model, its goal, its start and the reference; of a defence or what belongs to one "
    "its name, what is compared and the reference",
    "model": "name of the model",
    "model_digest": "first digits of a SHA-256 digest of its weights and structure, see `guardians.models.digest`",
    "data": "where the images came from, and the first digits of a SHA-256 digest of images and labels",
    "attack": "the attack, with its steps where it counts them, as PGD-40",
    "reference": "toolkit that native is held against; paper for a literal transcription of it",
    "kind": "of agreement asserted: exact, statistical or dominance; deviation where none is",
    "n": "number of images",
    "seed": "seed of the random starts",
    "batch_size": "images that the toolkit is given at a time",
    "max_abs_diff": "largest absolute difference of any pixel of the final float32 images, each attack run on its own; "
    "of a defence in any of its answers, relative to the largest where that is above 1",
    "pixel_mismatch": "pixels over all steps at which one native step from the reference's own iterate lands further "
    "from the reference's next iterate than rounding",
    "unexplained": "those of them that the reference's gradient does not excuse, not being within rounding of zero "
    "(norm inf) or of the largest (norm 1); must be 0",
    "max_abs_diff_float64": "largest absolute difference of any pixel of the final images of two runs in float64, for "
    "C&W of all its queries too, of a defence in its answers; empty where the toolkit cannot compute in float64, and "
    "for dominance and statistical",
    "label_agreement": "fraction of the images to whose two adversarial versions the model gives the same label",
    "native_success": "fraction of the images on which the native attack reached its goal",
    "reference_success": "fraction of the images on which the reference reached its goal",
    "difference": "native_success - reference_success, paired by image",
    "difference_low": "lower end of its 95% interval",
    "difference_high": "upper end of its 95% interval",
    "l2_ratio": "mean L2 norm of the perturbation, native / reference",
    "query_ratio": "samples through the model, forward and backward, native / reference",
    "time_ratio": "wall-clock time, native / reference",
    "verdict": "whether the kind of agreement holds: exact; equivalent, or undecided where the interval of the "
    "difference reaches beyond the margin; dominates; else different or weaker",
    "note": "what explains a difference",
}

CONFORMANCE_COLUMNS = {
    "implementation": "whose code it is: native, ART, torchattacks or foolbox",
    "name": "the attack or defence, as `guardians check` takes it",
    "norm": "order p of the norm of the ball, or of the distance that is minimised; empty for defences, and where none "
    "was run",
    "check": "of guardians/parity/checks.py, without check_; empty where none was run",
    "outcome": "passed, failed, skipped (there is nothing to check), timed out, or left out",
    "why": "what is wrong, or why there is no answer",
}

_TEXT_COLUMNS = """
    model model_digest data defence attack implementation params flags device precision search versions commit
    case reference kind verdict note file command
""".split()  # noqa: SIM905
RATES = """
    clean_accuracy robust_accuracy robust_accuracy_low robust_accuracy_high success_rate label_agreement
    native_success reference_success difference difference_low difference_high
    on_reference_images reference_accuracy accuracy accuracy_low accuracy_high seed_sd seed_min seed_max
""".split()  # noqa: SIM905
"""Columns of fractions that are shown as percentages."""


class Table:
    """A CSV file to which rows are appended one by one, and which a killed run can open again and continue.

    Several processes may write one table: each reads and writes it under a lock, the file `.<name>.lock` beside it,
    and takes in what the others have written.

    Args:
        path: the file; it and its folder are created where they do not exist. A last line that was cut short, as by a
            kill, is removed.
        columns: names of the columns, in order; of a mapping, its keys.
        key: the columns that identify a row. No two rows are written with the same key.

    Raises:
        ValueError: the file cannot be written, has other columns or a row of another length, or `key` names a column
            that is not there.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str] | Mapping[str, str], key: Sequence[str]):
        self.path = Path(path)
        self.columns = list(columns)
        self.key = list(key)
        unknown = [name for name in self.key if name not in self.columns]
        if unknown or not self.key:
            raise ValueError(f"key={self.key}: needs at least one, all out of {', '.join(self.columns)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            rows = self._rows()
        except OSError as error:
            raise ValueError(f"table {str(self.path)!r} cannot be written: {error}") from error
        self._known = {self._key_of(row) for row in rows}  # at the start, and what is appended here

    def __contains__(self, row: object) -> bool:
        """Whether a row with this key is on disk; given as a mapping with the key columns, or as the key's values."""
        if isinstance(row, Mapping):
            key = self._key_of(row)
        elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(self.key):
            key = tuple(map(as_written, row))
        else:
            raise ValueError(f"{row!r}: must be a mapping with, or the values of, {', '.join(self.key)}")
        return key in self._known or self._has(key)

    def __len__(self) -> int:
        return len(self._rows())

    def append(self, row: Mapping[str, Any]) -> bool:
        """Write a row; it is on disk when this returns.

        None and NaN become empty cells, numbers are written so that they are read back exactly, and line breaks in text
        become spaces. Text that a spreadsheet would take for a formula gets an apostrophe before it, which `read_csv`
        takes away again.

        Args:
            row: a value for each column.

        Returns:
            True; False where another process has written a row with this key in the meantime, which stays.

        Raises:
            ValueError: the row has other columns than the table, or its key was there when the table was opened, or was
                appended here.
            OSError: the disk does not take it.
        """
        if set(row) != set(self.columns):
            raise ValueError(f"{_mismatch(list(row), self.columns)} in a row for {str(self.path)!r}")
        key = self._key_of(row)
        if key in self._known:
            described = ", ".join(f"{name}={value}" for name, value in zip(self.key, key, strict=True))
            raise ValueError(f"table {str(self.path)!r} has a row for {described} already")
        with self._lock:
            if self._has(key):
                return False
            with self.path.open("ab") as file:
                _write(file, [_cell(row[name]) for name in self.columns])
        self._known.add(key)
        return True

    def frame(self) -> pd.DataFrame:
        """The table as it is on disk."""
        return _typed(self._cells())

    def select(self, rows: Sequence[Mapping[str, Any]], unwritten: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
        """The rows that have the keys of `rows`, in the order of the table, and after them `unwritten` as they are.

        What is unwritten looks as if it had been read from the table.
        """
        cells = self._cells()
        wanted = {self._key_of(row) for row in rows}
        keys = cells[self.key].itertuples(index=False, name=None)
        found = cells[np.array([key in wanted for key in keys], dtype=bool)]
        added = {name: [as_written(row[name]) for row in unwritten] for name in self.columns}
        return _typed(pd.concat([found, pd.DataFrame(added, dtype=str)], ignore_index=True))

    def _cells(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows(), columns=self.columns, dtype=str)

    def _rows(self) -> list[dict[str, str]]:
        with self._lock, self.path.open("a+b") as file:
            return self._recover(file)

    def _has(self, key: tuple[str, ...]) -> bool:
        """Whether it is on disk."""
        return any(self._key_of(row) == key for row in self._rows())

    def _key_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(as_written(row[name]) for name in self.key)

    def _recover(self, file: Any) -> list[dict[str, str]]:
        """The rows of the open file, after what a kill cut short has been removed; a new file gets its header."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and _line(self.columns).startswith(content):
            file.truncate(0)
            _write(file, self.columns)
            return []
        lines = csv.reader(io.StringIO((whole or content).decode("utf-8", errors="replace"), newline=""))
        rows = []
        with _cells_of_any_length():
            header = next(lines, [])
            if header != self.columns:
                mismatch = _mismatch(header, self.columns)
                raise ValueError(f"table {str(self.path)!r}: {mismatch}; write into another folder")
            for line in lines:
                if line and len(line) != len(self.columns):
                    where = f"table {str(self.path)!r}, line {lines.line_num}"
                    raise ValueError(f"{where}: {len(line)} cells for {len(self.columns)} columns")
                if line:
                    rows.append(dict(zip(self.columns, map(_text_of, line), strict=True)))
        if len(whole) < len(content):
            file.truncate(len(whole))
        return rows


def read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A table from disk: numbers exactly as they were written, text as it was before (empty for none)."""
    cells = pd.read_csv(path, dtype=str, keep_default_na=False)
    return _typed(pd.DataFrame({name: list(map(_text_of, cells[name])) for name in cells}, dtype=str))


def write_csv(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """A table as a file that is there whole or not at all, whoever else writes it; without the frame's index.

    Its folder is created where it does not exist.

    Raises:
        OSError: the disk does not take it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            frame.map(lambda value: _cell(value) if isinstance(value, str) else value).to_csv(
                file, index=False, lineterminator="\n"
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of text."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def write_shown(frame: pd.DataFrame, path: Path, shown: Sequence[str], text: str | None = None) -> pd.DataFrame:
    """Write a table as CSV, and beside it what people are shown in Markdown.

    Args:
        frame: the table.
        path: of the CSV file.
        shown: columns that are shown, and returned.
        text: in the place of these columns in Markdown.
    """
    write_csv(frame, path)
    path.with_suffix(".md").write_text((columns_as_markdown(frame, shown) if text is None else text) + "\n")
    return frame[list(shown)]


def columns_as_markdown(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """Columns of a table in Markdown, as `printed`."""
    head = [name.replace("_", " ") + " (%)" * (name in RATES) for name in columns]
    rows = frame[list(columns)].itertuples(index=False, name=None)
    return markdown(head, ([printed(*cell) for cell in zip(columns, row, strict=True)] for row in rows))


def print_table(
    frame: pd.DataFrame, columns: Sequence[str] | None = None, title: str | None = None, console: Console | None = None
) -> None:
    """Print columns of a table (all by default); accuracies and rates, fractions in the data, as percentages.

    Raises:
        ValueError: a column is not in the table.
    """
    columns = list(frame.columns) if columns is None else list(columns)
    unknown = [name for name in columns if name not in frame.columns]
    if unknown:
        raise ValueError(f"columns={unknown}: not in the table, which has {', '.join(map(str, frame.columns))}")
    table = RichTable(
        title=None if title is None else Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        heading = f"{name}_%" if name in RATES else name
        table.add_column(heading.replace("_", "\n"), justify="right" if numeric else "left", overflow="fold")
    for row in frame[columns].itertuples(index=False, name=None):
        table.add_row(*(Text(printed(name, value)) for name, value in zip(columns, row, strict=True)))
    if console is None:
        console = Console()
        # Words stay whole: a log has no width to keep to, and a narrow terminal wraps lines itself.
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def _typed(cells: pd.DataFrame) -> pd.DataFrame:
    """Columns that are not known to be text become numbers where all cells are; pandas' own parser may round."""
    return pd.DataFrame(
        {name: cells[name] if name in _TEXT_COLUMNS else _numbers(cells[name].tolist()) for name in cells}, cells.index
    )


def _numbers(cells: list[str]) -> np.ndarray:
    for number, dtype in ((int, np.int64), (lambda cell: float(cell or "nan"), np.float64)):
        try:
            return np.array([number(cell) for cell in cells], dtype=dtype)
        except (ValueError, OverflowError):
            continue
    return np.array(cells, dtype=object)


def printed(name: str, value: Any) -> str:
    """A value of a column for people: `RATES` as percentages, radii as k/255, empty for what is missing."""
    if value is None or value != value:
        return ""
    if isinstance(value, Real) and not isinstance(value, (bool, Integral)):
        if name in RATES:
            return f"{100 * value:.1f}"
        if name == "eps":
            return _printed_eps(float(value))
        return f"{value:.4g}"
    return str(value)


def _printed_eps(eps: float) -> str:
    """As k/255 where it is one of the radii that papers write so."""
    k = round(eps * 255) if np.isfinite(eps) else 0
    return f"{k}/255" if 0 < k <= 32 and abs(eps * 255 - k) < 1e-6 else f"{eps:.4g}"


def as_written(value: Any) -> str:
    """A value as it is written: the key of a row is compared in this form."""
    if value is None:
        return ""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return "" if value != value else repr(float(value))
    return " ".join(str(value).splitlines())


def file_name(*parts: Any) -> str:
    """One name for a file, without folder and suffix, of parts that may be anything: "a model", 40 -> "a-model-40".

    Spaces and commas become hyphens. Where there is more to change, be it a slash or a length above 200, the first
    digits of a SHA-256 digest end the name, so that other parts have another.
    """
    text = "-".join(map(str, parts))
    wanted = re.sub(r"[ ,]+", "-", text)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", wanted).lstrip(".-")[:200]
    return name if name == wanted else f"{name}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def _cell(value: Any) -> str:
    """What stands in the file for a value.

    Spreadsheets run text that begins as a formula does; an apostrophe before it stops them. What looks as if it had
    got one already gets another, so that each text is read back as it was. Numbers are left as they are.
    """
    text = as_written(value)
    return text if isinstance(value, Real) else re.sub(r"^(?='*[=+@\t-])", "'", text)


def _text_of(cell: str) -> str:
    """What `_cell` was given, as written."""
    return re.sub(r"^'(?='*[=+@\t-])", "", cell)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Without the limit of the csv module, which has no reader with a limit of its own."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _line(cells: Sequence[str]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode("utf-8")


def _write(file: Any, cells: Sequence[str]) -> None:
    """One line, on disk when this returns."""
    file.write(_line(cells))
    file.flush()
    os.fsync(file.fileno())


def _mismatch(got: list[str], expected: list[str]) -> str:
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    if not missing and not unexpected:
        return f"columns in another order: {', '.join(got)} where {', '.join(expected)} are expected"
    return f"columns missing: {', '.join(missing) or 'none'}, columns unexpected: {', '.join(unexpected) or 'none'}"
