"""Studies: files that say what to run on what, and which tables and figures are made of it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn

from guardians.data import Dataset, load_data
from guardians.engine.checks import check_choice, check_integer
from guardians.engine.ranks import ranks
from guardians.engine.victim import predicted_labels
from guardians.experiments.bench import BENCHMARK_SHOWN, benchmark_table, runs_of
from guardians.experiments.defences import defences_view
from guardians.experiments.evaluation import evaluation_view
from guardians.experiments.minimum_norm import consts_view, minimum_norm_view
from guardians.experiments.names import parsed
from guardians.experiments.published import published_view
from guardians.experiments.run import Run, perform
from guardians.experiments.store import Store
from guardians.experiments.subject import KINDS, Subject, defended
from guardians.experiments.throughput import throughput_view
from guardians.models import load_model
from guardians.tables import write_shown

__all__ = ["VIEWS", "Study", "find_studies", "load_study", "perform_study"]


def benchmark_view(store: Store, runs: Sequence[tuple[Run, str]], out: Path) -> pd.DataFrame:
    """`benchmark.csv`, a row for each run."""
    return write_shown(benchmark_table(store, [run for run, _ in runs]), out / "benchmark.csv", BENCHMARK_SHOWN)


VIEWS: dict[str, Callable[[Store, Sequence[tuple[Run, str]], Path], pd.DataFrame]] = {
    "benchmark": benchmark_view,
    "minimum_norm": minimum_norm_view,
    "consts": consts_view,
    "throughput": throughput_view,
    "defences": defences_view,
    "evaluation": evaluation_view,
    "published": published_view,
}
"""Of the runs of a study, with their labels: writes tables and figures into a folder, and returns what is printed."""


@dataclass(frozen=True)
class Study:
    """What to run, as a YAML file says it.

    Attributes:
        title: one line.
        view: of `VIEWS`.
        subjects: names of models, or for each a mapping with `model` and `defence`.
        runs: mappings of arguments of `guardians.experiments.bench.runs_of`, such as `attacks` and `eps` (8/255),
            and `label`, for tables; `n`, the first so many of the images; `seeds` in the place of the study's;
            `models` and `defences`, names such as "none", "rse" and "mi-ol(lam=0.5)", of the subjects for which they
            are made; and `source`, what the attacks ask in the place of the subject: another model by its name, or a
            defence around the same network.
        n: images, class-balanced.
        split: "test" or "train".
        correct: only the first so many images that each model gets right; None for all.
        pool: training images of defences that mix with some.
        rounds: how often each run is made, in random order within a round.
        seeds: with how many seeds, from 0, what is random is attacked and judged.
    """

    title: str
    view: str
    subjects: list[str | dict[str, str]]
    runs: list[dict[str, Any]]
    n: int = 1000
    split: str = "test"
    correct: int | None = None
    pool: int = 1000
    rounds: int = 1
    seeds: int = 1

    def __post_init__(self) -> None:
        check_choice("view", self.view, tuple(VIEWS))
        check_choice("split", self.split, ("test", "train"))
        for name in ("n", "pool", "rounds", "seeds"):
            check_integer(name, getattr(self, name), low=1)
        if self.correct is not None:
            check_integer("correct", self.correct, low=1)
        if not self.subjects or not self.runs:
            raise ValueError("a study needs at least one of subjects and one of runs")
        for entry in self.subjects:
            if not isinstance(entry, str) and not {"model"} <= set(entry) <= {"model", "defence"}:
                raise ValueError(f"subjects: {entry!r} must be a name, or have model and defence")


def find_studies(folder: str | os.PathLike[str]) -> dict[Path, Study]:
    """The studies in a folder, by their files."""
    return {path: load_study(path) for path in sorted(Path(folder).glob("*.yaml"))}


def load_study(path: str | os.PathLike[str]) -> Study:
    """Read a study.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or says what a `Study` does not know.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"study {str(path)!r} is no YAML: {error}") from error
    known = {field.name for field in fields(Study)}
    if not isinstance(content, Mapping) or not {"title", "view", "subjects", "runs"} <= set(content) <= known:
        got = sorted(content) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"study {str(path)!r} has {got}: must have title, view, subjects and runs; known are {known}")
    try:
        return Study(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"study {str(path)!r}: {error}") from error


