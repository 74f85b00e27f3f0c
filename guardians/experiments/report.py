"""The report: what lies in a folder of results, as one self-contained HTML page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from guardians.experiments.audit import RULES
from guardians.experiments.bench import BENCHMARK_SHOWN
from guardians.experiments.commands import COMMANDS
from guardians.experiments.defence_speed import SPEED_COLUMNS
from guardians.experiments.defences import DEFENCE_COLUMNS, DEFENCE_SHOWN
from guardians.experiments.evaluation import EVALUATION_COLUMNS, EVALUATION_SHOWN
from guardians.experiments.memory import MEMORY_COLUMNS
from guardians.experiments.minimum_norm import CONST_COLUMNS, MINIMUM_NORM_COLUMNS, MINIMUM_NORM_SHOWN
from guardians.experiments.page import Claim, Figure, Section, data_uri, write_page
from guardians.experiments.planted import AUDIT_COLUMNS
from guardians.experiments.published import PUBLISHED_COLUMNS, PUBLISHED_SHOWN
from guardians.experiments.store import Store
from guardians.experiments.throughput import THROUGHPUT_COLUMNS, THROUGHPUT_SHOWN
from guardians.tables import BENCHMARK_COLUMNS, BENCHMARK_FLAGS, CONFORMANCE_COLUMNS, PARITY_COLUMNS, read_csv

__all__ = ["TABLES", "Known", "report_page"]


@dataclass(frozen=True)
class Known:
    """A table that a report shows.

    Attributes:
        title: of its section.
        text: what it says.
        command: that writes it, unless `commands.csv` or the README.md of the folder says another.
        columns: what they mean.
        shown: columns that are visible at first; empty for all.
        flags: that its rows may have, and what each means.
        rates: columns of fractions beside `guardians.tables.RATES`.
        figures: files in the folder that belong to it, and their captions.
        counted: two columns; of each value of the first, how often each of the second is there.
        of_runs: columns by which its rows and the runs of the store are matched, for versions and commits; empty where
            they are in the table itself, or it is not of the store.
    """

    title: str
    text: str
    command: str
    columns: Mapping[str, str]
    shown: Sequence[str] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    rates: Sequence[str] = ()
    figures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    counted: tuple[str, str] | None = None
    of_runs: Sequence[str] = ()


_EVALUATION = Known(
    "Evaluation",
    "Robust accuracy that `guardians.evaluate` and native AutoAttack leave, and their time, beside torchattacks' "
    "AutoAttack on the same images. A negative difference says that the reference left more.",
    "guardians study benchmarks/evaluation.yaml --out results",
    EVALUATION_COLUMNS,
    EVALUATION_SHOWN,
    of_runs=("model_digest", "data", "attack", "implementation", "device"),
)
_HEADLINE = (
    *("model", "norm", "eps", "robust_accuracy", "interval", "clean_accuracy", "n"),
    *("on_reference_images", "reference_accuracy", "reference_n", "speedup"),
)
_THROUGHPUT = Known(
    "Throughput",
    "Images a second of PGD-40 in every implementation on the same images, in rounds in random order; `speedup` is "
    "over the fastest toolkit of the same round.",
    "guardians study benchmarks/attack_throughput.yaml --out results",
    THROUGHPUT_COLUMNS,
    THROUGHPUT_SHOWN,
    of_runs=("model", "implementation", "n"),
)
_PARITY_SHOWN = (
    *("case", "kind", "reference", "n", "max_abs_diff", "pixel_mismatch", "unexplained", "max_abs_diff_float64"),
    *("native_success", "reference_success", "verdict", "note"),
)
TABLES: dict[str, Known] = {
    "evaluation.csv": _EVALUATION,
    "gpu/evaluation.csv": Known(
        "Evaluation on a GPU",
        "The same on an NVIDIA H100, as far as it got in minutes.",
        "guardians study benchmarks/evaluation.yaml --device cuda --out results/gpu",
        EVALUATION_COLUMNS,
        EVALUATION_SHOWN,
        of_runs=_EVALUATION.of_runs,
    ),
    "parity.csv": Known(
        "Parity",
        "Each native attack and defence beside its reference, on the same model, images, labels and start. Exact: the "
        "same image up to rounding, step by step; statistical: the interval of the paired difference in success lies "
        "within the margin; dominance: not weaker, and no larger perturbation, for fewer queries.",
        "guardians parity --n 200 --out results  # cases, and those with --n 20, as listed in the Makefile",
        PARITY_COLUMNS,
        _PARITY_SHOWN,
        counted=("reference", "verdict"),
    ),
    "deviations.csv": Known(
        "Deviations",
        "Where a toolkit follows another rule than the paper of the attack, native follows the paper. Here both run "
        "with their own rules; `docs/deviations.md` has each rule and the test that pins it.",
        "guardians parity --own-rules --n 200 --attack FGSM --attack PGD-40 --out results",
        PARITY_COLUMNS,
        (
            *("case", "reference", "n", "native_success", "reference_success", "difference", "difference_low"),
            *("difference_high", "l2_ratio", "query_ratio", "note"),
        ),
    ),
    "robust_neural_networks/robust_neural_networks.csv": Known(
        "A report of 2023, done again",
        "Each figure of the report beside ours, on a model like its own and on the bundled ones, and what a stronger "
        "attack leaves. The rules of the verdicts are those of `guardians.experiments.published.judged`.",
        "guardians study benchmarks/robust_neural_networks.yaml --out results/robust_neural_networks",
        PUBLISHED_COLUMNS,
        PUBLISHED_SHOWN,
        figures={
            "robust_neural_networks/robust_neural_networks_lambda.png": (
                "Accuracy against lambda",
                "Of Mixup Inference, with 95 % intervals.",
            ),
            "robust_neural_networks/robust_neural_networks_c.png": (
                "Carlini-Wagner with c = 0.1 and c = 100",
                "The images, what the attack made of them, and the perturbation.",
            ),
        },
    ),
    "conformance.csv": Known(
        "Conformance",
        "Every attack and defence put through the contract: batches, devices, bounds, seeds, and the model left alone. "
        "One row a check of `guardians/parity/checks.py`.",
        "guardians check --all --out results",
        CONFORMANCE_COLUMNS,
        counted=("implementation", "outcome"),
    ),
    "audit.csv": Known(
        "Audit",
        "Planted defences that only hide from gradients, of which the audit has to raise a flag, and sound models, of "
        "which it may raise none. The columns of the rules are what was measured.",
        "guardians audit --planted --n 100 --data-seed 1 --out results",
        AUDIT_COLUMNS,
        ("defence", "model", "right", "planted", "raised", "verdict"),
        {
            rule.name: f"{rule.measured}; limit {rule.threshold:g} ({rule.source}). What to do: {rule.advice}."
            for rule in RULES
        },
        [rule.name for rule in RULES if rule.measured.startswith("share")],
    ),
    "defences.csv": Known(
        "Defences",
        "Models and defences under attacks that know more and more of them. Each accuracy is by fresh draws of the "
        "defence, mean over the seeds. The lowest of a row's ball is what counts; an attack that leaves more flatters.",
        "guardians study benchmarks/defences.yaml --n 500 --out results",
        DEFENCE_COLUMNS,
        DEFENCE_SHOWN,
        {
            "flattering": "another attack in the same ball leaves an interval that lies below this one's: the number "
            "says more of the attack than of the defence",
            **BENCHMARK_FLAGS,
        },
        of_runs=("model_digest", "data", "device"),
    ),
    "benchmark.csv": Known(
        "Benchmark",
        "Every implementation of the same attacks: what each leaves, and what it costs in passes and time. `union` "
        "counts an image as fooled where any of them fools it.",
        "guardians study benchmarks/benchmark.yaml --out results",
        BENCHMARK_COLUMNS,
        BENCHMARK_SHOWN,
        BENCHMARK_FLAGS,
    ),
    "carlini_wagner.csv": Known(
        "Carlini-Wagner",
        "Attacks that look for the smallest perturbation, at several settings.",
        "guardians study benchmarks/carlini_wagner.yaml --out results",
        MINIMUM_NORM_COLUMNS,
        MINIMUM_NORM_SHOWN,
        figures={
            "carlini_wagner_frontier.png": (
                "Mean L2 norm against gradient evaluations",
                "A line joins the settings of an implementation; hollow markers do not fool all images",
            )
        },
        of_runs=("model_digest", "data", "implementation"),
    ),
    "carlini_wagner_consts.csv": Known(
        "Carlini-Wagner: the constant c",
        "Robust accuracy and the norm of the perturbations with c fixed.",
        "guardians study benchmarks/carlini_wagner_consts.yaml --out results",
        CONST_COLUMNS,
        figures={
            "carlini_wagner_consts.png": (
                "Robust accuracy and mean L2 norm against c",
                "Both fall and rise with the weight of the loss",
            ),
            "carlini_wagner_c.png": (
                "Images attacked with little and much c",
                "Clean, adversarial and magnified perturbation",
            ),
        },
        of_runs=("model", "n"),
    ),
    "attack_throughput.csv": _THROUGHPUT,
    "attack_overhead.csv": Known(
        "Overhead",
        "Time of one batch of PGD-40 in every implementation, beside a bare loop of forward and backward passes.",
        "guardians study benchmarks/attack_overhead.yaml --out results",
        THROUGHPUT_COLUMNS,
        ("implementation", "n", "rounds", "seconds", "images_per_second", "bare_loop_ratio", "engine_overhead"),
        of_runs=_THROUGHPUT.of_runs,
    ),
    "attack_cost.csv": Known(
        "Cost",
        "Time of PGD-40 against the number of images: native with early_stop, and the fastest toolkit as far as it was "
        "run.",
        "guardians study benchmarks/attack_cost.yaml --out results",
        THROUGHPUT_COLUMNS,
        ("model", "implementation", "precision", "n", "robust_accuracy", "seconds", "images_per_second", "speedup"),
        figures={"attack_cost.png": ("Time against the number of images", "Both axes are logarithmic")},
        of_runs=_THROUGHPUT.of_runs,
    ),
    "attack_memory.csv": Known(
        "Memory",
        "Peak memory of native PGD-40. Images are read from a memory-mapped file, in a process of its own.",
        "python benchmarks/attack_memory.py",
        MEMORY_COLUMNS,
    ),
    "defence_speed.csv": Known(
        "Speed of defences",
        "Inference of the defences, and training steps beside ART's trainer.",
        "python benchmarks/defence_speed.py --rounds 5",
        {"model": BENCHMARK_COLUMNS["model"], **SPEED_COLUMNS},
    ),
}
"""Files of a folder of results, in the order in which a report shows them."""


def report_page(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], *, drawn: Sequence[Any] = (), title: str = "Guardians"
) -> None:
    """Write the tables and figures of a folder of results as one self-contained HTML file.

    Args:
        folder: with some of `TABLES`, the figures that belong to them, and the store or its `runs.csv`.
        path: of the file.
        drawn: figures in `figures/` of the folder, each with a name, title, caption and command: `figures/{name}.svg`,
            or where that is not there `.png`.
        title: of the page.

    Raises:
        ValueError: the folder has none of the tables.
    """
    folder = Path(folder)
    tables = {name: read_csv(folder / name) for name in TABLES if (folder / name).exists()}
    if not tables:
        raise ValueError(f"folder={str(folder)!r} has none of the tables that a report shows: {', '.join(TABLES)}")
    runs: dict[Path, pd.DataFrame] = {}
    said = _commands(folder / "README.md")
    sections = []
    for name, frame in tables.items():
        at = (folder / name).parent
        if at not in runs:
            runs[at] = _runs(at)
        sections.append(_section(folder, name, frame, runs[at], said.get(name)))
    if drawn:
        figures = [
            Figure(one.title, one.caption, data_uri(_file(folder / "figures", one.name)), one.command) for one in drawn
        ]
        sections.insert(0, Section("figures", "Figures", figures=figures))
    if "evaluation.csv" in tables:
        sections.insert(0, _headline(tables["evaluation.csv"]))
    lede = [
        "Adversarial attacks and defences for PyTorch image classifiers, measured and cross-checked. Every number is "
        "from a table on this page, beside the command that wrote it."
    ]
    write_page(path, title, sections, lede=lede, claims=list(_claims(tables)))


def _section(folder: Path, name: str, frame: pd.DataFrame, runs: pd.DataFrame, said: str | None) -> Section:
    known, path = TABLES[name], folder / name
    written = said or f"`{known.command}`"
    noted = _noted(path)
    if len(noted):
        written = "; ".join(f"`{command}`" for command in noted["command"].unique())
    figures = [
        Figure(title, caption, data_uri(folder / file))
        for file, (title, caption) in known.figures.items()
        if (folder / file).exists()
    ]
    counts = {}
    if known.counted is not None:
        of, what = known.counted
        counts = {str(value): _counts(rows[what]) for value, rows in frame.groupby(of, sort=False)}
    return Section(
        key=_key(name),
        title=known.title,
        text=[known.text],
        facts={"Table": f"`{name}`", "Command": written, **_provenance(frame, noted, runs, known.of_runs), **counts},
        table=frame,
        columns=known.columns,
        shown=[column for column in known.shown if column in frame],
        rates=known.rates,
        flags=known.flags,
        figures=figures,
    )


def _commands(path: Path) -> dict[str, str]:
    """By file, what the first table of a README says in its columns file and command."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 2:
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1])
    return found


