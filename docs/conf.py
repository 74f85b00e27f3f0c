"""Sphinx configuration: `make docs`."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import guardians  # noqa: E402
from guardians.experiments import commands, defences, evaluation, minimum_norm, published, throughput  # noqa: E402
from guardians.experiments.store import OUTCOME_COLUMNS  # noqa: E402
from guardians.tables import BENCHMARK_COLUMNS, CONFORMANCE_COLUMNS, PARITY_COLUMNS  # noqa: E402

project, author, release = "Guardians", "the authors of Guardians", guardians.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "Guardians"
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": False}
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
# Tables of 100 and more attacks are code's own words.
suppress_warnings = ["myst.header"]

TABLES = {
    "benchmark.csv": BENCHMARK_COLUMNS,
    "parity.csv, deviations.csv": PARITY_COLUMNS,
    "evaluation.csv": evaluation.EVALUATION_COLUMNS,
    "defences.csv": defences.DEFENCE_COLUMNS,
    "robust_neural_networks.csv": published.PUBLISHED_COLUMNS,
    "conformance.csv": CONFORMANCE_COLUMNS,
    "attack_throughput.csv, attack_cost.csv, attack_overhead.csv": throughput.THROUGHPUT_COLUMNS,
    "carlini_wagner.csv": minimum_norm.MINIMUM_NORM_COLUMNS,
    "carlini_wagner_consts.csv": minimum_norm.CONST_COLUMNS,
    "outcomes.csv.xz, of each image of each run": OUTCOME_COLUMNS,
    "commands.csv": commands.COMMAND_COLUMNS,
}


def columns() -> str:
    """What the columns of the tables are, from where the code says so."""

    def lines(of: Mapping[str, str]) -> list[str]:
        return [f"- `{name}`: {text}" for name, text in of.items()]

    return "\n\n".join(f"## {file}\n\n" + "\n".join(lines(of)) for file, of in TABLES.items())


def as_rst(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings have tables and lists as Markdown has them, and bars in norms and absolute values."""
    out: list[str] = []
    for line in lines:
        last = out[-1] if out else ""
        is_table, was_table = line.lstrip().startswith("| "), last.startswith("    | ")
        is_indented = _indent(line) != _indent(last) and "- " in line + last
        if last and line and (is_table != was_table or is_indented):
            out.append("")
        if is_table:
            out += ["    " + line.strip()] if was_table else ["::", "", "    " + line.strip()]
        else:
            out.append(re.sub(r"\|(?=\S)", r"\|", line))
    lines[:] = out


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def write_columns(app: object) -> None:
    """Before pages are read."""
    page = HERE / "_build" / "columns.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(columns() + "\n")


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_columns)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", as_rst)  # type: ignore[attr-defined]
