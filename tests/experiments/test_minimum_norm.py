import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import is_fooled, small_net, some_images

from guardians.attacks import CarliniWagnerL2
from guardians.data import Dataset
from guardians.experiments import study as study_module
from guardians.experiments.minimum_norm import (
    CONST_COLUMNS,
    MINIMUM_NORM_COLUMNS,
    _beside_others,
    local_optimality,
)
from guardians.experiments.store import Store
from guardians.experiments.study import Study, perform_study
from guardians.tables import read_csv

INF = float("inf")
N = 5
QUICK = [
    {"attacks": ["C&W(searches=2)"], "implementations": ["native"], "norm": 2, "batch_size": 3, "label": "2 x 10"},
    {"attacks": ["C&W"], "implementations": ["torchattacks"], "norm": 2, "batch_size": 3, "label": "1 x 50"},
]


@pytest.fixture
def data(monkeypatch):
    """Images of which the model gets every other one right."""
    images = (255 * some_images(12)).round().to(torch.uint8)
    with torch.no_grad():
        labels = small_net()(images.float() / 255).argmax(1)
    found = Dataset(images, (labels + torch.arange(12) % 2) % 5, tuple("abcde"), "noise")
    monkeypatch.setattr(study_module, "load_data", lambda *_, **__: found)
    return found


def run(out, runs=QUICK, view="minimum_norm", **options):
    study = Study("title", view, ["models_for_tests:small_net"], runs, n=12, correct=N, **options)
    frame, interrupted = perform_study(study, study_module.load_data(), out, verbose=False)
    assert not interrupted
    return frame


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


def beside(*distances, implementations=("ART", "native"), seconds=(60.0, 2.0)):
    rows = pd.DataFrame({"implementation": implementations, "params": "{}", "seconds": seconds})
    return _beside_others(rows, np.array(distances)).set_index("implementation")


def test_runs_are_held_against_the_best():
    frame = beside([0.4, 0.2, INF], [0.1, 0.3, 0.5])
    assert frame["l2_best"].tolist() == pytest.approx([0.8 / 3] * 2)
    assert frame["l2_ratio"].tolist() == pytest.approx([0.6 / 0.3, 0.9 / 0.8])
    assert frame["l2_penalised"].tolist() == pytest.approx([1.1 / 3, 0.9 / 3])
    assert frame["local_optimality"]["native"] == pytest.approx((0.5 - 0.3) / (0.5 - 0.8 / 3))
    assert frame["speed_up"].tolist() == [1, 30]
    alone = beside([9.0, 9.0], implementations=["native"], seconds=[1.0])
    assert alone["l2_ratio"].tolist() == [1]
    assert alone["speed_up"].isna().all()


def test_runs_are_measured_by_the_model_itself(data, tmp_path):
    pytest.importorskip("torchattacks")
    shown = run(tmp_path)
    frame = read_csv(tmp_path / "carlini_wagner.csv")
    assert list(frame.columns) == list(MINIMUM_NORM_COLUMNS)
    assert frame["implementation"].tolist() == shown["implementation"].tolist() == ["native", "torchattacks"]
    assert frame["setting"].tolist() == ["2 x 10", "1 x 50"]
    assert [json.loads(params) for params in frame["params"]] == [{"searches": 2}, {}]
    net = small_net()
    images, labels = data.as_floats()[::2][:N], data.labels[::2][:N]  # the first that it gets right
    attack = CarliniWagnerL2(net, binary_search_steps=2, batch_size=3, verbose=False, seed=0)
    x_adv = attack(images, labels)
    native = frame.iloc[0]
    l2 = (x_adv - images).flatten(1).norm(dim=1)[torch.from_numpy(is_fooled(net, x_adv, labels))]
    assert native["n"] == N
    assert native["success_rate"] == pytest.approx(len(l2) / N)
    assert native["l2_mean"] == pytest.approx(l2.mean().item(), rel=1e-5)
    assert native["backward_per_image"] * N == attack.report.search_backward
    assert native["judgement_per_image"] > 0
    assert frame.iloc[1]["judgement_per_image"] == 0
    assert frame.iloc[1]["backward_per_image"] <= 50
    assert (tmp_path / "carlini_wagner_frontier.png").exists()


@pytest.mark.usefixtures("data")
def test_names_say_whose_attack_it_is(tmp_path):
    pytest.importorskip("foolbox")
    quick = partial(dict, norm=2, batch_size=3)
    runs = [
        quick(attacks=["DDN-3"], implementations=["foolbox"], label=3),
        quick(attacks=["C&W(searches=1, steps=3, adaptive=False)"], implementations=["native"]),
        quick(attacks=["C&W(searches=1, steps=3)"], implementations=["ART"]),
    ]
    frame = run(tmp_path, runs)
    assert frame["implementation"].tolist() == ["foolbox DDN", "native, as in the paper", "ART"]


@pytest.mark.usefixtures("data")
def test_runs_keep_their_outcomes_in_whatever_order_they_were_made(tmp_path):
    runs = [QUICK[0] | {"attacks": ["C&W(searches=5)"]}, QUICK[0]]
    whole = run(tmp_path / "whole", runs)
    run(tmp_path / "parts", runs[1:])
    parts = run(tmp_path / "parts", runs)
    figures = ["setting", "l2_mean", "l2_ratio", "local_optimality"]
    pd.testing.assert_frame_equal(whole[figures], parts[figures])
    assert whole["l2_mean"].nunique() == 2
    assert len(Store(tmp_path / "parts").runs()) == 2


@pytest.mark.usefixtures("data")
def test_a_larger_const_fools_more(tmp_path):
    runs = [
        {
            "attacks": [
                f"C&W(const={const}, searches=1, steps=50, learning_rate=0.01, adaptive=False, abort_early=False)"
            ],
            "implementations": ["native"],
            "norm": 2,
        }
        for const in (1e-6, 0.1, 100.0)
    ]
    frame = run(tmp_path, runs, "consts")
    assert list(frame.columns) == list(CONST_COLUMNS)
    assert frame["const"].tolist() == [1e-6, 0.1, 100.0]
    assert frame["accuracy"].iloc[[0, 2]].tolist() == [1, 0]
    assert frame["l2_mean"].isna().tolist()[::2] == [True, False]
    pd.testing.assert_frame_equal(read_csv(tmp_path / "carlini_wagner_consts.csv"), frame, check_dtype=False)
    assert (tmp_path / "carlini_wagner_c.png").exists()
