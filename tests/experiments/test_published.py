"""What becomes of a report's claims: verdicts by stated rules, from the outcomes of the store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_for_tests import made_up

from guardians.attacks.registry import Spec
from guardians.experiments.published import CLAIMS, PUBLISHED_COLUMNS, judged, published_table, published_view
from guardians.experiments.study import load_study
from guardians.statistics import paired_difference
from guardians.tables import read_csv

INF = float("inf")
FGSM, PGD = Spec("FGSM", INF, 0.03), Spec("PGD", INF, 0.03, params={"steps": 40})


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        ((0.55, 0.57, (0.53, 0.61)), "reproduced"),
        ((0.55, 0.70, (0.54, 0.80)), "reproduced"),  # within our interval
        ((0.55, 0.70, (0.66, 0.74)), "undecided"),
        ((0.22, 0.40, (0.36, 0.44), 0.12, (0.3, 0.25, 0.35)), "same direction"),
        ((0.22, 0.21, (0.18, 0.25), 0.12, (0.1, 0.05, 0.15)), "reproduced"),
        ((0.22, 0.21, (0.18, 0.25), 0.12, (-0.1, -0.15, -0.05)), "contradicted"),  # though the figure is the same
        ((0.22, 0.40, (0.36, 0.44), 0.12, (0.01, -0.02, 0.04)), "undecided"),
        ((0.095, 0.2, (0.18, 0.25), -0.005, (-0.1, -0.15, -0.05)), "same direction"),
    ],
)
def test_verdicts(arguments, verdict):
    found, why = judged(*arguments)
    assert found == verdict
    assert f"{arguments[1]:.1%}" in why


def stands(share, n=200):
    return np.arange(n) < round(share * n)


def rows(model="lenet"):
    return [
        (f"{model}-standard", "clean", None, stands(0.55)),
        (f"{model}-standard", "FGSM", FGSM, stands(0.1)),
        (f"{model}-standard", "PGD-40", PGD, stands(0.05)),
        (f"{model}-fgsm-at", "FGSM", FGSM, stands(0.3)),
        (f"{model}-fgsm-at", "evaluate", Spec("evaluate", INF, 0.03), stands(0.2)),
    ]


def test_claims_are_compared_within_one_architecture(tmp_path):
    store, runs = made_up(tmp_path, [*rows(), *rows("resnet9-16")])
    frame = published_table(store, runs)
    assert list(frame.columns) == list(PUBLISHED_COLUMNS)
    assert frame["model"].str.startswith("lenet").sum() == len(frame) / 2
    row = frame[(frame["model"] == "lenet-fgsm-at")].iloc[0]
    assert (row["published"], row["accuracy"], row["published_beside"], row["accuracy_beside"]) == (
        0.2285,
        0.3,
        0.1,
        0.1,
    )
    expected = paired_difference(stands(0.3), stands(0.1))
    assert tuple(row[["difference", "difference_low", "difference_high"]]) == pytest.approx(expected)
    assert row["verdict"] == "same direction"
    assert (row["stronger"], row["stronger_accuracy"], row["stronger_beside"]) == ("evaluate", 0.2, 0.05)
    first = frame.iloc[0]
    assert (first["attack"], first["verdict"], first["stronger"]) == ("clean", "reproduced", first["stronger"])


def with_lambda(run, lam):
    return replace(run, subject=replace(run.subject, defence=f"mi-ol(lam={lam}, num_samples=10)"))


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [((0.2, 0.4, 0.6), "same direction"), ((0.6, 0.4, 0.2), "contradicted"), ((0.5, 0.5, 0.5), "undecided")],
)
def test_accuracy_against_lambda(tmp_path, shares, verdict):
    rows = [("a-standard", "lambda", None, stands(share), {"seed": i}) for i, share in enumerate(shares)]
    store, runs = made_up(tmp_path, rows)
    runs = [(with_lambda(run, lam), label) for (run, label), lam in zip(runs, (0.1, 0.5, 0.9), strict=True)]
    frame = published_table(store, runs)
    assert frame["verdict"].tolist() == [verdict]


def test_an_eps_at_which_fgsm_leaves_another_share_is_told(tmp_path, caplog):
    shares = ((0.01, 0.4), (0.02, 0.1))
    rows = [("a-standard", "search for eps", Spec("FGSM", INF, eps), stands(share)) for eps, share in shares]
    published_table(*made_up(tmp_path / "other", [*rows, ("a-standard", "FGSM", FGSM, stands(0.05))]))
    assert "FGSM leaves nearest to 10 % at 0.0200" in caplog.text
    caplog.clear()
    published_table(*made_up(tmp_path / "same", [*rows, ("a-standard", "FGSM", Spec("FGSM", INF, 0.02), stands(0.1))]))
    assert not caplog.text


def test_the_view_writes_the_table(tmp_path):
    shown = published_view(*made_up(tmp_path, rows()), tmp_path)
    assert len(shown) == len(read_csv(tmp_path / "robust_neural_networks.csv")) == 4
    lines = (tmp_path / "robust_neural_networks.md").read_text().splitlines()
    assert lines[2].startswith("| lenet-standard | none | clean | 55 | 55.0 [")
    assert "| 22.85 | 30.0 [" in lines[-1]
    assert lines[-1].endswith("| 20.0 (evaluate) | 5.0 |")


def test_the_study_has_runs_for_every_claim():
    study = load_study(Path(__file__).parents[2] / "benchmarks" / "robust_neural_networks.yaml")
    assert {claim.attack for claim in CLAIMS} <= {run["label"] for run in study.runs}
