"""The tables of speed, by a clock that the tests set."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import CLASSES, small_net, snapshot, some_images, some_labels, traceable_net

from guardians.defences import training_loop
from guardians.experiments import timing
from guardians.experiments.defence_speed import SPEED_COLUMNS, measure_inference, measure_training
from guardians.experiments.timing import paired_times

N, BATCH_SIZE, ROUNDS, SEED = 6, 4, 3, 11
FGSM, PGD = "FGSM, ratio 0.5", "PGD-7, ratio 1"
TRAINING = [
    (FGSM, "ART", "float32"),
    (PGD, "ART", "float32"),
    (PGD, "ART AdversarialTrainerMadryPGD", "float32"),
    (FGSM, "native", "float32"),
    (PGD, "native", "float32"),
    (FGSM, "native", "auto"),
    (PGD, "native", "auto"),
]
INFERENCE = ["inference: plain x 3", "inference: Random Self-Ensemble", "inference: MI-PL", "inference: MI-OL"]


def orders(count, rounds, seed):
    """The order of the runs in each round."""
    order, shuffle, found = list(range(count)), random.Random(seed).shuffle, []
    for _ in range(rounds):
        shuffle(order)
        found.append(order.copy())
    return found


def script(monkeypatch, seconds, seed):
    """Let the runs (columns) of each round (rows) take these seconds, by a clock that does not run them."""
    played = zip(seconds, orders(len(seconds[0]), len(seconds), seed), strict=True)
    readings = iter([row[i] for row, order in played for i in order])
    monkeypatch.setattr(timing, "timed", lambda run: (None, next(readings)))
    return readings


def some_seconds(count):
    return np.random.default_rng(0).uniform(0.5, 2, (ROUNDS, count)).tolist()


def pool():
    return some_images(10, seed=77), torch.arange(10) % CLASSES


def training(**options):
    options = {"batch_size": BATCH_SIZE, "rounds": ROUNDS, "seed": SEED, **options}
    return measure_training(options.pop("model", small_net()), some_images(N), some_labels(N), **options)


def inference(**options):
    options = {"passes": 3, "batch_size": BATCH_SIZE, "rounds": ROUNDS, "seed": SEED, **options}
    return measure_inference(options.pop("model", small_net()), some_images(N), pool(), **options)


def assert_follows(frame, seconds, references, inverted):
    """Each row is what follows from the seconds; `references` are the columns of those it is held against."""
    seconds = np.array(seconds)
    for i, (_, row) in enumerate(frame.iterrows()):
        ratio = seconds[:, references[i]] / seconds[:, i] if inverted else seconds[:, i] / seconds[:, references[i]]
        median = np.median(seconds[:, i])
        assert row["seconds"] == pytest.approx(median, rel=1e-12)
        assert row["images_per_second"] == pytest.approx(N / median, rel=1e-12)
        found = [row["ratio_low"], row["ratio"], row["ratio_high"]]
        assert found == pytest.approx(np.quantile(ratio, [0.25, 0.5, 0.75]).tolist(), rel=1e-12)
        if references[i] == i:
            assert found == [1, 1, 1]
    assert (frame[["n", "batch_size", "rounds"]] == [N, BATCH_SIZE, ROUNDS]).all(axis=None)


def test_training_is_held_against_that_of_art(monkeypatch):
    seconds, net = some_seconds(len(TRAINING)), small_net()
    readings, before = script(monkeypatch, seconds, SEED), snapshot(net)
    frame = training(model=net)
    assert next(readings, None) is None
    assert list(frame.columns) == list(SPEED_COLUMNS)
    assert list(frame[["work", "implementation", "precision"]].itertuples(index=False, name=None)) == TRAINING
    assert set(frame["options"][frame["precision"] != "auto"]) == {"none"}
    assert_follows(frame, seconds, [TRAINING.index((work, "ART", "float32")) for work, _, _ in TRAINING], inverted=True)
    assert snapshot(net) == before  # though its copies were trained


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(("make", "folded"), [(traceable_net, ["folded batch norm"]), (small_net, [])])
def test_training_says_which_options_were_on(monkeypatch, is_native, make, folded):
    """Those that "auto" has turned on for this model on this device."""
    monkeypatch.setattr(training_loop, "bfloat16_is_native", lambda device: is_native)
    script(monkeypatch, some_seconds(len(TRAINING))[:1], SEED)
    frame = training(model=make(), rounds=1)
    expected = " + ".join([*["bfloat16"] * is_native, "channels_last", *folded])
    assert frame["options"].tolist() == ["none"] * 5 + [expected] * 2


def test_every_training_run_trains_a_copy(monkeypatch):
    trained = []

    class Spy(torch.optim.SGD):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            weights = self.param_groups[0]["params"]
            trained.append((weights, [weight.detach().clone() for weight in weights]))

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    script(monkeypatch, some_seconds(len(TRAINING))[:1], SEED)
    net = small_net()
    training(model=net, rounds=1)
    assert len(trained) == len(TRAINING)  # in the warm-up
    for weights, at_first in trained:
        for weight, first, original in zip(weights, at_first, net.parameters(), strict=True):
            assert torch.equal(first, original)
            assert weight.data_ptr() != original.data_ptr()
        assert any(not torch.equal(weight, first) for weight, first in zip(weights, at_first, strict=True))


def test_inference_is_held_against_the_plain_passes(monkeypatch):
    seconds, net = some_seconds(len(INFERENCE)), small_net()
    readings, before = script(monkeypatch, seconds, SEED), snapshot(net)
    frame = inference(model=net)
    assert next(readings, None) is None
    assert list(frame.columns) == list(SPEED_COLUMNS)
    assert frame["work"].tolist() == INFERENCE
    assert set(frame["implementation"]) == {"native"}
    assert set(frame["precision"]) == {"float32"}
    assert set(frame["options"]) == {"none"}
    assert_follows(frame, seconds, [0] * len(INFERENCE), inverted=False)
    assert snapshot(net) == before


def test_inference_is_as_many_passes_as_it_says(monkeypatch):
    script(monkeypatch, some_seconds(len(INFERENCE))[:1], SEED)
    net = small_net()
    inference(model=net, rounds=1)
    # A warm-up run: the plain passes, one more in each Mixup Inference, one image when it is made, and a batch asked
    # twice to find the memory format.
    assert net.images_seen == N * 3 + 2 * (N * (1 + 3) + 1 + 2 * BATCH_SIZE)


@pytest.mark.parametrize("measure", [training, inference])
@pytest.mark.parametrize("name", ["batch_size", "rounds"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_bad_counts_are_refused(measure, name, value, monkeypatch):
    monkeypatch.setattr(timing, "timed", None)
    with pytest.raises((TypeError, ValueError), match=f"{name}={value}"):
        measure(**{name: value})


def test_bad_passes_are_refused():
    with pytest.raises(ValueError, match="passes=0"):
        inference(passes=0)


def test_all_runs_warm_up_and_run_once_a_round_in_shuffled_order(monkeypatch):
    names, calls = list("abcde"), []
    runs = {name: lambda name=name: calls.append(name) for name in names}
    seconds = [[float(10 * round_ + i) for i in range(5)] for round_ in range(4)]
    readings = iter(range(100))
    played = [(round_, i) for round_, order in enumerate(orders(5, 4, SEED)) for i in order]

    def timed(run):
        run()
        round_, i = played[next(readings)]
        return None, seconds[round_][i]

    monkeypatch.setattr(timing, "timed", timed)
    frame = paired_times(runs, 4, SEED, "")
    assert calls[:5] == names
    rounds = [calls[first : first + 5] for first in range(5, 25, 5)]
    assert calls[25:] == []
    assert all(sorted(order) == names for order in rounds)
    assert rounds == [[names[i] for i in order] for order in orders(5, 4, SEED)]
    assert len(set(map(tuple, rounds))) > 1
    pd.testing.assert_frame_equal(frame, pd.DataFrame(seconds, columns=names))


def test_the_order_is_that_of_the_seed(monkeypatch):
    def order_of(seed):
        calls = []
        paired_times({name: lambda name=name: calls.append(name) for name in "abcde"}, 3, seed, "")
        return calls

    assert order_of(0) == order_of(0)
    assert order_of(0) != order_of(1)
