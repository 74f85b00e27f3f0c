"""The committed tables are of the bundled models, and a command that wrote them finds its rows."""

import json
from pathlib import Path

import pytest
from guardians.experiments.runner import outcome_path

from guardians.attacks.registry import named
from guardians.experiments import defences, runner
from guardians.experiments.defences import DEFENCE_COLUMNS, RUN_COLUMNS, summarise
from guardians.experiments.minimum_norm import MINIMUM_NORM_COLUMNS
from guardians.experiments.minimum_norm import RUN_COLUMNS as MINIMUM_NORM_RUN_COLUMNS
from guardians.models import digest, load_model
from guardians.parity import cases
from guardians.tables import BENCHMARK_COLUMNS, PARITY_COLUMNS, read_csv

RESULTS = Path(__file__).parents[2] / "results"
TABLES = {
    "benchmark": BENCHMARK_COLUMNS,
    "parity": PARITY_COLUMNS,
    "deviations": PARITY_COLUMNS,
    "carlini_wagner": MINIMUM_NORM_COLUMNS,
    "carlini_wagner_runs": MINIMUM_NORM_RUN_COLUMNS,
    "defences": DEFENCE_COLUMNS,
    "defences_runs": RUN_COLUMNS,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_columns_of_the_code(name):
    assert list(read_csv(RESULTS / f"{name}.csv").columns) == list(TABLES[name])


@pytest.mark.parametrize("name", ["benchmark", "parity", "deviations", "carlini_wagner", "carlini_wagner_runs"])
def test_rows_are_of_the_bundled_models(name):
    frame = read_csv(RESULTS / f"{name}.csv")
    for model, rows in frame.groupby("model"):
        assert set(rows["model_digest"]) == {digest(load_model(model))}


def test_rows_are_of_the_bundled_defences():
    """But Mixup Inference, whose pool is of training images."""
    frame = read_csv(RESULTS / "defences_runs.csv")
    surrogate = digest(load_model("resnet9-16-standard"))
    for name in ("standard", "fgsm-at", "pgd-at", "rse"):
        defended = defences.bundled(name, None)
        rows = frame[frame["defence"] == name]
        assert set(rows["model_digest"]) == {digest(defended.module(0, defences.PASSES))}
        assert set(rows["attack"]) == set(defended.attacks)
        for attack, params in zip(rows["attack"], rows["params"], strict=True):
            assert params == json.dumps(defences._params(defended, attack, surrogate))


def test_outcomes_are_found():
    for _, row in read_csv(RESULTS / "benchmark.csv").iterrows():
        assert outcome_path(RESULTS, row).is_file()


def test_rows_are_those_that_the_commands_ask_for():
    for _, row in read_csv(RESULTS / "benchmark.csv").iterrows():
        params = json.loads(row["params"])
        ball = {name: params.get(name) for name in ("eps_step", "random_start")}
        spec = None if row["attack"] == "clean" else named(row["attack"], row["norm"], row["eps"], **ball)
        options = {"precision": row["precision"]}
        options |= {"early_stop": params["early_stop"]} if "early_stop" in params else {}
        columns = runner._columns_of(row["implementation"], spec, params["batch_size"], options)
        assert columns == {name: row[name] for name in columns}


@pytest.mark.parametrize("name", ["parity", "deviations"])
def test_cases_are_those_that_the_harness_runs(name):
    of = {case.name: case for case in cases()}
    for _, row in read_csv(RESULTS / f"{name}.csv").iterrows():
        case = of[row["case"]]
        assert (case.spec.name, case.reference) == (row["attack"], row["reference"])
        assert row["kind"] in (case.kind, "deviation")


def test_deviations_are_called_so():
    assert set(read_csv(RESULTS / "deviations.csv")["kind"]) == {"deviation"}


def test_the_summary_is_of_the_runs():
    assert read_csv(RESULTS / "defences.csv").equals(summarise(read_csv(RESULTS / "defences_runs.csv")))
