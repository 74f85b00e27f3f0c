from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import is_fooled, small_net, some_images

from guardians.attacks import CarliniWagnerL2
from guardians.data import Dataset
from guardians.experiments.minimum_norm import (
    CONST_COLUMNS,
    CONTENDERS,
    MINIMUM_NORM_COLUMNS,
    RUN_COLUMNS,
    correct_images,
    local_optimality,
    measure_consts,
    measure_minimum_norm,
    perturb,
    summarise,
)
from guardians.tables import read_csv

INF = float("inf")
N = 5
BY_NAME = {contender.name: contender for contender in CONTENDERS}
QUICK = [BY_NAME["native 2 x 10"], BY_NAME["torchattacks 1 x 50"]]


@pytest.fixture
def data():
    """Images of which the model gets every other one right."""
    images = (255 * some_images(12)).round().to(torch.uint8)
    with torch.no_grad():
        labels = small_net()(images.float() / 255).argmax(1)
    return Dataset(images, (labels + torch.arange(12) % 2) % 5, tuple("abcde"), "noise")


def run(data, out, contenders=QUICK, **options):
    options = {"n": N, "batch_size": 3, "verbose": False, **options}
    return measure_minimum_norm({"small": small_net()}, data, out=out, contenders=contenders, **options)


distances = st.lists(st.floats(0.01, 2) | st.just(INF), min_size=6, max_size=6).map(np.array)


@settings(deadline=None)
@given(distances, st.lists(st.floats(0.01, 2), min_size=6, max_size=6).map(np.array))
def test_local_optimality_is_the_share_of_the_area_above_the_curves(own, others):
    best = np.minimum(own, others)
    if best.max() - best.mean() < 1e-3:
        return
    radii = np.linspace(0, best.max(), 20_001)
    fooled_by, fooled_by_best = ((d[:, None] <= radii).mean(axis=0) for d in (own, best))
    assert local_optimality(own, best) == pytest.approx(fooled_by.mean() / fooled_by_best.mean(), abs=2e-2)


def test_local_optimality_of_the_best_and_of_the_worst():
    best = np.array([0.1, 0.2, 0.3])
    assert local_optimality(best, best) == 1
    assert local_optimality(np.full(3, INF), best) == 0
    assert local_optimality(best + 1, best) == 0
    assert local_optimality(np.array([0.2, 0.2, 0.3]), best) == pytest.approx(2 / 3)
    assert local_optimality(best, np.append(best[:2], INF)) <= 1
    for nothing_to_tell in (np.full(2, 0.5), np.full(2, INF)):
        assert np.isnan(local_optimality(nothing_to_tell, nothing_to_tell))


def outcome(l2, fooled=(1, 1, 1)):
    return pd.DataFrame({"fooled": fooled, "l2": l2})


def test_runs_are_held_against_the_best_of_their_own_model():
    runs = pd.DataFrame(
        [
            ["a", "ART", "{}", 60.0],
            ["b", "native", "{}", 1.0],
            ["a", "native", "{}", 2.0],
        ],
        columns=["model", "implementation", "params", "seconds"],
    ).reindex(columns=list(RUN_COLUMNS))
    outcomes = [outcome([0.4, 0.2, 0.0], fooled=(1, 1, 0)), outcome([9.0, 9.0, 9.0]), outcome([0.1, 0.3, 0.5])]
    frame = summarise(runs, outcomes)
    assert list(frame.columns) == list(MINIMUM_NORM_COLUMNS)
    a, b = frame[frame["model"] == "a"].set_index("implementation"), frame[frame["model"] == "b"]
    assert a["l2_best"].tolist() == pytest.approx([0.8 / 3] * 2)
    assert a.loc["ART", "l2_ratio"] == pytest.approx(0.6 / 0.3)
    assert a.loc["native", "l2_ratio"] == pytest.approx(0.9 / 0.8)
    assert a.loc["ART", "l2_penalised"] == pytest.approx(1.1 / 3)
    assert a.loc["native", "l2_penalised"] == pytest.approx(0.9 / 3)
    assert a.loc["native", "local_optimality"] == pytest.approx((0.5 - 0.3) / (0.5 - 0.8 / 3))
    assert a["speed_up"].tolist() == [1, 30]
    assert b["l2_ratio"].tolist() == [1]
    assert b["speed_up"].isna().all()


def test_runs_are_measured_by_the_model_itself(data, tmp_path):
    pytest.importorskip("torchattacks")
    frame = run(data, tmp_path)
    assert list(frame.columns) == list(MINIMUM_NORM_COLUMNS)
    assert frame["implementation"].tolist() == ["native", "torchattacks"]
    net = small_net()
    images, labels = correct_images(net, data, N, "cpu")
    attack = CarliniWagnerL2(net, binary_search_steps=2, batch_size=3, verbose=False)
    x_adv = attack(images, labels)
    native = frame.iloc[0]
    l2 = (x_adv - images).flatten(1).norm(dim=1)[torch.from_numpy(is_fooled(net, x_adv, labels))]
    assert native["success_rate"] == pytest.approx(len(l2) / N)
    assert native["l2_mean"] == pytest.approx(l2.mean().item(), rel=1e-5)
    assert native["backward_per_image"] * N == attack.report.search_backward
    assert native["judgement_per_image"] > 0
    assert frame.iloc[1]["judgement_per_image"] == 0
    assert frame.iloc[1]["backward_per_image"] <= 50
    outcomes = pd.read_csv(next((tmp_path / "carlini_wagner_outcomes").glob("small-native-*.csv")))
    assert len(outcomes) == N
    assert outcomes["l2"][outcomes["fooled"] == 1].mean() == pytest.approx(native["l2_mean"])


