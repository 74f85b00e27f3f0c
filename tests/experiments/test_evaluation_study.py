"""The table of what an evaluation says and costs beside another one."""

import numpy as np
import pytest
from store_for_tests import made_up

from guardians.attacks.registry import Spec
from guardians.experiments.evaluation import EVALUATION_COLUMNS, as_markdown, evaluation_table, evaluation_view
from guardians.statistics import paired_difference, wilson_interval
from guardians.tables import read_csv

INF = float("inf")
FGSM, PGD = Spec("FGSM", INF, 0.03), Spec("PGD", INF, 0.03, params={"steps": 2})
RANDOM = np.random.default_rng(0)
STANDS, THEIRS = RANDOM.random(40) < 0.3, RANDOM.random(30) < 0.5


def test_what_both_have_is_compared_image_by_image(tmp_path):
    rows = [("a", "reference", PGD, THEIRS, {"seconds": 60.0}), ("a", "ours", FGSM, STANDS, {"seconds": 2.0})]
    frame = evaluation_table(*made_up(tmp_path, rows)).set_index("contender")
    ours = frame.loc["ours"]
    assert (ours["n"], ours["reference_n"]) == (40, 30)
    assert ours["robust_accuracy"] == STANDS.mean()
    assert tuple(ours[["robust_accuracy_low", "robust_accuracy_high"]]) == pytest.approx(
        wilson_interval(int(STANDS.sum()), 40)
    )
    assert (ours["on_reference_images"], ours["reference_accuracy"]) == (STANDS[:30].mean(), THEIRS.mean())
    found = tuple(ours[["difference", "difference_low", "difference_high"]])
    assert found == pytest.approx(paired_difference(STANDS[:30], THEIRS))
    assert ours["seconds_per_image"] == 0.05
    assert ours["speedup"] == pytest.approx(2 / 0.05)
    assert ours["backward_per_image"] == 1
    assert frame.loc["reference", "difference"] == 0
    assert frame.loc["reference", "speedup"] == 1


def test_rounds_are_paired(tmp_path):
    rows = [("a", "reference", PGD, THEIRS, {"seconds": t, "repetition": i}) for i, t in ((1, 30.0), (2, 90.0))]
    rows += [("a", "ours", FGSM, THEIRS, {"seconds": t, "repetition": i}) for i, t in ((1, 10.0), (2, 10.0), (3, 99.0))]
    ours = evaluation_table(*made_up(tmp_path, rows)).set_index("contender").loc["ours"]
    assert ours["rounds"] == 3
    assert ours["seconds"] == 10
    assert ours["speedup"] == pytest.approx((3 + 9) / 2)


def test_balls_and_models_are_apart_and_what_has_no_reference_is_alone(tmp_path):
    other = Spec("FGSM", 2, 0.5)
    rows = [("a", "reference", PGD, THEIRS), ("a", "ours", other, STANDS), ("b", "ours", FGSM, STANDS)]
    frame = evaluation_table(*made_up(tmp_path, rows))
    assert frame[["model", "norm", "contender"]].to_numpy().tolist() == [
        ["a", INF, "reference"],
        ["a", 2.0, "ours"],
        ["b", INF, "ours"],
    ]
    assert frame["speedup"].isna().tolist() == [False, True, True]


def test_the_view_is_written(tmp_path):
    shown = evaluation_view(*made_up(tmp_path, [("a", "reference", PGD, THEIRS)]), tmp_path)
    assert shown["robust_accuracy"].tolist() == [THEIRS.mean()]
    assert list(read_csv(tmp_path / "evaluation.csv").columns) == list(EVALUATION_COLUMNS)
    first = (tmp_path / "evaluation.md").read_text().splitlines()[0]
    assert first == "| model | norm | reference | reference, s / image |"


def test_the_table_for_people(tmp_path):
    half = np.array([True, False] * 10)
    rows = [
        ("a", "reference", PGD, half, {"seconds": 20.0}),
        ("a", "few", FGSM, half[:10] & (np.arange(10) > 1), {"seconds": 5.0}),
        ("a", "many", Spec("PGD", INF, 0.03, params={"steps": 9}), np.repeat(half, 100), {"seconds": 500.0}),
        ("a", "alone", Spec("FGSM", 2, 0.5), half),
        ("b", "reference", PGD, half, {"seconds": 2.0}),
    ]
    assert as_markdown(evaluation_table(*made_up(tmp_path, rows))).splitlines()[2:] == [
        "| a | inf | 50.0 | 40.0 (50.0), of 10 | 100.0 (50.0 of 2,000) |  | 1 | 2 x | 4 x |  |",
        "| b | inf | 50.0 |  |  |  | 0.1 |  |  |  |",
    ]
