import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import CLASSES, SmallNet, small_net, some_images

from guardians.attacks import PGD
from guardians.data import Dataset
from guardians.experiments.bench import runs_of
from guardians.experiments.run import perform
from guardians.experiments.store import Store
from guardians.experiments.subject import Subject
from guardians.experiments.throughput import THROUGHPUT_COLUMNS, throughput_table, throughput_view
from guardians.statistics import paired_difference, wilson_interval
from guardians.tables import read_csv

NAMES = ["bare loop", "ART", "torchattacks", "foolbox", "native", "native", "native"]
N = 12


class ClockedNet(SmallNet):
    """Time passes when images go through it, a second each."""

    now = 0.0

    def forward(self, x):
        ClockedNet.now += len(x)
        return super().forward(x)


@pytest.fixture
def clocked(monkeypatch):
    net = small_net()
    net.__class__ = ClockedNet
    monkeypatch.setattr("guardians.experiments.run.time.perf_counter", lambda: ClockedNet.now)
    return net


@pytest.fixture
def data():
    images = (255 * some_images(N)).round().to(torch.uint8)
    labels = small_net()(images.float() / 255).argmax(1)
    labels[:3] = (labels[:3] + 1) % CLASSES
    return Dataset(images, labels, tuple("abcde"), "noise")


def runs_on(net, data, rounds=2):
    common = {"attacks": ["PGD-4"], "batch_size": 5}
    contenders = [{"implementations": NAMES[:4]}]
    settings = ((False, "float32"), (True, "float32"), (True, "auto"))
    contenders += [{"implementations": ["native"], "early_stop": early, "precision": name} for early, name in settings]
    subject, device = Subject("net", net), torch.device("cpu")
    return [
        run
        for contender in contenders
        for repetition in range(1, rounds + 1)
        for run in runs_of(subject, data, device, **common, **contender, repetition=repetition)
    ]


@pytest.fixture
def measured(clocked, data, tmp_path):
    runs, store = runs_on(clocked, data), Store(tmp_path)
    assert not perform(runs, store, verbose=False)
    return throughput_table(store, runs)


def test_every_implementation_has_a_row(measured):
    assert list(measured.columns) == list(THROUGHPUT_COLUMNS)
    assert measured["implementation"].tolist() == NAMES
    natives = measured[measured["implementation"] == "native"]
    assert natives[["early_stop", "precision"]].values.tolist() == [
        [False, "float32"],
        [True, "float32"],
        [True, "auto"],
    ]
    assert (measured[["model", "steps", "n", "batch_size", "rounds"]] == ["net", 4, N, 5, 2]).all(axis=None)


def test_times_and_ratios(measured):
    forward = measured["forward_per_image"] + measured["judgement_per_image"]
    assert measured["forward_per_image"][:5].tolist() == [4, 6, 4, 5, 4]  # ART predicts twice more, foolbox once
    classical = slice(0, 5)
    np.testing.assert_allclose(measured["seconds"][classical], N * forward[classical])
    np.testing.assert_allclose(measured["images_per_second"], N / measured["seconds"])
    np.testing.assert_allclose(measured["bare_loop_ratio"][classical], forward[classical] / 4)
    for column in ("speedup", "speedup_low", "speedup_high"):  # torchattacks is the fastest toolkit
        np.testing.assert_allclose(measured[column][classical], 4 / forward[classical])


def test_the_engine_costs_what_its_passes_cost(measured):
    is_native = measured["implementation"] == "native"
    np.testing.assert_allclose(measured["engine_overhead"][is_native], 1)
    assert measured["engine_overhead"][~is_native].isna().all()


def test_passes_are_those_of_the_report(measured, data):
    net = small_net()
    for row in measured[measured["implementation"] == "native"].itertuples():
        attack = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=4, batch_size=5, verbose=False)
        attack.set_params(early_stop=row.early_stop, precision=row.precision)
        attack(data.as_floats(), data.labels)
        report = attack.report
        assert row.search == report.search
        assert row.forward_per_image * N == pytest.approx(report.search_forward)
        assert row.backward_per_image * N == pytest.approx(report.search_backward)
        assert row.judgement_per_image * N == pytest.approx(report.judgement_forward)


def test_robust_accuracy_is_the_models_verdict(measured, data):
    net, images, labels = small_net(), data.as_floats(), data.labels
    adversarial = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=4, verbose=False)(images, labels)
    robust = ((net(images).argmax(1) == labels) & (net(adversarial).argmax(1) == labels)).numpy()
    rows = measured[measured["implementation"] != "bare loop"]
    np.testing.assert_allclose(rows["robust_accuracy"][:4], robust.mean())
    low, high = wilson_interval(int(robust.sum()), N)
    assert rows["robust_accuracy_low"].iloc[0] == low
    assert rows["robust_accuracy_high"].iloc[0] == high
    assert measured.loc[0, ["robust_accuracy", "difference"]].isna().all()
    early = measured.iloc[5]
    assert (early["difference"], early["difference_low"]) == paired_difference(robust, robust)[:2]


class Timed(Store):
    """What it is asked for took so long."""

    seconds: dict

    def runs(self, *arguments, **options):
        found = super().runs(*arguments, **options)
        return [run | {"seconds": self.seconds[run["implementation"]][run["repetition"] - 1]} for run in found]


def test_ratios_are_taken_within_a_round(data, tmp_path):
    runs = [run for run in runs_on(small_net(), data, rounds=3) if run.options.get("early_stop") is not True]
    assert not perform(runs, Store(tmp_path), verbose=False)
    store = Timed(tmp_path)
    store.seconds = {
        "bare loop": [10.0, 20.0, 30.0],
        "ART": [40.0, 80.0, 120.0],
        "torchattacks": [20.0, 60.0, 90.0],
        "foolbox": [30.0, 40.0, 90.0],
        "native": [5.0, 20.0, 10.0],
    }
    frame = throughput_table(store, runs)
    native = frame.iloc[4]
    assert native["seconds"] == 10
    assert (native["speedup"], native["speedup_low"], native["speedup_high"]) == (4, 2, 9)  # of 20/5, 40/20, 90/10
    assert native["bare_loop_ratio"] == 0.5  # of 5/10, 20/20, 10/30
    assert frame.loc[1, "speedup"] == 0.5


def test_a_round_counts_when_it_is_complete(data, tmp_path):
    runs, store = runs_on(small_net(), data), Store(tmp_path)
    assert not perform(
        [run for run in runs if run.repetition == 1 or run.implementation == "ART"], store, verbose=False
    )
    assert throughput_table(store, runs)["rounds"].unique().tolist() == [1]
    assert throughput_table(Store(tmp_path / "empty"), runs).empty
    shown = throughput_view(store, [(run, "a_name") for run in runs], tmp_path)
    assert shown["implementation"].tolist() == NAMES
    on_disk = read_csv(tmp_path / "a_name.csv")
    on_disk["early_stop"] = on_disk["early_stop"] == "True"
    pd.testing.assert_frame_equal(on_disk, throughput_table(store, runs), check_dtype=False)