def _key(name: str) -> str:
    return name.removesuffix(".csv").replace("/", "-").replace("_", "-")


def _file(folder: Path, name: str) -> Path:
    """Of a figure."""
    vector = folder / f"{name}.svg"
    return vector if vector.exists() else vector.with_suffix(".png")


def _runs(folder: Path) -> pd.DataFrame:
    """What was run: labels, versions and commit of the complete runs of a folder; empty where it has no store."""
    if not (folder / "store.sqlite").exists() and not (folder / "runs.csv").exists():
        return pd.DataFrame()
    return pd.DataFrame(Store(folder).runs())


def _noted(path: Path) -> pd.DataFrame:
    """What `commands.csv` says of a table: a row a command and code."""
    beside = path.with_name(COMMANDS)
    commands = read_csv(beside) if beside.exists() else pd.DataFrame({"file": []})
    return commands[commands["file"] == path.name]


def _provenance(frame: pd.DataFrame, noted: pd.DataFrame, runs: pd.DataFrame, by: Sequence[str]) -> dict[str, str]:
    """Versions and commits: of the rows, of the commands, or of the runs of the same models, images and so on."""
    if {"versions", "commit"} <= set(frame):
        sources, whose = frame, "rows"
    elif len(noted):
        sources, whose = noted, "commands"
    elif by and set(by) <= set(frame) & set(runs):
        sources = runs.merge(frame[list(by)].drop_duplicates(), on=list(by))
        whose = f"runs in the store of the same {', '.join(by)}".replace("_", " ")
    else:
        return {"Versions": "not recorded with this table"}
    versions = [json.loads(cell) if isinstance(cell, str) else cell for cell in sources["versions"] if cell]
    named = [", ".join(f"{package} {version}" for package, version in cell.items() if version) for cell in versions]
    counts = sources["commit"].map(_short).value_counts().sort_index()
    commits = ", ".join(f"{commit} ({count})" for commit, count in counts.items())
    return {
        "Versions": "; ".join(dict.fromkeys(filter(None, named))) or "not recorded",
        "Commits": f"{commits}, of {len(sources)} {whose}" if commits else "not recorded",
    }


