"""Figures hold what the store holds, and are drawn only where there is enough of it."""

import numpy as np
import pandas as pd
import pytest
from store_for_tests import made_up

from guardians.attacks.registry import Spec
from guardians.experiments import curves
from guardians.experiments.curves import draw_figures
from guardians.experiments.store import Store
from guardians.figures import plot_lines
from guardians.statistics import wilson_interval

INF = float("inf")
RANDOM = np.random.default_rng(0)


def spec(eps, steps=2, family="PGD"):
    return Spec(family, INF, eps, params={"steps": steps})


@pytest.fixture
def drawn(monkeypatch):
    """What has been drawn, by the names of the files."""
    frames = {}

    def draw(frame, path, **options):
        frames[path.stem] = frame, options
        plot_lines(frame, path, **options)

    monkeypatch.setattr(curves, "plot_lines", draw)
    return frames


def test_a_security_curve_has_the_accuracy_at_each_radius(tmp_path, drawn):
    stands = {eps: RANDOM.random(40) < 0.8 - 10 * eps for eps in (0.01, 0.02, 0.04)}
    store, _ = made_up(tmp_path, [("a", "", spec(eps), which) for eps, which in stands.items()])
    assert [one.name for one in draw_figures(store, tmp_path)] == ["security_curves"]
    frame, options = drawn["security_curves"]
    assert options["axis"] == "radius eps"
    for row in frame.itertuples():
        assert row.accuracy == stands[row.x].mean()
        assert (row.low, row.high) == pytest.approx(wilson_interval(int(stands[row.x].sum()), 40))
    assert frame["line"].unique().tolist() == ["PGD-2"]
    assert (tmp_path / "figures" / "security_curves.png").exists()


def test_steps_make_another_figure(tmp_path, drawn):
    rows = [("a", "", spec(0.03, steps), np.arange(20) < 20 - steps) for steps in (1, 5, 10)]
    store, _ = made_up(tmp_path, rows)
    assert [one.name for one in draw_figures(store, tmp_path)] == ["accuracy_by_steps"]
    frame, _ = drawn["accuracy_by_steps"]
    assert frame[["x", "accuracy"]].to_numpy().tolist() == [[1, 0.95], [5, 0.75], [10, 0.5]]


def test_of_the_smallest_perturbations_stands_what_is_farther(tmp_path, drawn):
    sizes = RANDOM.random(30)
    found = np.arange(30) < 25
    store, _ = made_up(tmp_path, [("a", "", Spec("C&W", 2, None), ~found, {"l2": sizes})])
    draw_figures(store, tmp_path)
    frame, _ = drawn["accuracy_by_distance"]
    for row in frame.itertuples():
        assert row.accuracy == np.mean(~found | (sizes > row.x))
    assert frame["accuracy"].iloc[-1] == 5 / 30


def test_after_no_gradient_the_clean_accuracy_is_left(tmp_path, drawn):
    store, [(run, _)] = made_up(tmp_path, [("a", "", spec(0.03), np.ones(10, dtype=bool))])
    spent = np.array([1, 1, 2, 3, 3, 5, 9, 9, 9, 9])
    outcomes = store.outcomes(run.key).assign(backward=spent)
    outcomes.loc[:1, "clean_prediction"] = 1
    outcomes.loc[:5, "adversarial_prediction"] = 1
    other = Store(tmp_path / "counted")
    [known] = store.runs()
    other.write(run.key, run.known, {name: known[name] for name in known if name not in run.known}, outcomes)
    assert [one.name for one in draw_figures(other, tmp_path)] == ["accuracy_by_gradients"]
    frame, options = drawn["accuracy_by_gradients"]
    assert options["steps"]
    assert frame[["x", "accuracy"]].to_numpy().tolist() == [[0, 0.8], [2, 0.7], [3, 0.5], [5, 0.4], [9, 0.4]]


def test_lines_of_other_images_are_not_joined(tmp_path, drawn):
    rows = [("a", "", spec(eps), np.ones(20, dtype=bool)) for eps in (0.01, 0.02, 0.04)]
    rows += [("a", "", spec(eps), np.zeros(10, dtype=bool)) for eps in (0.03, 0.05)]
    store, _ = made_up(tmp_path, rows)
    draw_figures(store, tmp_path)
    assert drawn["security_curves"][0]["x"].tolist() == [0.01, 0.02, 0.04]


def test_nothing_is_drawn_of_two_points(tmp_path):
    store, _ = made_up(tmp_path, [("a", "", spec(eps), np.ones(4, dtype=bool)) for eps in (0.01, 0.02)])
    assert draw_figures(store, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_the_same_store_gives_the_same_bytes(tmp_path):
    rows = [("a", "", spec(eps), np.arange(9) < 3) for eps in (0.01, 0.02, 0.04)]
    contents = []
    for name in ("one", "two"):
        store, _ = made_up(tmp_path / name, rows)
        draw_figures(store, tmp_path / name)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name / "figures").iterdir())])
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


def test_an_empty_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        plot_lines(pd.DataFrame(columns=["panel", "line", "x"]), tmp_path / "a.png", axis="x")