def test_a_finished_run_is_not_repeated(data, tmp_path):
    first = run(data, tmp_path, contenders=QUICK[:1])

    def never(*_):
        raise AssertionError("it ran again")

    again = run(data, tmp_path, contenders=[replace(QUICK[0], build=never)])
    pd.testing.assert_frame_equal(first, again)
    with pytest.raises(AssertionError, match="it ran again"):
        run(data, tmp_path, contenders=[replace(QUICK[0], build=never)], batch_size=2)


def test_names_do_not_leave_the_folder_of_outcomes(data, tmp_path):
    names = ("../../x", "..-..-x", "a/b", "a b")
    measure_minimum_norm(
        dict.fromkeys(names, small_net()), data, n=2, out=tmp_path / "out", contenders=QUICK[:1], verbose=False
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out" / "carlini_wagner_outcomes").iterdir())) == len(names)
    assert read_csv(tmp_path / "out" / "carlini_wagner_runs.csv")["model"].tolist() == list(names)


def test_other_data_or_another_model_under_the_same_name_does_not_change_what_was_measured(data, tmp_path):
    contenders = [BY_NAME["native 5 x 10"], BY_NAME["native 2 x 10"]]
    first = run(data, tmp_path, contenders)
    turned = Dataset(data.images.flip(0), data.labels.flip(0), data.classes, data.source)
    second = run(turned, tmp_path, contenders, n=N)
    other = measure_minimum_norm(
        {"small": small_net(1)}, data, n=2, out=tmp_path, contenders=contenders, batch_size=3, verbose=False
    )
    assert (first["l2_best"] != second["l2_best"]).all()
    assert (first["l2_best"] != other["l2_best"]).all()
    pd.testing.assert_frame_equal(run(data, tmp_path, contenders), first)
    pd.testing.assert_frame_equal(run(turned, tmp_path, contenders), second)
    assert len(list((tmp_path / "carlini_wagner_outcomes").iterdir())) == 6


def test_other_arguments_under_the_same_name_are_run(data, tmp_path):
    first = run(data, tmp_path, QUICK[:1])
    second = run(data, tmp_path, [replace(BY_NAME["native 5 x 10"], setting=QUICK[0].setting)])
    assert first["backward_per_image"].item() != second["backward_per_image"].item()


def test_runs_keep_their_outcomes_in_whatever_order_they_were_made(data, tmp_path):
    contenders = [BY_NAME["native 5 x 10"], BY_NAME["native 2 x 10"]]
    whole = run(data, tmp_path / "whole", contenders=contenders)
    run(data, tmp_path / "parts", contenders=contenders[1:])
    parts = run(data, tmp_path / "parts", contenders=contenders)
    figures = ["setting", "l2_mean", "l2_ratio", "local_optimality"]
    pd.testing.assert_frame_equal(whole[figures], parts[figures])
    assert whole["l2_mean"].nunique() == 2


def test_every_contender_has_a_name_of_its_own():
    assert len(BY_NAME) == len(CONTENDERS)
    assert BY_NAME["ART 10 x 10"].params == {}
    assert BY_NAME["ART 10 x 10"].batch_size == 1


@pytest.mark.parametrize(
    "name", ["foolbox 9 x 100", "foolbox DDN 20", "native, as in the paper 9 x 100", "ART 10 x 10"]
)
def test_contenders_attack(name, data, tmp_path):
    pytest.importorskip("foolbox")
    frame = run(data, tmp_path, contenders=[BY_NAME[name]], n=2)
    assert frame["forward_per_image"].item() > 0
    assert 0 <= frame["success_rate"].item() <= 1


def test_correct_images_are_the_first_that_the_model_gets_right(data):
    images, labels = correct_images(small_net(), data, 4, "cpu")
    assert torch.equal(images, data.as_floats()[::2][:4])
    assert torch.equal(labels, data.labels[::2][:4])
    with pytest.raises(ValueError, match=r"n=7: the model gets 6 of the 12 images right"):
        correct_images(small_net(), data, 7, "cpu")


def test_a_larger_const_fools_more(data):
    frame = measure_consts({"small": small_net()}, data, [1e-6, 100.0], n=N, steps=50)
    assert list(frame.columns) == list(CONST_COLUMNS)
    assert frame["accuracy"].tolist() == [1, 0]
    assert frame["l2_mean"].isna().tolist() == [True, False]
    images, labels = correct_images(small_net(), data, N, "cpu")
    x_adv, fooled = perturb(small_net(), images, labels, 100.0, steps=50)
    assert np.array_equal(fooled.numpy(), is_fooled(small_net(), x_adv, labels))


@pytest.mark.parametrize("options", [{"n": 0}, {"batch_size": 0}, {"n": 2.5}])
def test_bad_sizes_are_errors_before_any_work(options, data, tmp_path):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
