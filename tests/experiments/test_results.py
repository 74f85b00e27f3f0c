"""The committed tables are of the bundled models, and a command that wrote them finds its runs."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from guardians.experiments import defences, evaluation, published
from guardians.experiments.bench import BENCHMARK_SHOWN, summarise
from guardians.experiments.defences import DEFENCE_COLUMNS
from guardians.experiments.evaluation import EVALUATION_COLUMNS
from guardians.experiments.minimum_norm import CONST_COLUMNS, MINIMUM_NORM_COLUMNS, MINIMUM_NORM_SHOWN
from guardians.experiments.run import IDENTITY, key_of
from guardians.experiments.store import Store
from guardians.experiments.throughput import THROUGHPUT_COLUMNS, THROUGHPUT_SHOWN
from guardians.models import digest, load_model
from guardians.parity import cases
from guardians.tables import BENCHMARK_COLUMNS, PARITY_COLUMNS, columns_as_markdown, read_csv

RESULTS, DOCS = (Path(__file__).parents[2] / name for name in ("results", "docs"))
TABLES = {
    "attack_cost": THROUGHPUT_COLUMNS,
    "attack_overhead": THROUGHPUT_COLUMNS,
    "attack_throughput": THROUGHPUT_COLUMNS,
    "benchmark": BENCHMARK_COLUMNS,
    "carlini_wagner": MINIMUM_NORM_COLUMNS,
    "carlini_wagner_consts": CONST_COLUMNS,
    "parity": PARITY_COLUMNS,
    "deviations": PARITY_COLUMNS,
    "defences": DEFENCE_COLUMNS,
    "evaluation": EVALUATION_COLUMNS,
    "gpu/evaluation": EVALUATION_COLUMNS,
}
FOR_PEOPLE = {
    "attack_throughput": partial(columns_as_markdown, columns=THROUGHPUT_SHOWN),
    "benchmark": partial(columns_as_markdown, columns=BENCHMARK_SHOWN),
    "carlini_wagner": partial(columns_as_markdown, columns=MINIMUM_NORM_SHOWN),
    "defences": defences.as_markdown,
    "evaluation": evaluation.as_markdown,
    "robust_neural_networks/robust_neural_networks": published.as_markdown,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_columns_of_the_code(name):
    assert list(read_csv(RESULTS / f"{name}.csv").columns) == list(TABLES[name])


@pytest.mark.parametrize("name", ["benchmark", "parity", "deviations", "carlini_wagner", "evaluation", "defences"])
def test_rows_are_of_the_bundled_models(name):
    frame = read_csv(RESULTS / f"{name}.csv")
    undefended = frame[frame["defence"] == "none"] if "defence" in frame else frame
    for model, rows in undefended.groupby("model"):
        assert set(rows["model_digest"]) == {digest(load_model(model))}


@pytest.fixture
def store(tmp_path):
    for name in ("runs.csv", "outcomes.csv.xz"):
        shutil.copy(RESULTS / name, tmp_path)
    return Store(tmp_path)


def test_the_store_has_whole_runs_under_their_keys(store):
    assert store.runs()
    for run in store.runs():
        assert run["key"] == key_of({name: run[name] for name in IDENTITY})
        assert len(store.outcomes(run["key"])) == run["n"]
        if run["defence"] == "none":
            assert run["model_digest"] == digest(load_model(run["model"]))


def test_the_benchmark_is_a_view_of_the_store(store):
    committed = read_csv(RESULTS / "benchmark.csv")
    runs = {
        (run["attack"], run["implementation"]): store.outcomes(run["key"])
        for run in store.runs()
        if (run["n"], run["repetition"], run["model"]) == (1000, 0, "resnet9-16-standard")
        and run["options"].get("precision", "auto") == "auto"
    }
    for _, row in committed[committed["attack"] != "union"].iterrows():
        figures = summarise(runs[row["attack"], row["implementation"]])
        assert figures == pytest.approx({name: row[name] for name in figures}, nan_ok=True)


@pytest.mark.parametrize("name", FOR_PEOPLE)
def test_tables_for_people_are_of_those_on_disk(name):
    committed = (RESULTS / f"{name}.md").read_text()
    assert committed == FOR_PEOPLE[name](read_csv(RESULTS / f"{name}.csv")) + "\n"
    assert f"```{{include}} ../results/{name}.md" in "".join(page.read_text() for page in DOCS.glob("*.md"))


def test_the_budget_standard_leaves_no_more_than_the_reference():
    frame = read_csv(RESULTS / "evaluation.csv")
    standard = frame[frame["contender"] == "standard"]
    assert len(standard) == 10
    assert (standard["difference"] <= 0).all()


@pytest.mark.parametrize("name", ["parity", "deviations"])
def test_cases_are_those_that_the_harness_runs(name):
    of = {case.name: case for case in cases()}
    for _, row in read_csv(RESULTS / f"{name}.csv").iterrows():
        case = of[row["case"]]
        assert (case.attack, case.reference) == (row["attack"], row["reference"])
        assert row["kind"] in (case.kind, "deviation")


def test_every_case_has_a_row():
    assert set(read_csv(RESULTS / "parity.csv")["case"]) == {case.name for case in cases()}


def test_deviations_are_called_so():
    assert set(read_csv(RESULTS / "deviations.csv")["kind"]) == {"deviation"}