def _short(commit: str) -> str:
    """For people."""
    digest, _, dirty = commit.partition("-")
    return f"`{digest[:9]}{'-dirty' if dirty else ''}`" if commit else "not recorded"


def _claims(tables: Mapping[str, pd.DataFrame]) -> Iterator[Claim]:
    """The numbers of the headline, each from a table that is there."""
    if "parity.csv" in tables:
        verdicts = tables["parity.csv"]["verdict"]
        yield Claim(
            f"{len(verdicts)} cases", f"of native attacks and defences beside references: {_counts(verdicts)}", "parity"
        )
    if "conformance.csv" in tables:
        frame = tables["conformance.csv"]
        native = frame[frame["implementation"] == "native"]
        failed = int((native["outcome"] == "failed").sum())
        yield Claim(
            f"{failed} of {len(native)}",
            f"checks of the contract that native attacks and defences fail; of the toolkits' attacks "
            f"{int((frame['outcome'] == 'failed').sum()) - failed} of {len(frame) - len(native)}",
            "conformance",
        )
    if "audit.csv" in tables:
        verdicts = tables["audit.csv"]["verdict"]
        yield Claim(_counts(verdicts), "of planted defences and sound models, by the audit", "audit")
    if "defences.csv" in tables:
        flags = tables["defences.csv"]["flags"]
        count = int(flags.str.contains("flattering").sum())
        yield Claim(
            f"{count} of {len(flags)}", "attacks on models and defences flatter: another leaves less", "defences"
        )
    if "attack_throughput.csv" in tables:
        frame = tables["attack_throughput.csv"]
        native = frame[(frame["implementation"] == "native") & frame["early_stop"].astype(str).eq("True")]
        ratios = native.loc[native["precision"] == "float32", "speedup"]
        if len(ratios):
            text = f"the images a second of the fastest toolkit: PGD-40, early_stop, float32, on {len(ratios)} models"
            yield Claim(f"{_span(ratios)} times", text, "attack-throughput")


def _headline(frame: pd.DataFrame) -> Section:
    """Robust accuracy by `standard`, beside the reference on the same images."""
    frame = frame[frame["contender"] == "standard"].reset_index(drop=True)
    ends = zip(frame["robust_accuracy_low"], frame["robust_accuracy_high"], strict=True)
    frame = frame.assign(interval=[f"{100 * low:.1f} to {100 * high:.1f}" for low, high in ends])
    columns = {**EVALUATION_COLUMNS, "interval": "95% Wilson interval of the robust accuracy, in percent"}
    text = (
        "What `guardians evaluate`, budget standard, leaves of the bundled models, and beside it torchattacks' "
        "AutoAttack on the images that both have. Command and versions are those of the section Evaluation."
    )
    return Section("headline", "Robust accuracy", [text], table=frame[list(_HEADLINE)], columns=columns)


def _counts(values: pd.Series) -> str:
    return ", ".join(f"{count} {value}" for value, count in values.value_counts().items())


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.1f}", f"{values.max():.1f}"
    return low if low == high else f"{low} to {high}"