def perform_study(
    study: Study,
    images: Dataset,
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    n: int | None = None,
    again: Sequence[str] = (),
    device: torch.device | str = "cpu",
    seed: int = 0,
    verbose: bool = True,
) -> tuple[pd.DataFrame, bool]:
    """Do what is not in the store of `out` yet, and write the tables and figures of the study.

    Args:
        study: see `load_study`.
        images: as many as the study says, of its split.
        out: folder of store, tables and figures.
        data: of `load_data`, for defences that mix with training images.
        n: how many they are where it is not as the study says; `correct` is in proportion.
        again: labels of runs that are done anew, where the store has them already.
        device: of the models.
        seed: of the order of runs within a round.
        verbose: show a progress bar.

    Returns:
        What the view shows, and whether Ctrl-C ended it; then the view is of what is there. Of several processes
        (`guardians.engine.ranks`) the first shows and writes, the others return an empty table.

    Raises:
        TypeError, ValueError: something in the study is outside what is allowed; before any run.
    """
    correct = study.correct if study.correct is None or n is None else max(1, study.correct * n // study.n)
    device = torch.empty(0, device=device).device
    labelled: list[tuple[Run, str]] = []
    rounds = range(1, study.rounds + 1) if study.rounds > 1 else [0]
    made = _Subjects(study, data, device)
    for entry in study.subjects:
        subject = made.of(entry)
        attacked = images if correct is None else _right_ones(subject, images, correct, device)
        for settings in study.runs:
            try:
                runs = made.runs(subject, attacked, settings, rounds)
            except (TypeError, ValueError) as error:
                raise ValueError(f"runs: {settings!r}: {error}") from error
            labelled += [(run, str(settings.get("label", ""))) for run in runs]
    for label in again:
        check_choice("again", label, tuple(dict.fromkeys(known for _, known in labelled)))
    shuffle = random.Random(seed).shuffle
    order = []
    for repetition in rounds:
        runs = sorted((run for run, _ in labelled if run.repetition == repetition), key=lambda run: run.seed)
        if study.rounds > 1:
            shuffle(runs)
        order += runs
    if not ranks().is_first:
        return pd.DataFrame(), perform(order, None, verbose=False)
    store = Store(out)
    store.forget(run.key for run, label in labelled if label in again)
    interrupted = perform(order, store, verbose=verbose)
    store.export(out)
    return VIEWS[study.view](store, labelled, Path(out)), interrupted


class _Subjects:
    """The subjects of a study, and what is run on them."""

    def __init__(self, study: Study, data: Any, device: torch.device) -> None:
        self.study, self.data, self.device = study, data, device
        self._networks: dict[str, nn.Module] = {}
        self._models = tuple(entry if isinstance(entry, str) else entry["model"] for entry in study.subjects)

    @cached_property
    def pool(self) -> Dataset:
        """The training images that Mixup Inference mixes with."""
        return load_data(self.data, "train", self.study.pool)

    def of(self, entry: str | dict[str, str]) -> Subject:
        """A model, or a defence around one."""
        model, defence = (entry, "none") if isinstance(entry, str) else (entry["model"], entry.get("defence", "none"))
        if model not in self._networks:
            self._networks[model] = load_model(model, device=self.device)
        pool = self.pool if defence.casefold().startswith("mi") else None
        return defended(model, self._networks[model], defence, pool)

    def runs(self, subject: Subject, images: Dataset, settings: dict[str, Any], rounds: Iterable[int]) -> list[Run]:
        """Of one entry of the study on one subject; what is its own source is the same as without one, and left out."""
        options = dict(settings)
        options.pop("label", None)
        sizes = {name: options[name] for name in ("eps", "eps_step") if isinstance(options.get(name), str)}
        options |= {name: parsed(f"size({name}={size})")[1][name] for name, size in sizes.items()}
        n, seeds = options.pop("n", len(images)), options.pop("seeds", self.study.seeds)
        check_integer("seeds", seeds, low=1)
        models, wanted = options.pop("models", None), options.pop("defences", None)
        source = options.pop("source", None)
        for name in models or ():
            check_choice("models", name, self._models)
        for name in wanted or ():
            check_choice("defences", parsed(name)[0], KINDS)
        if models is not None and subject.name not in models:
            return []
        if wanted is not None and not any(_is_such(subject.defence, name) for name in wanted):
            return []
        if source is not None:
            is_defence = parsed(source)[0].casefold() in KINDS
            source = self.of({"model": subject.name, "defence": source} if is_defence else source)
            if source.digest == subject.digest:
                return []
        seeded = range(seeds if subject.make is not None else 1)
        few, first = _first(images, n), options.pop("seed", 0)
        return [
            run
            for repetition in rounds
            for seed in seeded
            for run in runs_of(
                subject, few, self.device, **options, seed=first + seed, repetition=repetition, source=source
            )
        ]


def _is_such(defence: str, name: str) -> bool:
    """Whether a defence has this name, and the arguments that go with it."""
    (kind, arguments), (wanted, given) = parsed(defence), parsed(name)
    return kind == wanted and given.items() <= arguments.items()


def _first(data: Dataset, n: int) -> Dataset:
    """The first `n` images, or all where there are fewer; as they are prefixes, those that fewer were drawn as."""
    check_integer("n", n, low=1)
    return data if n >= len(data) else Dataset(data.images[:n], data.labels[:n], data.classes, data.source)


def _right_ones(subject: Subject, data: Dataset, n: int, device: torch.device) -> Dataset:
    """The first `n` images that the model gets right."""
    right = predicted_labels(subject.base, data.as_floats().to(device)).cpu() == data.labels
    if int(right.sum()) < n:
        raise ValueError(f"correct={n}: {subject.name} gets {int(right.sum())} of the {len(data)} images right")
    source = f"{data.source}, that {subject.name} gets right"
    return Dataset(data.images[right][:n], data.labels[right][:n], data.classes, source)
